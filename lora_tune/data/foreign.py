"""What a file is that is named like rows and is none: told by its first bytes.

Such a file would give a message for every line of it; one that names what it is helps more.
"""

_UNPACK = "unpack it first"
_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", f"a gzip archive; {_UNPACK}"),
    (b"PK\x03\x04", f"a zip archive or a spreadsheet; {_UNPACK}, or save it as CSV"),
    (b"\x28\xb5\x2f\xfd", f"a zstd archive; {_UNPACK}"),
    (b"BZh", f"a bzip2 archive; {_UNPACK}"),
    (b"\xfd7zXZ\0", f"an xz archive; {_UNPACK}"),
    (b"SQLite format 3\0", "a SQLite database; write its rows as JSON, one a line"),
    (b"ARROW1", "an Arrow file; save it as parquet"),
    (b"%PDF", "a PDF; its text has to be taken out first"),
    (b"version https://git-lfs", "a git-lfs pointer, not the data; fetch them with git lfs pull"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
)
_PARQUET = b"PAR1"
_PAGES = (b"<!doctype", b"<html", b"<?xml")


def foreign_content(start: bytes, suffix: str) -> str | None:
    r"""Return what a file is and what to do, or None when nothing speaks against its name.

    Args:
        start: Its first bytes.
        suffix: How its name ends, in lower case.

    >>> foreign_content(b"\x1f\x8b\x08", ".jsonl")
    'a gzip archive; unpack it first'
    >>> foreign_content(b'{"text": "a"}', ".jsonl") is None
    True
    """
    for first, what in _KINDS:
        if start.startswith(first):
            return what
    if start.lstrip().lower().startswith(_PAGES):
        return "a web page, not data; a download may have saved an error in its place"
    if suffix == ".parquet":
        return None
    if start.startswith(_PARQUET):
        return "a parquet file; let its name end with .parquet"
    if start and not start.strip(b"\0"):
        return "empty space (NUL bytes) at its beginning; it was not written to its end"
    if len(start) > 1 and not (start[1:16:2].strip(b"\0") and start[:16:2].strip(b"\0")):
        return "UTF-16 text; save it as UTF-8"
    return None
