"""Dates and numbers as people write them, each with its translation into digits."""

import datetime
import itertools

import numpy as np

from experiments.tasks import hashing

KINDS = ("dates", "numbers")

_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
)
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_FORMS = (
    *("{weekday} {d} {month} {yyyy}", "{dd}.{mm}.{yy}", "{mon} {d} {yyyy}", "{d} {month} {yyyy}"),
    *("{month} {d}, {yyyy}", "{mm}/{dd}/{yyyy}", "{d}-{mon}-{yy}", "{yyyy}/{mm}/{dd}"),
    *(
        "the {ordinal} of {month}, {yyyy}",
        "{weekday}, {month} {ordinal} {yyyy}",
        "{d}. {m}. {yyyy}",
    ),
)
# A hundred years, so that two digits identify a year.
_FIRST_DAY = datetime.date(1950, 1, 1).toordinal()
_NUM_DAYS = datetime.date(2050, 1, 1).toordinal() - _FIRST_DAY

_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = (*("", "", "twenty", "thirty", "forty"), *("fifty", "sixty", "seventy", "eighty", "ninety"))

_FORM_DRAW = 2**32


def generate(kind: str, stream: int, seed: int, indices: np.ndarray) -> tuple[list, list]:
    """Phrases and their translations: 'Monday 21 November 2022' and '2022-11-21'.

    'dates': every day of 1950 to 2049 is as likely as any other, in one of eleven forms; to ISO
    8601.  'numbers': below 10³, 10⁴, 10⁵ or 10⁶, in British or American words; to digits.

    One date or number in ten occurs in validation only, one in the test only, chosen by its hash,
    so those splits hold nothing that was seen in training in another form.

    Args:
      kind: one of KINDS.
      stream: hashing.TRAIN, VALIDATION or TEST.
      seed: of the whole corpus.
      indices: numbers of the examples [n]; each depends on (seed, index) alone.
    """
    values = np.full(len(indices), -1)
    for draw in itertools.count():
        open_ = np.flatnonzero(values < 0)
        if not len(open_):
            break
        bits = hashing.bits(stream, seed, indices[open_], draw, 2)
        high = _NUM_DAYS if kind == "dates" else 10 ** (3 + hashing.integers(bits[:, 1], 4))
        candidates = hashing.integers(bits[:, 0], high)
        ours = _stream_of(candidates) == stream
        values[open_[ours]] = candidates[ours]
    forms = hashing.bits(stream, seed, indices, _FORM_DRAW, 1)[:, 0]
    write = _date if kind == "dates" else _number
    pairs = [write(int(v), int(form)) for v, form in zip(values, forms, strict=True)]
    return [phrase for phrase, _ in pairs], [digits for _, digits in pairs]


def _stream_of(values):
    tenth = hashing.integers(hashing.bits(hashing.LENGTH, 0, values, 0, 1)[:, 0], 10)
    return np.select([tenth == 0, tenth == 1], [hashing.VALIDATION, hashing.TEST], hashing.TRAIN)


def _date(value, form):
    day = datetime.date.fromordinal(_FIRST_DAY + value)
    # Not strftime, whose names depend on the machine's language.
    ending = "th" if 10 < day.day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    month = _MONTHS[day.month - 1]
    phrase = _FORMS[form % len(_FORMS)].format(
        weekday=_WEEKDAYS[day.weekday()],
        d=day.day,
        dd=f"{day.day:02}",
        ordinal=f"{day.day}{ending}",
        month=month,
        mon=month[:3].lower(),
        m=day.month,
        mm=f"{day.month:02}",
        yy=f"{day.year % 100:02}",
        yyyy=day.year,
    )
    return phrase, day.isoformat()


def _number(value, form):
    thousands, rest = divmod(value, 1000)
    joint = " and " if form % 2 else " "
    words = [_below_thousand(thousands, joint) + " thousand"] if thousands else []
    if rest or not thousands:
        words.append(_below_thousand(rest, joint))
    # 'two thousand and six', but 'two thousand six hundred'.
    return (joint if 0 < rest < 100 else " ").join(words), str(value)


def _below_thousand(value, joint):
    hundreds, rest = divmod(value, 100)
    words = [_SMALL[hundreds] + " hundred"] if hundreds else []
    if rest or not hundreds:
        tens, ones = divmod(rest, 10)
        after = f"-{_SMALL[ones]}" if ones else ""
        words.append(_SMALL[rest] if rest < 20 else _TENS[tens] + after)
    return joint.join(words)
