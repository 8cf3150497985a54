"""`at2po eval URL`: from the words of the command line to a served model's figures and what they cost."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from at2po_agent.cli.suite import results_file, take_json_file
from at2po_agent.config.sections import Config
from at2po_agent.evaluation.served import (
    Served,
    evaluate_served,
    evaluate_served_suite,
    make_served,
    open_policy,
    served_config,
    tools_env,
)
from at2po_agent.evaluation.suite import suite_groups
from at2po_agent.policies.openai import OpenAIPolicy
from at2po_agent.report.ending import evaluation_table, shown_path
from at2po_agent.report.live import make_listener
from at2po_agent.report.suite_table import print_suite
from at2po_agent.runs.progress import Progress
from at2po_env.errors import At2poError, ConfigError

_INTERRUPTED = 130


def is_served(target: str) -> bool:
    """Whether what is to be evaluated is a server's address."""
    return target.startswith(("http://", "https://"))


def evaluate_and_print(
    target: str,
    words: Sequence[str],
    *,
    suite: str | None,
    config: str | None,
    env: str | None,
    options: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Evaluate a served model; print and write the figures, and what they cost even when it breaks off.

    Raises:
        At2poError: A setting is wrong, or the server is no use.
    """
    served = _settings(target, options)
    if suite is not None:
        suite_groups(suite)  # a misspelt name is said before anything is loaded
        if env is not None or served.temperature:
            raise ConfigError(
                "--suite asks its own environments, greedily. Fix: leave --env, --temperature out"
            )
    overrides, file = take_json_file(words, as_json=as_json)
    settings = served_config(served, overrides, config=config, env=env)
    files = [] if file is None else [file]
    if suite is not None:
        files.insert(0, results_file(settings, settings.model.path or target, suite))
    console, policy = Console(stderr=True), open_policy(served, tools_env(served, settings, suite))
    try:
        with policy, make_listener(console) as listener:
            results = _evaluate(served, settings, policy, listener, suite=suite, files=files)
    except (KeyboardInterrupt, At2poError) as stop:
        _say_broken_off(console, policy, files, suite)
        if isinstance(stop, At2poError):
            raise
        raise typer.Exit(_INTERRUPTED) from stop
    if as_json and file is None:
        typer.echo(json.dumps(results, indent=2, ensure_ascii=False))
        return
    _print(results, served, suite)
    for path in files:
        typer.echo(shown_path(path))


def _settings(target: str, options: Mapping[str, Any]) -> Served:
    given = dict(options)
    extra = given.pop("extra", None)
    try:
        members = {} if extra is None else json.loads(extra)
    except ValueError as error:
        raise ConfigError(f"--extra: not JSON: {error}") from error
    return make_served(url=target, extra=members, **given)


def _evaluate(
    served: Served,
    config: Config,
    policy: OpenAIPolicy,
    progress: Progress,
    *,
    suite: str | None,
    files: Sequence[Path],
) -> dict[str, Any]:
    if suite is not None:
        return evaluate_served_suite(served, config, suite, policy, progress, files=files)
    results = evaluate_served(served, config, policy, progress)
    for path in files:
        path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return results


def _print(results: Mapping[str, Any], served: Served, suite: str | None) -> None:
    console, told = Console(), results["served"]
    if suite is None:
        console.print(evaluation_table({served.mode: results[served.mode]}))
    else:
        print_suite(console, results, told["model"])
    console.print(cost_table(told))
    for line in remarks(told):
        console.print(f"Note: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def cost_table(told: Mapping[str, Any]) -> Table:
    """Requests, tokens and cost of a served evaluation."""
    table = Table(title=f"{told['model']} at {told['url']}", title_justify="left", title_style="bold")
    names = ("requests", "retries", "failures", "prompt_tokens", "cached_tokens", "completion_tokens")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("cost", justify="right")
    cost = "–" if told["cost"] is None else f"{told['cost']:.4f}"
    table.add_row(*(f"{told[name]:,}" for name in names), cost)
    return table


def remarks(told: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures has to know."""
    lines = []
    if told["failures"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in told["reasons"].items())
        last = f"; the last one: {told['last_failure']}"
        lines.append(f"{told['failures']} answers were given up and count as wrong ({kinds}){last}")
    if draws := [name for name in told["left_out"] if name in ("temperature", "top_p")]:
        lines.append(f"the server refuses {' and '.join(draws)}: its own default decided the draws")
    if "logprobs" in told["left_out"]:
        lines.append("the server gives no log-probs: tokens of an episode are not known")
    if told["shortened"]:
        lines.append(f"{told['shortened']} answers had less room in the context than rollout.max_turn_tokens")
    return lines


def _say_broken_off(console: Console, policy: OpenAIPolicy, files: Sequence[Path], suite: str | None) -> None:
    if not policy.stats.requests:
        return
    stats = policy.stats
    cost = "" if stats.cost is None else f", cost {stats.cost:.4f}"
    text = (
        f"Stopped after {stats.requests} requests: {stats.prompt_tokens:,} prompt tokens, "
        f"{stats.completion_tokens:,} completion tokens{cost}."
    )
    kept = [shown_path(path) for path in files if path.is_file()]
    if suite is not None and kept:
        text += f" The sets that were complete are in {', '.join(kept)}."
    console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
