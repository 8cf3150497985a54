"""Evaluating a model that is served elsewhere, in any environment: what `at2po eval URL` does.

Limits of a configuration are tokens, the ids of a served model are bytes: `rollout.max_*_tokens` are
multiplied by `bytes_per_token`, and the server is asked for the limit in its own tokens again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from at2po_agent.config.loading import load_config
from at2po_agent.config.sections import Config
from at2po_agent.environments import Env, make_eval_env
from at2po_agent.evaluation.of_run import DEFAULT_CONFIG, evaluate_mode
from at2po_agent.evaluation.suite import published_split, suite_sets
from at2po_agent.evaluation.suite_run import Source, evaluate_suite, find_questions, set_config
from at2po_agent.policies.openai import OpenAIPolicy
from at2po_agent.policies.openai.client import Server
from at2po_agent.policies.openai.messages import Dialect, Endpoint
from at2po_agent.policies.openai.stats import Prices
from at2po_agent.runs.progress import Progress
from at2po_env import HermesProtocol
from at2po_env.data.catalog import QA_SETS
from at2po_env.errors import ConfigError

_LIMITS = ("max_turn_tokens", "max_response_tokens", "max_prompt_tokens")


class Served(BaseModel):
    """Which server is asked, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    url: str = Field(description="Address up to the version, such as http://localhost:8000/v1.")
    model: str | None = Field(None, description="Name of the model; none takes the only one of the server.")
    endpoint: Endpoint = Field("chat", description="chat, or completions with the running text.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the key.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 is greedy.")
    concurrency: int = Field(16, ge=1, description="Requests under way at the same time.")
    timeout_s: float = Field(900.0, gt=0, description="Deadline of an answer, all tries included.")
    native_tools: bool = Field(False, description="Let the server parse tool calls (protocol hermes).")
    system: str | None = Field(None, description="System message before the prompt (chat).")
    logprobs: bool = Field(True, description="Ask for log-probs: surprisals, and tokens of an episode.")
    bytes_per_token: int = Field(4, ge=1, description="Bytes that count as one token of a limit.")
    price_input: float | None = Field(None, ge=0, description="Price of a million input tokens.")
    price_output: float | None = Field(None, ge=0, description="Price of a million output tokens.")
    price_cached: float | None = Field(None, ge=0, description="Price of a million cached input tokens.")
    extra: dict[str, Any] = Field(default_factory=dict, description="Further members of every request.")

    @property
    def mode(self) -> str:
        """What the figures are called."""
        return "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"


def make_served(**settings: Any) -> Served:
    """Settings, with every problem in one message.

    Raises:
        ConfigError: Some are wrong.
    """
    try:
        return Served(**{name: value for name, value in settings.items() if value is not None})
    except ValidationError as error:
        problems = [f"--{_option(str(fault['loc'][0]))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError("; ".join(problems)) from error


def served_config(
    served: Served, overrides: Sequence[str], *, config: str | None = None, env: str | None = None
) -> Config:
    """The configuration of an evaluation: another model, limits in bytes, perhaps another environment.

    Args:
        served: The server.
        overrides: `key=value` texts; they win.
        config: Where everything but the model comes from; None takes `DEFAULT_CONFIG`.
        env: Gymnasium id; what the file says of its own environment is left aside. One of the published sets
            is asked in its published split.

    Raises:
        ConfigError: A setting is wrong.
    """
    loaded = load_config(config or DEFAULT_CONFIG, overrides)
    if env is not None and env != (loaded.eval.id or loaded.env.id):
        loaded = _in_environment(loaded, env, overrides)
    limits = {name: getattr(loaded.rollout, name) * served.bytes_per_token for name in _LIMITS}
    named = loaded.model.model_copy(update={"path": served.model or served.url})
    return loaded.model_copy(update={"rollout": loaded.rollout.model_copy(update=limits), "model": named})


def open_policy(served: Served, env: Env | None = None) -> OpenAIPolicy:
    """The policy; to be closed.

    Args:
        served: The server.
        env: The environment, whose tools the server is told of where it parses their calls.

    Raises:
        ConfigError: The environment does not speak Hermes, or the variable holds no key.
    """
    return OpenAIPolicy(
        Server(served.url, api_key_env=served.api_key_env, timeout_s=served.timeout_s),
        served.model,
        dialect=Dialect(
            served.endpoint,
            tools=_tools(env) if served.native_tools else (),
            logprobs=served.logprobs,
            bytes_per_token=served.bytes_per_token,
            extra=served.extra,
        ),
        concurrency=served.concurrency,
        prices=Prices(served.price_input, served.price_output, served.price_cached),
        system=served.system,
    )


def evaluate_served(
    served: Served, config: Config, policy: OpenAIPolicy, progress: Progress
) -> dict[str, Any]:
    """Ask the first `eval.questions` questions of the configuration's environment.

    Returns:
        The figures by mode, and what they cost, as JSON values.
    """
    env = make_eval_env(config)
    figures = evaluate_mode(config, served.mode, env, policy, progress, temperature=served.temperature)
    env.close()
    return {served.mode: figures.to_json(), **costs(served, policy)}


def evaluate_served_suite(
    served: Served,
    config: Config,
    suite: str,
    policy: OpenAIPolicy,
    progress: Progress,
    *,
    files: Sequence[Path] = (),
) -> dict[str, Any]:
    """Ask the published sets; the results hold what they cost so far, after every set."""
    return evaluate_suite(
        config,
        suite,
        progress,
        policy=policy,
        files=files,
        about=lambda: costs(served, policy),
    )


def costs(served: Served, policy: OpenAIPolicy) -> Mapping[str, Any]:
    """Who was asked, and what it cost so far."""
    asked = {"url": policy.server.url, "model": served.model or policy.model, "endpoint": served.endpoint}
    return {"served": {**asked, "temperature": served.temperature, **policy.stats.to_json()}}


def tools_env(served: Served, config: Config, suite: str | None) -> Env | None:
    """The environment whose tools the server is told of; None where it is told of none."""
    if not served.native_tools:
        return None
    if suite is None:
        return make_eval_env(config)
    sources = {name: find_questions(name, config.dataset) for name in suite_sets(suite)}
    name = next((name for name, source in sources.items() if source.origin != "missing"), None)
    return None if name is None else make_eval_env(set_config(config, name, sources[name]))


def _option(name: str) -> str:
    return name.removesuffix("_s").replace("_", "-")


def _tools(env: Env | None) -> Sequence[Mapping[str, Any]]:
    if env is None:
        return ()
    known = env.has_wrapper_attr("tool_schemas") and env.has_wrapper_attr("protocol")
    if not known or not isinstance(env.get_wrapper_attr("protocol"), HermesProtocol):
        raise ConfigError(
            "--native-tools: the environment's protocol has to be hermes, and its tools have to have schemas "
            "(at2po_env.ToolEnv). Fix: eval.kwargs.protocol=hermes"
        )
    schemas: Sequence[Mapping[str, Any]] = env.get_wrapper_attr("tool_schemas")
    return schemas


def _in_environment(config: Config, env: str, overrides: Sequence[str]) -> Config:
    """The same limits and numbers in another environment."""
    kwargs = {**config.env.kwargs, **config.eval.kwargs}
    given = {key: value for key, value in kwargs.items() if _is_given(key, overrides)}
    name = next((name for name, qa in QA_SETS.items() if f"at2po/{qa.title}-v0" == env), None)
    if name is not None:
        source = Source("given", published_split(name), Path(config.dataset) if config.dataset else None)
        config = set_config(config, name, source)
        given = {**config.eval.kwargs, **given}
    update = {
        "env": config.env.model_copy(update={"kwargs": {}}),
        "eval": config.eval.model_copy(update={"id": env, "kwargs": given}),
    }
    return config.model_copy(update=update)


def _is_given(key: str, overrides: Sequence[str]) -> bool:
    """Whether the command line says so, and not the file about its own environment."""
    beginnings = tuple(
        f"{section}.kwargs{end}" for section in ("env", "eval") for end in ("=", f".{key}=", f".{key}.")
    )
    return any(word.startswith(beginnings) for word in overrides)
