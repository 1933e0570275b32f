"""Claims: what a sweep is expected to find, against SciPy's tests and by simulation."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats

from experiments.analysis import claim_tests, statistics
from experiments.config import claims, settings, sweep
from experiments.config.claims import equal, less
from experiments.launch import runner

RNG = np.random.default_rng(0)
A, B = RNG.normal(1.0, 0.1, 6), RNG.normal(1.4, 0.1, 6)
VALUES = {("a", ""): A, ("b", ""): B, ("a", "far"): A + 1, ("b", "far"): B + 5}


def verdicts(*stated, values=VALUES):
    return [finding.verdict for finding in claim_tests.test(stated, values)]


def test_less_is_the_one_sided_paired_t_test():
    (finding,) = claim_tests.test([less("a", "b", says="", by=0.1)], VALUES)
    assert finding.p == pytest.approx(stats.ttest_1samp(B - A, 0.1, alternative="greater").pvalue)
    assert finding.difference == pytest.approx(np.mean(B - A)) and finding.seeds == 6
    assert finding.interval == pytest.approx(statistics.mean_interval(B - A)[1])


def test_verdicts():
    assert verdicts(less("a", "b", says="")) == ["holds"]
    assert verdicts(less("b", "a", says="")) == ["contradicted"]
    assert verdicts(less("a", "b", says="", by=0.4)) == ["open"]
    assert verdicts(less("a", "b", says="", by=2)) == ["contradicted"]
    assert verdicts(equal("a", "b", within=0.6, says="")) == ["holds"]
    assert verdicts(equal("b", "a", within=0.6, says="")) == ["holds"]
    assert verdicts(equal("a", "b", within=0.1, says="")) == ["contradicted"]
    assert verdicts(equal("b", "a", within=0.1, says="")) == ["contradicted"]
    assert verdicts(equal("a", "b", within=0.38, says="")) == ["open"]
    assert verdicts(less("a", "c", says=""), less("a", "b@no", says="")) == ["missing"] * 2
    one = {name: x[:1] for name, x in VALUES.items()}
    assert verdicts(less("a", "b", says=""), values=one) == ["open"]


def test_sides_are_metrics_differences_and_numbers():
    (finding,) = claim_tests.test([less("a@far", "b@far", says="")], VALUES)
    assert finding.difference == pytest.approx(np.mean(B - A) + 4)
    (finding,) = claim_tests.test([less("a", "b", at="far", says="")], VALUES)
    assert finding.difference == pytest.approx(np.mean(B - A) + 4)
    (finding,) = claim_tests.test([less(("b", "a"), ("b@far", "a@far"), says="")], VALUES)
    assert finding.difference == pytest.approx(4)
    (finding,) = claim_tests.test([less(0.5, "a", says="")], VALUES)
    assert finding.difference == pytest.approx(A.mean() - 0.5) and finding.verdict == "holds"
    (finding,) = claim_tests.test([less("b", ("b@far", 1.0), says="")], VALUES)
    assert finding.difference == pytest.approx(4)


def test_all_claims_of_a_sweep_are_corrected_together():
    alone = claim_tests.test([less("a", "b", says="")], VALUES)[0].p
    many = claim_tests.test([less("a", "b", says="")] * 5, VALUES)
    assert all(finding.p == pytest.approx(5 * alone) for finding in many)


def test_equal_differences_count_as_if_one_were_a_step_off():
    values = {("a", ""): [0.7, 0.6, 0.8], ("b", ""): [0.9, 0.8, 1.0]}
    values["loss of another task", ""] = [2.0, 2.0001, 2.1]  # says nothing of these steps
    (finding,) = claim_tests.test([less("a", "b", says="")], values)
    assert finding.p == pytest.approx(stats.t.sf(0.2 * 3 / 0.1, 2))
    (finding,) = claim_tests.test([equal(("b", "a"), 0.2, within=0.1, says="")], values)
    assert finding.p == pytest.approx(stats.t.sf(0.1 * 3 / 0.1, 2))
    solved = {("a", ""): [1.0, 1.0], ("b", ""): [1.0, 1.0]}
    assert verdicts(equal("a", "b", within=0.01, says=""), values=solved) == ["holds"]


def test_false_alarms_are_as_rare_as_they_should_be():
    rng, alarms = np.random.default_rng(1), []
    stated = [less("a", "b", says=""), less("b", "a", says=""), equal("a", "b", within=1, says="")]
    for _ in range(400):
        a = rng.normal(size=5)
        values = {("a", ""): a, ("b", ""): a + 0.2 * rng.normal(size=5)}
        alarms.append({f.verdict for f in claim_tests.test(stated[:2], values)} != {"open"})
    assert np.mean(alarms) < 0.13  # 'less' and its opposite are two families of 5% each
    outcomes = []
    for _ in range(400):  # exactly at the margin
        difference = 1 + rng.normal(size=5)
        outcomes += verdicts(stated[2], values={("a", ""): np.zeros(5), ("b", ""): difference})
    assert 0.02 < np.mean([x == "holds" for x in outcomes]) < 0.08


def test_claims_are_read_as_they_were_described():
    stated = [less(("a", "b@far"), 0.5, says="x", by=1), equal("a", "b", within=0.1, says="y")]
    assert claims.read(claims.describe(stated)) == stated
    assert claims.cells(stated[0]) == {"a", "b"}
    with pytest.raises(ValueError, match="margin above 0: got within=0"):
        equal("a", "b", within=0, says="")
    with pytest.raises(ValueError, match="is about cells: got 0.5 and 0.7"):
        less(0.5, 0.7, says="")


def test_p_is_that_of_what_decided():
    (finding,) = claim_tests.test([less("b", "a", says="")], VALUES)
    assert finding.verdict == "contradicted"
    assert finding.p == pytest.approx(stats.ttest_1samp(B - A, 0, alternative="greater").pvalue)
    # Either of two tests may contradict equality, so their smaller p counts twice.
    (finding,) = claim_tests.test([equal("a", "b", within=0.1, says="")], VALUES)
    p = stats.ttest_1samp(B - A, 0.1, alternative="greater").pvalue
    assert finding.verdict == "contradicted" and finding.p == pytest.approx(2 * p)
    many = claim_tests.test([less("b", "a", says="")] * 3, VALUES)
    alone = stats.ttest_1samp(B - A, 0, alternative="greater").pvalue
    assert all(one.p == pytest.approx(3 * alone) for one in many)


def test_a_claim_keeps_when_it_was_first_stated_until_it_is_rewritten():
    first = less(("a", "b"), "c", says="x"), equal("a", "b", within=0.1, says="y")
    recorded = claims.record(first, [], "2026-11-21T12:00:00", 0)
    assert [(one["stated"], one["results"]) for one in recorded] == [("2026-11-21T12:00:00", 0)] * 2
    kept = json.loads(json.dumps(recorded))
    assert claims.record(first, kept, "2026-12-24T12:00:00", 9) == kept, "the same at a relaunch"
    for rewritten in (
        dataclasses.replace(first[1], margin=0.2),
        dataclasses.replace(first[1], says="z"),
        equal("b", "a", within=0.1, says="y"),
    ):
        one, other = claims.record([first[0], rewritten], kept, "2026-12-24T12:00:00", 9)
        assert one == kept[0]
        assert (other["stated"], other["results"]) == ("2026-12-24T12:00:00", 9)
    assert [claim.stated for claim in claims.read(kept)] == ["2026-11-21T12:00:00"] * 2
    # Of a directory from before it was recorded, nothing is known, and nothing is made up.
    old = [
        {name: x for name, x in one.items() if name not in ("stated", "results")} for one in kept
    ]
    assert claims.record(first, old, "2026-12-24T12:00:00", 9) == old
    assert claims.read(old)[0].stated == ""


def test_claims_about_seeds_that_learned_or_not_are_tested_by_permutation():
    learned, mixed, failed = (
        [0.99, 0.98, 0.97, 0.99, 0.96],
        [0.98, 0.25, 0.99, 0.97, 0.2],
        [0.2] * 5,
    )
    values = {("a", ""): learned, ("b", ""): mixed, ("c", ""): failed}
    stated = [less("c", "a", says=""), less("b", "a", says=""), less(0.5, "a", says="")]
    findings = claim_tests.test(stated, values, bimodal=set(values))
    # Of 252 ways to deal ten runs one is as uneven; of 32 signs of five seeds one.
    alone = [1 / 252, *statistics.permutation_test([learned], [mixed], greater=True), 1 / 32]
    assert [one.p for one in findings] == pytest.approx(list(statistics.holm(alone)))
    assert [one.verdict for one in findings] == ["holds", "open", "open"]
    assert all(math.isnan(one.interval) for one in findings)
    t_tests = claim_tests.test(stated, values)
    assert [one.verdict for one in t_tests] == ["holds", "open", "holds"]
    within = equal("a", "a", within=0.1, says="")
    (one,) = claim_tests.test([within], values, bimodal=set(values))
    assert one.verdict == "holds"


def test_a_sweep_records_its_claims_once(tmp_path):
    swept = sweep.expand(settings.config("recall"), {"a": {}}, {"b": [{"model.num_heads": 2}]})
    path = tmp_path / "run" / "sweep.json"

    def relaunch(*stated):
        runner.open_workdir(path.parent, swept, stated)
        return json.loads(path.read_text())["claims"]

    pair = less(("a", "a.b=2"), 0.5, says="x")
    first = relaunch(pair)
    assert first[0]["stated"] and first[0]["results"] == 0
    written = path.stat().st_mtime_ns
    assert relaunch(pair) == first and path.stat().st_mtime_ns == written
    (path.parent / "cells/a/result.json").write_text('{"status": "done"}')
    kept, late = relaunch(pair, less("a", "a.b=2", says="y"))
    assert kept == first[0] and late["results"] == 1


def test_a_claim_stated_when_all_is_trained_is_in_the_report(tmp_path, monkeypatch):
    swept = sweep.expand(settings.config("recall"), {"a": {}}, {})
    runner.open_workdir(tmp_path, swept)
    (tmp_path / "cells/a/result.json").write_text('{"status": "failed", "error": "-"}')
    (tmp_path / "report.html").write_text("")
    whence = {"command": "a", "created": "then", "environment": {"device": "another"}}
    written = json.loads((tmp_path / "sweep.json").read_text()) | whence
    (tmp_path / "sweep.json").write_text(json.dumps(written))
    published = []

    def publish(workdir):
        (workdir / "report.html").write_text("")
        published.append(workdir)

    monkeypatch.setattr(runner.page, "publish", publish)

    def relaunch(*stated):
        runner.train_sweep(tmp_path, swept, stated, executor=None, stop=None)
        return json.loads((tmp_path / "sweep.json").read_text())["claims"]

    assert relaunch() == [] and not published
    (late,) = relaunch(less("a", 0.5, says="x"))
    assert late["results"] == 1 and published == [tmp_path]
    assert relaunch(less("a", 0.5, says="x")) == [late] and len(published) == 1
    # Where the results come from is what it was.
    assert json.loads((tmp_path / "sweep.json").read_text()) == {**written, "claims": [late]}
