"""Implements `at2po eval`: evaluates a run, a checkpoint, a model, or a served model."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from at2po_env.errors import At2poError, ConfigError, require

if TYPE_CHECKING:
    from at2po_agent.config.sections import Config
    from at2po_agent.policies.base import Policy

EXIT_INTERRUPTED = 130


def need_agent_extra() -> None:
    """Check that the agent's packages are installed.

    Raises:
        MissingExtraError: One is missing; the message names the extra to install.
    """
    for module in ("torch", "transformers", "safetensors"):
        require(module, "agent")


def evaluate_command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL|URL",
            help="A run's folder, a checkpoint, a model's folder or hub name, or a served model's address.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings that win over the configuration, such as eval.questions=500. For a served model "
            "also served.KEY=VALUE: endpoint, api_key_env, temperature, concurrency, timeout_s, "
            "native_tools, system, price_input, price_output, price_cached, extra.NAME.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            help="Configuration to use. The default is the run's own, or at2po-search for a model of no run.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="Ask the published question sets instead, greedily: multihop, singlehop or all."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print JSON instead of a table; --json FILE prints the table and writes JSON to FILE.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of the served model, short for served.model=NAME. It may be left out where the server "
            "lists only one."
        ),
    ] = None,
    env: Annotated[
        str | None, typer.Option(help="Gymnasium id of another environment, short for env.id=ID.")
    ] = None,
) -> None:
    """Evaluate a policy on held-out questions, or on the published question sets."""
    need_agent_extra()
    from at2po_agent.evaluation.suite import suite_sources
    from at2po_agent.evaluation.target import check_results, evaluate_policy, evaluation_config, open_policy
    from at2po_agent.report.live import make_listener
    from at2po_agent.report.tables import print_evaluation, shown_path

    words, file = take_json_file(overrides or [], as_json=as_json)
    words += [f"served.model={model}"] if model is not None else []
    words += [f"env.id={env}"] if env is not None else []
    if suite is not None and any(word.startswith(("env.id=", "served.temperature=")) for word in words):
        raise ConfigError(
            "--suite asks its own environments, greedily. Fix: leave env.id and served.temperature out"
        )
    composed = evaluation_config(target, words, config)
    files = [] if file is None else [file]
    if suite is not None:
        suite_sources(composed, suite)  # so that a misspelt name is said before anything is loaded
        files.insert(0, results_file(composed, target, suite))
    console = Console(stderr=True)
    with open_policy(composed, suite) as policy:
        try:
            with contextlib.closing(make_listener(console)) as progress:
                results = evaluate_policy(composed, policy, progress, suite=suite, files=files)
        except (KeyboardInterrupt, At2poError) as stop:
            _say_broken_off(console, policy, files if suite is not None else [])
            if isinstance(stop, At2poError):
                raise
            raise typer.Exit(EXIT_INTERRUPTED) from stop
    if as_json and file is None:
        typer.echo(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        print_evaluation(Console(), results, target)
        for path in files:
            typer.echo(shown_path(path))
    check_results(results, composed)


def results_file(config: "Config", target: str, suite: str) -> Path:
    """Find a free name in the run's folder, or in the current one for a model that belongs to no run."""
    from at2po_agent.config.loading import CONFIG_FILE

    run = target if (Path(target) / CONFIG_FILE).is_file() else config.run.dir
    number, path = 1, Path(run or ".") / f"suite_{suite}.json"
    while path.exists():
        number += 1
        path = path.with_name(f"suite_{suite}-{number}.json")
    return path


def take_json_file(words: Sequence[str], *, as_json: bool) -> tuple[list[str], Path | None]:
    """Split the words after the target into overrides and the file of `--json FILE`.

    `--json` alone is a flag, so its file arrives among the overrides: the one that has no "=".
    """
    names = [word for word in words if "=" not in word] if as_json else []
    if len(names) > 1:
        raise ConfigError(f"--json: got {len(names)} files ({', '.join(names)}), expected one")
    return [word for word in words if word not in names], Path(names[0]) if names else None


def _say_broken_off(console: Console, policy: "Policy", files: Sequence[Path]) -> None:
    """Say what an evaluation that stopped early has cost, and where its complete sets are."""
    from at2po_agent.policies.openai import OpenAIPolicy
    from at2po_agent.report.tables import shown_path

    text = ""
    if isinstance(policy, OpenAIPolicy) and (stats := policy.stats).requests:
        cost = "" if stats.cost is None else f", cost {stats.cost:.4f}"
        text = (
            f"Stopped after {stats.requests} requests: {stats.prompt_tokens:,} prompt tokens, "
            f"{stats.completion_tokens:,} completion tokens{cost}. "
        )
    if kept := [shown_path(path) for path in files if path.is_file()]:
        text += f"The sets that were complete are in {', '.join(kept)}."
    if text:
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
