"""Times contenders fairly: in turns, with pauses, until the median is known well enough."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def take_turns(
    runs: Mapping[Any, Callable[[], Any]],
    seconds: float,
    precision: float,
    rounds: int,
    note: Callable[[Any], None] = lambda name: None,
    pause: float = 0.2,
    least: float = 0.1,
) -> dict[Any, list[float]]:
    """Seconds of each run, one a turn.

    Turns end when every median is known to ± `precision` of itself (see `interval`), the `seconds`
    are up (but not before five turns), or there were `rounds`. Before each timed run there is a
    `pause`, since threads of another library that wait for more work in a loop take cores away, and
    runs for `least` seconds, one at least, that wake up those of this one. `note` is called before
    that with the name of the run.
    """
    times: dict[Any, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for turn in range(max(5, rounds) if runs else 0):
        if turn >= 5 and time.perf_counter() > end:
            break
        if turn >= 5 and all(width(x) <= precision for x in times.values()):
            break
        for name, run in runs.items():
            note(name)
            settle(run, pause, least)
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def settle(run: Callable[[], Any], pause: float, least: float) -> None:
    """Waits, then runs for `least` seconds, once at least."""
    time.sleep(pause)
    end = time.perf_counter() + least
    while True:
        run()
        if time.perf_counter() > end:
            return


def interval(numbers: list[float]) -> tuple[float, float, float]:
    """The median and a 95% interval of it: order statistics, so no shape is assumed.

    The interval between the k-th lowest and the k-th highest of n holds the true median with
    probability 1 − 2 P(Bin(n, ½) < k); with fewer than six numbers it is that of the extremes.
    """
    from scipy import stats

    x = np.sort(numbers)
    k = max(1, int(stats.binom.ppf(0.025, len(x), 0.5)))
    return float(np.median(x)), float(x[k - 1]), float(x[-k])


def width(numbers: list[float]) -> float:
    """Half the interval of the median, relative to it."""
    middle, low, high = interval(numbers)
    return (high - low) / 2 / middle
