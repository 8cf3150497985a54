"""The policy of a configuration: what samples with the learner's weights."""

from typing import Any

from torch import nn

from at2po_agent.config.sections import Config
from at2po_agent.policies.base import Policy
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.policies.vllm import VLLMPolicy
from at2po_agent.policies.vllm.config import VLLMConfig
from at2po_agent.policies.vllm.spec import check_installed
from at2po_agent.transcripts.tokenizer import HFTokenizer
from at2po_agent.transcripts.transcripts import Transcript


def check_sampler(config: Config) -> None:
    """Find out early whether the configured sampler can be had.

    Raises:
        MissingExtraError: It is not installed.
    """
    if config.model.sampler == "vllm":
        check_installed()


def build_policy(
    config: Config, model: nn.Module, tokenizer: HFTokenizer, transcript: Transcript | None
) -> Policy:
    """The policy that samples with a model's weights.

    Raises:
        MissingExtraError: vLLM is configured and not installed.
        PolicyError: The model cannot be served.
    """
    settings = config.model
    if settings.sampler == "hf":
        served: Any = model  # HFPolicy says itself where it cannot serve it
        return HFPolicy(served, tokenizer, slots=settings.slots, transcript=transcript)
    return VLLMPolicy(
        model,
        tokenizer,
        settings=engine_settings(config, most=getattr(model.config, "max_position_embeddings", None)),
        path=None if settings.random_init else settings.path,
        slots=settings.slots,
        transcript=transcript,
    )


def engine_settings(config: Config, *, most: int | None) -> VLLMConfig:
    """How engines are run, with what the rest of the configuration decides filled in.

    Args:
        config: The run.
        most: Positions of the model.
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
