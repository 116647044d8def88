"""The tables that people read, made from a result."""

from __future__ import annotations

from statistics import median

from benchmarks.contenders import OURS
from benchmarks.result import Case, Result, ratios


def markdown(result: Result) -> str:
    """The whole page."""
    parts = (_heading(result), _decode(result), _first(result), _agreement(result), _loads(result))
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(result: Result) -> str:
    s, m = result.settings, result.machine
    where = f"{m['processor']}, {m['cores']} cores, {m['memory_gib']} GiB, {m['cpu_capability']}"
    if "gpu" in m:
        where = f"{m['gpu']}; {where}"
    used = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    return "\n".join(
        (
            f"# Decoding: {' beside '.join(result.contenders)}",
            "",
            f"- Machine: {where}; {m['system']}",
            f"- Versions: {used}",
            f"- Date: {result.date}",
            f"- Made by: `{result.command}`",
            f"- Settings: {s.threads} threads for all, prompts of {s.prompt_tokens} tokens, "
            f"{s.new_tokens} new tokens forced, greedy, random weights; median of {s.rounds} "
            "rounds in which the contenders take turns",
            f"- Copy bandwidth of the same run: {result.bytes_per_second / 1e9:.1f} GB/s",
        )
    )


def _decode(result: Result) -> str:
    head = ["shape", "dtype", "batch"]
    head += [f"{name}, ms a step" for name in result.contenders]
    head += [f"times {peer} (all rounds)" for peer in result.contenders[1:]]
    head += [f"{name}, tokens/s" for name in result.contenders]
    head += ["roofline, ms", "share of it"]
    rows = [_decode_row(result, case) for case in result.cases]
    note = (
        "Roofline: bytes that a step must read over the copy bandwidth. More than 100% means that "
        "weights stayed in a cache that is faster than memory."
    )
    return f"## A decode step\n\n{_table(head, rows)}\n\n{note}"


def _decode_row(result: Result, case: Case) -> list[str]:
    names = result.contenders
    bound = case.step_bytes / result.bytes_per_second
    row = [case.shape, case.dtype, str(case.batch)]
    row += [f"{case.step(name) * 1e3:.2f}" for name in names]
    row += [_spread(case.steps(OURS), case.steps(peer)) for peer in names[1:]]
    row += [f"{case.tokens_per_second(name):.0f}" for name in names]
    return [*row, f"{bound * 1e3:.2f}", f"{bound / case.step(OURS):.0%}"]


def _first(result: Result) -> str:
    names = result.contenders
    head = ["shape", "dtype", "batch", *(f"{name}, ms" for name in names)]
    head += [f"times {peer} (all rounds)" for peer in names[1:]]
    rows = [
        [case.shape, case.dtype, str(case.batch)]
        + [f"{case.first(name) * 1e3:.1f}" for name in names]
        + [_spread(case.first_seconds[OURS], case.first_seconds[peer]) for peer in names[1:]]
        for case in result.cases
    ]
    return f"## The first token\n\n{_table(head, rows)}"


def _agreement(result: Result) -> str:
    lines = [
        f"- {case.shape} {case.dtype}, batch {case.batch}: "
        + ", ".join(f"{share:.1%} equal those of {peer}" for peer, share in case.agreement.items())
        for case in result.cases
        if case.dtype != "fp32"
    ]
    note = (
        "In fp32 every token must equal the peer's, or nothing is measured. Narrower types round "
        "differently in each implementation, and once a token differs, so does what follows it."
    )
    return "\n".join(("## Tokens", "", note, "", *lines))


def _loads(result: Result) -> str:
    noisy = [case for case in result.cases if not case.load.quiet]
    if not noisy:
        return ""
    lines = [f"- {case.shape} {case.dtype}, batch {case.batch}: {_load(case)}" for case in noisy]
    warning = "**The machine was busy with other work: these times are not to be relied on.**"
    return "\n".join(("## Warning", "", warning, "", *lines))


def _load(case: Case) -> str:
    load = case.load
    return (
        f"{load.others} of {load.cores} cores taken by others, "
        f"load average {load.before} before and {load.after} after"
    )


def _spread(ours: list[float], peer: list[float]) -> str:
    """The median of the rounds' ratios, and the smallest and the largest."""
    found = ratios(ours, peer)
    return f"{median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---" if column < 2 else "--:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))
