"""The published table with the row of the policy that was evaluated, and what stands behind that row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from at2po_agent.evaluation.suite import GROUPS, PUBLISHED, PUBLISHED_MODEL, SHORT, suite_groups

_NOTHING = "–"


def print_suite(console: Console, results: Mapping[str, Any], name: str) -> None:
    """Print the published table of each group, the details, then every remark.

    Args:
        console: Where to.
        results: What `suite_run.evaluate_suite` returns.
        name: What the policy is called.
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
    """Exact match in percent: published rows, then the policy's; * marks an average over fewer sets."""
    table = _table(f"Exact match, %, {group}")
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
    """By set and average: exact match, its 95% interval, questions asked of how many, and from where."""
    table = _table("This policy: greedy, one chain per question")
    table.add_column("", no_wrap=True)
    for title in ("EM, %", "95% interval", "F1, %", "questions"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("questions from", overflow="fold")
    for group in suite_groups(results["suite"]):
        for key in GROUPS[group]:
            _add_set(table, SHORT[key], results["sets"][key])
        average = results["averages"][group]
        asked = _NOTHING if average is None else f"{average['questions']:,}"
        sets = "" if average is None else f"{len(average['sets'])} of {len(GROUPS[group])} sets"
        partial = "" if average is None or not average["partial"] else ", partial"
        cells = (_average(average), _interval(average), "", asked, sets + partial)
        table.add_row(f"Avg. {group}", *cells, style="bold", end_section=True)
    return table


def _add_set(table: Table, short: str, record: Mapping[str, Any]) -> None:
    figures = record["figures"]
    if figures is None:
        missing = record["origin"] == "missing"
        why = Text("missing", style="red") if missing else Text("not asked yet")
        table.add_row(short, _NOTHING, _NOTHING, _NOTHING, f"0 of {record['size']:,}", why)
        return
    where = {"given": "given", "cache": "cache", "sample": "SAMPLE, not comparable"}[record["origin"]]
    table.add_row(
        short,
        _percent(figures),
        _interval(figures),
        _percent(figures, "f1"),
        f"{figures['questions']:,} of {record['size']:,}",
        Text(f"{where} ({record['split']})", style="yellow" if record["origin"] == "sample" else ""),
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def _percent(figures: Mapping[str, Any] | None, key: str = "em") -> str:
    return _NOTHING if figures is None else f"{100 * figures[key]:.2f}"


def _average(average: Mapping[str, Any] | None) -> str:
    return _percent(average) + ("*" if average is not None and average["partial"] else "")


def _interval(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return _NOTHING
    return f"{100 * figures['em_low']:.2f} – {100 * figures['em_high']:.2f}"
