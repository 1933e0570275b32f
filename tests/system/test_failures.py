"""What goes wrong with a sweep: signals, dying processes, full disks, two launchers at once."""

import json
import os
import signal
import subprocess
import time

import pytest

from support.launching import CONFIG, ablate, children, ended, read, start, wait_for


@pytest.mark.parametrize(
    "kind, status, workers, cells",
    [
        pytest.param(signal.SIGTERM, 143, 1, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, 2, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    config, tmp_path, kind, status, workers, cells
):
    work = tmp_path / "work"
    sweep = "position" if cells == 2 else ""
    flags = [f"--config={config}", f"--sweep={sweep}", f"--workdir={work}"]
    flags += ["--config.train.steps=100000", "--config.train.checkpoint_every=100000"]
    run = start(*flags, f"--workers={workers}")
    log = work / "cells/base/metrics.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, run)
    processes = children(run.pid)
    ahead = [child for process in processes for child in children(process)]
    assert (len(processes), len(ahead)) == (workers, cells - workers)
    run.send_signal(kind)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == status and "Traceback" not in errors
    last = f"stopped by {kind.name}; the same command goes on from here"
    assert errors.strip() == last, errors
    assert all(map(ended, processes + ahead))
    (saved,) = (p.name for p in (work / "cells/base/checkpoints").iterdir())
    assert 0 < int(saved) < 100000 and not (work / "cells/base/result.json").exists()
    assert json.loads(log.read_text().splitlines()[-1])["step"] <= int(saved)


@pytest.mark.slow
def test_a_signal_while_it_compiles_ends_it_at_once(config, tmp_path):
    work = tmp_path / "work"
    flags = [f"--config={config}", "--sweep=", f"--workdir={work}"]
    flags += ["--config.model.num_layers=40"]  # seconds to compile
    run = start(*flags)
    wait_for(lambda: (work / "cells/base/lease.json").exists(), run)
    time.sleep(0.5)
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 143 and time.monotonic() - began < 5
    assert not (work / "cells/base/metrics.jsonl").exists()


@pytest.mark.slow
def test_two_launchers_share_a_sweep_and_do_no_cell_twice(config, tmp_path):
    work = tmp_path / "work"
    flags = [f"--config={config}", "--config.train.steps=100"]
    flags += ["--config.train.checkpoint_every=50", f"--workdir={work}"]
    runs = [start(*flags) for _ in range(2)]
    outputs = [run.communicate(timeout=200) for run in runs]
    assert [run.returncode for run in runs] == [1, 1], outputs
    assert all(errors.endswith("tries them again\n") for _, errors in outputs)
    printed = "".join(output for output, _ in outputs)
    for cell, line in (
        ("base", "base: validation/accuracy"),
        ("base.position=none", "base.position=none: validation/accuracy"),
        ("base.rate=1e+30,0", "base.rate=1e+30,0: failed"),
    ):
        assert printed.count(f"] {line}") == 1, printed
        log = (work / "cells" / cell / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in log if "train/loss" in line]
        assert steps == sorted(set(steps))
    assert all(output.count("(base)") == 1 for output, _ in outputs), "both end in the table"

    work.rename(tmp_path / "moved")
    moved = ablate(*flags[:-1], f"--workdir={tmp_path / 'moved'}", "--retry_failed")
    assert "1 of 3 cells to train" in moved.stdout and not work.exists(), moved.stderr


@pytest.mark.slow
def test_a_cell_whose_process_dies_is_tried_once_more_and_then_a_failure(config, tmp_path):
    work = tmp_path / "work"
    flags = [f"--config={config}", "--sweep=", f"--workdir={work}"]
    flags += ["--config.train.steps=100000", "--config.train.checkpoint_every=50"]
    run = start(*flags)
    for deaths in range(2):
        wait_for(lambda: (work / "cells/base/lease.json").exists(), run)
        held = read(work / "cells/base/lease.json")["pid"]
        assert held in children(run.pid)
        saved = set(work.glob("cells/base/checkpoints/[0-9]*"))
        wait_for(lambda saved=saved: set(work.glob("cells/base/checkpoints/[0-9]*")) - saved, run)
        os.kill(held, signal.SIGKILL)
        if not deaths:
            wait_for(lambda held=held: read(work / "cells/base/lease.json")["pid"] != held, run)
    output, errors = run.communicate(timeout=200)
    assert run.returncode == 1 and errors.startswith("error: 1 of 1 cells failed"), errors
    assert "once more, from the last checkpoint" in output
    result = read(work / "cells/base/result.json")
    assert result["status"] == "failed"
    assert "died of signal 9 (SIGKILL, out of memory?)" in result["error"]
    assert "base (base) failed: its process died" in output


@pytest.mark.slow
def test_a_cell_that_takes_too_long_fails_and_is_tried_again_on_request(config, tmp_path):
    work = tmp_path / "work"
    flags = [f"--config={config}", "--sweep=", f"--workdir={work}", "--config.train.steps=100000"]
    for again in ([], ["--retry_failed"]):
        done = ablate(*flags, *again, "--max_minutes=0.01")
        assert done.returncode == 1 and done.stderr.startswith("error: 1 of 1 cells failed")
        result = read(work / "cells/base/result.json")
        assert result["status"] == "failed" and "TimeoutError: at step" in result["error"]


@pytest.mark.slow
def test_successive_halving_drops_the_worse_and_keeps_the_base(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        CONFIG.partition("def sweep_position")[0]
        + """
def sweep_rate():
    for rate in (1e-5, 1e-2, 1e30):
        yield {"optimizer.learning_rate": rate}
"""
    )
    work = tmp_path / "work"
    flags = [
        f"--config={path}",
        "--halving=2",
        "--config.train.checkpoint_every=50",
        "--config.train.steps=200",
        "--config.optimizer.warmup_steps=5",
    ]
    done = ablate(*flags, f"--workdir={work}")
    assert done.returncode == 1 and "error: 1 of 4 cells failed" in done.stderr
    results = {p.parent.name: read(p) for p in work.glob("cells/*/result.json")}
    status = {id: x["status"] for id, x in results.items()}
    assert status["base"] == "done" and status["base.rate=1e+30"] == "failed"
    assert sorted(status.values()) == ["done", "done", "dropped", "failed"]
    assert status["base.rate=1e-05"] == "dropped", results
    rungs = {p.parent.name: list(read(p)) for p in work.glob("cells/*/rungs.json")}
    assert rungs["base"] == ["50", "100"]
    assert "dropped: number" in done.stdout
    report = (work / "report.html").read_text()
    assert "at step 50" in report or "at step 100" in report


@pytest.mark.slow
@pytest.mark.parametrize("module, cell", [("ablate", "cells/base"), ("train", "")])
def test_a_full_disk_stops_a_training_and_it_goes_on_with_space(config, tmp_path, module, cell):
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options):
        return subprocess.run(["mount", *options, str(disk)], capture_output=True).returncode == 0

    if not mount("-t", "tmpfs", "-o", "size=300k", "tmpfs"):
        pytest.skip("only root may mount a small disk")
    try:
        flags = [f"--config={config}", f"--workdir={disk / 'work'}"]
        flags += ["--sweep="] if module == "ablate" else []
        flags += ["--config.train.steps=200", "--config.train.checkpoint_every=20"]
        full = ablate(*flags, module=module)
        assert full.returncode == 1, full.stdout
        assert "is full: free some space; the same command goes on" in full.stderr
        assert not (disk / "work" / cell / "result.json").exists()
        assert mount("-o", "remount,size=50m")
        again = ablate(*flags, module=module)
        assert again.returncode == 0, again.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)
