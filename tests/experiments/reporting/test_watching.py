"""The live page: for this machine alone, read-only, as new as the files."""

import http.client
import threading
import time
from pathlib import Path

import pytest

from experiments.analysis import run_directory
from experiments.reporting import live as live_pages
from experiments.reporting import page as report
from support.runs import CELLS, write_run


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A run directory, and a function that asks its server."""
    monkeypatch.setattr(live_pages, "_PAUSE", 0.0)
    monkeypatch.setattr(live_pages, "_SHARE", 0.0)
    write_run(tmp_path, [*CELLS[:2], (*CELLS[2][:4], None)], layers=1, heads=1)
    live = live_pages.Live([tmp_path], lambda version: report.live_page([tmp_path], version))

    def ask(path, method="GET", host="127.0.0.1"):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.request(method, path, headers={"Host": f"{host}:{server.server_port}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    with live_pages.server(live) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, ask, server
        server.shutdown()


def files(path):
    return {p: p.stat().st_mtime_ns for p in path.rglob("*")}


def test_the_page_follows_the_files_and_writes_none(served):
    path, ask, server = served
    before = files(path)
    assert server.server_address[0] == "127.0.0.1"
    (status, page), (_, version) = ask("/"), ask("/version")
    assert status == 200 and f'data-version="{version}"' in page
    assert "connect-src 'self'" in page and "2 of 3 cells done" in page
    assert ask("/version")[1] == version and files(path) == before
    time.sleep(0.01)
    log = path / "cells/text.heads=2/metrics.jsonl"
    log.parent.mkdir()
    log.write_text('{"step": 30, "validation/loss": [2, 2, 2]}\n')
    (path / "cells/text.heads=2/config.json").write_text("{}")
    later = ask("/version")[1]
    assert later != version
    assert "partial, step 30" in ask("/")[1]


def test_only_reading_from_this_machine_is_answered(served):
    path, ask, _ = served
    before = files(path)
    assert ask("/", "HEAD") == (200, "")
    assert ask("/cells/text/config.json")[0] == 404
    assert ask("/../sweep.json")[0] == 404
    for method in ("POST", "PUT", "DELETE"):
        assert ask("/", method)[0] == 501
    # A page from elsewhere whose name leads here.
    assert ask("/", host="evil.example")[0] == 403
    assert ask("/version", host="localhost")[0] == 200
    assert files(path) == before


def test_a_file_that_is_not_whole_is_told(served):
    path, ask, _ = served
    (path / "sweep.json").write_text("{")
    status, text = ask("/")
    assert status == 503 and "is not JSON" in text


def test_a_file_that_goes_while_it_is_looked_at_changes_the_version(served, monkeypatch):
    path, ask, _ = served
    gone = path / "cells/text/result.json"
    glob, before = Path.glob, ask("/version")

    def late(self, pattern):
        return [*glob(self, pattern), gone] if "result" in pattern else glob(self, pattern)

    gone.unlink()
    monkeypatch.setattr(Path, "glob", late)
    status, version = ask("/version")
    assert status == 200 and version != before[1]


def test_a_page_of_a_file_asks_nobody(tmp_path):
    experiment = run_directory.load(write_run(tmp_path, CELLS[:2], layers=1, heads=1))
    page = report.page([experiment], {})
    assert "connect-src" not in page and "data-version=" not in page.partition("<script")[0]
