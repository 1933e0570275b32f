"""A live page of a sweep under way, for this machine's browsers only."""

import contextlib
import hashlib
import html
import http.server
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.analysis.run_directory import LOOKS

_PAUSE = 2.0  # least seconds between two reads of the files
_SHARE = 10.0  # and this multiple of the time that a page takes: the sweep needs the machine

_AGAIN = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="3">'


def version(workdirs: Sequence[Path]) -> str:
    """A hash that changes with any result, log or settings of the directories."""
    digest = hashlib.sha256()
    for workdir in workdirs:
        names = ("sweep.json", "cells/*/result.json", "cells/*/metrics.jsonl")
        for pattern in (*names, f"{LOOKS}/*/sweep.json", f"{LOOKS}/*/cells/*/result.json"):
            for path in sorted(workdir.glob(pattern)):
                with contextlib.suppress(FileNotFoundError):  # removed just now
                    status = path.stat()
                    digest.update(f"{path} {status.st_size} {status.st_mtime}\n".encode())
    return digest.hexdigest()[:16]


class Live:
    """The page as of the latest change, made on request.

    `render(version)` makes it, and nothing is written to the directories.
    """

    def __init__(self, workdirs: Sequence[Path], render: Callable[[str], str]):
        self._workdirs, self._render = workdirs, render
        self._lock = threading.Lock()
        self._next, self._version, self._page = 0.0, "", ("", "")

    def version(self) -> str:
        """`version` of the directories, looked up every few seconds."""
        with self._lock:
            if time.monotonic() > self._next:
                self._version = version(self._workdirs)
                self._next = time.monotonic() + _PAUSE
            return self._version

    def page(self) -> str:
        """The page."""
        now = self.version()
        with self._lock:
            if self._page[0] != now:
                began = time.monotonic()
                self._page = now, self._render(now)
                took = time.monotonic() - began
                self._next = max(self._next, time.monotonic() + _SHARE * took)
            return self._page[1]


def server(live: Live, port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server of `/`, the page, and `/version` on 127.0.0.1; port 0 is any that is free.

    It only answers GET and HEAD, and only requests that name this machine itself: a page from
    elsewhere cannot read it by a host name of its own.  OSError where the port is taken.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host not in ("127.0.0.1", "localhost"):
                return self._answer(403, "text/plain", "ask for http://127.0.0.1")
            if self.path == "/version":
                return self._answer(200, "text/plain", live.version())
            if self.path.partition("?")[0] == "/":
                try:
                    return self._answer(200, "text/html", live.page())
                except Exception as error:  # such as a file that is being replaced
                    text = html.escape(f"{type(error).__name__}: {error}")
                    return self._answer(503, "text/html", f"{_AGAIN}<p>Not now: {text}</p>")
            return self._answer(404, "text/plain", "there is / and /version")

        do_HEAD = do_GET

        def _answer(self, status, kind, text):
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
