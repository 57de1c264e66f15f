"""Uploads against a small stand-in for the hub: real HTTP, real huggingface_hub, in a process of its own."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from finished_studies import finished_study
from test_end_to_end import workplace as workplace  # the fixture

from lora_tune.records import StudySnapshot

TOKEN = "hf_secretsecretsecretsecret"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files needs; remembers what it was sent."""

    private: ClassVar[dict[str, bool]] = {}
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    refuses: ClassVar[int | None] = None

    def do_GET(self) -> None:
        self.asked.append(f"GET {self.path}")
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "who are you"}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user"})
        else:
            repo = self.path.removeprefix("/api/models/").partition("?")[0]
            self.answer({"id": repo, "private": self.private[repo], "siblings": [], "tags": []})

    def do_POST(self) -> None:
        self.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.refuses is not None and "commit" in self.path:
            self.answer({"error": "no"}, self.refuses)
        elif self.path == "/api/repos/create":
            fields = json.loads(body)
            owner, name = fields.get("organization") or "me", fields["name"]
            is_private = fields.get("private", fields.get("visibility") == "private")
            self.private.setdefault(f"{owner}/{name}", is_private)
            host = self.headers["host"]
            self.answer({"url": f"http://{host}/{owner}/{name}", "name": f"{owner}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            self.answer(
                {
                    "commitUrl": f"http://{self.headers['host']}/me/adapter/commit/1",
                    "commitOid": "1",
                    "success": True,
                }
            )
        else:
            self.answer({"error": "unknown"}, 404)

    def answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub without repositories."""
    for kept in (Hub.private, Hub.files, Hub.asked):
        kept.clear()
    Hub.refuses = None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def study(workplace: Path) -> StudySnapshot:
    return finished_study(workplace, "none")


COMMAND = """
import sys
from pathlib import Path
from lora_tune.commands.export import export
from lora_tune.errors import LoraTuneError
study, target, output, repo, public = sys.argv[1:]
try:
    export(study, target=target, output=Path(output), gpu=None, push=repo, public=public == "public",
           force=False, as_json=False)
except LoraTuneError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def push(
    study: StudySnapshot,
    folder: Path,
    hub: str,
    *,
    repo: str = "me/adapter",
    target: str = "adapter",
    public: bool = False,
    token: str | None = TOKEN,
    offline: str = "0",
) -> subprocess.CompletedProcess[str]:
    """Run the command where nothing but the environment says which hub and whose token."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": offline, "HF_HOME": str(folder / "home")}
    if token is not None:
        environment["HF_TOKEN"] = token
    words = [
        str(study.folder),
        target,
        str(folder / "out"),
        repo,
        "public" if public else "private",
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMAND, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_an_adapter_is_uploaded_to_a_private_repository(study, hub, tmp_path):
    done = push(study, tmp_path, hub, repo="adapter")
    assert done.returncode == 0, done.stderr
    assert Hub.private == {"me/adapter": True}
    assert set(Hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for name, content in Hub.files.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert "uploaded (private): http" in done.stderr
    assert not any(str(tmp_path).encode() in content for content in Hub.files.values())


def test_it_is_public_only_when_asked_for(study, hub, tmp_path):
    done = push(study, tmp_path, hub, public=True)
    assert done.returncode == 0, done.stderr
    assert Hub.private == {"me/adapter": False}


def test_a_repository_that_is_public_already_is_not_filled_by_accident(study, hub, tmp_path):
    Hub.private["me/adapter"] = False
    done = push(study, tmp_path, hub)
    assert done.returncode == 8
    assert "is there already and is public" in done.stderr
    assert Hub.files == {}


def test_offline_nothing_is_asked_and_nothing_is_written(study, hub, tmp_path):
    done = push(study, tmp_path, hub, offline="1")
    assert done.returncode == 7
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert Hub.asked == []
    assert not (tmp_path / "out").exists()


def test_without_a_token_it_says_how_to_log_in(study, hub, tmp_path):
    done = push(study, tmp_path, hub, token=None)
    assert done.returncode == 8
    assert "hf auth login" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_token_that_the_hub_does_not_know_is_refused_before_the_export(study, hub, tmp_path):
    done = push(study, tmp_path, hub, token="hf_wrong")
    assert done.returncode == 8
    assert "HTTP 401" in done.stderr
    assert "hf_wrong" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_a_hub_that_refuses_the_upload_leaves_the_export_on_disk(study, hub, tmp_path):
    Hub.refuses = 403
    done = push(study, tmp_path, hub)
    assert done.returncode == 8
    assert "HTTP 403" in done.stderr
    assert f"The export is in {tmp_path / 'out'}" in done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_no_hub_at_all_is_one_message(study, tmp_path):
    done = push(study, tmp_path, "http://127.0.0.1:9")  # the discard port: nothing listens
    assert done.returncode == 8
    assert "the hub did not take it (ConnectError)" in done.stderr


def test_an_invalid_name_is_refused(study, hub, tmp_path):
    done = push(study, tmp_path, hub, repo="../x")
    assert done.returncode == 3
    assert "no valid repository name" in done.stderr
    assert Hub.asked == []
