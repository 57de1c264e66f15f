"""Files and folders that appear whole or not at all."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

from lora_tune.files import (
    MANIFEST,
    drop_from,
    is_complete,
    links_below,
    make_folder,
    publish_folder,
    published_digests,
    sha256_of,
    size_below,
    write_text,
)


class Gone(BaseException):
    """Stands for whatever ends the process: a signal, a full disk, a bug."""


def publish(target: Path, **files: str) -> None:
    with publish_folder(target) as folder:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")


def content(folder: Path) -> dict[str, str]:
    return {
        path.name: path.read_text(encoding="utf-8")
        for path in folder.iterdir()
        if path.name != MANIFEST
    }


@pytest.fixture
def published(tmp_path: Path) -> Path:
    target = tmp_path / "rung-0"
    with publish_folder(target) as folder:
        (folder / "adapter.bin").write_bytes(bytes(range(256)))
        (folder / "sub").mkdir()
        (folder / "sub" / "empty").touch()
    return target


def test_a_written_file_is_exactly_the_text(tmp_path: Path) -> None:
    path = tmp_path / "trial.json"
    for text in ("first\n", "second\r\nünïcode\n", ""):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_not_utf_8_is_written_as_escapes(tmp_path: Path) -> None:
    path = tmp_path / "trial.json"
    write_text(path, "rows-\udcff.jsonl")
    assert path.read_text(encoding="utf-8") == "rows-\\udcff.jsonl"


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "trial.json"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_text(path, "a folder is in the way")
    assert list(tmp_path.iterdir()) == [path]


def test_files_and_folders_have_the_mode_that_the_user_s_umask_gives(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        publish(tmp_path / "folder", a="x")
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
        assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
        assert (tmp_path / "folder" / MANIFEST).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(mask)


def test_a_published_folder_has_a_manifest_of_all_its_files(published: Path) -> None:
    manifest = json.loads((published / MANIFEST).read_text(encoding="utf-8"))
    assert manifest == {
        "sha256": {
            "adapter.bin": hashlib.sha256(bytes(range(256))).hexdigest(),
            "sub/empty": hashlib.sha256(b"").hexdigest(),
        }
    }
    assert sha256_of(published / "adapter.bin") == manifest["sha256"]["adapter.bin"]
    assert is_complete(published)
    assert [path.name for path in published.parent.iterdir()] == ["rung-0"]


@pytest.mark.parametrize("fault", [RuntimeError("disk full"), KeyboardInterrupt(), Gone()])
def test_a_folder_that_was_not_finished_leaves_nothing(
    tmp_path: Path, fault: BaseException
) -> None:
    def interrupted() -> None:
        with publish_folder(tmp_path / "rung-0") as folder:
            (folder / "adapter.bin").write_bytes(b"half")
            raise fault

    with pytest.raises(type(fault)):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_seen_before_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "trials" / "0000" / "rung-0"
    with publish_folder(target) as folder:
        (folder / "a").touch()
        assert not target.exists()
    assert target.is_dir()


def test_a_published_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    publish(target, old="1", shared="old")
    publish(target, new="2", shared="new")
    assert content(target) == {"new": "2", "shared": "new"}
    assert is_complete(target)
    assert list(tmp_path.iterdir()) == [target]


def test_a_replacement_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    publish(target, old="1")
    with suppress(Gone), publish_folder(target) as folder:
        (folder / "new").touch()
        raise Gone
    assert content(target) == {"old": "1"}
    assert is_complete(target)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("position", [0, 1, 100, 255])
def test_a_flipped_bit_is_noticed(published: Path, position: int) -> None:
    path = published / "adapter.bin"
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 1
    path.write_bytes(damaged)
    assert not is_complete(published)


def test_a_file_cut_short_lengthened_or_missing_is_noticed(published: Path) -> None:
    path = published / "adapter.bin"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\x00", b""):
        path.write_bytes(damaged)
        assert not is_complete(published)
    path.unlink()
    assert not is_complete(published)
    path.write_bytes(whole)
    assert is_complete(published)


def test_a_folder_without_a_manifest_is_not_complete(published: Path, tmp_path: Path) -> None:
    (published / MANIFEST).unlink()
    assert not is_complete(published)
    assert not is_complete(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"sha256": []}', '{"sha256": {"a": 1}}'])
def test_a_manifest_that_says_nothing_usable_is_not_complete(published: Path, text: str) -> None:
    (published / MANIFEST).write_text(text, encoding="utf-8")
    assert not is_complete(published)


def test_a_manifest_cut_short_anywhere_is_not_complete(published: Path) -> None:
    path = published / MANIFEST
    whole = path.read_bytes()
    for length in range(len(whole.rstrip())):
        path.write_bytes(whole[:length])
        assert not is_complete(published)


def test_a_manifest_with_a_flipped_bit_never_raises(published: Path) -> None:
    path = published / MANIFEST
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        is_complete(published)


def test_a_file_that_is_dropped_leaves_the_folder_complete(published: Path) -> None:
    digests = published_digests(published)
    assert digests is not None
    drop_from(published, "adapter.bin")
    assert is_complete(published)
    assert published_digests(published) == {"sub/empty": digests["sub/empty"]}
    assert not (published / "adapter.bin").exists()
    before = (published / MANIFEST).stat()
    drop_from(published, "adapter.bin")
    drop_from(published, "nothing")
    assert (published / MANIFEST).stat().st_ino == before.st_ino


def test_a_file_whose_dropping_was_cut_short_is_dropped_by_the_next(published: Path) -> None:
    kept = (published / "adapter.bin").read_bytes()
    drop_from(published, "adapter.bin")
    (published / "adapter.bin").write_bytes(kept)  # killed before it was removed
    assert is_complete(published)
    drop_from(published, "adapter.bin")
    assert not (published / "adapter.bin").exists()


def test_nothing_is_dropped_from_a_folder_whose_manifest_cannot_be_read(published: Path) -> None:
    (published / MANIFEST).write_text("{")
    drop_from(published, "adapter.bin")
    drop_from(published / "missing", "adapter.bin")
    assert (published / "adapter.bin").exists()


@pytest.mark.parametrize(
    "name", ["n" * 255, "ä" * 127 + "x", "a b\n'c\"* <&>", "\udcff", ".hidden"]
)
def test_a_name_as_long_or_strange_as_names_get_is_written_and_replaced(
    tmp_path: Path, name: str
) -> None:
    for content_of_it in ("1", "2"):
        write_text(tmp_path / name, content_of_it)
    assert (tmp_path / name).read_text() == "2"
    (tmp_path / name).unlink()
    publish(tmp_path / name, old="1")
    publish(tmp_path / name, new="2")
    assert content(tmp_path / name) == {"new": "2"}
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_folder_is_made_with_those_above_it_and_may_be_there(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")


def test_the_size_of_a_folder_is_that_of_its_own_files(tmp_path: Path) -> None:
    (tmp_path / "study" / "trials").mkdir(parents=True)
    (tmp_path / "study" / "a").write_bytes(bytes(100))
    (tmp_path / "study" / "trials" / "b").write_bytes(bytes(23))
    (tmp_path / "large").write_bytes(bytes(10_000))
    (tmp_path / "study" / "link").symlink_to(tmp_path / "large")
    (tmp_path / "study" / "up").symlink_to(tmp_path)
    assert size_below(tmp_path / "study") == 123
    assert size_below(tmp_path / "nothing") == 0
    assert links_below(tmp_path / "study") == [tmp_path / "study/link", tmp_path / "study/up"]
