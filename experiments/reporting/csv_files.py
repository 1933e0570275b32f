"""results.csv and pairs.csv of a report, in full precision."""

import csv
import io
import math
import os
from collections.abc import Sequence

from experiments.analysis import learning
from experiments.analysis.comparisons import Estimate, Row, pairwise
from experiments.storage.paths import replace

_NAN = float("nan")
_FACTS = (
    *("num_params", "steps", "flops", "compile_seconds", "steps_per_second", "memory_bytes"),
    *("decode_ms_per_token", "cache_bytes_per_token"),
)
_COLUMNS = (
    *("cell", "base", "axis", "value", "status", "seeds", "metric", "mean", "interval95"),
    *("low95", "high95", "learned", "learned95_low", "learned95_high"),
    *("difference", "difference95_low", "difference95_high", "effect_size", "p", "p_holm", "df"),
    *("plain_interval95", "plain_p", "bootstrap95_low", "bootstrap95_high"),
    *("difference_bootstrap95_low", "difference_bootstrap95_high"),
    *("reported", *_FACTS, "error"),
)


def write_csv(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Writes one line a cell and metric, and one without a metric for a cell not done.

    The reported metric comes first and has a 1 under `reported`; the others describe and are no
    part of the family that p_holm and the simultaneous intervals (difference95) are corrected for.
    p is that of the moderated t-test or the permutation test, corrected for planned looks alone,
    plain_p that of the paired t-test by the own seeds alone, plain_interval95 half its interval;
    both are corrected for nothing. Numbers are in full precision; what is not known is empty. An
    existing file is replaced whole.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        cell, result = row.cell, row.cell.result
        names = sorted(row.metrics, key=lambda name: name != row.metric)
        for metric in names or [""]:
            e = row.metrics.get(metric, Estimate((), _NAN, _NAN))
            d, reported = e.comparison, metric != "" and metric == row.metric
            counted = (_NAN, _NAN, _NAN)
            if e.learned is not None:
                counted = (e.learned, *learning.share_interval(e.learned, len(e.values)))
            numbers = (
                *(e.mean, e.interval, e.low, e.high, *counted, d.difference),
                *((d.low, d.high) if reported else (_NAN, _NAN)),
                *(d.effect_size, d.p, d.p_holm if reported else _NAN, d.df),
                *(d.plain_interval, d.plain_p, *e.bootstrap, *d.bootstrap),
            )
            writer.writerow(
                [cell.id, cell.base, cell.axis, cell.value, cell.status, len(e.values), metric]
                + ["" if math.isnan(x) else x for x in numbers]
                + [int(reported) if metric else ""]
                + [result.get(name) for name in _FACTS]
                + [row.error]
            )
    replace(path, text.getvalue())


def write_pairs(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Writes `pairwise` of every group as CSV, a line a pair."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("difference", "difference95_low", "difference95_high", "p", "p_holm", "plain_p")
    writer.writerow(("cell", "other", "metric", *names))
    for base in dict.fromkeys(row.cell.base for row in rows):
        pairs = pairwise([row for row in rows if row.cell.base == base])
        for (i, j), d in pairs.of.items():
            ids = [pairs.rows[k].cell.id for k in (i, j)]
            numbers = (d.difference, d.low, d.high, d.p, d.p_holm, d.plain_p)
            texts = ["" if math.isnan(x) else x for x in numbers]
            writer.writerow([*ids, pairs.rows[i].metric, *texts])
    replace(path, text.getvalue())
