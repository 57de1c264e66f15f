"""A private PostgreSQL server for tests: folder and port of its own, started and stopped at will."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PASSWORD = "s3cr3t-Pa55w0rd"
PLACES = ("/usr/local/bin", "/usr/lib/postgresql")


def find_program(name: str) -> str | None:
    """Return a program of PostgreSQL's, on the path or where Debian puts it."""
    found = shutil.which(name)
    if found is not None:
        return str(Path(found).resolve())
    return next((str(path) for path in sorted(Path(PLACES[1]).glob(f"*/bin/{name}"))), None)


class PostgresServer:
    """A server that can be stopped as by a power cut, and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "password").write_text(PASSWORD)
        self._own()
        self._run(
            "initdb", "-D", self.data, "-U", "tuner", "--auth=scram-sha-256", "--no-sync",
            f"--pwfile={folder / 'password'}", "--no-instructions", "-E", "UTF8", "--locale=C",
        )  # fmt: skip

    def url(self, database: str = "postgres", password: str = PASSWORD) -> str:
        return f"postgresql://tuner:{password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c fsync=off"
        self._run(
            "pg_ctl", "-D", self.data, "-l", self.folder / "log", "-w", "-o", options, "start"
        )

    def stop(self) -> None:
        """Let the server's processes die at once, as they would with the machine."""
        self._run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop")

    def make_database(self, name: str) -> str:
        """Make an empty database and return its address."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        connection.close()
        return self.url(name)

    def _own(self) -> None:
        """Give the folder to a user who may run a server: root may not."""
        if os.getuid() == 0:
            user = _user()
            for path in (self.folder, *self.folder.rglob("*")):
                os.chown(path, user.pw_uid, user.pw_gid)

    def _run(self, program: str, *arguments: object) -> None:
        path = find_program(program)
        assert path is not None
        as_user = {}
        if os.getuid() == 0:
            user = _user()
            as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        done = subprocess.run(
            [path, *map(str, arguments)],
            cwd="/",
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # no pipe: the server inherits it and never ends
            stderr=sys.stderr,
            timeout=60,
            check=False,
            **as_user,
        )
        assert done.returncode == 0, f"{program} {arguments} ended with {done.returncode}"


def _user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise AssertionError("no user to run PostgreSQL as")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running server; skipped by name without the program, unless it is required."""
    required = "postgres" in os.environ.get("LORA_TUNE_TESTS_REQUIRE", "").split(",")
    if find_program("initdb") is None or find_program("pg_ctl") is None:
        if required:
            pytest.fail("PostgreSQL is required: initdb and pg_ctl are not installed")
        pytest.skip("PostgreSQL is not installed")
    if not required:
        pytest.importorskip("psycopg")
    folder = Path(f"/tmp/lora-tune-postgres-{os.getpid()}-{time.monotonic_ns()}")
    folder.mkdir(mode=0o755)
    server = PostgresServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)
