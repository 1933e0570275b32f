"""Work directories that are remote, on fsspec's file system in memory; S3 is in test_s3.py."""

import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import filelock
import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from experiments.config import sweep
from experiments.launch import cells, interrupts, runner
from experiments.launch.executors import Slurm
from experiments.reporting import page
from experiments.storage import holders, leases, mirrors, paths
from experiments.storage.remote_leases import RemoteLease
from experiments.training import checkpoints, loop, trained
from support.helpers import Silent, one_line
from support.runs import CELLS, write_run
from support.training import Signal, tiny


@pytest.fixture
def run(monkeypatch):
    """A remote work directory; nothing else is there."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return paths.as_path("memory://run")


def fail(monkeypatch, method, error):
    """Lets a method of the file system raise."""

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(MemoryFileSystem, method, failing)


# Paths and files


def test_a_path_is_remote_where_it_names_a_protocol(run, tmp_path):
    assert paths.as_path("runs/a") == Path("runs/a")
    assert paths.as_path("~/a") == Path.home() / "a"
    assert paths.as_path(tmp_path) == tmp_path == paths.as_path(f"file://{tmp_path}")
    assert not isinstance(run, Path) and paths.as_path(run) is run
    assert str(paths.as_path("memory://run/a/") / "b") == "memory://run/a/b"
    assert not run.fs.dircache.use_listings_cache, "others write there"


def test_what_a_path_lacks_is_said_in_a_line(run, monkeypatch):
    with one_line(ValueError, "a path is empty: give one"):
        paths.as_path("")
    with one_line(ValueError, "s4://bucket/run cannot be used", "s4"):
        paths.as_path("s4://bucket/run")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with one_line(ImportError, "gs://bucket/run cannot be used", "install gcsfs"):
        paths.as_path("gs://bucket/run")
    with monkeypatch.context() as patch, one_line(paths.StorageError, "memory://run cannot be"):
        fail(patch, "exists", RuntimeError("no credentials"))
        paths.as_path("memory://run")
    monkeypatch.setitem(sys.modules, "upath", None)
    with one_line(ImportError, "memory://run needs", "pip install 'attention[remote]'"):
        paths.as_path("memory://run")


@pytest.mark.parametrize("stores", [paths._STORES, set()], ids=["whole", "moved"])
def test_a_reader_sees_the_old_file_or_the_new_one(run, monkeypatch, stores):
    monkeypatch.setattr(paths, "_STORES", stores)
    path = run / "deep" / "report.html"
    paths.replace(path, "old")
    paths.replace(str(path), b"new")
    assert paths.read(path) == "new" and paths.files(run) == ["deep/report.html"]
    written = MemoryFileSystem.pipe_file

    def half(self, path, value, **kwargs):
        if stores:  # nothing is there before all is
            raise OSError("cut")
        written(self, path, value[:3], **kwargs)
        raise OSError("cut")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", half)
    with one_line(paths.StorageError, "memory://run/deep/report.html cannot be written", "cut"):
        paths.replace(path, "another")
    assert paths.read(path) == "new" and paths.files(run) == ["deep/report.html"]


def test_a_file_is_created_once(run, monkeypatch):
    path = run / "file"
    assert paths.create(path, "mine")
    assert not paths.create(path, "another's") and paths.read(path) == "mine"
    # The answer to a first try was lost, and a second one finds the file.
    assert paths.create(path, "mine")
    fail(monkeypatch, "pipe_file", PermissionError("denied"))
    with one_line(paths.StorageError, "memory://run/new cannot be written", "denied"):
        paths.create(run / "new", "mine")
    fail(monkeypatch, "pipe_file", FileExistsError())  # and was removed since
    assert not paths.create(run / "new", "mine")


# Leases

ELSEWHERE = {"host": "ada", "space": "ada's", "pid": 1, "born": 0, "token": "x"}
LEASE = ".lease.{}.json"


def numbers(folder):
    return [name for name in paths.files(folder) if name.startswith(".lease")]


def test_a_remote_lease_is_one_process_s_and_then_free(run):
    for number in (1, 2, 3):
        with leases.Lease(run):
            assert leases.holder(run).startswith(f"process {os.getpid()} on ")
            with (
                pytest.raises(leases.LeaseHeldError, match="run is held by process"),
                leases.Lease(run),
            ):
                pass
            assert numbers(run) == [LEASE.format(number)]
        assert leases.holder(run) is None
    assert paths.files(run) == [LEASE.format(3)], "the highest stays, free"


def test_a_killed_process_of_this_machine_holds_no_remote_lease(run):
    process = subprocess.Popen(["sleep", "100"])
    own = {**holders.this_process(), "pid": process.pid, "born": holders.born(process.pid)}
    paths.put(run / LEASE.format(7), json.dumps(own).encode())
    assert leases.holder(run).startswith(f"process {process.pid} on ")
    process.kill()
    process.wait()
    assert leases.holder(run) is None
    with leases.Lease(run):
        assert numbers(run) == [LEASE.format(8)]


@pytest.mark.parametrize("here", [False, True], ids=["another machine", "this machine"])
def test_a_remote_lease_that_nobody_touches_lapses_by_the_clock_of_the_store(
    run, monkeypatch, here
):
    path = run / LEASE.format(1)
    paths.put(path, json.dumps(holders.this_process() if here else ELSEWHERE).encode())
    monkeypatch.setattr(time, "time", lambda: 0.0)  # what this machine thinks is of no account
    assert leases.holder(run).startswith(f"process {os.getpid() if here else 1} on ")
    past = datetime.timedelta(seconds=holders.LAPSE + 1)
    MemoryFileSystem.store[path.path].modified -= past
    assert leases.holder(run) is None
    with leases.Lease(run):
        assert paths.files(run) == [LEASE.format(2)]


def rival(folder):
    return RemoteLease(folder, {**holders.this_process(), "token": "the rival's"})


def test_of_two_that_find_a_lease_free_one_gets_it(run, monkeypatch):
    created = paths.create

    def late(path, content):
        monkeypatch.setattr(paths, "create", created)
        assert rival(run).take() is None
        return created(path, content)

    monkeypatch.setattr(paths, "create", late)
    with pytest.raises(leases.LeaseHeldError), leases.Lease(run):
        pass
    assert numbers(run) == [LEASE.format(1)]
    assert json.loads(paths.read(run / LEASE.format(1)))["token"] == "the rival's"


def test_who_makes_a_number_that_has_had_its_day_gets_nothing(run, monkeypatch):
    paths.put(run / LEASE.format(5), b"{}")
    created = paths.create

    def late(path, content):
        monkeypatch.setattr(paths, "create", created)
        first = rival(run)
        assert first.take() is None
        first.release()
        assert rival(run).take() is None  # number 7; 6 is gone
        return created(path, content)

    monkeypatch.setattr(paths, "create", late)
    with pytest.raises(leases.LeaseHeldError), leases.Lease(run):
        pass
    assert numbers(run) == [LEASE.format(7)]


def test_of_many_at_once_none_holds_it_beside_another(run, monkeypatch):
    lock, piped = threading.Lock(), MemoryFileSystem.pipe_file

    def atomic(self, path, value, mode="overwrite", **_):  # as an object store is
        if mode == "create" and random.random() < 0.5:
            time.sleep(0.02)  # others take it and give it back meanwhile
        with lock:
            piped(self, path, value, mode=mode)

    def whole(self, path, **_):
        try:
            return self.store[path].getvalue()
        except KeyError:
            raise FileNotFoundError(path) from None

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", atomic)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", whole)
    inside, times, errors = [], [], []

    def work(name):
        rng = random.Random(name)
        place = RemoteLease(run, {**holders.this_process(), "token": name})
        try:
            while len(times) < 200 and not errors:
                if place.take() is None:
                    inside.append(name)
                    time.sleep(rng.random() / 500)
                    assert inside == [name] and place.touch()
                    inside.clear()
                    times.append(name)
                    place.release()
                time.sleep(rng.random() / 500)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"{i}",)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and len(set(times)) > 1 and leases.holder(run) is None
    assert len(numbers(run)) == 1


def test_a_remote_lease_is_touched_and_who_lost_it_ends(run, monkeypatch, capsys):
    monkeypatch.setattr(leases, "BEAT", 0.02)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with leases.Lease(run):
        first = MemoryFileSystem.store[(run / LEASE.format(1)).path].modified
        time.sleep(0.3)
        assert MemoryFileSystem.store[(run / LEASE.format(1)).path].modified > first
        leases.confirm()
        assert not ended
        paths.put(run / LEASE.format(2), json.dumps(ELSEWHERE).encode())
        leases.confirm()
        assert 1 in ended and "run has another process now" in capsys.readouterr().err
    assert json.loads(paths.read(run / LEASE.format(2))) == ELSEWHERE, "it is the other's"


def test_a_store_that_is_away_for_a_moment_ends_no_holder(run, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda _: pytest.fail("it ends"))
    with leases.Lease(run) as lease, monkeypatch.context() as patch:
        fail(patch, "ls", RuntimeError("no route"))
        lease._touch()
        leases.give_back()
        patch.undo()
        leases.give_back()
        leases.confirm()
        assert leases.holder(run) is None
        assert lease._beat.is_alive()


def test_a_remote_folder_is_waited_for(run):
    inside = []

    def work():
        with leases.alone(run):
            inside.append(1)
            time.sleep(0.05)
            assert len(inside) == 1
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    with leases.alone(run):
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert not inside
    for thread in threads:
        thread.join(30)
    assert not inside and leases.holder(run) is None


# Mirrors


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(mirrors, "LOOK", 0.01)
    monkeypatch.setattr(mirrors, "LOGS", 0.02)
    monkeypatch.setattr(mirrors, "WAITS", (0, 0))


@pytest.fixture
def slow(monkeypatch):
    """Nothing is uploaded before the end."""
    monkeypatch.setattr(mirrors, "LOOK", 100)


def save(here, step, content=b"state"):
    """A checkpoint, as Orbax leaves it."""
    folder = here / "checkpoints" / f"{step}.tmp"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "array").write_bytes(content)
    (folder / "metadata").write_text(f"step {step}")
    folder.rename(folder.with_name(str(step)))


def uploaded(run):
    return sorted({int(name.split("/")[1]) for name in paths.files(run) if "checkpoints" in name})


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def fetched(run):
    """The checkpoints that the next start has."""
    with mirrors.mirror(run, interrupts.Stop()) as here:
        return mirrors._steps(here)


def test_a_local_run_trains_where_it_is(tmp_path):
    with mirrors.mirror(tmp_path, interrupts.Stop()) as here:
        assert here == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_what_changes_is_uploaded_and_fetched_at_the_next_start(run, quick):
    paths.put(run / "config.json", b"{}")
    with mirrors.mirror(run, interrupts.Stop()) as here:
        assert (here / "config.json").read_text() == "{}"
        (here / "metrics.jsonl").write_text("1\n")
        (here / ".attention.npz.tmp").write_text("half")
        (here / "events").write_text("old")
        until(lambda: {"metrics.jsonl", "events"} <= set(paths.files(run)))
        (here / "metrics.jsonl").write_text("1\n2\n")
        (here / "events").unlink()
        until(lambda: paths.read(run / "metrics.jsonl") == "1\n2\n")
        until(lambda: "events" not in paths.files(run))
        save(here, 20)
        until(lambda: f"checkpoints/20/{mirrors.MARK}" in paths.files(run))
        (here / "attention.npz").write_text("maps")
    assert sorted(n for n in paths.files(run) if "/" not in n) == [
        "attention.npz", "config.json", "metrics.jsonl",
    ]  # fmt: skip
    with mirrors.mirror(run, interrupts.Stop()) as here:
        assert (here / "metrics.jsonl").read_text() == "1\n2\n"
        assert (here / "checkpoints/20/state/array").read_bytes() == b"state"


def test_a_checkpoint_is_uploaded_between_its_lines_and_its_mark_before_older_ones_go(
    run, slow, monkeypatch
):
    for step in (1, 2):
        with mirrors.mirror(run, interrupts.Stop()) as here:
            save(here, step)
    done = []
    for method in ("pipe_file", "put_file", "rm_file"):
        original = getattr(MemoryFileSystem, method)

        def noted(self, *args, method=method, original=original, **kwargs):
            place = args[1] if method == "put_file" else args[0]
            done.append((method[:2], place.removeprefix("/run/")))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, method, noted)
    with mirrors.mirror(run, interrupts.Stop()) as here:
        save(here, 3)
        (here / "metrics.jsonl").write_text("line\n")
    assert done[0] == ("pi", "metrics.jsonl")
    assert sorted(done[1:3]) == [
        ("pu", "checkpoints/3/metadata"), ("pu", "checkpoints/3/state/array"),
    ]  # fmt: skip
    mark, gone = done[3], done[4:]
    assert mark == ("pi", f"checkpoints/3/{mirrors.MARK}")
    assert gone[0] == ("rm", f"checkpoints/1/{mirrors.MARK}"), "first it is no longer whole"
    assert len(gone) == 3 and all(place.startswith("checkpoints/1/") for _, place in gone)


def test_the_lines_that_a_checkpoint_vouches_for_are_uploaded_with_it(run, slow, monkeypatch):
    steps = mirrors._steps

    def late(here):  # the run goes on until it is looked for
        (here / "metrics.jsonl").write_text("line\nlater\n")
        save(here, 3)
        monkeypatch.setattr(mirrors, "_steps", steps)
        return steps(here)

    with mirrors.mirror(run, interrupts.Stop()) as here:
        (here / "metrics.jsonl").write_text("line\n")
        monkeypatch.setattr(mirrors, "_steps", late)
    assert uploaded(run) == [3] and paths.read(run / "metrics.jsonl") == "line\nlater\n"


def test_the_two_newest_checkpoints_are_kept(run, slow):
    for step in (1, 2, 3, 10):
        with mirrors.mirror(run, interrupts.Stop()) as here:
            save(here, step)
    assert uploaded(run) == [3, 10] and fetched(run) == [10]


def test_a_checkpoint_is_uploaded_whole_though_a_newer_one_removes_it(run, slow, monkeypatch):
    put = MemoryFileSystem.put

    with mirrors.mirror(run, interrupts.Stop()) as here:
        save(here, 1)

        def late(self, *args, **kwargs):
            shutil.rmtree(here / "checkpoints/1", ignore_errors=True)
            return put(self, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, "put", late)
    assert fetched(run) == [1]


def cut(run, files):
    """A checkpoint of which a killed process has uploaded only some files."""
    with mirrors.mirror(run, interrupts.Stop()) as here:
        save(here, 2)
    there = [f"checkpoints/2/{name}" for name in ("metadata", "state/array", mirrors.MARK)]
    for name in there[files:]:
        MemoryFileSystem.store.pop((run / name).path)


def removed_before_its_mark(run):
    cut(run, 3)
    MemoryFileSystem.store.pop((run / "checkpoints/2/metadata").path)


def mixed_with_another(run):
    cut(run, 3)
    paths.put(run / "checkpoints/2/state/array", b"other")


@pytest.mark.parametrize("leave", [
    lambda run: cut(run, 1),
    lambda run: cut(run, 2),
    removed_before_its_mark,
    mixed_with_another,
], ids=["half", "all but the mark", "one file missing", "another file"])  # fmt: skip
def test_a_half_uploaded_checkpoint_is_ignored_and_removed(run, slow, leave):
    with mirrors.mirror(run, interrupts.Stop()) as here:
        save(here, 1, b"older")
    leave(run)
    with mirrors.checkpoint(run) as here:
        assert [path.name for path in here.iterdir()] == ["1"]
    assert uploaded(run) == [1, 2], "who only reads removes nothing"
    assert fetched(run) == [1] and uploaded(run) == [1]


def test_a_checkpoint_that_goes_while_it_is_read_is_looked_for_again(run, slow, monkeypatch):
    with mirrors.mirror(run, interrupts.Stop()) as here:
        save(here, 1)
    get = MemoryFileSystem.get

    def late(*args, **kwargs):
        monkeypatch.setattr(MemoryFileSystem, "get", get)
        with mirrors.mirror(run, interrupts.Stop()) as here:
            save(here, 2)
        for name in [name for name in paths.files(run) if "/1/" in name]:
            MemoryFileSystem.store.pop((run / name).path)
        return get(*args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "get", late)
    with mirrors.checkpoint(run) as here:
        assert [path.name for path in here.iterdir()] == ["2"]
    with one_line(ValueError, "no checkpoint in memory://run/none: train"):
        mirrors.checkpoint(run / "none").__enter__()


def test_an_upload_that_fails_is_tried_again(run, quick, monkeypatch):
    put, tries = MemoryFileSystem.put, []

    def failing(*args, **kwargs):
        tries.append(1)
        if len(tries) < 3:
            raise RuntimeError("slow down")
        return put(*args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put", failing)
    stop = interrupts.Stop()
    with mirrors.mirror(run, stop) as here:
        save(here, 1)
    assert len(tries) == 3 and stop.error is None and fetched(run) == [1]


def test_what_cannot_be_uploaded_fails_the_run_while_it_goes_on(run, quick, monkeypatch):
    stop = interrupts.Stop()
    with (
        monkeypatch.context() as patch,
        one_line(paths.StorageError, "checkpoints/1 cannot be written: RuntimeError: no route"),
        mirrors.mirror(run, stop) as here,
    ):
        fail(patch, "put", RuntimeError("no route"))
        save(here, 1)
        until(lambda: stop.error)
    with mirrors.mirror(run, stop):
        assert stop.error is None, "it was of another run"


def test_leaving_uploads_whatever_ends_the_run(run, slow):
    with pytest.raises(KeyboardInterrupt), mirrors.mirror(run, interrupts.Stop()) as here:
        save(here, 1)
        raise KeyboardInterrupt
    assert fetched(run) == [1]


def test_a_signal_that_ends_the_process_at_once_uploads_first(run, slow):
    left = []
    with interrupts.Stop(leave=lambda stop: left.append(uploaded(run))) as stop:
        with mirrors.mirror(run, stop) as here:
            save(here, 1)
            with pytest.raises(interrupts.Stopped):
                signal.raise_signal(signal.SIGTERM)
            assert left == [[1]]
        assert not stop.before_leaving


def test_a_signal_while_the_last_upload_goes_on_waits_for_its_end(run, slow, monkeypatch):
    put = MemoryFileSystem.put

    def put_after_signal(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return put(*args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put", put_after_signal)
    with interrupts.Stop() as stop, mirrors.mirror(run, stop) as here:
        save(here, 1)
    assert fetched(run) == [1] and stop.signal == signal.SIGTERM and not stop.unsaved


def test_folders_of_killed_processes_are_removed_and_those_of_others_are_not(run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        (tmp_path / "attention-mirror.dead" / "run").mkdir(parents=True)
        (tmp_path / "attention-mirror.dead.lock").touch()
        living = tmp_path / "attention-mirror.living"
        living.mkdir()
        with filelock.FileLock(f"{living}.lock"), mirrors.mirror(run, interrupts.Stop()) as here:
            assert here.parents[1] == tmp_path and living.exists()
            assert not (tmp_path / "attention-mirror.dead").exists()
        assert sorted(path.name for path in tmp_path.glob("attention-mirror*[!k]")) == [living.name]


def test_who_has_lost_the_lease_uploads_nothing_more(run, slow, monkeypatch):
    class Ended(BaseException):
        pass

    def end(_):
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended), leases.Lease(run), mirrors.mirror(run, interrupts.Stop()) as here:
        (here / "metrics.jsonl").write_text("of a process that slept")
        paths.put(run / LEASE.format(2), json.dumps(ELSEWHERE).encode())
    assert paths.read(run / "metrics.jsonl") is None


def test_processes_that_do_not_see_the_folder_of_the_first_are_told_what_to_do(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(mirrors.multihost_utils, "broadcast_one_to_all", lambda x: x)
    for there in ([True, True], [True, False]):
        is_there = np.array(there)
        monkeypatch.setattr(
            mirrors.multihost_utils,
            "process_allgather",
            lambda own, is_there=is_there: is_there & own,
        )
        if is_there.all():
            assert mirrors.shared_folder(tmp_path) == tmp_path
        else:
            with one_line(ValueError, f"{tmp_path}", "set TMPDIR to a folder"):
                mirrors.shared_folder(tmp_path)


# Cells and sweeps


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """What an undisturbed run leaves: its result, log and state."""
    directory = tmp_path_factory.mktemp("quiet") / "cells" / "base"
    loop.claim(directory, tiny())
    result = cells.run_cell(directory.parents[1], cells.Job("base"), Silent())
    return left(directory, result)


def left(directory, result):
    with mirrors.checkpoint(directory) as here:
        state = checkpoints.read_state(here)
    state["dropout"] = jax.random.key_data(state["dropout"])
    bits = [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]
    return result["metrics"], paths.read(directory / "metrics.jsonl"), bits


@pytest.mark.parametrize("stop_at, saved", [pytest.param(2, 0, marks=pytest.mark.slow), (5, 4)])
def test_a_remote_cell_that_was_stopped_ends_in_the_bits_of_a_local_one(run, quiet, stop_at, saved):
    directory = cells.folder(run, "base")
    loop.claim(directory, tiny())
    with pytest.raises(KeyboardInterrupt):
        cells.run_cell(run, cells.Job("base"), Silent(stop_at))
    started = []
    shown = Silent()
    shown.start = lambda steps, at: started.append(at)
    result = cells.run_cell(run, cells.Job("base"), shown)
    assert started == [saved]
    assert left(directory, result) == quiet
    assert cells.outcome(directory) == result and "attention.npz" in paths.files(directory)
    assert uploaded(directory)[-1] == 6 and len(uploaded(directory)) <= 2
    assert cells.run_cell(run, cells.Job("base"), Silent()) == result


def test_a_remote_cell_in_parts_and_asked_to_stop_ends_in_the_same_bits(run, quiet):
    directory = cells.folder(run, "base")
    loop.claim(directory, tiny())
    paused = cells.run_cell(run, cells.Job("base", until=3), Silent())
    assert paused["status"] == "paused" and cells.score(directory, 3) == paused["score"]
    shown = Signal(5)
    with pytest.raises(interrupts.Stopped):
        cells.run_cell(run, cells.Job("base"), shown, shown.stop)
    assert uploaded(directory)[-1] == 5 and leases.holder(directory) is None
    assert left(directory, cells.run_cell(run, cells.Job("base"), Silent())) == quiet


def test_a_cell_whose_checkpoints_cannot_be_uploaded_has_failed(run, quick, monkeypatch):
    directory = cells.folder(run, "base")
    loop.claim(directory, tiny(**{"train.steps": 100_000, "train.checkpoint_every": 10}))
    with monkeypatch.context() as patch:
        fail(patch, "put", RuntimeError("no route"))
        result = cells.run_cell(run, cells.Job("base"), Silent())
    assert (
        result["status"] == "failed"
        and "cannot be written: RuntimeError: no route" in (result["error"])
    )
    assert "no route" in paths.read(directory / "traceback.txt")
    cells.forget(directory, ("failed",))
    assert cells.outcome(directory) is None and not (directory / "traceback.txt").exists()


def test_events_of_tensorboard_are_replaced(run):
    config = tiny()
    loop.claim(run, config)
    for stop_at in (5, None):
        try:
            with mirrors.mirror(run, interrupts.Stop()) as here:
                loop.train(config, here, Silent(stop_at), tensorboard=True)
        except KeyboardInterrupt:
            time.sleep(1.1)  # their names have the second
    assert len([name for name in paths.files(run) if name.startswith("events.")]) == 1


def test_the_parameters_of_a_remote_run_load_in_one_line(run, tmp_path):
    config = tiny()
    with one_line(ValueError, "memory://run holds no config.json"):
        trained.load("memory://run")
    loop.claim(run, config)
    with one_line(ValueError, "no checkpoint in memory://run"):
        trained.load("memory://run")
    with mirrors.mirror(run, interrupts.Stop()) as here:
        loop.train(config, here, Silent())
    # The format is that of a local run: a copy of the files is one.
    run.fs.get([(run / n).path for n in paths.files(run)], [
        str(tmp_path / n) for n in paths.files(run)
    ])  # fmt: skip
    params = [trained.load(place, seed=1).params for place in ("memory://run", tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.mark.slow
def test_the_report_of_a_remote_run_is_that_of_a_local_one(run, tmp_path, capsys):
    local = write_run(tmp_path / "run", CELLS[:2], layers=1, heads=1)
    for path in local.rglob("*"):
        if path.is_file():
            paths.put(run / path.relative_to(local).as_posix(), path.read_bytes())
    page.publish("memory://run")
    assert capsys.readouterr().out.rstrip().endswith("memory://run/report.html")
    page.publish(local)
    for name in ("results.csv", "report.html"):
        text = (local / name).read_text("utf-8")  # its commands name the directory
        assert paths.read(run / name) == text.replace(str(local), "memory://run")
    plots = {path.name for path in (local / "plots").iterdir()}
    assert plots == {name[6:] for name in paths.files(run) if name.startswith("plots/")}


def test_a_remote_sweep_takes_cells_in_and_leaves_other_experiments_alone(run):
    def swept(*values, heads=2):
        axes = {"position": [{"model.position": value} for value in values]}
        return sweep.expand(tiny(**{"model.num_heads": heads}), {"base": {}}, axes)

    runner.open_workdir(run, swept("none"))
    runner.open_workdir(run, swept("alibi"))
    known = [cell["id"] for cell in json.loads(paths.read(run / "sweep.json"))["cells"]]
    assert known == ["base", "base.position=none", "base.position=alibi"]
    assert paths.read(cells.folder(run, "base.position=none") / "config.json")
    with pytest.raises(ValueError, match="model.num_heads is 2 there, 1 here"):
        runner.open_workdir(run, swept(heads=1))
    paths.put(run / "elsewhere" / "file", b"")
    with pytest.raises(ValueError, match="is not empty and holds no sweep"):
        runner.open_workdir(run / "elsewhere", swept())


def test_two_launchers_write_a_remote_sweep_in_turn(run, monkeypatch):
    """Else the later one would write what it read before the other had added its cells."""
    replaced = paths.replace

    def slow(path, content):
        if path.name == "sweep.json":
            time.sleep(0.3)
        replaced(path, content)

    monkeypatch.setattr(paths, "replace", slow)
    threads = []
    for value in ("none", "alibi"):
        axes = {"position": [{"model.position": value}]}
        swept = sweep.expand(tiny(), {"base": {}}, axes)
        threads.append(threading.Thread(target=runner.open_workdir, args=(run, swept)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(json.loads(paths.read(run / "sweep.json"))["cells"]) == 3


def test_the_logs_of_submitit_are_local(run, tmp_path, monkeypatch):
    folders = []

    class AutoExecutor:
        def __init__(self, folder, cluster):
            folders.append(folder)

        def update_parameters(self, name):
            folders.append(name)

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=AutoExecutor))
    monkeypatch.chdir(tmp_path)
    Slurm(run, 0, {})._make()
    Slurm(tmp_path / "work", 0, {})._make()
    assert folders == [tmp_path / "slurm" / "run", "run", tmp_path / "work" / "slurm", "work"]
