"""A TCP proxy that cuts a connection after the server has committed and before the client hears of it."""

import socket
import threading
from contextlib import suppress
from types import TracebackType


class CuttingProxy:
    """Passes bytes on; the answer to every n-th COMMIT, or other phrase, is lost with its connection."""

    def __init__(self, server_port: int, *, cut_every: int, phrase: bytes = b"COMMIT") -> None:
        self.server_port = server_port
        self.cut_every = cut_every
        self.phrase = phrase
        self.seen = 0
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> "CuttingProxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.server_port))
            lost = threading.Event()
            for source, target, is_client in ((client, server, True), (server, client, False)):
                threading.Thread(
                    target=self._pass, args=(source, target, lost, is_client), daemon=True
                ).start()

    def _pass(
        self, source: socket.socket, target: socket.socket, lost: threading.Event, is_client: bool
    ) -> None:
        try:
            while data := source.recv(65536):
                if is_client and self.phrase in data:
                    self.seen += 1
                    if self.seen % self.cut_every == 0:
                        self.cuts += 1
                        lost.set()
                if not is_client and lost.is_set():
                    break  # the answer: it was done, and nobody is told
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
