"""What a run prints at its end: the table, where everything lies, and what to try next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from at2po_agent.report.live import duration
from at2po_agent.report.run_folder import TreeRecord


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Exact match before and after, greedy and sampled, and what it cost; "–" where nothing was measured."""
    table = Table(title="Exact match on held-out questions", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("before", "after", "95% interval", "change"):
        table.add_column(name, justify="right")
    for name, prefix in (("greedy", ""), ("sampled", "sampled_")):
        before, after = summary.get(f"{prefix}em_before"), summary.get(f"{prefix}em_after")
        interval = _interval(summary, f"{prefix}em_low_after", f"{prefix}em_high_after")
        cells = (_share(before), _share(after), interval, _change(before, after))
        table.add_row(name, *cells, style="" if prefix else "bold")
    return table


def evaluation_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Figures of evaluations by mode: exact match with its 95% interval, F1, turns, tokens."""
    table = Table(title="Evaluation", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("questions", "exact match", "95% interval", "F1", "reward", "turns", "tokens"):
        table.add_column(name, justify="right")
    for mode, figures in results.items():
        interval = _interval(figures, "em_low", "em_high")
        table.add_row(
            mode,
            str(figures["questions"]),
            _share(figures["em"]),
            interval,
            _share(figures["f1"]),
            _share(figures["reward"]),
            f"{figures['turns']:.2f}",
            f"{figures['tokens']:.1f}",
        )
    return table


def tree_table(records: Sequence[TreeRecord], title: str) -> Table:
    """Trees by number: question, leaves, how many of them are right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, side in (("number", "right"), ("id", "left"), ("question", "left"), ("leaves", "right")):
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    table.add_column("correct", justify="right")
    for number, record in enumerate(records):
        outcomes = [record.tree.outcomes[leaf] or {} for leaf in record.tree.leaves()]
        correct = sum(1 for outcome in outcomes if outcome.get("em") == 1)
        cells = [str(number), record.tree.task_id, record.question, str(len(outcomes)), str(correct)]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def cost_line(summary: Mapping[str, Any]) -> str:
    """Sampled tokens, steps and wall time in one line."""
    parts = []
    if summary.get("steps") is not None:
        parts.append(f"{summary['steps']} step" + ("" if summary["steps"] == 1 else "s"))
    if summary.get("sampled_tokens") is not None:
        parts.append(f"{int(summary['sampled_tokens']):,} sampled tokens")
    if summary.get("wall_seconds") is not None:
        parts.append(f"{duration(float(summary['wall_seconds']))} wall time")
    return " · ".join(parts)


def print_ending(
    console: Console,
    run: Path,
    summary: Mapping[str, Any],
    written: Sequence[Path],
    commands: Sequence[tuple[str, str]],
) -> None:
    """Print the end of a run.

    Args:
        console: Where to.
        run: The run's folder.
        summary: Its `summary.json`.
        written: Pictures and pages to look at.
        commands: (command, what it does) of what to try next.
    """
    console.print()
    console.print(summary_table(summary))
    if line := cost_line(summary):
        console.print(line, highlight=False)
    console.print()
    _names(console, "Run folder", [(shown_path(run), "")])
    if written:
        _names(console, "Look at", [(shown_path(path), "") for path in written])
    _names(console, "Try next", commands)


def shown_path(path: Path) -> str:
    """A path as short as it can be typed here."""
    absolute = path.resolve()
    try:
        return str(absolute.relative_to(Path.cwd()))
    except ValueError:
        return str(absolute)


def command_line(*words: str | Path) -> str:
    """A command that a shell reads back as these words."""
    return shlex.join(str(word) for word in words)


def _names(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for index, (name, meaning) in enumerate(rows):
        line = Text(f"{title if index == 0 else '':<12}")
        line.append(f"{name:<{width}}" if meaning else name, style="cyan")
        line.append(f"  {meaning}" if meaning else "", style="dim")
        console.print(line, soft_wrap=True)


def _share(value: Any) -> str:
    return "–" if value is None else f"{float(value):.3f}"


def _interval(figures: Mapping[str, Any], low: str, high: str) -> str:
    if figures.get(low) is None or figures.get(high) is None:
        return "–"
    return f"{_share(figures[low])} – {_share(figures[high])}"


def _change(before: Any, after: Any) -> str:
    return "–" if before is None or after is None else f"{float(after) - float(before):+.3f}"
