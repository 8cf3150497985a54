"""What learns: a model, its tokenizer, and a policy that samples with it; built from a configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from at2po_agent.agents.cold_start import record_demonstrations
from at2po_agent.agents.model import ModelShape, build_model, load_model, train_tokenizer
from at2po_agent.agents.policy import build_policy, check_sampler
from at2po_agent.config.sections import Config
from at2po_agent.environments import make_cold_start_env, make_training_env
from at2po_agent.policies.base import Policy
from at2po_agent.runs.seeding import RunPurpose, run_generator, run_seed
from at2po_agent.transcripts.chat_templates import OWN, template_marks
from at2po_agent.transcripts.tokenizer import HFTokenizer, Tokenizer
from at2po_agent.transcripts.transcripts import ChatTranscript
from at2po_env.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_TOKENIZER_EPISODES = 300
_ROLES = "user\nassistant\n"


@dataclass(frozen=True)
class Agent:
    """A model that is trained, and a policy that samples with its current weights.

    Attributes:
        model: A causal language model of transformers, or any module whose output has `logits`.
        policy: Samples; its method `weights_changed`, where it has one, is called after each step.
    """

    model: nn.Module
    policy: Policy

    @property
    def tokenizer(self) -> Tokenizer:
        """The policy's tokenizer."""
        return self.policy.tokenizer

    @property
    def version(self) -> int:
        """Version of the policy's weights, as it counts them; 0 where it does not."""
        return int(getattr(self.policy, "version", 0))

    def weights_changed(self) -> None:
        """Tell the policy that the model's weights are new."""
        notify: Callable[[], object] | None = getattr(self.policy, "weights_changed", None)
        if notify is not None:
            notify()

    def rest(self) -> None:
        """Let the policy give back what it holds on the learner's device, until it samples again."""
        rest: Callable[[], object] | None = getattr(self.policy, "rest", None)
        if rest is not None:
            rest()

    def close(self) -> None:
        """End what the policy has started."""
        close: Callable[[], object] | None = getattr(self.policy, "close", None)
        if close is not None:
            close()


def build_agent(config: Config) -> Agent:
    """Make or load model and tokenizer, and the policy that samples with them."""
    check_sampler(config)
    tokenizer = build_tokenizer(config)
    transcript = build_transcript(config, tokenizer)
    if transcript is not None:
        tokenizer = transcript.tokenizer
    model = build_weights(config, vocab_size=len(tokenizer), eos_id=tokenizer.eos_id)
    return Agent(model, build_policy(config, model, tokenizer, transcript))


def build_transcript(config: Config, tokenizer: HFTokenizer) -> ChatTranscript | None:
    """How episodes are written, where not inline; the policy then needs the transcript's own tokenizer.

    Raises:
        ConfigError: The chat template will not do.
    """
    if config.model.transcript == "inline":
        return None
    chat = config.model.chat
    return ChatTranscript(
        tokenizer,
        template=chat.template,
        system=chat.system,
        observation_role=chat.observation_role,
        template_options=chat.template_options,
    )


def build_weights(
    config: Config, *, vocab_size: int, eos_id: int | None = None, device: str | None = None
) -> Any:
    """The model of a configuration; on device "meta" it has the configured shape and nothing is allocated."""
    settings = config.model
    where, seed = device or settings.device, run_seed(config.run.seed, RunPurpose.MODEL)
    if settings.path is not None and not settings.random_init and where != "meta":
        return load_model(settings.path, dtype=settings.dtype, device=where)
    shape = ModelShape(
        vocab_size=settings.vocab_size if settings.random_init else vocab_size,
        hidden_size=settings.hidden_size,
        layers=settings.layers,
        heads=settings.heads,
        kv_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        ffn_size=settings.ffn_size,
        max_positions=settings.max_positions,
        tied=settings.tied,
        architecture=settings.architecture,
        init_std=settings.init_std,
        rope_theta=settings.rope_theta,
    )
    return build_model(shape, seed=seed, dtype=settings.dtype, device=where, eos_id=eos_id)


def build_tokenizer(config: Config, folder: "Path | None" = None) -> HFTokenizer:
    """Load the tokenizer, or train one on what the environment shows (and the expert writes)."""
    own = None if config.model.random_init else config.model.path
    source = folder or config.model.tokenizer or own
    if source is not None:
        return HFTokenizer.load(source)
    marks = template_marks(config.model.chat.template)
    if config.model.transcript == "chat" and config.model.chat.template == OWN:
        raise ConfigError(
            "model.chat.template: a tokenizer that is trained here has no template of its own; "
            "set model.chat.template=chatml"
        )
    texts = example_texts(config)
    if config.model.transcript == "chat":
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
        settings = config.cold_start.model_copy(update={"demonstrations": _TOKENIZER_EPISODES})
        record_demonstrations(make_cold_start_env(config), collector, settings, rng=rng)
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
