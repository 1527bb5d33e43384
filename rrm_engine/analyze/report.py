"""The analysis as tables in a terminal, each with the formulas of its ratios below it."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rrm_engine.analyze.contrast import QUANTITIES, sentence
from rrm_engine.bench.table import count, interval_percent, percent, seconds
from rrm_engine.legible import legible, legible_key, plural
from rrm_engine.runs.trust import DIRECT, RECURSIVE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Figures = dict[str, Any]
SHOWN_ROWS = 200
SHOWN_RUNS = 5  # of an arm
NAMES = {DIRECT: "direct", RECURSIVE: "recursive"}
POPULATIONS = {"all": "all", "headline": "headline", "atomic": "did not split"}
RATIO_FORMULAS = ("median", "geometric_mean", "of_sums", "tokens_per_s_ratio", "ci95")


def print_report(console: "Console", document: Figures, rows: bool = False) -> None:
    """All tables; with ``rows`` every row's label and reason."""
    arms, formulas = document["arms"], document["formulas"]
    if len(arms) > 1:
        _arms(console, arms)
    for part in (_modes, _ratios, _shape, _batch, _servers, _controls, _labels):
        part(console, arms, formulas)
    for found in document["comparisons"]:
        _comparison(console, found, formulas)
    for arm in arms:
        for caution in arm["cautions"]:
            _line(console, f"Caution: {arm['name']}: {caution}.")
    if rows:
        _rows(console, arms, document["rows"])


def _arms(console: "Console", arms: Sequence[Figures]) -> None:
    """What the arms' numbers in the tables stand for."""
    for arm in arms:
        runs = [legible(run["path"]) for run in arm["runs"]]
        more = f" and {len(runs) - SHOWN_RUNS:,} more" if len(runs) > SHOWN_RUNS else ""
        name = "" if [arm["name"]] == runs else f"{arm['name']}: "
        _line(console, f"Arm {_number(arms, arm)}: {name}{', '.join(runs[:SHOWN_RUNS])}{more}")
    console.print()


def _modes(console: "Console", arms: Sequence[Figures], formulas: Figures) -> None:
    sampled = any(figures["k"] > 1 for arm in arms for figures in arm["modes"].values())
    stepped = any(arm["drafted"] for arm in arms)
    table = _table("Accuracy, time and tokens", *_of_arm(arms), "mode")
    heads = ["rows", "right", "95 %", *(["avg@k", "95 %", "pass@k"] if sampled else []), "to answer", "path"]
    for head in [*heads, *(["steps"] if stepped else []), "tokens", "tok/s"]:
        table.add_column(head, justify="right", no_wrap=True)
    for arm in arms:
        for mode, f in arm["modes"].items():
            cells = [count(f["n"]), percent(f["accuracy"]), interval_percent(f["accuracy_ci95"])]
            if sampled:
                cells += [percent(f["avg_at_k"]), interval_percent(f["avg_at_k_ci95"]), percent(f["pass_at_k"])]
            cells += [seconds(f["latency_s_median"]), count(f["critical_path_tokens_median"])]
            cells += [count(f["critical_path_steps_median"])] if stepped else []
            cells += [count(f["total_tokens_median"]), count(f["tokens_per_s"])]
            table.add_row(*_of_arm(arms, arm), NAMES[mode], *cells)
    console.print(table)
    line = "to answer, path, tokens: medians of a row; path: the longest chain of tokens decoded one after another"
    _line(console, line + (", steps: of forward passes." if stepped else "."))
    if sampled:
        ks = sorted({figures["k"] for arm in arms for figures in arm["modes"].values()})
        _line(console, f"k is {' or '.join(map(str, ks))}, the fewest samples that a problem has.")
    _formulas(console, formulas, ["accuracy", *(["avg_at_k", "pass_at_k"] if sampled else []), "tokens_per_s"])


def _ratios(console: "Console", arms: Sequence[Figures], formulas: Figures) -> None:
    chosen = [
        (arm, POPULATIONS[name], arm["direct_and_recursive"][name])
        for arm in arms
        for name in POPULATIONS
        if arm["direct_and_recursive"][name]["timed"]
    ]
    if not chosen:
        return
    table = _table("Direct over recursive, on the same problems", *_of_arm(arms), "pairs", "of")
    groups = [([*_of_arm(arms, arm), name], figures) for arm, name, figures in chosen]
    _add_ratios(table, groups, any(arm["drafted"] for arm in arms))
    console.print(table)
    _line(
        console, "first is direct, second is recursive: above 1 the recursive side takes less; in tok/s it makes more."
    )
    for arm in arms:
        figures = arm["direct_and_recursive"]["all"]
        if figures["n"]:
            about = f"{arm['name']}: " if len(arms) > 1 else ""
            _line(console, about + sentence(figures, "direct", "recursive"))
            if arm["compared_with"]:
                _line(console, f"{about}{arm['compared_with']}.")
    _formulas(console, formulas, RATIO_FORMULAS)


def _comparison(console: "Console", found: Figures, formulas: Figures) -> None:
    modes = {mode: figures for mode, figures in found["modes"].items() if figures["n"]}
    if not modes:
        if not found["lent"]:
            _line(
                console, f"{found['first']} and {found['second']} have no problem in common that both ran in one mode."
            )
        return
    table = _table(f"{found['first']} over {found['second']}", "pairs", "of")
    _add_ratios(table, [([NAMES[mode]], figures) for mode, figures in modes.items()], found["drafted"])
    console.print(table)
    _line(
        console,
        f"first is {found['first']}, second is {found['second']}: above 1 the second takes less; in tok/s more.",
    )
    for mode, figures in modes.items():
        _line(console, f"{NAMES[mode]}: {sentence(figures, 'the first', 'the second')}")
    _formulas(console, formulas, RATIO_FORMULAS)


def _add_ratios(table: "Table", groups: Iterable[tuple[list[Any], Figures]], stepped: bool) -> None:
    """A line for each quantity of a group of pairs, the group's names on the first one; steps only if ``stepped``."""
    for head in ("n", "median", "95 %", "geo. mean", "of sums"):
        table.add_column(head, justify="right", no_wrap=True)
    for names, figures in groups:
        for name, what in QUANTITIES.items():
            if (ratio := figures[name]) and (stepped or name != "critical_path_steps"):
                cells = [count(ratio["n"]), _times(ratio["median"]), _span(ratio["median_ci95"])]
                table.add_row(*names, what, *cells, _times(ratio["geometric_mean"]), _times(ratio["of_sums"]))
                names = [""] * len(names)
        if rates := figures["tokens_per_s"]:
            table.add_row(*names, "tok/s", count(figures["timed"]), "", "", "", _times(rates["ratio"]))
        table.add_section()


def _shape(console: "Console", arms: Sequence[Figures], formulas: Figures) -> None:
    shown = [arm for arm in arms if arm["shape"]["n"]]
    if not shown:
        return
    table = _table("What recursive rows did", *_of_arm(arms))
    for head in ("rows", "split", "95 %", "nodes", "width", "depth", "tok/path", "overlap", "parallel"):
        table.add_column(head, justify="right", no_wrap=True)
    for arm in shown:
        s = arm["shape"]
        table.add_row(
            *_of_arm(arms, arm),
            count(s["n"]),
            percent(s["activation"]),
            interval_percent(s["activation_ci95"]),
            *(_decimal(s[name]) for name in ("nodes_mean", "width_mean", "depth_mean", "parallelism_tokens")),
            *(percent(s[name]) for name in ("overlap", "parallel")),
        )
    console.print(table)
    _formulas(console, formulas, ["activation", "parallelism_tokens", "overlap", "parallel"])
    for arm in shown:
        if repairs := arm["shape"]["repairs"]:
            about = f"{arm['name']}: " if len(arms) > 1 else ""
            _line(console, f"{about}Repaired events: {_counts(repairs)}.")


def _batch(console: "Console", arms: Sequence[Figures], formulas: Figures) -> None:
    shown = [arm for arm in arms if arm["batch"]["jobs"]]
    for arm in arms:
        if problem := arm["batch"]["problem"]:
            _line(console, f"{arm['name']}: no figures of nodes over time: {problem}.")
        if left_out := arm["batch"]["left_out"]:
            _line(console, f"{arm['name']}: {plural(left_out, 'job')} left out of these, with an incomplete trace.")
    if not shown:
        return
    table = _table("What nodes did with their time", *_of_arm(arms))
    for head in ("at work", "idle parents", "queued", "longest", "nodes", "cancelled", "no use", "tokens"):
        table.add_column(head, justify="right", no_wrap=" " not in head, min_width=len(head.split()[-1]))
    for arm in shown:
        b, use = arm["batch"], arm["batch"]["recursive"]
        cells = [
            _decimal(b["nodes_at_work"]),
            percent(b["idle_parents"]),
            percent(b["queued"]),
            seconds(b["queued_s_max"]),
        ]
        cells += [
            count(use["nodes"]),
            count(use["cancelled"]),
            percent(use["of_no_use"]),
            percent(use["tokens_of_no_use"]),
        ]
        table.add_row(*_of_arm(arms, arm), *cells)
    console.print(table)
    _formulas(console, formulas, ["nodes_at_work", "idle_parents", "queued", "of_no_use", "tokens_of_no_use"])


def _servers(console: "Console", arms: Sequence[Figures], formulas: Figures) -> None:
    shown = [arm for arm in arms if arm["servers"]]
    for arm in shown:
        s = arm["servers"]
        about = f"{arm['name']}: " if len(arms) > 1 else ""
        nodes = ", ".join(f"{legible(name)} {n:,}" for name, n in s["nodes"].items())
        line = f"{about}Nodes by replica: {nodes}; imbalance {_decimal(s['imbalance'])}"
        if s["attempts"]:  # of servers: in this process nothing is asked for twice
            line += f"; {seconds(s['queued_s'])} queued"
            line += f", {plural(s['attempts'], 'attempt')}, {plural(s['restarts'], 'restart')}"
        if s["cached_tokens"] is not None:
            untold = f", {plural(s['cached_untold'], 'stream')} did not tell" if s["cached_untold"] else ""
            line += f", {s['cached_tokens']:,} tokens cached{untold}"
        _line(console, f"{line}.")
    if shown:
        _formulas(console, formulas, ["imbalance"])


def _controls(console: "Console", arms: Sequence[Figures], formulas: Figures) -> None:
    shown = [arm for arm in arms if arm["controls"]]
    if not shown:
        return
    table = _table("Direct solving with what recursion was allowed", *_of_arm(arms), "what")
    for head in ("problems", "right", "95 %"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    for arm in shown:
        for name, found, note in _control_lines(arm["controls"]):
            cells = [count(found["problems"]), percent(found["accuracy"]), interval_percent(found["accuracy_ci95"])]
            table.add_row(*_of_arm(arms, arm), name, *cells, note)
    console.print(table)
    for arm in shown:
        paths = arm["controls"]["one_at_a_time"]
        about = f"{arm['name']}: " if len(arms) > 1 else ""
        _line(
            console,
            f"{about}Path in tokens: direct {count(paths['direct'])}, recursive {count(paths['recursive'])}, recursive "
            f"one node at a time {count(paths['one_at_a_time'])}. For its time run again with --max-concurrency 1 and "
            f"give both runs.",
        )
    _formulas(console, formulas, ["matched_tokens", "matched_path", "one_at_a_time"])


def _control_lines(controls: Figures) -> Iterable[tuple[str, Figures, str]]:
    tokens, path = controls["matched_tokens"], controls["matched_path"]
    note = f"N is {tokens['samples_mean']:.1f} on average" if tokens["samples_mean"] else ""
    if tokens["problems_with_too_few"]:
        lacking = (
            f"{plural(tokens['problems_with_too_few'], 'problem')} left out: needs --samples {tokens['samples_wanted']}"
        )
        note = f"{note}; {lacking}" if note else lacking
    yield "recursive", controls["recursive"], ""
    yield "direct", controls["direct"], ""
    yield "direct, same total tokens", tokens, note
    late = f"{plural(path['right_too_late'], 'row')} right but later" if path["right_too_late"] else ""
    yield "direct, same critical path", path, late


def _labels(console: "Console", arms: Sequence[Figures], formulas: Figures) -> None:
    for arm in arms:
        for mode, labels in arm["labels"].items():
            about = f"{arm['name']}, {NAMES[mode]}" if len(arms) > 1 else NAMES[mode].capitalize()
            marks = arm["marks"][mode]
            line = f"{about} rows: {_counts(labels)}" + (f"; of them {_counts(marks)}" if marks else "")
            _line(console, f"{line}.")
    _line(console, "Why a row has its label: --rows, or rows.csv of --out.")


def _rows(console: "Console", arms: Sequence[Figures], rows: Sequence[Figures]) -> None:
    from rich.text import Text

    table = _table("Rows", *_of_arm(arms), "row")
    table.add_column("label", no_wrap=True)
    table.add_column("to answer", justify="right", no_wrap=True)
    table.add_column("why")
    by_name = {arm["name"]: arm for arm in arms}
    for row in rows[:SHOWN_ROWS]:
        key = f"{row['id']}/{row['mode']}/{row['sample']}" + (f" seed {row['seed']}" if row["seed"] else "")
        cells = [Text(legible_key(key)), row["label"], seconds(row["latency_s"]), Text(legible(row["reason"], 200))]
        table.add_row(*_of_arm(arms, by_name[row["arm"]]), *cells)
    console.print(table)
    if len(rows) > SHOWN_ROWS:
        _line(console, f"... and {plural(len(rows) - SHOWN_ROWS, 'row')} more: see rows.csv of --out.")


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(legible(title)),  # no markup: names are others' texts
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name == "arm")
    return table


def _formulas(console: "Console", formulas: Figures, names: Iterable[str]) -> None:
    for name in names:
        console.print(f"  {name} = {formulas[name]}", markup=False, highlight=False, style="dim")
    console.print()


def _line(console: "Console", text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _of_arm(arms: Sequence[Figures], arm: Figures | None = None) -> list[Any]:
    """The head of the arms' column, or what stands in it for ``arm``: its number, for names would fill the table;
    nothing where there is only one arm."""
    if len(arms) == 1:
        return []
    return ["arm"] if arm is None else [str(_number(arms, arm))]


def _number(arms: Sequence[Figures], arm: Figures) -> int:
    return next(number for number, other in enumerate(arms, 1) if other is arm)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _span(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {legible(name)}" for name, n in found.items())
