"""Sweeps by one worker and by several take turns, those of another version among them."""

from experiments.bench import throughput


def test_sweeps_take_turns_and_the_first_of_each_is_not_timed(monkeypatch, tmp_path):
    runs = []

    def run(config, workdir, workers, checkout):
        assert "steps=3" in config.read_text() and not workdir.exists()
        runs.append((workers, checkout))
        return float(len(runs))

    monkeypatch.setattr(throughput, "_run", run)
    assert throughput.measure(2, 3, 2) == {
        "one worker": [3.0, 5.0],
        "one for each core": [4.0, 6.0],
    }
    runs.clear()
    seconds = throughput.measure(2, 3, 2, before=tmp_path)
    assert runs == 3 * [(1, tmp_path.resolve()), (1, None), (0, None)]
    assert seconds == {
        "one worker before": [4.0, 7.0],
        "one worker": [5.0, 8.0],
        "one for each core": [6.0, 9.0],
    }
