"""Leases: one holder at a time, dead ones give up, other machines' lapse."""

import json
import os
import subprocess
import sys
import time

import pytest

from experiments.storage import holders, leases
from support import ROOT

HOLD = """
import sys, time
from pathlib import Path
from experiments.storage import leases
with leases.Lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def hold(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_living_process_keeps_its_lease_and_a_killed_one_does_not(tmp_path):
    process = hold(tmp_path / "cell")
    assert leases.holder(tmp_path / "cell").startswith(f"process {process.pid} on ")
    with (
        pytest.raises(leases.LeaseHeldError, match=f"cell is held by process {process.pid} on"),
        leases.Lease(tmp_path / "cell"),
    ):
        pass
    process.kill()  # a zombie until it is waited for, and no holder
    time.sleep(0.2)
    assert leases.holder(tmp_path / "cell") is None
    with leases.Lease(tmp_path / "cell"):
        assert leases.holder(tmp_path / "cell").startswith(f"process {os.getpid()} on ")
    assert leases.holder(tmp_path / "cell") is None
    assert not (tmp_path / "cell" / leases.NAME).exists()
    process.communicate()


def test_a_number_that_another_process_has_now_holds_nothing(tmp_path):
    with leases.Lease(tmp_path):
        there = json.loads((tmp_path / leases.NAME).read_text())
        (tmp_path / leases.NAME).write_text(json.dumps({**there, "born": there["born"] - 1}))
        assert leases.holder(tmp_path) is None
        (tmp_path / leases.NAME).write_text(json.dumps(there))


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 90, b'{"host": "a', b"\xff\xfe"],
    ids=["empty", "zeros", "cut", "no text"],
)
def test_a_file_that_a_disk_has_lost_holds_nothing(tmp_path, content):
    (tmp_path / leases.NAME).write_bytes(content)
    assert leases.holder(tmp_path) is None
    with leases.Lease(tmp_path):
        assert leases.holder(tmp_path).startswith(f"process {os.getpid()} on ")


def test_another_machine_keeps_its_lease_while_it_touches_it(tmp_path):
    own = {"host": "ada", "space": "ada's", "pid": 1, "born": 0, "token": "x"}
    path = tmp_path / leases.NAME
    path.write_text(json.dumps(own))
    assert leases.holder(tmp_path) == "process 1 on ada"
    past = time.time() - holders.LAPSE - 1
    os.utime(path, (past, past))
    assert leases.holder(tmp_path) is None
    with leases.Lease(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lease_is_touched_and_who_lost_it_ends(tmp_path):
    script = HOLD.replace("with leases", "leases.BEAT = 0.1\nwith leases")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    path = tmp_path / leases.NAME
    past = time.time() - 1000
    os.utime(path, (past, past))
    for _ in range(100):
        time.sleep(0.05)
        if path.stat().st_mtime > past + 500:
            break
    else:
        pytest.fail("it is not touched")
    path.write_text(json.dumps({**json.loads(path.read_text()), "token": "another's"}))
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and "has another process now" in errors
    assert path.exists(), "it is the other's"


def test_only_one_of_many_gets_it(tmp_path):
    script = """
import sys, time
from pathlib import Path
from experiments.storage import leases
print("ready", flush=True)
sys.stdin.readline()
try:
    with leases.Lease(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(2)
except leases.LeaseHeldError:
    print("taken", flush=True)
"""
    several = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for process in several:
        assert process.stdout.readline() == "ready\n"
    for process in several:
        process.stdin.write("\n")
        process.stdin.flush()
    replies = sorted(process.communicate(timeout=60)[0].strip() for process in several)
    assert replies == ["held"] + 5 * ["taken"]
