"""The launcher on a server that speaks S3, as a process of its own on this machine.

`make test-clusters` runs them; without the extra `test-clusters` they are skipped.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import psutil
import pytest

from experiments.storage import leases, mirrors, paths
from experiments.training import trained
from support import meshes
from support.kills import finish, launch, left, quiet
from support.launching import CONFIG, ROOT, ablate, start, wait_for

pytest.importorskip("moto")
pytest.importorskip("s3fs")

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server():
    """The address of S3."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    port = next(line.split()[1] for line in process.stdout if line.startswith("port"))
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.communicate()


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """An empty bucket, for this process and those that it starts."""
    import s3fs

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "NO_PROXY": "127.0.0.1",
        "TMPDIR": str(tmp_path / "temporary"),  # of the processes
        "RAY_TMPDIR": tempfile.gettempdir(),  # whose sockets must have short names
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "temporary").mkdir()
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket{random.getrandbits(40)}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


def fetched(run, folder):
    """A local copy of a work directory."""
    run = paths.as_path(run)
    names = paths.files(run)
    run.fs.get([(run / name).path for name in names], [str(folder / name) for name in names])
    return folder


def clean(run, tmp_path):
    """Whether nothing half is left there, nor anything here."""
    names = paths.files(paths.as_path(run))
    saved = {name.rpartition("/checkpoints/")[0] for name in names if "/checkpoints/" in name}
    for cell in saved:
        steps = mirrors._remote_steps([n[len(cell) + 1 :] for n in names if n.startswith(cell)])
        assert 1 <= len(steps) <= 2
        assert all(f"{cell}/checkpoints/{step}/{mirrors.MARK}" in names for step in steps)
    assert not [name for name in names if ".clock." in name or name.endswith(".tmp")]
    return not list((tmp_path / "temporary").glob("attention-mirror.*"))


def test_of_two_who_create_an_object_the_second_is_told(bucket):
    path = paths.as_path(f"{bucket}/run") / "object"
    assert paths.create(path, "first")
    assert not paths.create(path, "second") and paths.read(path) == "first"
    assert paths.create(path, "first"), "as after an answer that was lost"
    with leases.Lease(path.parent), pytest.raises(leases.LeaseHeldError), leases.Lease(path.parent):
        pass
    assert leases.holder(path.parent) is None


def test_what_another_process_writes_is_seen(bucket):
    run = paths.as_path(f"{bucket}/run")
    paths.put(run / "a", b"1")
    assert paths.files(run) == ["a"] and not (run / "b").exists() and len(list(run.iterdir())) == 1
    other = (
        "from experiments.storage import paths; import sys\n"
        "paths.put(paths.as_path(sys.argv[1]), b'')"
    )
    subprocess.run([sys.executable, "-c", other, f"{bucket}/run/b"], check=True)
    assert paths.files(run) == ["a", "b"] and (run / "b").exists()
    assert len(list(run.iterdir())) == 2


def test_mistakes_are_one_line(bucket, config, monkeypatch):
    flags = [f"--config={config}", "--sweep="]
    for workdir, message in ((f"{bucket}-none/run", "bucket does not exist"), ("s4://b/run", "s4")):
        done = ablate(*flags, f"--workdir={workdir}")
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith("error: ") and message in last
        assert "Traceback" not in done.stderr
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    done = ablate(*flags, f"--workdir={bucket}/run")
    assert done.returncode == 1 and "Unable to locate credentials" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_sweep_on_s3_from_start_to_report(bucket, tmp_path):
    config, expected, _ = quiet(tmp_path)
    run = f"{bucket}/run"
    finish(launch(config, run))
    assert left(fetched(run, tmp_path / "copy")) == expected
    assert clean(run, tmp_path)
    done = launch(config, run)
    output, _ = done.communicate(timeout=100)
    assert "all 3 cells were done already: s3://" in output

    page = paths.as_path(run) / "report.html"
    page.unlink()
    done = ablate(f"--workdir={run}", module="report")
    assert done.returncode == 0 and done.stdout.rstrip().endswith(f"{run}/report.html")
    assert paths.read(page).rstrip().endswith("</html>")
    places = (f"{run}/cells/base", tmp_path / "quiet/cells/base")
    params = [trained.load(place).params for place in places]
    jax.tree.map(np.testing.assert_array_equal, *params)


def kill(config, run, instant, seconds, rng):
    """Starts the launcher and kills it, or all its processes, when a new object shows or later.

    Returns whether that came before its end.
    """
    place = paths.as_path(run)
    before = set(paths.files(place))
    process = launch(config, run)
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
        new = set(paths.files(place)) - before if instant else ()
        if any(instant in name for name in new):
            break
    early = process.poll() is None
    family = psutil.Process(process.pid).children(recursive=True) if early else []
    process.send_signal(signal.SIGKILL)
    for child in family if rng.random() < 0.7 else ():  # else they end with the launcher
        child.kill()
    process.communicate()
    assert not psutil.wait_procs(family, timeout=20)[1]
    return early


@pytest.mark.slow
def test_killed_again_and_again_a_sweep_on_s3_ends_in_the_same_bits(bucket, tmp_path):
    config, expected, duration = quiet(tmp_path)
    rng = random.Random(0)
    instants = [
        *(".lease.1.json", "metrics.jsonl", "/state/", "/metadata", mirrors.MARK),
        *("attention.npz", "result.json", "plots/", None, None, None),
    ]
    kills = sweeps = 0
    while kills < 24:
        sweeps += 1
        run = f"{bucket}/run{sweeps}"
        early = True
        while early and kills < 24:
            instant = rng.choice(instants)
            seconds = duration if instant else rng.uniform(0.1, 0.7) * duration
            early = kill(config, run, instant, seconds, rng)
            kills += early
            print(kills, sweeps, instant, early, flush=True)
        finish(launch(config, run))
        copy = fetched(run, tmp_path / f"copy{sweeps}")
        assert left(copy) == expected, f"sweep {sweeps}, after {kills} kills"
        assert clean(run, tmp_path)


@pytest.mark.slow
def test_two_launchers_on_s3_share_a_sweep_and_do_no_cell_twice(bucket, tmp_path):
    config, expected, _ = quiet(tmp_path)
    run = f"{bucket}/run"
    both = [launch(config, run) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    printed = "".join(output for output, _ in outputs)
    for cell in expected[0]:
        assert printed.count(f"] {cell}: validation/accuracy") == 1, printed
    assert left(fetched(run, tmp_path / "copy")) == expected
    assert clean(run, tmp_path)


@pytest.mark.slow
def test_a_signal_saves_on_s3_and_the_same_command_goes_on(bucket, config, tmp_path):
    run = f"{bucket}/run"
    flags = [f"--config={config}", "--sweep=", f"--workdir={run}"]
    flags += ["--config.train.steps=100000", "--config.train.checkpoint_every=100000"]
    process = start(*flags)
    cell = paths.as_path(run) / "cells" / "base"
    wait_for(lambda: (cell / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors
    assert leases.holder(cell) is None and clean(run, tmp_path)
    with mirrors.checkpoint(cell) as here:
        (saved,) = (int(path.name) for path in here.iterdir())
    assert 0 < saved < 100000 and paths.read(cell / "result.json") is None


@pytest.mark.slow
def test_two_processes_of_one_run_train_on_s3(bucket, tmp_path):
    run, local = f"{bucket}/run", tmp_path / "local"
    for workdir in (run, local):
        meshes.finish(meshes.two_processes(tmp_path, workdir))
    logs = [paths.read(paths.as_path(place) / "metrics.jsonl") for place in (run, local)]
    assert logs[0] == logs[1] and clean(run, tmp_path)
    params = [trained.load(place).params for place in (run, local)]
    jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.mark.slow
@pytest.mark.parametrize("executor, more", [
    ("slurm", "cluster=local,timeout_min=30"), ("ray", "num_cpus=1"),
])  # fmt: skip
def test_a_cluster_trains_on_s3(bucket, tmp_path, executor, more):
    pytest.importorskip({"ray": "ray", "slurm": "submitit"}[executor])
    config = tmp_path / "config.py"
    config.write_text(CONFIG.partition("def sweep_rate")[0])
    run = f"{bucket}/{bucket.removeprefix('s3://')}"
    flags = [f"--config={config}", f"--executor={executor}", f"--resources={more}"]
    done = ablate(*flags, "--workers=2", f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(ROOT / "slurm" / paths.as_path(run).name, ignore_errors=executor == "ray")
    local = ablate(f"--config={config}", f"--workdir={tmp_path / 'quiet'}")
    assert local.returncode == 0
    there = left(fetched(run, tmp_path / "copy"))
    assert there == left(tmp_path / "quiet") and clean(run, tmp_path)
