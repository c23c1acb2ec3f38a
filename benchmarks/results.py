"""RESULTS.md from the records of `speed.py`: goals, comparison, growth, what limits it, versions and machine."""

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import arms
import flops

Record = dict[str, Any]

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "politune")
NAMES = {"original": "original recipe on TRL", "best": "TRL at its best", "politune": "politune"}
DTYPES = ("bf16", "fp32")
FASTER_THAN = {"best": 4.0, "original": 6.0}
SHARE_OF_PEAK, SHARE_OF_MEMORY, DEVIATION = 0.60, 0.5, 0.10


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and memory in GiB."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    sizes = [int(line.split()[1]) / 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = names[0] if names else platform.processor() or platform.machine()
    return {
        "processor": processor,
        "cores": cores,
        "memory_gib": round(sizes[0]) if sizes else None,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's default"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def seconds(record: Record) -> float:
    """What one epoch costs: its steps and its share of the reference pass."""
    return float(record["epoch_seconds"] + record["reference_seconds"] / arms.REFERENCE_EPOCHS)


def share_of_peak(record: Record) -> float:
    """Useful operations per second beside what plain products reached before and after."""
    return float(record["useful_flops"] / seconds(record) / statistics.mean(record["peak_flops_per_second"]))


def peak_memory(record: Record) -> float:
    return float(record["peak_bytes"])


def render(facts: Record, records: Sequence[Record]) -> str:
    """The whole page; parts that were not measured say so."""
    latest = {record["name"]: record for record in records}.values()
    parts: dict[str, list[Record]] = {}
    for record in latest:
        parts.setdefault(record["part"], []).append(record)
    main = parts.get("main", [])
    main = [record for record in main if record["pairs"] == main[-1]["pairs"]]
    growth = _middle_runs(parts.get("pairs", []))
    sections = [
        "# Speed and memory of `politune train dpo`",
        "Written by `make bench` (`python benchmarks/speed.py`). How the figures come about stands there, in `flops.py` and in\n"
        "`lengths.py`; in short:",
        _method(main),
        "## Goals",
        _goals(facts, main, growth),
        "## Beside TRL",
        _comparison(main),
        "## Growth with the number of pairs",
        _pairs(growth),
        "## Growth with the length",
        _lengths(parts.get("length", [])),
        "## Growth with the model",
        _sizes(parts.get("size", [])),
        "## What limits it",
        _limits(parts.get("profile", [])),
        _arithmetic(main, parts.get("profile", [])),
        "## Useful operations",
        "```\n" + (flops.__doc__ or "").strip() + "\n```",
        "## Versions and machine",
        _surroundings(facts),
    ]
    return "\n\n".join(sections) + "\n"


def _method(main: list[Record]) -> str:
    tokens = main[0]["tokens"] if main else {}
    work = (
        f"- {main[0]['pairs']} pairs of our own words with the public left-leaning set's lengths: {tokens['packed']:,} tokens"
        f" with each prompt once, {tokens['unshared']:,} with it before both sides, {tokens['completion']:,} of them scored.\n"
        if main
        else ""
    )
    return work + (
        f"- SmolLM2 135M, LoRA of rank {arms.RANK} on all seven projections, batches of 4 pairs, 2 per step, no length limit in\n"
        "  reach. Two epochs, the first one discarded. All arms read the same file and do the same optimizer steps.\n"
        "- *Original recipe on TRL*: a second model in memory as the reference, asked in each step; activation checkpointing.\n"
        "- *TRL at its best*: reference computed once, before training; no checkpointing. Batches of 4, as in the other arms.\n"
        "- *politune*: the command in a process of its own.\n"
        "- Seconds per epoch: from the last logged step of the first epoch to that of the second, plus a quarter of the\n"
        "  reference pass, which the recipe's four epochs share.\n"
        "- Share of peak: the operations that the packed computation needs, in each arm the same, by the seconds and by what\n"
        f"  a product of two {arms.PEAK_SIDE} x {arms.PEAK_SIDE} matrices reached in that dtype before and after (their mean).\n"
        "- Peak memory: the most that the kernel saw the process hold, from start to end.\n"
        "- The arms take turns; medians over the rounds, ratios within a round, in brackets the range."
    )


def _by_round(main: list[Record], arm: str, dtype: str) -> dict[int, Record]:
    return {record["round"]: record for record in main if (record["arm"], record["dtype"]) == (arm, dtype)}


def _ratios(main: list[Record], arm: str, dtype: str, figure: Callable[[Record], float]) -> list[float]:
    """The other arm's figure by politune's, per round."""
    own, others = _by_round(main, "politune", dtype), _by_round(main, arm, dtype)
    return [figure(others[turn]) / figure(own[turn]) for turn in sorted(own.keys() & others.keys())]


def _goals(facts: Record, main: list[Record], growth: list[Record]) -> str:
    trl = ".".join(facts["versions"]["trl"].split(".")[:2])
    rows = []
    for arm, goal in FASTER_THAN.items():
        name = NAMES[arm].replace("TRL", f"TRL {trl}")
        cells = [_verdict(_ratios(main, arm, dtype, seconds), goal, "{:.1f}x") for dtype in DTYPES]
        rows.append([f"{name}: seconds by politune's", f"at least {goal}x", *cells])
    shares = [[share_of_peak(record) for record in _by_round(main, "politune", dtype).values()] for dtype in DTYPES]
    cells = [_verdict(each, SHARE_OF_PEAK, "{:.0%}") for each in shares]
    rows.append(["share of the matrix-product peak", f"at least {SHARE_OF_PEAK:.0%}", *cells])
    memory = [[1 / ratio for ratio in _ratios(main, "best", dtype, peak_memory)] for dtype in DTYPES]
    cells = [_verdict(each, SHARE_OF_MEMORY, "{:.2f}x", at_most=True) for each in memory]
    rows.append([f"peak memory by that of {NAMES['best']}", f"at most {SHARE_OF_MEMORY}x", *cells])
    worst = [max(map(abs, _deviations(growth)))] if len(growth) > 2 else []
    pairs = f" to {growth[-1]['pairs']} pairs" if growth else ""
    linear = _verdict(worst, DEVIATION, "{:.1%}", at_most=True)
    rows.append([f"seconds by packed tokens, off a straight line{pairs}", f"at most {DEVIATION:.0%}", linear, ""])
    return _table(["goal", "target", *DTYPES], rows)


def _verdict(values: Sequence[float], target: float, form: str, at_most: bool = False) -> str:
    """The median, and whether it reaches the target as it is, before rounding."""
    if not values:
        return "not measured"
    median = statistics.median(values)
    reached = median <= target if at_most else median >= target
    return f"{form.format(median)}, {'reached' if reached else '**not reached**'}"


def _comparison(main: list[Record]) -> str:
    rows = []
    for dtype in DTYPES:
        for arm, name in NAMES.items():
            runs = list(_by_round(main, arm, dtype).values())
            if not runs:
                continue
            ratios = _ratios(main, arm, dtype, seconds)
            rows.append(
                [
                    dtype,
                    name,
                    _spread([seconds(run) for run in runs], "{:.1f}"),
                    f"{statistics.median(run['reference_seconds'] for run in runs):.1f}"
                    if arm != "original"
                    else "in each step",
                    _spread(ratios, "{:.2f}x") if arm != "politune" else "",
                    _spread([100 * share_of_peak(run) for run in runs], "{:.0f} %"),
                    f"{statistics.median(peak_memory(run) for run in runs) / 1e9:.2f}",
                    f"{statistics.median(statistics.mean(run['peak_flops_per_second']) for run in runs) / 1e9:.0f}",
                ]
            )
    heads = [
        "dtype",
        "arm",
        "s per epoch",
        "reference pass, s",
        "politune is faster by",
        "share of peak",
        "peak memory, GB",
    ]
    return _table([*heads, "products, GFLOP/s"], rows)


def _middle_runs(runs: list[Record]) -> list[Record]:
    """Of each number of pairs the run that took the median time (of an even number the faster of the middle two)."""
    of_pairs: dict[int, list[Record]] = {}
    for run in sorted(runs, key=seconds):
        of_pairs.setdefault(run["pairs"], []).append(run)
    return [of_pairs[pairs][(len(of_pairs[pairs]) - 1) // 2] for pairs in sorted(of_pairs)]


def _pairs(growth: list[Record]) -> str:
    deviations = _deviations(growth) if len(growth) > 2 else [None] * len(growth)
    rows = [
        [
            f"{run['pairs']}",
            *_cost_cells(run),
            f"{off:+.1%}" if off is not None else "",
            f"{peak_memory(run) / 1e9:.2f}",
            f"{statistics.mean(run['peak_flops_per_second']) / 1e9:.0f}",
        ]
        for run, off in zip(growth, deviations, strict=True)
    ]
    heads = ["pairs", "packed tokens", "s per epoch", "s per 1,000 tokens", "off the line", "peak memory, GB"]
    line = (
        "politune, bf16. Of each size the run with the median time; the line has the least squared relative deviations."
    )
    return f"{line}\n\n{_table([*heads, 'products, GFLOP/s'], rows)}"


def _deviations(growth: list[Record]) -> list[float]:
    """How far each epoch's seconds are off a straight line through the packed tokens, as a share of the line's value.

    The line a + b t minimises the sum of ((a + b t) / y - 1)^2: relative, so that the longest run does not decide alone.
    """
    tokens, costs = [float(run["tokens"]["packed"]) for run in growth], [seconds(run) for run in growth]
    weights = [1 / cost**2 for cost in costs]
    total = sum(weights)
    mean_t = sum(w * t for w, t in zip(weights, tokens, strict=True)) / total
    mean_y = sum(w * y for w, y in zip(weights, costs, strict=True)) / total
    points = list(zip(weights, tokens, costs, strict=True))
    slope = sum(w * (t - mean_t) * (y - mean_y) for w, t, y in points) / sum(
        w * (t - mean_t) ** 2 for w, t, _ in points
    )
    return [y / (mean_y + slope * (t - mean_t)) - 1 for t, y in zip(tokens, costs, strict=True)]


def _lengths(runs: list[Record]) -> str:
    rows = [
        [
            f"{run['fill']:,}",
            f"{run['pairs']}",
            *_cost_cells(run),
            f"{peak_memory(run) / 1e9:.2f}",
            f"{share_of_peak(run):.0%}",
        ]
        for run in sorted(runs, key=lambda run: int(run["fill"]))
    ]
    heads = [
        "max_length",
        "pairs",
        "packed tokens",
        "s per epoch",
        "s per 1,000 tokens",
        "peak memory, GB",
        "share of peak",
    ]
    return f"politune, bf16; rows that fill the length, one pair per pass and eight passes per step.\n\n{_table(heads, rows)}"


def _sizes(runs: list[Record]) -> str:
    rows = []
    for model in dict.fromkeys(run["model"] for run in runs):
        arms_of = {run["arm"]: run for run in runs if run["model"] == model}
        if len(arms_of) < 2:
            continue
        best, own = arms_of["best"], arms_of["politune"]
        rows.append(
            [
                f"{own['weights'] / 1e6:.0f} M",
                f"{seconds(best):.1f}",
                f"{seconds(own):.1f}",
                f"{seconds(best) / seconds(own):.2f}x",
                f"{share_of_peak(own):.0%}",
                f"{peak_memory(best) / 1e9:.2f}",
                f"{peak_memory(own) / 1e9:.2f}",
            ]
        )
    heads = ["weights", "TRL at its best, s per epoch", "politune, s per epoch", "faster by", "share of peak"]
    pairs = f", {runs[0]['pairs']} pairs" if runs else ""
    intro = f"bf16, random weights in Llama's form, with the demo model's vocabulary{pairs}, one run each."
    return f"{intro}\n\n{_table([*heads, 'TRL, GB', 'politune, GB'], rows)}"


def _cost_cells(run: Record) -> list[str]:
    tokens = run["tokens"]["packed"]
    return [f"{tokens:,}", f"{seconds(run):.1f}", f"{1000 * seconds(run) / tokens:.2f}"]


def _limits(profiles: list[Record]) -> str:
    runs = {run["dtype"]: run for run in profiles}
    totals = {dtype: sum(run["groups"].values()) for dtype, run in runs.items()}
    groups = list(next(iter(runs.values()))["groups"]) if runs else []
    largest = runs.get("bf16", next(iter(runs.values())))["groups"] if runs else {}
    rows = [
        [group, *(f"{run['groups'][group] / totals[dtype]:.0%}" for dtype, run in runs.items())]
        for group in sorted(groups, key=lambda group: -largest[group])
    ]
    text = "One epoch of politune under torch's profiler (self time on the CPU, which the profiler itself raises a little)."
    operations = [
        f"{dtype}: " + ", ".join(f"`{name}` {spent / totals[dtype]:.0%}" for name, spent in run["operations"][:8]) + "."
        for dtype, run in runs.items()
    ]
    return "\n\n".join([text, _table(["part of the time", *runs], rows), *operations])


def _arithmetic(main: list[Record], profiles: list[Record]) -> str:
    """How near to the peak each goal is, and how much of it the profile leaves."""
    lines = ["What the goals ask for, by the medians above:", ""]
    for dtype in DTYPES:
        own = list(_by_round(main, "politune", dtype).values())
        if not own:
            continue
        at_peak = statistics.median(run["useful_flops"] / statistics.mean(run["peak_flops_per_second"]) for run in own)
        took = statistics.median(map(seconds, own))
        lines.append(
            f"- {dtype}: the needed operations alone take {at_peak:.1f} s at the peak; politune takes {took:.1f} s."
        )
        for arm, goal in FASTER_THAN.items():
            other = statistics.median(map(seconds, _by_round(main, arm, dtype).values()))
            lines.append(
                f"  {goal}x {NAMES[arm]} ({other:.1f} s) is {other / goal:.1f} s, {at_peak / (other / goal):.0%} of the peak."
            )
        for run in profiles:
            if run["dtype"] == dtype:
                products = run["groups"]["matrix products"] / sum(run["groups"].values())
                rest = took * (1 - products)
                lines.append(
                    f"  Of politune's time {products:.0%} are products, at {at_peak / (took * products):.0%} of the peak's speed."
                    f" Were all of them at the peak and the rest as it is: {at_peak / (at_peak + rest):.0%} of the peak."
                )
    return "\n".join(lines)


def _surroundings(facts: Record) -> str:
    host = facts["machine"]
    listed = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"- {listed}; code {facts['code']}\n"
        f"- {host['processor']}, {host['cores']} cores, {host['memory_gib']} GiB, {host['system']}; threads: {host['threads']}"
    )


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    median = form.format(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({form.format(min(values))} to {form.format(max(values))})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "Not measured."
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
