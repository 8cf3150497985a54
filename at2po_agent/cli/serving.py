"""Implements `at2po serve-env`."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from at2po_agent.cli.retrieval import read_options, read_token

app = typer.Typer()


@app.command("serve-env")
def serve_env(
    id: Annotated[str, typer.Argument(metavar="ID", help="Gymnasium id, as `at2po envs` lists them.")],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="Argument of the environment, NAME=VALUE; repeatable."),
    ] = None,
    kwargs: Annotated[str, typer.Option(help="Arguments of the environment as a JSON object.")] = "{}",
    host: Annotated[str, typer.Option(help="Others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8001,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the bearer token that requests must carry; default: AT2PO_ENV_TOKEN."),
    ] = None,
    max_sessions: Annotated[int, typer.Option(min=1, help="Sessions at the same time.")] = 1024,
    idle_s: Annotated[
        float, typer.Option(min=1, help="Seconds after which an unused session closes.")
    ] = 1800,
    timeout_s: Annotated[float, typer.Option(min=1, help="Deadline of a request, in seconds.")] = 60,
) -> None:
    """Serve an environment over HTTP: reset, step, snapshot, restore, fork; and OpenEnv's protocol."""
    from at2po_env.serving.app import EnvServerConfig, make_served_env
    from at2po_env.serving.app import serve_env as serve
    from at2po_env.serving.messages import TOKEN_VARIABLE

    config = EnvServerConfig.model_validate(
        {
            "host": host,
            "port": port,
            "token": read_token(token_file, TOKEN_VARIABLE),
            "max_sessions": max_sessions,
            "idle_s": idle_s,
            "timeout_s": timeout_s,
        }
    )
    config.check_address()
    env = make_served_env(id, **{**read_options(option or []), **_object(kwargs)})
    typer.echo(f"serving {id} on http://{host}:{port} (process {os.getpid()}; Ctrl-C stops it)")
    serve(env, config)


def _object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"--kwargs is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter("--kwargs: expected a JSON object")
    return value
