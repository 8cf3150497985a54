"""Turns what `at2po eval` is given (a run, a checkpoint, a model, an address) into figures.

`evaluation_config` makes one configuration of the target and the command line, `open_policy` opens the
policy that it describes, and `evaluate_policy` asks the questions.

The limits of a configuration count tokens, but the ids of a served model are bytes. So `rollout.max_*_tokens`
are multiplied by `served.bytes_per_token`, and the server is asked for the limit in its own tokens again.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from at2po_agent.agents.agent import build_agent, in_windows
from at2po_agent.config.loading import CONFIG_FILE, load_config
from at2po_agent.config.sections import Config
from at2po_agent.environments import Env, TaskSplit, make_eval_env, make_training_env, split_tasks
from at2po_agent.evaluation.evaluate import MODES, evaluate_mode
from at2po_agent.evaluation.published import published_split
from at2po_agent.evaluation.suite import Source, evaluate_suite, set_config, suite_sources, write_results
from at2po_agent.health import check_failures
from at2po_agent.policies.base import Policy
from at2po_agent.policies.openai import OpenAIPolicy
from at2po_agent.policies.openai.client import Server
from at2po_agent.policies.openai.messages import Dialect
from at2po_agent.policies.openai.stats import Prices
from at2po_agent.runs.checkpoint import check_checkpoint, list_checkpoints
from at2po_agent.runs.folder import CHECKPOINTS
from at2po_agent.runs.progress import Progress
from at2po_agent.transcripts.inline import GrowingTranscript
from at2po_env import HermesProtocol
from at2po_env.data.catalog import QA_SETS
from at2po_env.errors import At2poError, ConfigError

DEFAULT_CONFIG = "at2po-search"


def is_address(target: str) -> bool:
    """Tell whether a target is the address of a served model."""
    return target.startswith(("http://", "https://"))


def evaluation_config(target: str, overrides: Sequence[str], config: str | None = None) -> Config:
    """Compose the configuration that evaluates a target.

    Args:
        target: A run's folder (its newest checkpoint is taken), a checkpoint's folder, a model's folder or
            hub name, or the address of a served model.
        overrides: `key=value` texts; they win. `env.id=ID` asks in another environment: the configuration's
            limits stay, and what it says of its own environment is left aside; one of the published sets is
            asked in its published split.
        config: The configuration that everything but the model comes from; None takes the run's own, or
            `DEFAULT_CONFIG` where the target belongs to no run.

    Raises:
        ConfigError: The run has no whole checkpoint, or a setting is wrong.
    """
    path, own = Path(target), ["served.url=null"]
    run = path if (path / CONFIG_FILE).is_file() else path.resolve().parent.parent
    if is_address(target):
        own = [f"served.url={target}"]
    elif path.is_dir() and (run / CONFIG_FILE).is_file():
        checkpoints = list_checkpoints(path / CHECKPOINTS) if run == path else [path]
        if not checkpoints:
            raise ConfigError(
                f"{path}: no checkpoint to evaluate yet; train it first: at2po train {path} --resume"
            )
        check_checkpoint(checkpoints[0])
        own += [f"model.path={checkpoints[0]}", "model.random_init=false", "model.tokenizer=null"]
        own += ["model.lora=null"]  # the adapters of a checkpoint are merged when it is loaded
        config = config or str(run)
    else:
        own += [f"model.path={target}", "model.random_init=false", "model.sampler=hf"]
    if not is_address(target) and (served := [word for word in overrides if word.startswith("served.")]):
        raise ConfigError(
            f"{', '.join(served)}: only for served models, but {target!r} is no address (http://HOST:PORT/v1)"
        )
    ids = [word.partition("=")[2] for word in overrides if word.startswith("env.id=")]
    others = [word for word in overrides if not word.startswith("env.id=")]
    loaded = load_config(config or DEFAULT_CONFIG, [*own, *others])
    if ids and ids[-1] != (loaded.eval.id or loaded.env.id):
        loaded = _in_environment(loaded, ids[-1], others)
    if loaded.served.url is None:
        return loaded
    limits = {
        name: getattr(loaded.rollout, name) * loaded.served.bytes_per_token
        for name in ("max_turn_tokens", "max_response_tokens", "max_prompt_tokens")
    }
    named = loaded.model.model_copy(update={"path": loaded.served.model or loaded.served.url})
    return loaded.model_copy(update={"rollout": loaded.rollout.model_copy(update=limits), "model": named})


@contextlib.contextmanager
def open_policy(config: Config, suite: str | None = None) -> Iterator[Policy]:
    """Load the model of a configuration, or connect to the server, until the end of the block.

    Args:
        config: The configuration.
        suite: The suite that will be asked; the server is told of the tools of its first set.

    Raises:
        ConfigError: The model or the server cannot be used as configured.
    """
    if config.served.url is None:
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        agent = build_agent(config)
        with contextlib.closing(agent.sampler):
            yield agent.policy
        return
    served = config.served
    policy = OpenAIPolicy(
        Server(config.served.url, api_key_env=served.api_key_env, timeout_s=served.timeout_s),
        served.model,
        dialect=Dialect(
            served.endpoint,
            tools=_tool_schemas(config, suite) if served.native_tools else (),
            logprobs=served.logprobs,
            bytes_per_token=served.bytes_per_token,
            extra=served.extra,
        ),
        concurrency=served.concurrency,
        max_failures=20 if config.health.pause_at is None else None,  # else an outage is a pause, not an end
        prices=Prices(served.price_input, served.price_output, served.price_cached),
        system=served.system,
    )
    assert isinstance(policy.transcript, GrowingTranscript)
    policy.transcript = in_windows(policy.transcript, config)
    with policy:
        yield policy


def evaluate_policy(
    config: Config,
    policy: Policy,
    progress: Progress,
    *,
    suite: str | None = None,
    files: Sequence[Path] = (),
) -> dict[str, Any]:
    """Ask the questions of the configuration, or those of a suite.

    A model that is loaded here is asked greedily and, with `eval.sampled`, at temperature 1: with the
    configuration of a run this gives the figures that the run itself measured. A served model is asked at
    `served.temperature`.

    Args:
        config: What `evaluation_config` returned.
        policy: What `open_policy` opened.
        progress: Listener.
        suite: A key of `published.SUITES`; it is asked greedily.
        files: The results are written there as JSON; those of a suite after every set.

    Returns:
        Figures by mode, or the results of `evaluate_suite`; for a served model also what it cost, under
        `served`. All of it is JSON values.
    """
    if suite is not None:
        return evaluate_suite(
            config,
            suite,
            progress,
            policy=policy,
            files=files,
            about=lambda: costs(config, policy),
        )
    if config.served.url is not None:
        modes = {mode_name(config): config.served.temperature}
    else:
        modes = {mode: MODES[mode] for mode in (MODES if config.eval.sampled else ("greedy",))}
    told: list[str] = []

    def tell(traceback: str) -> None:
        if not told:
            progress.message(f"the environment failed, first with this:\n{traceback.rstrip()}")
        told.append(traceback)

    env, results = make_eval_env(config), {}
    with contextlib.closing(env):
        split = _questions(config, env)
        for mode, temperature in modes.items():
            figures = evaluate_mode(config, mode, env, policy, progress, split=split, temperature=temperature)
            results[mode] = figures.to_json()
    results |= costs(config, policy)
    for file in files:
        write_results(file, results)
    return results


def check_results(results: Mapping[str, Any], config: Config) -> None:
    """Refuse results of which too much failed; they are complete otherwise, and may be shown and kept.

    Raises:
        ServiceError: See `health.check_failures`.
    """
    if "sets" in results:
        found = {name: one["figures"] for name, one in results["sets"].items() if one["figures"] is not None}
    else:
        found = {name: figures for name, figures in results.items() if name != "served"}
    for name, figures in found.items():
        check_failures(f"evaluation ({name})", figures["failures"], figures["failed_share"], config.health)


def mode_name(config: Config) -> str:
    """Name the figures of a served model by its temperature."""
    heat = config.served.temperature
    return "greedy" if heat == 0 else f"temperature {heat:g}"


def costs(config: Config, policy: Policy) -> Mapping[str, Any]:
    """Say which server was asked and what it cost so far, under `served`; empty for a model loaded here."""
    if not isinstance(policy, OpenAIPolicy):
        return {}
    served = config.served
    asked = {"url": policy.server.url, "model": served.model or policy.model, "endpoint": served.endpoint}
    return {"served": {**asked, "temperature": served.temperature, **policy.stats.to_json()}}


def _questions(config: Config, env: Env) -> TaskSplit:
    """The questions that a run with this configuration is evaluated on, and how many it trains on, too.

    A model that belongs to no run has trained on nothing that is known. It is asked what is held out where
    the configuration trains on the very same environment, and the first questions elsewhere.
    """
    if config.eval.id in (None, config.env.id):
        if config.run.dir is not None:
            with contextlib.suppress(At2poError):  # the data of the training may be elsewhere
                return split_tasks(config, make_training_env(config), env)
        elif config.env.kwargs == {**config.env.kwargs, **config.eval.kwargs}:
            return split_tasks(config, env, env)
    return split_tasks(config, None, env)


def _tool_schemas(config: Config, suite: str | None) -> Sequence[Mapping[str, Any]]:
    """The tools of the environment that will be asked, for a server that parses their calls."""
    if suite is not None:
        sources = suite_sources(config, suite)
        name = next(name for name, source in sources.items() if source.origin != "missing")
        config = set_config(config, name, sources[name])
    env = make_eval_env(config)
    known = env.has_wrapper_attr("tool_schemas") and env.has_wrapper_attr("protocol")
    if not known or not isinstance(env.get_wrapper_attr("protocol"), HermesProtocol):
        raise ConfigError(
            "served.native_tools: the environment's protocol has to be hermes, and its tools have to have "
            "schemas (at2po_env.ToolEnv). Fix: eval.kwargs.protocol=hermes"
        )
    schemas: Sequence[Mapping[str, Any]] = env.get_wrapper_attr("tool_schemas")
    return schemas


def _in_environment(config: Config, env_id: str, overrides: Sequence[str]) -> Config:
    """The same limits in another environment, with the keywords that the command line gives for it."""

    def is_given(key: str) -> bool:
        ends = ("=", f".{key}=", f".{key}.")
        return any(
            word.startswith((f"env.kwargs{end}", f"eval.kwargs{end}")) for word in overrides for end in ends
        )

    kwargs = {**config.env.kwargs, **config.eval.kwargs}
    given = {key: value for key, value in kwargs.items() if is_given(key)}
    name = next((name for name, qa in QA_SETS.items() if f"at2po/{qa.title}-v0" == env_id), None)
    if name is not None:
        source = Source("given", published_split(name), Path(config.dataset) if config.dataset else None)
        config = set_config(config, name, source)
        given = {**config.eval.kwargs, **given}
    update = {
        "env": config.env.model_copy(update={"kwargs": {}}),
        "eval": config.eval.model_copy(update={"id": env_id, "kwargs": given}),
    }
    return config.model_copy(update=update)
