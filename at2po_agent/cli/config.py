"""Implements `at2po config`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from at2po_agent.cli.eval import need_agent_extra
from at2po_env.errors import ConfigError


def config_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="WORD", help="Show the settings that have all of these words."),
    ] = None,
    of: Annotated[
        str | None,
        typer.Option(
            "--of", metavar="CONFIG", help="A shipped configuration, a YAML file or a run's folder."
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="With --of: settings that win; repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the whole configuration there, each setting below its meaning.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema, for editors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show, search and explain the settings of a run, or write them to a file with comments."""
    need_agent_extra()
    from at2po_agent.config import reference
    from at2po_agent.config.loading import flatten, load_config

    if schema:
        typer.echo(json.dumps(reference.schema(), indent=2))
        return
    if override and of is None:
        raise ConfigError("--set changes the configuration that --of names; give --of CONFIG too")
    chosen = None if of is None else load_config(of, override or [])
    if out is not None:
        values = chosen.model_dump(mode="json") if chosen else _defaults()
        if out.exists():
            raise ConfigError(f"{out} exists already; choose another name or remove it")
        values["run"]["dir"] = None
        out.write_text(reference.commented_yaml(values), encoding="utf-8")
        typer.echo(out)
        return
    found = reference.search(" ".join(words or []))
    if not found:
        raise ConfigError(
            f"no setting has all of the words {' '.join(words or [])!r}; `at2po config` lists all"
        )
    values = {} if chosen is None else dict(flatten(chosen.model_dump(mode="json")))
    rows = [{**one._asdict(), **({"value": values[one.key]} if one.key in values else {})} for one in found]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    console = Console()
    for row in rows:
        kind = f"{row['type']}, {row['limits']}" if row["limits"] else row["type"]
        value = json.dumps(row["value"]) if "value" in row else row["default"]
        kind += f"; default {row['default']}" if "value" in row else ""
        console.print(Text.assemble((row["key"], "bold"), f" = {value}  ", (f"({kind})", "dim")))
        console.print(Padding(Text(row["meaning"]), (0, 0, 0, 4)))


def _defaults() -> dict[str, dict[str, object]]:
    from at2po_agent.config.sections import Config

    values: dict[str, dict[str, object]] = Config().model_dump(mode="json")
    return values
