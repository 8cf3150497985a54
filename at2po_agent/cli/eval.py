"""`at2po eval`: a run, a model's folder, or a model that is served at an address."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console

_PANEL = "Served models (the target is an address)"


def _served(*names: str, text: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_PANEL)


def need_agent_extra() -> None:
    """Say which extra is missing, if one is.

    Raises:
        MissingExtraError: The agent's packages are not installed.
    """
    from at2po_env.errors import require

    for module in ("torch", "transformers", "safetensors"):
        require(module, "agent")


def evaluate_command(  # noqa: PLR0913  the options of one command
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL_OR_URL",
            help="A run's folder, a checkpoint, a model's folder or name, or a server's address.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings, such as eval.questions=500; they win over the file."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", help="Settings other than the run's own; needed for a bare model."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="The published sets instead: multihop, singlehop or all; greedy only."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON instead of a table; with --suite, --json FILE writes it."),
    ] = False,
    model: Annotated[
        str | None, _served("--model", text="The model's name; default: the only one that the server lists.")
    ] = None,
    env: Annotated[str | None, _served("--env", text="Gymnasium id; default: that of --config.")] = None,
    endpoint: Annotated[
        str | None, _served("--endpoint", text="chat (default), or completions with the running text.")
    ] = None,
    api_key_env: Annotated[
        str | None,
        _served("--api-key-env", text="Environment variable that holds the key; default: none is sent."),
    ] = None,
    temperature: Annotated[
        float | None, _served("--temperature", text="Sampling temperature; default: 0, greedy.")
    ] = None,
    concurrency: Annotated[
        int | None, _served("--concurrency", text="Requests under way at the same time; default: 16.")
    ] = None,
    timeout: Annotated[
        float | None, _served("--timeout", text="Seconds for an answer, all tries included; default: 900.")
    ] = None,
    native_tools: Annotated[
        bool, _served("--native-tools", text="Let the server parse tool calls; eval.kwargs.protocol=hermes.")
    ] = False,
    system: Annotated[str | None, _served("--system", text="System message before the prompt.")] = None,
    price_input: Annotated[
        float | None, _served("--price-input", text="Price of a million input tokens.")
    ] = None,
    price_output: Annotated[
        float | None, _served("--price-output", text="Price of a million output tokens.")
    ] = None,
    price_cached: Annotated[
        float | None, _served("--price-cached", text="Price of a million cached input tokens.")
    ] = None,
    extra: Annotated[
        str | None, _served("--extra", text="Further members of every request, as a JSON object.")
    ] = None,
) -> None:
    """Evaluate a policy on held-out questions, greedily and sampled, or on the published sets."""
    need_agent_extra()
    options = {
        **{"model": model, "endpoint": endpoint, "api_key_env": api_key_env, "temperature": temperature},
        **{"concurrency": concurrency, "timeout_s": timeout, "native_tools": native_tools or None},
        **{"system": system, "price_input": price_input, "price_output": price_output},
        **{"price_cached": price_cached, "extra": extra},
    }
    from at2po_agent.cli import served as cli_served

    if cli_served.is_served(target):
        cli_served.evaluate_and_print(
            target, overrides or [], suite=suite, config=config, env=env, options=options, as_json=as_json
        )
        return
    _refuse({**options, "env": env}, target)
    if suite is not None:
        from at2po_agent.cli.suite import evaluate_and_print

        evaluate_and_print(target, suite, overrides or [], config, as_json=as_json)
        return
    _evaluate(target, overrides or [], config, as_json=as_json)


def _evaluate(target: str, overrides: list[str], config: str | None, *, as_json: bool) -> None:
    from at2po_agent.evaluation.of_run import evaluate_config, evaluation_config
    from at2po_agent.report.ending import evaluation_table
    from at2po_agent.report.live import make_listener

    settings = evaluation_config(target, overrides, config)
    modes = ("greedy", "sampled") if settings.eval.sampled else ("greedy",)
    with make_listener(Console(stderr=True)) as progress:
        results = evaluate_config(settings, progress, modes)
    figures = {mode: result.to_json() for mode, result in results.items()}
    if as_json:
        typer.echo(json.dumps(figures, indent=2, ensure_ascii=False))
    else:
        Console().print(evaluation_table(figures))


def _refuse(options: dict[str, Any], target: str) -> None:
    """Options of served models say nothing about a model that is loaded here."""
    given = [
        name.removesuffix("_s").replace("_", "-") for name, value in options.items() if value is not None
    ]
    if given:
        from at2po_env.errors import ConfigError

        raise ConfigError(
            f"--{', --'.join(given)}: for served models, but {target!r} is no address (http://HOST:PORT/v1)"
        )
