"""Builds what learns from a configuration: a model, its tokenizer, and a policy that samples with it."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from at2po_agent.agents.cold_start import record_demonstrations
from at2po_agent.agents.model import (
    ModelShape,
    adapter_settings,
    add_adapters,
    build_model,
    load_model,
    train_tokenizer,
)
from at2po_agent.config.sections import Config, ModelConfig
from at2po_agent.environments import make_cold_start_env, make_training_env
from at2po_agent.policies.base import Policy, TrainablePolicy, as_trainable
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.policies.vllm import VLLMPolicy
from at2po_agent.policies.vllm.config import VLLMConfig
from at2po_agent.runs.seeding import RunPurpose, run_generator, run_seed
from at2po_agent.transcripts.chat import ChatTranscript
from at2po_agent.transcripts.chat_templates import OWN, template_marks
from at2po_agent.transcripts.inline import GrowingTranscript, InlineTranscript, Transcript
from at2po_agent.transcripts.tokenizer import HFTokenizer, Tokenizer
from at2po_agent.transcripts.window import WindowTranscript
from at2po_env.errors import ConfigError, require

_TOKENIZER_EPISODES = 300
_ROLES = "user\nassistant\n"


@dataclass(frozen=True)
class Agent:
    """A model that is trained, and a policy that samples with its current weights.

    Attributes:
        model: A causal language model of transformers, or any module whose output has `logits`.
        policy: Samples turns; anything that implements `Policy`.
        sampler: What a learner calls of the policy; defaults for a policy that only generates.
    """

    model: nn.Module
    policy: Policy
    sampler: TrainablePolicy = field(init=False, repr=False)

    @property
    def tokenizer(self) -> Tokenizer:
        """The policy's tokenizer."""
        return self.policy.tokenizer

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler", as_trainable(self.policy))


def build_agent(config: Config) -> Agent:
    """Make or load model and tokenizer, and the policy that samples with them.

    Raises:
        MissingExtraError: vLLM is configured and not installed.
        PolicyError: The model cannot be served.
        ConfigError: The chat template will not do, no model can be loaded, or there is no such device.
    """
    own = config.model
    if own.sampler == "vllm":
        require("vllm.v1", "vllm")  # before anything is loaded
    check_device(own.device)
    for key, path in (("path", None if own.random_init else own.path), ("tokenizer", own.tokenizer)):
        if path is not None:
            check_model_path(f"model.{key}", path)
    tokenizer = build_tokenizer(config)
    written: GrowingTranscript = InlineTranscript(tokenizer)
    if _writes_chats(own):
        chat = own.chat
        written = ChatTranscript(
            tokenizer,
            template=chat.template,
            system=chat.system,
            observation_role=chat.observation_role,
            template_options=chat.template_options,
            growing=own.transcript == "chat",
        )
        tokenizer = written.tokenizer  # it ends a sequence where the template ends a message
    transcript = in_windows(written, config)
    seed = run_seed(config.run.seed, RunPurpose.MODEL)
    model = build_weights(own, seed=seed, vocab_size=len(tokenizer), eos_id=tokenizer.eos_id)
    if own.lora is not None:
        model = add_adapters(model, own.lora, seed=run_seed(config.run.seed, RunPurpose.ADAPTERS))
    if own.sampler == "hf":
        return Agent(model, HFPolicy(model, tokenizer, slots=own.slots, transcript=transcript))
    policy = VLLMPolicy(
        model,
        tokenizer,
        config=engine_config(config, most=getattr(model.config, "max_position_embeddings", None)),
        path=None if own.random_init or (own.path and adapter_settings(own.path)) else own.path,
        slots=own.slots,
        transcript=transcript,
    )
    return Agent(model, policy)


def check_device(device: str) -> None:
    """Refuse a device that torch does not have here.

    Raises:
        ConfigError: It has none of this name.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ConfigError(
            f"model.device: got {device!r}, which torch cannot use here ({str(error).splitlines()[0]}). Fix: "
            "model.device=cpu, or a machine and a build of torch that have it"
        ) from error


def check_model_path(key: str, path: str) -> None:
    """Refuse a misspelt folder, so that the hub is not asked for it (which may take a minute).

    A name of the hub is `NAME` or `OWNER/NAME`, so anything longer is a path, and so is a name in a folder
    that is here.

    Raises:
        ConfigError: The path is no name of the hub, and there is nothing.
    """
    place = Path(path).expanduser()
    is_path = place.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1
    if not place.exists() and (is_path or ("/" in path and place.parent.is_dir())):
        here = [one.name for one in place.parent.iterdir()] if place.parent.is_dir() else []
        close = difflib.get_close_matches(place.name, here, n=2)
        near = f"; did you mean {' or '.join(str(place.parent / name) for name in close)}?" if close else ""
        raise ConfigError(f"{key}: there is no folder {path!r}{near}")


def _writes_chats(own: ModelConfig) -> bool:
    """Whether what the model sees is rendered by a chat template."""
    return own.transcript == "chat" or own.window.written_as == "chat"


def in_windows(transcript: GrowingTranscript, config: Config) -> Transcript:
    """Give each turn a prompt of its own, if that is configured; else return the transcript as it is."""
    if config.model.transcript != "window":
        return transcript
    return WindowTranscript(transcript, config.model.window, max_tokens=config.rollout.max_prompt_tokens)


def engine_config(config: Config, *, most: int | None) -> VLLMConfig:
    """The engines' settings, completed from the rest of the configuration.

    Args:
        config: The run.
        most: Positions of the model, where it has a limit.
    """
    own = config.model.vllm
    wanted = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    computed = config.model.dtype if config.train.autocast == "none" else config.train.autocast
    return own.model_copy(
        update={
            "max_model_len": own.max_model_len or min(wanted, most or wanted),
            "dtype": computed if own.dtype == "auto" else own.dtype,
        }
    )


def build_weights(
    own: ModelConfig, *, seed: int, vocab_size: int, eos_id: int | None = None, device: str | None = None
) -> Any:
    """Make or load a model; on device "meta" it has the configured shape and nothing is allocated.

    Args:
        own: The model's section of the configuration.
        seed: Decides random weights.
        vocab_size: Size of the vocabulary of a model that is made here.
        eos_id: End-of-sequence id written into its configuration.
        device: Another device than the configured one.
    """
    where = device or own.device
    if own.path is not None and not own.random_init and where != "meta":
        return load_model(own.path, dtype=own.dtype, device=where)
    shape = ModelShape(
        vocab_size=own.vocab_size if own.random_init else vocab_size,
        hidden_size=own.hidden_size,
        layers=own.layers,
        heads=own.heads,
        kv_heads=own.kv_heads,
        head_dim=own.head_dim,
        ffn_size=own.ffn_size,
        max_positions=own.max_positions,
        tied=own.tied,
        architecture=own.architecture,
        init_std=own.init_std,
        rope_theta=own.rope_theta,
    )
    return build_model(shape, seed=seed, dtype=own.dtype, device=where, eos_id=eos_id)


def build_tokenizer(config: Config) -> HFTokenizer:
    """Load the tokenizer, or train one on what the environment shows (and the expert writes)."""
    own = None if config.model.random_init else config.model.path
    source = config.model.tokenizer or own
    if source is not None:
        return HFTokenizer.load(source)
    marks = template_marks(config.model.chat.template)
    if _writes_chats(config.model) and config.model.chat.template == OWN:
        raise ConfigError(
            "model.chat.template: a tokenizer that is trained here has no template of its own; "
            "set model.chat.template=chatml"
        )
    texts = example_texts(config)
    if _writes_chats(config.model):
        texts += [_ROLES] * len(texts)  # so that a message's header is a few tokens
    return train_tokenizer(
        texts,
        vocab_size=config.model.vocab_size,
        special_tokens=[*config.model.special_tokens, *marks],
        kind=config.model.tokenizer_kind,
    )


def example_texts(config: Config) -> list[str]:
    """Texts to train a tokenizer on: whole demonstrations where there is an expert, else prompts."""
    rng = run_generator(config.run.seed, RunPurpose.TOKENIZER)
    if config.cold_start.steps:
        collector = _TextCollector()
        episodes = config.cold_start.model_copy(update={"demonstrations": _TOKENIZER_EPISODES})
        shown = in_windows(InlineTranscript(collector), config)
        record_demonstrations(make_cold_start_env(config), collector, episodes, rng=rng, transcript=shown)
        return collector.texts
    env = make_training_env(config)
    return [env.reset(seed=int(rng.integers(2**31)))[0] for _ in range(_TOKENIZER_EPISODES)]


class _TextCollector:
    """Keeps the texts that it is asked to encode."""

    eos_id = 0

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        """Keep a text."""
        self.texts.append(text)
        return []

    def decode(self, ids: Sequence[int]) -> str:
        """Nothing was encoded."""
        del ids
        return ""
