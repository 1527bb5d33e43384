"""The closing table of a run and the sentences under it."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rrm_engine.bench.progress import first_line
from rrm_engine.bench.summary import RECURSIVE
from rrm_engine.legible import legible_key, plural
from rrm_engine.runs.rows import Row, row_key

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Figures = dict[str, Any]
COLUMNS = {  # of the table of the modes, with the figures in them
    "n": "n",
    "correct": "accuracy",
    "95 %": "accuracy_ci95",
    "latency": "latency_median",
    "crit. path": "critical_path_tokens_median",
    "TTFT": "ttft_median",
    "tokens each": "tokens_median",
    "tokens": "tokens_total",
    "tok/s": "tokens_per_s",
}
PROBLEMS = ("cut", "errors")  # columns that are there only if there is something in them
WIDE, ONLY_WIDE = 100, ("TTFT", "tokens each")
DISPENSABLE = ("95 %", "tok/s", "tokens", "crit. path", "latency")  # left out one after the other on narrow terminals


def print_closing(console: "Console", summary: Figures, rows: list[Row], concurrency: int) -> None:
    """The table of the modes, then what it means, in a dozen lines."""
    if not rows:
        console.print("No row is finished yet.")
        return
    console.print(fitting_table(console, summary["modes"]))
    for line in sentences(summary, concurrency):
        console.print(line, markup=False, highlight=False)
    if line := error_line(rows):
        console.print(line, style="red", markup=False, highlight=False)


def about_solver(about: Figures) -> list[str]:
    """What a solver tells about itself: a line, and more if its checkpoint asks for more than usual sampling, or has
    modules that are not used."""
    unused = f"not used of the checkpoint: {cut(', '.join(about['unused']))}" if "unused" in about else None
    generation = generation_line(about) if "generation_ignored" in about else None
    return [line for line in (model_line(about), generation, unused) if line is not None]


def model_line(about: Figures) -> str:
    """The model and where it runs, in one line."""
    if "base_urls" in about:
        return server_line(about)
    parts = [
        f"{about['model']}",
        f"{count(about['parameters'])} parameters",
        f"{about['dtype']} on {about['device']}",
        f"attention: {about['attention']}",
        *([f"transformers' own forward pass, for ours is wrong here: {about['slower']}"] if "slower" in about else []),
        f"prompts: {about['prompt_style']}" + ("" if about["chat_template"] else " (plain text: no chat template)"),
        f"KV: {about['kv_blocks']:,} blocks of {about['block_size']} tokens",
    ]
    return ", ".join(parts)


def server_line(about: Figures) -> str:
    """The model and the servers that hold it, in one line."""
    held = ", ".join(about["grammar"]) or f"none ({about.get('without_grammar') or 'not asked for'})"
    parts = [
        f"{about['model']}",
        f"{about['backend']} API at {', '.join(about['base_urls'])}",
        f"prompts: {about['prompt_style']}",
        f"nodes go on by {about['continued_by']}",
        f"grammar: {cut(held, 120)}",
        *([f"answers begin as the model likes ({cut(why, 120)})"] if (why := about.get("without_openings")) else []),
        *([f"refused there: {', '.join(about['refused'])}"] if "refused" in about else []),
    ]
    return ", ".join(parts)


def generation_line(about: Figures) -> str | None:
    """The checkpoint's settings besides the usual ones: those used, and those not honoured; None if it has none."""
    usual = ("temperature", "top_k", "top_p", "min_p")
    used = {name: value for values in about["sampling"].values() for name, value in values.items() if name not in usual}
    parts = []
    for name, value in used.items():
        rests = " (rests where a grammar holds)" if name in about["rests_under_grammars"] else ""
        parts.append(f"{name} {cut(json.dumps(value))}{rests}")
    if about["generation_ignored"]:
        parts.append("not honoured: " + ", ".join(about["generation_ignored"]))
    return f"generation_config: {', '.join(parts)}" if parts else None


def cut(text: str, longest: int = 40) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def fitting_table(console: "Console", modes: Figures) -> "Table":
    """The table of the modes with as many columns as there is room for."""
    columns = [name for name in COLUMNS if console.width >= WIDE or name not in ONLY_WIDE]
    columns += [name for name in PROBLEMS if any(figures[name] for figures in modes.values())]
    unbounded = console.options.update(width=1000)
    for least in (*DISPENSABLE, None):
        table = modes_table(modes, columns)
        if least is None or console.measure(table, options=unbounded).maximum <= console.width:
            break
        columns = [name for name in columns if name != least]
    return table


def modes_table(modes: Figures, columns: Sequence[str]) -> "Table":
    """One line per mode."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("mode", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for mode, figures in modes.items():
        table.add_row(mode, *(cell(figures, name) for name in columns))
    medians = [name for name in ("latency", "crit. path", "TTFT", "tokens each") if name in columns]
    table.caption = f"{', '.join(medians).replace('crit.', 'critical')}: medians"
    table.caption_justify = "left"
    return table


def cell(figures: Figures, column: str) -> str:
    """What stands in a column of a mode's line."""
    match column:
        case "correct":
            return percent(figures["accuracy"])
        case "95 %":
            return interval_percent(figures["accuracy_ci95"])
        case "latency":
            return seconds(figures["latency_median"])
        case "TTFT":
            return seconds(figures["ttft_median"])
        case _:
            return count(figures[COLUMNS.get(column, column)])


def sentences(summary: Figures, concurrency: int) -> list[str]:
    """Speed-ups, how recursive runs ended, and the KV cache, in plain words."""
    modes, kv = summary["modes"], summary["kv"]
    lines = []
    if len(modes) == 2:
        lines.append(headline_line(summary["headline"]))
        lines.append(all_pairs_line(summary["all_pairs"]))
    if RECURSIVE in modes:
        lines.append(status_line(modes[RECURSIVE]["status"], summary["atomic_controls"]))
    line = (
        f"KV: {kv['prefilled']:,} tokens prefilled, {kv['reused']:,} reused; blocks: peak {kv['peak_blocks']:,}, "
        f"{kv['forked_blocks']:,} forked, {kv['copied_blocks']:,} copied; {plural(kv['resumes'], 'resume')}"
    )
    if kv["resume_latency_median"] is not None:
        line += f", median {1000 * kv['resume_latency_median']:.0f} ms"
    lines.append(line + ".")
    if kv["spliced_rows"]:
        lines.append(splice_line(kv))
    lines += filter(None, [cut_line(list(modes.values())), grading_line(list(modes.values()))])
    if concurrency > 1:
        lines.append(f"Latencies were measured with {concurrency} tasks in flight and disturb each other.")
    return lines


def cut_line(modes: Sequence[Figures]) -> str:
    """Which limits rows ran into, and what to raise."""
    by: Counter[str] = Counter()
    for figures in modes:
        by.update(figures["cut_by"])
    cut = sum(figures["cut"] for figures in modes)
    if not cut:
        return ""
    flags = ", ".join(f"--{setting.replace('_', '-')} ({plural(n, 'row')})" for setting, n in by.most_common())
    return f"Cut by a limit: {plural(cut, 'row')}. To give them more room, raise {flags}."


def grading_line(modes: Sequence[Figures]) -> str:
    """How many answers could not be judged."""
    failed = sum(figures["grading_errors"] for figures in modes)
    return f"{plural(failed, 'answer')} could not be graded (counted as wrong): see grading_error." if failed else ""


def splice_line(kv: Figures) -> str:
    """That rows are approximate, and by how much."""
    line = f"Approximate: in {plural(kv['spliced_rows'], 'row')} KV of {kv['spliced_tokens']:,} tokens was attached"
    if not kv["splice_compared_tokens"]:
        return line + "."
    line += (
        f". Against the text, over {plural(kv['splice_compared_tokens'], 'token')} after "
        f"{plural(kv['splice_compared_resumes'], 'resume')}: KL divergence {kv['splice_kl_mean']:.2g} nats on average, "
        f"{kv['splice_kl_max']:.2g} at most; likeliest token the same in {percent(kv['splice_top1_agreement'])}"
    )
    if kv["splice_differing_resumes"]:
        line += (
            f"; {plural(kv['splice_differing_resumes'], 'resume')} differ, first at token "
            f"{kv['splice_first_difference_median'] + 1:.0f} (median)"
        )
    return line + "."


def headline_line(figures: Figures) -> str:
    """The headline speed-ups, or why there are none."""
    if not figures["n"]:
        return "Headline: no pair yet where both modes are right and the recursive one a graph that overlaps."
    return (
        f"Headline, {plural(figures['n'], 'pair')} right in both modes with an overlapping graph: recursive runs "
        f"are {speedup(figures, 'latency')}; critical path {speedup(figures, 'critical_path', 'shorter', 'longer')}."
    )


def all_pairs_line(figures: Figures) -> str:
    """The same over every pair, right or wrong."""
    if not figures["n"]:
        return "All pairs: none is complete yet."
    line = f"All pairs ({figures['n']:,}): {speedup(figures, 'latency')}"
    if figures["only_direct_correct"] or figures["only_recursive_correct"]:
        line += (
            f"; only direct right {figures['only_direct_correct']}x, "
            f"only recursive {figures['only_recursive_correct']}x (McNemar p = {figures['mcnemar_p']:.2g})"
        )
    return line + "."


def status_line(status: dict[str, int], controls: Figures) -> str:
    """How recursive runs ended."""
    line = "Recursive runs: " + ", ".join(f"{n} {name}" for name, n in status.items())
    if controls["n"]:
        line += " (atomic: did not split, a control for direct"
        if controls["accuracy"] is not None:
            line += f"; {percent(controls['accuracy'])} right"
        if controls["latency_speedup_median"] is not None:
            line += f", speed-up over direct {controls['latency_speedup_median']:.2f}x"
        line += ")"
    return line + "."


def error_line(rows: list[Row]) -> str:
    """How many rows have an error, with the first one."""
    failed = [row for row in rows if row["error"] is not None]
    if not failed:
        return ""
    what = f"{plural(len(failed), 'row')} with an error (counted as wrong)"
    return f"{what}; {legible_key(row_key(failed[0]))}: {first_line(failed[0]['error'] or '')}"


def speedup(figures: Figures, name: str, more: str = "faster", less: str = "slower") -> str:
    """``1.31x faster (95 % interval 1.10-1.52)``; a speed-up of 0.5 is ``2.00x slower``."""
    ratio, interval = figures[f"{name}_speedup_median"], figures[f"{name}_speedup_ci95"]
    if ratio is None:
        return "not measured"
    word = more
    if ratio < 1:
        word, ratio = less, 1 / ratio
        interval = interval and [1 / bound for bound in reversed(interval)]
    words = f"{ratio:.2f}x {word}"
    return words if interval is None else f"{words} (95 % interval {interval[0]:.2f}-{interval[1]:.2f})"


def percent(share: float | None) -> str:
    """``87 %``."""
    return "-" if share is None else f"{100 * share:.0f} %"


def interval_percent(interval: list[float] | None) -> str:
    """``70-95``."""
    return "-" if interval is None else f"{100 * interval[0]:.0f}-{100 * interval[1]:.0f}"


def seconds(value: float | None) -> str:
    """``0.123 s``, ``12.3 s``, ``123 s``."""
    if value is None:
        return "-"
    return f"{value:.{3 if value < 1 else 1 if value < 100 else 0}f} s"


def count(value: float | None) -> str:
    """``12,345``, ``33.7 M``."""
    if value is None:
        return "-"
    for limit, unit in [(1e10, "G"), (1e7, "M")]:
        if value >= limit:
            return f"{value / (limit / 10):,.1f} {unit}"
    return f"{value:,.0f}"
