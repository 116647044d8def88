"""The kinds of spoken number, date, time, sum and measure, each with its written form."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from random import Random

from lmi_multi.demo import tables

Pair = tuple[str, str]
Maker = Callable[[Random], Pair]


def cardinal(n: int, link: str = " and ") -> str:
    """Say a whole number below 10**12; `link` joins hundreds to what follows."""
    if n < 20:
        return tables.ONES[n]
    if n < 100:
        return tables.TENS[n // 10] + (f" {tables.ONES[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{tables.ONES[n // 100]} hundred" + (link + cardinal(n % 100) if n % 100 else "")
    size, name = next(scale for scale in tables.SCALES if n >= scale[0])
    head, rest = divmod(n, size)
    tail = (link if rest < 100 else " ") + cardinal(rest, link) if rest else ""
    return f"{cardinal(head, link)} {name}{tail}"


def ordinal(n: int, link: str = " and ") -> Pair:
    """Say and write a place in an order: ("twenty first", "21st")."""
    head, space, last = cardinal(n, link).rpartition(" ")
    regular = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return head + space + tables.ORDINALS.get(last, regular), f"{n}{ending}"


def write(n: int) -> str:
    """Write a whole number: round millions and billions keep their word."""
    for size, name in tables.SCALES[:2]:
        if n and n % size == 0:
            return f"{n // size} {name}"
    return str(n)


def link(rng: Random) -> str:
    """British numbers say "and" after hundreds, American ones do not."""
    return " and " if rng.random() < 0.6 else " "


def say(n: int, rng: Random) -> str:
    """Say a whole number in one of the ways people do."""
    if 1100 <= n < 10_000 and n % 100 == 0 and n % 1000 and rng.random() < 0.5:
        return f"{cardinal(n // 100)} hundred"
    text = cardinal(n, link(rng))
    return "a" + text[3:] if text.startswith("one ") and rng.random() < 0.4 else text


def digits(text: str, rng: Random) -> str:
    """Say digits one at a time; zero is "oh" or "zero" throughout."""
    zero = rng.choice(("oh", "zero"))
    return " ".join(tables.ONES[int(digit)] if digit != "0" else zero for digit in text)


def whole(rng: Random, most: int = 9) -> int:
    """Draw a whole number of up to `most` digits, with more zeros than chance would give."""
    if rng.random() < 0.02:
        return 0
    length = min(rng.randint(1, most), rng.randint(1, most))
    sparse = rng.choice((0.1, 0.4, 0.9))
    rest = (rng.choice("0" if rng.random() < sparse else "123456789") for _ in range(length - 1))
    return int(rng.choice("123456789") + "".join(rest))


def integer(rng: Random, least: int = 0) -> Pair:
    round_one = rng.randint(1, 999) * 10 ** rng.choice((6, 9))
    n = max(least, round_one if rng.random() < 0.08 else whole(rng))
    return say(n, rng), write(n)


def count(rng: Random) -> Pair:
    """How many of something there are, which is always more than one."""
    return integer(rng, least=2)


def decimal(rng: Random, places: int = 3) -> Pair:
    n = whole(rng, 3) if rng.random() < 0.8 else 0
    after = "".join(rng.choices("0123456789", k=rng.randint(1, places)))
    return f"{say(n, rng)} point {digits(after, rng)}", f"{n}.{after}"


def mixed(rng: Random) -> Pair:
    n, tail = rng.randint(1, 99), rng.choice(tuple(tables.QUARTERS))
    return f"{cardinal(n)} {tail}", f"{n}.{tables.QUARTERS[tail]}"


def scaled(rng: Random) -> Pair:
    spoken, written = rng.choice((decimal(rng, 2), mixed(rng)))
    name = rng.choice(("million", "billion"))
    return f"{spoken} {name}", f"{written} {name}"


def negative(rng: Random) -> Pair:
    spoken, written = rng.choice((count(rng), decimal(rng)))
    return f"{rng.choice(('minus', 'negative'))} {spoken}", f"-{written}"


def number(rng: Random) -> Pair:
    return rng.choice((integer, integer, decimal, decimal, mixed, negative, scaled))(rng)


def quantity(rng: Random) -> Pair:
    """A number as it stands before a unit."""
    n = whole(rng, 4)
    return rng.choice(((say(n, rng), write(n)), decimal(rng, 2), mixed(rng)))


def measure(rng: Random, group: str) -> Pair:
    one, many, symbol = rng.choice(tables.UNITS[group])
    if rng.random() < 0.06:
        return f"half {'an' if one in ('hour', 'inch') else 'a'} {one}", f"0.5{symbol}"
    spoken, written = quantity(rng)
    if group == "temperature" and spoken != "zero" and rng.random() < 0.3:
        spoken, written = f"minus {spoken}", f"-{written}"
    return f"{spoken} {one if spoken in ('one', 'minus one') else many}", written + symbol


def compound(rng: Random, group: str) -> Pair:
    large, small, ratio = rng.choice(tables.COMPOUNDS[group])
    n, m = rng.randint(1, 12), rng.randint(1, ratio - 1)
    glue = rng.choice((" ", " and "))
    spoken = f"{cardinal(n)} {large[n > 1]}{glue}{cardinal(m)} {small[m > 1]}"
    return spoken, f"{n}{large[2]} {m}{small[2]}"


def money(rng: Random) -> Pair:
    one, many, symbol, cent, cents = rng.choice(tables.CURRENCIES)
    form = rng.choice(("whole", "whole", "scaled", "both", "both", "short", "small"))
    n, m = whole(rng, rng.choice((3, 6))), rng.randint(1, 99)
    name = one if n == 1 else many
    if form == "scaled" and rng.random() < 0.5:
        spoken, written = scaled(rng)
        return f"{spoken} {many}", symbol + written
    if form == "both" and cent:
        glue = rng.choice((" ", " and "))
        spoken = f"{say(n, rng)} {name}{glue}{cardinal(m)} {cent if m == 1 else cents}"
        return spoken, f"{symbol}{n}.{m:02}"
    if form == "short" and cent and m > 9:  # "five pounds six" could be 5.06 or 5.60
        return f"{say(n, rng)} {name} {cardinal(m)}", f"{symbol}{n}.{m}"
    if form == "small" and cent and symbol != "€":  # cents alone are dollar cents
        return f"{cardinal(m)} {cent if m == 1 else cents}", f"{symbol}0.{m:02}"
    return f"{say(n, rng)} {name}", symbol + write(n)


def percent(rng: Random) -> Pair:
    if rng.random() < 0.05:
        return "half a percent", "0.5%"
    spoken, written = quantity(rng)
    sign = spoken != "zero" and rng.random() < 0.15
    name = rng.choice(("percent", "percent", "per cent"))
    return f"{'minus ' * sign}{spoken} {name}", f"{'-' * sign}{written}%"


def fraction(rng: Random) -> Pair:
    name = rng.choice(tuple(tables.FRACTIONS))
    n = rng.randint(1, tables.FRACTIONS[name] - 1)
    return f"{cardinal(n)} {name}{'s' * (n > 1)}", f"{n}/{tables.FRACTIONS[name]}"


def place_in_order(rng: Random) -> Pair:
    return ordinal(max(1, whole(rng, 4)), link(rng))


def code(rng: Random) -> Pair:
    text = "".join(rng.choices("0123456789", k=rng.randint(3, rng.choice((7, 11)))))
    return digits(text, rng), text


def between(rng: Random) -> Pair:
    low = rng.randint(2, 98)
    high = rng.randint(low + 1, 99)
    return f"{cardinal(low)} and {cardinal(high)}", f"{low} and {high}"


def year_words(n: int, rng: Random) -> str:
    """Say a year from 1500 to 2099; other years are said as plain numbers."""
    early, late = divmod(n, 100)
    if 2000 <= n < 2010 or (n >= 2010 and rng.random() < 0.3):
        plain = n == 2000 or n >= 2010 or rng.random() < 0.7
        return cardinal(n, link(rng)) if plain else f"{cardinal(early)} oh {cardinal(late)}"
    if late == 0:
        return f"{cardinal(early)} hundred"
    return f"{cardinal(early)} {'oh ' * (late < 10)}{cardinal(late)}"


def year(rng: Random) -> Pair:
    n = rng.choice((rng.randint(1500, 2099), rng.randint(1900, 2049)))
    return year_words(n, rng), str(n)


def decade(rng: Random) -> Pair:
    early, late = rng.randint(15, 20), rng.randint(2, 9)
    return f"{cardinal(early)} {tables.TENS[late][:-1]}ies", f"{early}{late}0s"


def day_words(day: int, month: int, rng: Random) -> str:
    spoken, name = ordinal(day)[0], tables.MONTHS[month - 1]
    forms = ("the {0} of {1}", "the {0} of {1}", "{0} of {1}", "{1} {0}", "{1} the {0}")
    return rng.choice(forms).format(spoken, name)


def date(rng: Random) -> Pair:
    """A date with its year: ("the third of march nineteen ninety nine", "1999-03-03")."""
    spoken_year, text = year(rng)
    first, last = datetime.date(int(text), 1, 1), datetime.date(int(text), 12, 31)
    when = first + datetime.timedelta(days=rng.randint(0, (last - first).days))
    spoken = f"{day_words(when.day, when.month, rng)} {spoken_year}"
    if rng.random() < 0.15:
        weekday = tables.WEEKDAYS[when.weekday()]
        return f"{weekday} {spoken}", f"{weekday.capitalize()} {when}"
    return spoken, str(when)


def day(rng: Random) -> Pair:
    """A date without its year, or a day of the week."""
    when = datetime.date(2024, 1, 1) + datetime.timedelta(days=rng.randrange(366))
    spoken = day_words(when.day, when.month, rng)
    written = f"{when.day} {tables.MONTHS[when.month - 1].capitalize()}"
    weekday = rng.choice(tables.WEEKDAYS)
    form = rng.choice(("date", "date", "date", "weekday", "both"))
    if form == "weekday":
        return weekday, weekday.capitalize()
    if form == "both":
        return f"{weekday} {spoken}", f"{weekday.capitalize()} {written}"
    return spoken, written


def month(rng: Random) -> Pair:
    spoken, n = year(rng)
    i = rng.randint(1, 12)
    return f"{tables.MONTHS[i - 1]} {spoken}", f"{n}-{i:02}"


def clock(rng: Random) -> Pair:
    """A time of day that can be told from other numbers without the word "at"."""
    if rng.random() < 0.04:
        return rng.choice((("noon", "12:00"), ("midnight", "00:00")))
    part = rng.choice((*tables.PARTS, "am", "pm", ""))
    hour = rng.choice(tables.PARTS[part] if part else range(1, 13))
    minute = rng.choice((0, 15, 30, 45, rng.randrange(60), 5 * rng.randrange(12)))
    this, then = tables.ONES[(hour - 1) % 12 + 1], tables.ONES[hour % 12 + 1]
    past = minute <= 30
    near = minute if past else 60 - minute
    relative = {15: rng.choice(("quarter", "a quarter")), 30: "half"}.get(near, cardinal(near))
    if near % 5 or (near % 15 and rng.random() < 0.2):
        relative += " minute" if near == 1 else " minutes"
    if minute == 0:
        spoken = f"{this} o'clock" if not part or rng.random() < 0.3 else this
    elif not part or rng.random() < 0.5:
        spoken = f"{relative} past {this}" if past else f"{relative} to {then}"
    else:
        spoken = f"{this} {'oh ' * (minute < 10)}{cardinal(minute)}"
    return f"{spoken} {part}".strip(), f"{hour:02}:{minute:02}"


def at(rng: Random) -> Pair:
    """A time of day after "at", where a pair of numbers is a time and never a year."""
    if rng.random() < 0.6:
        spoken, written = clock(rng)
        return f"at {spoken}", f"at {written}"
    hour, minute = rng.randint(1, 23), rng.randrange(60)
    if rng.random() < 0.2:
        return f"at {cardinal(hour)}", f"at {hour:02}:00"
    hours = minute == 0 or rng.random() < 0.2
    spoken = f"{'oh ' * (hours and hour < 10)}{cardinal(hour)} "
    spoken += f"{'oh ' * (minute < 10)}{cardinal(minute)}" if minute else "hundred"
    return f"at {spoken}{' hours' * hours}", f"at {hour:02}:{minute:02}"


def stamp(rng: Random) -> Pair:
    """Date and time alone, without a sentence around them: the "at" is not written."""
    (first, day_written), (second, time_written) = date(rng), at(rng)
    return f"{first} {second}", f"{day_written} {time_written.removeprefix('at ')}"


ITEMS: dict[str, Maker] = {
    "date": date, "day": day, "month": month, "year": year, "decade": decade, "time": clock,
    "at": at, "count": count, "number": number, "ordinal": place_in_order, "money": money,
    "percent": percent, "fraction": fraction, "code": code, "range": between,
    **{group: functools.partial(compound, group=group) for group in tables.COMPOUNDS},
    **{group: functools.partial(measure, group=group) for group in tables.UNITS},
}  # fmt: skip
"""The kinds of spoken number, by the name of the slot that they fill in `tables.TEMPLATES`."""
