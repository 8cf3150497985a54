"""Prints what a person reads on a terminal at the end of a command: figures, costs, files, next commands.

Every table takes the JSON values that are also written to files.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from at2po_agent.evaluation.published import GROUPS, PUBLISHED, PUBLISHED_MODEL, SHORT, suite_groups
from at2po_agent.report.live import duration
from at2po_agent.report.run_folder import TreeRecord, asked_questions, is_right

NOTHING = "–"

# The end of a training run ----------------------------------------------------------------------------------


def print_ending(
    console: Console,
    run: Path,
    summary: Mapping[str, Any],
    written: Sequence[Path],
    commands: Sequence[tuple[str, str]],
) -> None:
    """Print the end of a run.

    Args:
        console: Where to print.
        run: The run's folder.
        summary: Its `summary.json`.
        written: Pictures and pages to look at.
        commands: (command, what it does) of what to try next.
    """
    parts = []
    if (steps := summary.get("steps")) is not None:
        parts.append(f"{steps} step" + ("" if steps == 1 else "s"))
    if summary.get("sampled_tokens") is not None:
        parts.append(f"{int(summary['sampled_tokens']):,} sampled tokens")
    if summary.get("wall_seconds") is not None:
        parts.append(f"{duration(float(summary['wall_seconds']))} wall time")
    console.print()
    console.print(summary_table(summary))
    if parts:
        console.print(" · ".join(parts), highlight=False)
    console.print()
    blocks = [
        ("Run folder", [(shown_path(run), "")]),
        ("Look at", [(shown_path(path), "") for path in written]),
        ("Try next", commands),
    ]
    for title, rows in blocks:
        width = max((len(name) for name, _ in rows), default=0)
        for index, (name, meaning) in enumerate(rows):
            line = Text(f"{title if index == 0 else '':<12}")
            line.append(f"{name:<{width}}" if meaning else name, style="cyan")
            line.append(f"  {meaning}" if meaning else "", style="dim")
            console.print(line, soft_wrap=True)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Tabulate the scores before and after training.

    First comes success where the environment reports it, else exact match, else the reward; then every other
    number that the environment reports, and the reward. "–" stands where nothing was measured.
    """

    def measured(score: str) -> bool:
        keys = (f"{prefix}{score}_{when}" for prefix in ("", "sampled_") for when in ("before", "after"))
        return any(summary.get(key) is not None for key in keys)

    titles = {"success": "Success", "em": "Exact match", "reward": "Reward"}
    named = ("success", "em", *(name for name in summary.get("metrics", ()) if name not in titles), "reward")
    scores = [score for score in named if measured(score)] or ["em"]
    asked = asked_questions(summary, "evaluated_questions", "seen_questions")
    table = _table(f"{titles.get(scores[0], scores[0])} on {asked}")
    table.add_column("")
    for name in ("before", "after", "95% interval", "change"):
        table.add_column(name, justify="right")
    for score in scores:
        for mode, prefix in (("greedy", ""), ("sampled", "sampled_")):
            before, after = summary.get(f"{prefix}{score}_before"), summary.get(f"{prefix}{score}_after")
            interval = _interval(summary, f"{prefix}{score}_low_after", f"{prefix}{score}_high_after")
            change = NOTHING if before is None or after is None else f"{float(after) - float(before):+.3f}"
            first = score == scores[0]
            label = mode if first else f"{titles.get(score, score).lower()}, {mode}"
            style = "bold" if first and not prefix else ""
            ends = first and bool(prefix) and len(scores) > 1
            table.add_row(
                Text(label), _share(before), _share(after), interval, change, style=style, end_section=ends
            )
    keys = {"training": "failures", "evaluations": "failures_in_evaluations"}
    _caption(table, {part: summary.get(key) for part, key in keys.items()})
    return table


def tree_table(records: Sequence[TreeRecord], title: str) -> Table:
    """List trees by number: question, leaves, how many of them are right."""
    table = _table(title)
    for name, side in (("number", "right"), ("id", "left"), ("question", "left"), ("leaves", "right")):
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    table.add_column("correct", justify="right")
    for number, record in enumerate(records):
        outcomes = [record.tree.outcomes[leaf] or {} for leaf in record.tree.leaves()]
        correct = sum(map(is_right, outcomes))
        cells = [str(number), record.tree.task_id, record.question, str(len(outcomes)), str(correct)]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def shown_path(path: Path) -> str:
    """Write a path as short as it can be typed here."""
    absolute = path.resolve()
    try:
        return str(absolute.relative_to(Path.cwd()))
    except ValueError:
        return str(absolute)


def command_line(*words: str | Path) -> str:
    """Write a command that a shell reads back as these words."""
    return shlex.join(str(word) for word in words)


# An evaluation ----------------------------------------------------------------------------------------------


def print_evaluation(console: Console, results: Mapping[str, Any], name: str) -> None:
    """Print the figures of an evaluation or of a suite, then the costs of a served model, with remarks.

    Args:
        console: Where to print.
        results: What `target.evaluate_policy` returned.
        name: The name of the policy in the table of a suite; a served model has its own.
    """
    told = results.get("served")
    if "suite" in results:
        print_suite(console, results, name if told is None else told["model"])
    else:
        modes = {mode: results[mode] for mode in results if mode != "served"}
        console.print(evaluation_table(modes))
        if any(figures.get("seen") for figures in modes.values()):
            asked = asked_questions(next(iter(modes.values())))
            console.print(Text(f"Note: {asked}", style="yellow"), soft_wrap=True)
    if told is None:
        return
    table = _table(f"{told['model']} at {told['url']}")
    counts = ("requests", "retries", "failures", "prompt_tokens", "cached_tokens", "completion_tokens")
    for count in (*counts, "cost"):
        table.add_column(count.replace("_", " "), justify="right")
    cost = NOTHING if told["cost"] is None else f"{told['cost']:.4f}"
    table.add_row(*(f"{told[count]:,}" for count in counts), cost)
    console.print(table)
    remarks = []
    if told["failures"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in told["reasons"].items())
        last = f"; the last one: {told['last_failure']}"
        remarks.append(f"{told['failures']} answers were given up and count as wrong ({kinds}){last}")
    if draws := [member for member in told["left_out"] if member in ("temperature", "top_p")]:
        remarks.append(f"the server refuses {' and '.join(draws)}: its own default decided the draws")
    if "logprobs" in told["left_out"]:
        remarks.append("the server gives no log-probs: tokens of an episode are not known")
    if told["shortened"]:
        remarks.append(
            f"{told['shortened']} answers had less room in the context than rollout.max_turn_tokens"
        )
    for remark in remarks:
        console.print(f"Note: {remark}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def evaluation_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Tabulate figures by mode, with reward, turns and tokens.

    The scores are exact match with its 95% interval and F1, where the environment scores them, and the
    numbers that it reports.
    """
    table = _table("Evaluation")
    table.add_column("")
    reported = sorted({name for figures in results.values() for name in figures.get("metrics", {})})
    matched = any(figures["em"] is not None for figures in results.values())
    scores = ["exact match", "95% interval", "F1", *reported] if matched else reported
    for name in ("questions", *scores, "reward", "turns", "tokens"):
        table.add_column(name, justify="right")
    for mode, figures in results.items():
        cells = [_share(figures.get("metrics", {}).get(name)) for name in reported]
        if matched:
            cells = [_share(figures["em"]), _interval(figures), _share(figures["f1"]), *cells]
        table.add_row(
            mode,
            str(figures["questions"]),
            *cells,
            _share(figures["reward"]),
            f"{figures['turns']:.2f}",
            f"{figures['tokens']:.1f}",
        )
    _caption(table, {mode: figures.get("failures") for mode, figures in results.items()})
    return table


def print_suite(console: Console, results: Mapping[str, Any], name: str) -> None:
    """Print the published table of each group, the details, then every remark.

    Args:
        console: Where to print.
        results: What `suite.evaluate_suite` returned.
        name: The name of the policy.
    """
    for group in suite_groups(results["suite"]):
        console.print(published_table(results, group, name))
    console.print(detail_table(results))
    for remark in results["remarks"]:
        alarming = remark.startswith("NOT COMPARABLE")
        line = Text("Warning: " if alarming else "Note: ", style="bold yellow" if alarming else "bold")
        console.print(line.append(remark, style="yellow" if alarming else ""), soft_wrap=True)
    published = results["published"]
    console.print(Text(f"Published rows: {published['source']}. {published['remark']}"), soft_wrap=True)


def published_table(results: Mapping[str, Any], group: str, name: str) -> Table:
    """Tabulate exact match in percent: published rows, then the policy's; * marks a partial average."""
    table = _table(f"Exact match, %, {group}", box.SIMPLE_HEAD)
    table.add_column(PUBLISHED_MODEL, min_width=len(PUBLISHED_MODEL), overflow="fold")
    for key in GROUPS[group]:
        table.add_column(SHORT[key], justify="right", no_wrap=True)
    table.add_column("Avg.", justify="right", no_wrap=True)
    for row in PUBLISHED:
        sets = [f"{row.sets[key]:.2f}" for key in GROUPS[group]]
        table.add_row(f"{row.name} (published)", *sets, f"{row.averages[group]:.2f}")
    table.add_section()
    own = [_percent(results["sets"][key]["figures"]) for key in GROUPS[group]]
    table.add_row(Text(name), *own, _average(results["averages"][group]), style="bold")
    return table


def detail_table(results: Mapping[str, Any]) -> Table:
    """Tabulate each set and average: exact match, its 95% interval, questions asked, and their origin."""
    table = _table("This policy: greedy, one chain per question", box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for title in ("EM, %", "95% interval", "F1, %", "questions"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("questions from", overflow="fold")
    origins = {"given": "given", "cache": "cache", "sample": "SAMPLE, not comparable"}
    for group in suite_groups(results["suite"]):
        for key in GROUPS[group]:
            record = results["sets"][key]
            figures, origin, size = record["figures"], record["origin"], record["size"]
            if figures is None:
                where = Text("missing", style="red") if origin == "missing" else Text("not asked yet")
                asked = f"0 of {size:,}"
            else:
                style = "yellow" if origin == "sample" else ""
                where = Text(f"{origins[origin]} ({record['split']})", style=style)
                asked = f"{figures['questions']:,} of {size:,}"
            interval = _interval(figures, scale=100)
            table.add_row(SHORT[key], _percent(figures), interval, _percent(figures, "f1"), asked, where)
        average = results["averages"][group]
        cells = (_average(average), _interval(average, scale=100), "")
        if average is None:
            asked, sets = NOTHING, ""
        else:
            asked, sets = f"{average['questions']:,}", f"{len(average['sets'])} of {len(GROUPS[group])} sets"
            sets += ", partial" if average["partial"] else ""
        table.add_row(f"Avg. {group}", *cells, asked, sets, style="bold", end_section=True)
    found = {SHORT[key]: one["figures"] for key, one in results["sets"].items() if one["figures"] is not None}
    _caption(table, {name: figures.get("failures") for name, figures in found.items()})
    return table


def _table(title: str, lines: box.Box = box.HEAVY_HEAD) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=lines)


def _share(value: Any) -> str:
    return NOTHING if value is None else f"{float(value):.3f}"


def _caption(table: Table, parts: Mapping[str, Mapping[str, int] | None]) -> None:
    """Say below a table what failed how often in which part, such as "failures: greedy env_error 12"."""
    said = []
    for name, counts in parts.items():
        if failed := ", ".join(f"{kind} {count}" for kind, count in (counts or {}).items() if count):
            said.append(f"{name} {failed}")
    if any(counts is not None for counts in parts.values()):  # files of older releases do not count them
        table.caption, table.caption_justify = f"failures: {'; '.join(said) or 'none'}", "left"


def _percent(figures: Mapping[str, Any] | None, key: str = "em") -> str:
    return NOTHING if figures is None else f"{100 * figures[key]:.2f}"


def _average(average: Mapping[str, Any] | None) -> str:
    return _percent(average) + ("*" if average is not None and average["partial"] else "")


def _interval(
    figures: Mapping[str, Any] | None, low: str = "em_low", high: str = "em_high", *, scale: int = 1
) -> str:
    """Both ends of an interval, as shares (scale 1) or percentages (scale 100)."""
    if figures is None or figures.get(low) is None or figures.get(high) is None:
        return NOTHING
    digits = 3 if scale == 1 else 2
    return f"{scale * float(figures[low]):.{digits}f} – {scale * float(figures[high]):.{digits}f}"
