"""Every setting of a run, by section, with its meaning and default; `config` reads them from files.

An unknown key is an error. Every field is read somewhere; a test proves it.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from at2po_agent.losses.kl import Estimator as KlEstimator
from at2po_agent.policies.vllm.config import VLLMConfig
from at2po_agent.rollout.config import RolloutConfig


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class EnvConfig(Section):
    """The environment that is trained on."""

    id: str = Field("at2po/MiniWiki-v0", description="Gymnasium id.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments for gymnasium.make.")


class EvalConfig(Section):
    """How a policy is evaluated: one chain per question, no tree."""

    id: str | None = Field(None, description="Gymnasium id; none means that of env.")
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments for gymnasium.make, over those of env."
    )
    questions: int = Field(200, ge=0, description="How many questions; 0 evaluates nothing.")
    every: int = Field(0, ge=0, description="Greedy evaluation every so many steps; 0 only before and after.")
    sampled: bool = Field(True, description="Also evaluate at temperature 1 before and after training.")
    batch: int = Field(256, ge=1, description="Questions under way at the same time.")


class ChatConfig(Section):
    """How an episode is written as a chat."""

    template: str = Field(
        "tokenizer",
        description="chatml, qwen3-preserving, llama3, a .jinja file, or the tokenizer's own; one that "
        "changes earlier messages is refused.",
    )
    system: str | None = Field(None, description="System message; none leaves it to the template.")
    observation_role: Literal["user", "tool"] = Field("user", description="Whose messages observations are.")
    template_options: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the template, such as enable_thinking."
    )


class ModelConfig(Section):
    """The policy's model: weights from a path, or a Qwen3-shaped one made here."""

    path: str | None = Field(
        None, description="Folder or hub name of a model with its tokenizer; none makes one."
    )
    random_init: bool = Field(
        False, description="Leave path alone: random weights of the shape below, vocab_size included."
    )
    tokenizer: str | None = Field(
        None, description="Folder or hub name of a tokenizer; none takes that of path, or trains one."
    )
    special_tokens: list[str] = Field(
        default_factory=list,
        description="Strings that are always one token of a trained tokenizer, such as tags.",
    )
    architecture: Literal["qwen3", "qwen2", "llama"] = Field(
        "qwen3", description="Family of a model made here."
    )
    vocab_size: int = Field(
        512, ge=260, description="Tokens of the vocabulary (the limit, when one is trained)."
    )
    tokenizer_kind: Literal["bpe", "words"] = Field(
        "bpe", description="What is trained: byte-pair merges, or whole words by frequency."
    )
    hidden_size: int = Field(128, ge=8, description="Width of the residual stream.")
    layers: int = Field(3, ge=1, description="Number of layers.")
    heads: int = Field(4, ge=1, description="Attention heads.")
    kv_heads: int = Field(2, ge=1, description="Heads of keys and values.")
    head_dim: int = Field(32, ge=2, description="Width of one head.")
    ffn_size: int = Field(256, ge=8, description="Width of the feed-forward layer.")
    max_positions: int = Field(8192, ge=16, description="Longest sequence, prompt included.")
    tied: bool = Field(True, description="Whether input and output embeddings are one matrix.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of random weights.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary embedding.")
    transcript: Literal["inline", "chat"] = Field(
        "inline", description="Episodes as one running text, or as the messages of a chat."
    )
    chat: ChatConfig = Field(default_factory=ChatConfig, description="The chat, where it is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Number format of the weights."
    )
    device: str = Field("cpu", description="Where the model lives: cpu, cuda, cuda:1 ...")
    sampler: Literal["hf", "vllm"] = Field(
        "hf", description="What samples: the learner's own model (hf), or engines of vLLM with its weights."
    )
    vllm: VLLMConfig = Field(default_factory=VLLMConfig, description="The engines, where sampler = vllm.")
    slots: int = Field(256, ge=1, description="Sequences that the sampler decodes at the same time.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self

    @model_validator(mode="after")
    def _chat_is_used(self) -> Self:
        if self.transcript != "chat" and self.chat != ChatConfig():
            raise ValueError(
                f"chat is set, but transcript is {self.transcript}: set model.transcript=chat, or leave chat "
                "as it was"
            )
        return self


class AlgorithmConfig(Section):
    """How rewards become gradients. A preset fills the parts; any of them may be replaced."""

    preset: str = Field("at2po", description="Named composition of rollout, credit and loss.")
    keep: Literal["all", "informative"] = Field(
        "all", description="Train on all questions, or on those whose leaves earn different rewards (DAPO)."
    )
    oversampling: int = Field(
        3, ge=1, description="With keep = informative: ask at most so many times train.questions in a step."
    )
    credit: str = Field("tree", description="Registered credit rule: rewards of a tree -> advantages.")
    credit_options: dict[str, Any] = Field(default_factory=dict, description="Keywords of the credit rule.")
    loss: str = Field("atpo", description="Registered loss.")
    loss_options: dict[str, Any] = Field(default_factory=dict, description="Keywords of the loss.")
    kl_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the KL to the policy before training.",
    )
    kl_estimator: KlEstimator = Field("k3", description="Estimator of the KL from sampled tokens.")
    kl_place: Literal["loss", "reward"] = Field(
        "loss", description="Add the KL to the loss, or take each branch's sum from its reward."
    )


class OptimizerConfig(Section):
    """AdamW with a constant learning rate."""

    lr: float = Field(1e-6, gt=0, description="Learning rate after the warmup.")
    warmup_steps: int = Field(0, ge=0, description="Training steps over which the rate rises linearly.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")


class TrainConfig(Section):
    """The training loop."""

    steps: int = Field(240, ge=0, description="Training steps; each samples new trees.")
    questions: int = Field(64, ge=1, description="Questions of one step.")
    minibatch_questions: int = Field(8, ge=1, description="Questions of one optimiser update.")
    epochs: int = Field(1, ge=1, description="Passes over the trees of a step.")
    micro_batch_tokens: int = Field(
        16384, ge=1, description="Most tokens, padding included, that go through the model at once."
    )
    packing: Literal["auto", "tree", "rows"] = Field(
        "auto",
        description="Compute what branches share once (tree), or each branch as a row of its own (rows); "
        "auto takes tree where a test on the model shows that both give the same log-probs.",
    )
    old_log_probs: Literal["sampler", "recompute", "auto"] = Field(
        "recompute",
        description="Log-probs at the start of the update: as sampled, or from a forward pass; auto takes "
        "the sampler's where a micro-batch shows that they agree to 0.001 nats.",
    )
    importance_cap: float | None = Field(
        None,
        ge=1,
        allow_inf_nan=False,
        description="Weigh each token's loss by how much likelier the learner finds it than the sampler did, "
        "at most so much (truncated importance sampling); none does not weigh.",
    )
    mismatch_warning: float = Field(
        0.01, gt=0, description="Warn when sampler and learner differ by a larger KL, in nats per token."
    )
    autocast: Literal["none", "bfloat16"] = Field(
        "none", description="Number format of the learner's matrix products; weights keep model.dtype."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, a third more time."
    )
    save_every: int = Field(20, ge=0, description="Checkpoint every so many steps; 0 only at the end.")
    keep_checkpoints: int = Field(2, ge=1, description="How many checkpoints are kept.")
    save_trees_every: int = Field(10, ge=0, description="Keep the trees of every n-th step; 0 none.")
    save_trees: int = Field(4, ge=1, description="How many of a step's trees are kept.")

    @model_validator(mode="after")
    def _minibatch_fits(self) -> Self:
        if self.minibatch_questions > self.questions:
            raise ValueError(
                f"minibatch_questions ({self.minibatch_questions}) exceeds questions ({self.questions})"
            )
        return self

    @model_validator(mode="after")
    def _weights_have_two_sides(self) -> Self:
        if self.importance_cap is not None and self.old_log_probs == "sampler":
            raise ValueError(
                "importance_cap compares recomputed log-probs with the sampler's, and old_log_probs is "
                "'sampler'; set it to recompute or auto"
            )
        return self


class ColdStartConfig(Section):
    """Supervised start on demonstrations of an expert with planted faults."""

    steps: int = Field(0, ge=0, description="Optimiser steps; 0 skips the cold start.")
    batch_size: int = Field(16, ge=1, description="Demonstrations of one step.")
    lr: float = Field(3e-3, gt=0, description="Peak learning rate of AdamW (embeddings, norms).")
    muon_lr: float = Field(0.02, gt=0, description="Peak learning rate of Muon (matrices).")
    env_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Keywords over env.kwargs for the questions of the demonstrations."
    )
    demonstrations: int = Field(4000, ge=1, description="How many demonstrations are drawn.")
    expert: dict[str, Any] = Field(default_factory=dict, description="Keywords of the expert: its faults.")


class RunConfig(Section):
    """The run as a whole."""

    name: str = Field("run", description="What the run is called; the default folder is runs/NAME.")
    dir: str | None = Field(
        None, description="Folder of the run; none takes a free one, runs/NAME, runs/NAME-2 ..."
    )
    seed: int = Field(0, ge=0, description="Decides every random draw.")
    threads: int = Field(0, ge=0, description="Threads of torch; 0 leaves torch's choice.")
    dry_run: bool = Field(False, description="Check everything, print the plan, allocate nothing, stop.")


class Config(Section):
    """One run."""

    dataset: str | None = Field(
        None, description="Questions (FlashRAG JSON lines), given to every environment."
    )
    corpus: str | None = Field(None, description="Passages (wiki-18 JSON lines), given to every environment.")
    env: EnvConfig = Field(default_factory=EnvConfig, description="Environment of the training.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="Evaluation.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="Model and sampler.")
    cold_start: ColdStartConfig = Field(default_factory=ColdStartConfig, description="Supervised start.")
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig, description="Credit and loss.")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="Trees and their limits.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimiser.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="Training loop.")
    run: RunConfig = Field(default_factory=RunConfig, description="Folder, seed, threads.")
