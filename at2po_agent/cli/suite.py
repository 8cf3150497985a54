"""`at2po eval --suite`: from the words of the command line to tables and files."""

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from at2po_agent.config.loading import CONFIG_FILE
from at2po_agent.config.sections import Config
from at2po_agent.evaluation.of_run import evaluation_config
from at2po_agent.evaluation.suite import suite_groups
from at2po_agent.evaluation.suite_run import evaluate_suite
from at2po_agent.report.ending import shown_path
from at2po_agent.report.live import make_listener
from at2po_agent.report.suite_table import print_suite
from at2po_env.errors import ConfigError


def evaluate_and_print(
    target: str, suite: str, words: Sequence[str], config: str | None, *, as_json: bool
) -> None:
    """Evaluate, and leave the results in the run's folder, on the screen, and where `--json FILE` says.

    Raises:
        ConfigError: No such suite; or what `evaluation_config` and `evaluate_suite` refuse.
    """
    suite_groups(suite)  # a misspelt name is said before anything is loaded
    overrides, file = take_json_file(words, as_json=as_json)
    settings = evaluation_config(target, overrides, config)
    files = [results_file(settings, target, suite), *([file] if file else [])]
    with make_listener(Console(stderr=True)) as progress:
        results = evaluate_suite(settings, suite, progress, files=files)
    if as_json and file is None:
        typer.echo(json.dumps(results, indent=2, ensure_ascii=False))
        return
    print_suite(Console(), results, target)
    for path in files:
        typer.echo(shown_path(path))


def results_file(config: Config, target: str, suite: str) -> Path:
    """A free name in the run's folder, or in the current one for a model that belongs to no run."""
    run = target if (Path(target) / CONFIG_FILE).is_file() else config.run.dir
    number, path = 1, Path(run or ".") / f"suite_{suite}.json"
    while path.exists():
        number += 1
        path = path.with_name(f"suite_{suite}-{number}.json")
    return path


def take_json_file(words: Sequence[str], *, as_json: bool) -> tuple[list[str], Path | None]:
    """Split what follows the target into overrides and the file of `--json FILE`.

    `--json` alone is a flag, so its file arrives among the overrides: the one that has no "=".
    """
    names = [word for word in words if "=" not in word] if as_json else []
    if len(names) > 1:
        raise ConfigError(f"--json: got {len(names)} files ({', '.join(names)}), expected one")
    return [word for word in words if word not in names], Path(names[0]) if names else None
