"""The launcher on a Ray cluster of two nodes, and on submitit's local executor.

`make test-clusters` runs them; without the extra `cluster` they are skipped.
"""

import importlib.util
import json
import os
import signal
import time

import pytest

from experiments.config import settings
from experiments.launch import cells, executors, interrupts, progress, runner
from experiments.launch.executors import base, local
from experiments.storage import holders, leases
from experiments.training import loop
from support.launching import CONFIG, ablate, read, start, wait_for

MORE = """
def sweep_score():
    for score in ("dot", "cosine", "additive(hidden=4)"):
        yield {"model.score": score}
"""


@pytest.fixture
def sweep(tmp_path):
    """A file of five cells that last some seconds each, and the flags for it."""
    path = tmp_path / "config.py"
    path.write_text(CONFIG.partition("def sweep_rate")[0] + MORE)
    return [
        f"--config={path}",
        "--config.train.steps=1500",
        "--config.train.checkpoint_every=100",
        "--config.train.eval_every=500",
        f"--workdir={tmp_path / 'work'}",
    ]


def check(work, quiet, output):
    """Every cell is done, none twice, with the numbers of a launcher that was left alone."""
    cells = sorted(path.parent.name for path in work.glob("cells/*/result.json"))
    assert len(cells) == 5, output
    for cell in cells:
        results = [read(path / "cells" / cell / "result.json") for path in (work, quiet)]
        assert results[0]["status"] == "done", results[0]
        assert results[0]["metrics"] == results[1]["metrics"]
        logs = [(path / "cells" / cell / "metrics.jsonl").read_text() for path in (work, quiet)]
        assert logs[0] == logs[1]
        assert output.count(f"] {cell}: validation/accuracy") == 1, output


def alone(flags, tmp_path):
    done = ablate(*flags[:-1], f"--workdir={tmp_path / 'quiet'}")
    assert done.returncode == 0, done.stderr
    return tmp_path / "quiet"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_that_loses_a_node_finishes_every_cell(sweep, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    quiet = alone(sweep, tmp_path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        work = tmp_path / "work"
        run = start(*sweep, "--executor=ray", "--resources=num_cpus=1")
        # Two cells have a checkpoint: one of each node.
        wait_for(lambda: len(list(work.glob("cells/*/checkpoints/[0-9]*"))) > 2, run)
        busy = len(list(work.glob("cells/*/lease.json")))
        cluster.remove_node(node, allow_graceful=False)
        output, errors = run.communicate(timeout=400)
        assert run.returncode == 0, errors
        assert busy == 2, "both nodes had a cell"
        check(work, quiet, output)
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_slurm_jobs_that_are_preempted_or_killed_go_on(sweep, tmp_path):
    pytest.importorskip("submitit")
    quiet = alone(sweep, tmp_path)
    work = tmp_path / "work"
    flags = [*sweep, "--executor=slurm", "--resources=cluster=local,timeout_min=30", "--workers=2"]
    run = start(*flags)
    wait_for(lambda: len(list(work.glob("cells/*/checkpoints/[0-9]*"))) > 2, run)
    leases = [json.loads(path.read_text()) for path in work.glob("cells/*/lease.json")]
    preempted, killed = (lease["pid"] for lease in leases)
    os.kill(preempted, signal.SIGUSR2)
    os.kill(killed, signal.SIGKILL)
    output, errors = run.communicate(timeout=400)
    assert run.returncode == 0, errors
    check(work, quiet, output)
    assert "once more, from the last checkpoint" in output
    logs = "".join(path.read_text() for path in (work / "slurm").glob("*_log.err"))
    assert "this job is preempted" in logs + "".join(
        path.read_text() for path in (work / "slurm").glob("*_log.out")
    )


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["ray", "slurm"])
def test_a_signal_to_the_launcher_saves_on_the_cluster(sweep, tmp_path, executor):
    pytest.importorskip({"ray": "ray", "slurm": "submitit"}[executor])
    work = tmp_path / "work"
    flags = [*sweep, f"--executor={executor}", "--config.train.checkpoint_every=100000"]
    if executor == "slurm":
        flags += ["--resources=cluster=local,timeout_min=30", "--workers=1"]
    run = start(*flags)
    wait_for(lambda: any(p.stat().st_size for p in work.glob("cells/*/metrics.jsonl")), run)
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    output, errors = run.communicate(timeout=200)
    assert run.returncode == 130, errors
    assert list(work.glob("cells/*/checkpoints/[0-9]*")), output
    assert not list(work.glob("cells/*/lease.json"))


class Dying(base.ClusterExecutor):
    """Tasks that die on another machine, whose lease nobody gives back."""

    submitted = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def _submit(self, job):
        self.submitted += 1
        lease = {"host": "ada", "space": "ada's", "pid": 1, "born": 0, "token": "x"}
        path = cells.folder(self._workdir, job.id) / leases.NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(lease))

    def _ended(self, handle):
        return True

    def _get(self, handle):
        raise OSError("its node is gone")

    def _cancel(self, handle):
        pass


def test_a_cell_that_always_dies_elsewhere_is_a_failure_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(holders, "LAPSE", 1.0)
    executor = Dying(tmp_path, 0, {})
    runner.run_until_done(tmp_path, [cells.Job("base")], executor, interrupts.Stop())
    result = cells.outcome(cells.folder(tmp_path, "base"))
    assert result["status"] == "failed" and "its node is gone, 3 times" in result["error"]
    assert executor.submitted == 3
    assert "its node is gone" in (tmp_path / "cells/base/traceback.txt").read_text()


@pytest.mark.slow  # a faster one is in test_failures.py
def test_a_worker_that_died_before_its_first_cell_is_replaced(tmp_path, capsys):
    config = settings.config("recall", vocab_size=16, length=8, num_pairs=2, num_eval=20)
    config.model.update(model_dim=8, num_layers=1, num_heads=2)
    config.train.update(steps=4, batch_size=4, seeds=1, log_every=2, eval_every=2)
    loop.claim(cells.folder(tmp_path, "base"), config)
    with local.Local(tmp_path) as executor, progress.Progress(1) as shown:
        executor._workers[0]._process.kill()
        executor._workers[0]._process.wait()
        executor.run([cells.Job("base")], shown, interrupts.Stop())
    assert cells.outcome(cells.folder(tmp_path, "base"))["status"] == "done"
    assert "once more" in capsys.readouterr().out


def test_why_a_cell_was_dropped_is_in_its_line():
    assert cells.line({"status": "dropped", "error": "number 2 of 3"}) == "dropped: number 2 of 3"


@pytest.mark.parametrize("name, resources, message", [
    ("local", "num_gpus=1", "is for --executor=ray and slurm"),
    ("ray", "num_gpus", "is name=value,name=value: got 'num_gpus'"),
])  # fmt: skip
def test_resources_that_mean_nothing_are_refused(tmp_path, monkeypatch, name, resources, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    with pytest.raises(ValueError, match=message):
        executors.create(name, tmp_path, 0, 1, resources)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"needs submitit: pip install 'attention\[cluster\]'"):
        executors.create("slurm", tmp_path, 0, 1, "")


def test_each_worker_has_gpus_of_its_own(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")

    def shown(*arguments):
        places = local.places(*arguments)
        return [place.environment["CUDA_VISIBLE_DEVICES"] for place in places]

    assert shown(0, 1) == ["0", "1", "2", "5"]
    assert shown(0, 2) == ["0,1", "2,5"]
    assert len(local.places(3, 1)) == 3
    with pytest.raises(ValueError, match="a cell needs 8 GPUs, there are 4: 0, 1, 2, 5"):
        local.places(0, 8)
