"""Defines the configuration of a run by section: each field with its meaning and default.

An unknown key is an error. Every field is read somewhere; a test proves it.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from at2po_agent.losses.kl import Estimator as KlEstimator
from at2po_agent.policies.vllm.config import VLLMConfig
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.transcripts.window import WindowConfig


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class EnvConfig(Section):
    """The environment that is trained on."""

    id: str = Field("at2po/MiniWiki-v0", description="Gymnasium id.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments for gymnasium.make.")
    held_out: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the questions that are kept for evaluation, by a hash of their ids, where "
        "evaluations have the same questions; 0 trains on all of them.",
    )


class EvalConfig(Section):
    """The evaluation of a policy: one chain per question, no tree."""

    id: str | None = Field(None, description="Gymnasium id; none takes that of env.")
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments for gymnasium.make; they win over those of env."
    )
    questions: int = Field(200, ge=0, description="How many questions; 0 evaluates nothing.")
    every: int = Field(
        0,
        ge=0,
        description="Evaluate greedily every so many steps; 0 does so only before and after training.",
    )
    sampled: bool = Field(True, description="Also evaluate at temperature 1 before and after training.")
    batch: int = Field(256, ge=1, description="Questions under way at the same time.")


class ChatConfig(Section):
    """The chat that an episode is written as."""

    template: str = Field(
        "tokenizer",
        description="chatml, qwen3-preserving, llama3, a .jinja file, or tokenizer for the tokenizer's own; "
        "a template that changes earlier messages is refused.",
    )
    system: str | None = Field(None, description="System message; none leaves it to the template.")
    observation_role: Literal["user", "tool"] = Field(
        "user", description="Role of the messages that hold observations."
    )
    template_options: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the template, such as enable_thinking."
    )


class LoraConfig(Section):
    """Low-rank adapters: a matrix W of the model acts as `W + alpha / rank * B A`, and only A and B learn."""

    rank: int = Field(16, ge=1, description="Rank of the products B A.")
    alpha: float = Field(32.0, gt=0, description="Scale of the products, divided by the rank.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of an adapter's inputs that an update leaves out."
    )
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Names of the linear layers that get adapters, such as [q_proj, v_proj]; all-linear "
        "takes all but the output embedding.",
    )


class ModelConfig(Section):
    """The policy's model: weights from a path, or a Qwen3-shaped one made here."""

    path: str | None = Field(
        None, description="Folder or hub name of a model with its tokenizer; none makes a model."
    )
    random_init: bool = Field(
        False, description="Draw random weights of the shape below, vocab_size included, even with a path."
    )
    tokenizer: str | None = Field(
        None, description="Folder or hub name of a tokenizer; none takes that of path, or trains a new one."
    )
    special_tokens: list[str] = Field(
        default_factory=list,
        description="Strings that a trained tokenizer keeps as one token each, such as tags.",
    )
    architecture: Literal["qwen3", "qwen2", "llama"] = Field(
        "qwen3", description="Family of a model that is made here."
    )
    vocab_size: int = Field(
        512, ge=260, description="Tokens of the vocabulary; the limit for a tokenizer that is trained."
    )
    tokenizer_kind: Literal["bpe", "words"] = Field(
        "bpe", description="Kind of a trained tokenizer: byte-pair merges, or whole words by frequency."
    )
    hidden_size: int = Field(128, ge=8, description="Width of the residual stream.")
    layers: int = Field(3, ge=1, description="Number of layers.")
    heads: int = Field(4, ge=1, description="Attention heads.")
    kv_heads: int = Field(2, ge=1, description="Heads of keys and values.")
    head_dim: int = Field(32, ge=2, description="Width of one head.")
    ffn_size: int = Field(256, ge=8, description="Width of the feed-forward layer.")
    max_positions: int = Field(8192, ge=16, description="Longest sequence, prompt included.")
    tied: bool = Field(True, description="Use one matrix for input and output embeddings.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of random weights.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary embedding.")
    transcript: Literal["inline", "chat", "window"] = Field(
        "inline",
        description="Write an episode as one running text (inline) or as messages (chat), or give each turn "
        "a prompt of its own with the last turns (window).",
    )
    chat: ChatConfig = Field(
        default_factory=ChatConfig,
        description="The chat, with transcript = chat or window.written_as = chat.",
    )
    window: WindowConfig = Field(
        default_factory=WindowConfig, description="The prompt of a turn, with transcript = window."
    )
    lora: LoraConfig | None = Field(
        None,
        description="Train low-rank adapters and leave the weights as they are; none trains all weights.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Number format of the weights."
    )
    device: str = Field("cpu", description="Device of the model: cpu, cuda, cuda:1 ...")
    sampler: Literal["hf", "vllm"] = Field(
        "hf", description="Sample with the learner's own model (hf), or with engines of vLLM (vllm)."
    )
    vllm: VLLMConfig = Field(default_factory=VLLMConfig, description="The engines, with sampler = vllm.")
    slots: int = Field(256, ge=1, description="Sequences that the sampler decodes at the same time.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self

    @model_validator(mode="after")
    def _engines_take_the_adapters(self) -> Self:
        served = self.vllm.lora_rank
        if self.lora is not None and 0 < served < self.lora.rank:
            raise ValueError(
                f"vllm.lora_rank ({served}) is smaller than lora.rank ({self.lora.rank}); raise it, or set "
                "it to 0, which sends merged weights"
            )
        return self

    @model_validator(mode="after")
    def _transcript_is_used(self) -> Self:
        if "chat" not in (self.transcript, self.window.written_as) and self.chat != ChatConfig():
            raise ValueError(
                f"chat is set, but transcript is {self.transcript}: set model.transcript=chat, or leave chat "
                "as it was"
            )
        if self.transcript != "window" and self.window != WindowConfig():
            raise ValueError(
                f"window is set, but transcript is {self.transcript}: set model.transcript=window, or leave "
                "window as it was"
            )
        return self


class AlgorithmConfig(Section):
    """The way from rewards to gradients. A preset fills the parts; any of them may be replaced."""

    preset: str = Field("at2po", description="Named composition of rollout, credit and loss.")
    keep: Literal["all", "informative"] = Field(
        "all", description="Train on all questions, or only on those whose leaves differ in reward (DAPO)."
    )
    oversampling: int = Field(
        3, ge=1, description="With keep = informative: ask at most so many times train.questions a step."
    )
    credit: str = Field("tree", description="Registered credit rule: rewards of a tree -> advantages.")
    credit_options: dict[str, Any] = Field(default_factory=dict, description="Keywords of the credit rule.")
    loss: str = Field("atpo", description="Registered loss.")
    loss_options: dict[str, Any] = Field(default_factory=dict, description="Keywords of the loss.")
    clip_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the sampled tokens that the loss is to clip; after each step its bounds are "
        "widened or narrowed towards that. None keeps them as they are.",
    )
    kl_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL to the policy before training.",
    )
    kl_estimator: KlEstimator = Field("k3", description="Estimator of the KL on sampled tokens.")
    kl_place: Literal["loss", "reward"] = Field(
        "loss", description="Add the KL to the loss, or subtract each branch's sum from its reward."
    )


class OptimizerConfig(Section):
    """AdamW and its learning rate."""

    lr: float = Field(1e-6, gt=0, description="Learning rate after the warmup.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="Keep the rate after the warmup, or let it fall so that it would be 0 one step after "
        "train.steps.",
    )
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
        16384, ge=1, description="Most tokens, padding included, that the learner processes at once."
    )
    packing: Literal["auto", "tree", "rows"] = Field(
        "auto",
        description="Compute shared prefixes once (tree), or each branch as a row of its own (rows); auto "
        "takes tree where a test on the model shows that both give the same log-probs.",
    )
    old_log_probs: Literal["sampler", "recompute", "auto"] = Field(
        "recompute",
        description="Take the old log-probs from the sampler, or recompute them by a forward pass; auto "
        "takes the sampler's where they agree to 0.001 nats on a micro-batch.",
    )
    importance_cap: float | None = Field(
        None,
        ge=1,
        description="Weigh each token's loss by the learner's probability over the sampler's, at most so "
        "much (truncated importance sampling); none does not weigh.",
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
    save_every: int = Field(20, ge=0, description="Save a checkpoint every so many steps; 0 only at the end.")
    keep_checkpoints: int = Field(2, ge=1, description="How many checkpoints are kept.")
    save_trees_every: int = Field(10, ge=0, description="Keep the trees of every n-th step; 0 keeps none.")
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


class ServedConfig(Section):
    """The server that `at2po eval URL` asks; training does not use it."""

    url: str | None = Field(
        None, description="Address up to the version, such as http://localhost:8000/v1; at2po eval sets it."
    )
    model: str | None = Field(
        None, description="Name of the model; none takes the only one that the server lists."
    )
    endpoint: Literal["chat", "completions"] = Field(
        "chat", description="chat sends messages, completions sends the running text."
    )
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the key; none sends no key."
    )
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 is greedy.")
    concurrency: int = Field(16, ge=1, description="Requests under way at the same time.")
    timeout_s: float = Field(900.0, gt=0, description="Seconds for an answer, all tries included.")
    native_tools: bool = Field(
        False, description="Let the server parse tool calls; needs eval.kwargs.protocol=hermes."
    )
    system: str | None = Field(None, description="System message before the prompt (chat only).")
    logprobs: bool = Field(
        True, description="Ask for log-probs; without them an episode's tokens are not known."
    )
    bytes_per_token: int = Field(4, ge=1, description="Bytes that count as one token of a limit.")
    price_input: float | None = Field(None, ge=0, description="Price of a million input tokens.")
    price_output: float | None = Field(None, ge=0, description="Price of a million output tokens.")
    price_cached: float | None = Field(None, ge=0, description="Price of a million cached input tokens.")
    extra: dict[str, Any] = Field(default_factory=dict, description="Further members of every request.")


class ColdStartConfig(Section):
    """Supervised start on demonstrations of an expert with planted faults."""

    steps: int = Field(0, ge=0, description="Optimiser steps; 0 skips the cold start.")
    batch_size: int = Field(16, ge=1, description="Demonstrations of one step.")
    lr: float = Field(3e-3, gt=0, description="Peak learning rate of AdamW (embeddings, norms).")
    muon_lr: float = Field(0.02, gt=0, description="Peak learning rate of Muon (matrices).")
    env_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Keywords of the demonstrations' environment; they win over env.kwargs.",
    )
    demonstrations: int = Field(4000, ge=1, description="How many demonstrations are drawn.")
    expert: dict[str, Any] = Field(
        default_factory=dict, description="Keywords of the expert, such as its faults."
    )


class HealthConfig(Section):
    """When a run or an evaluation pauses because tools, retrieval, environments or the policy have died."""

    warn_at: float = Field(0.05, gt=0, le=1, description="Warn from this share of failed calls of a service.")
    pause_at: float | None = Field(
        0.5, gt=0, le=1, description="Pause from this share: save, probe, sample again; none never pauses."
    )
    fail_at: float | None = Field(
        0.05,
        ge=0,
        le=1,
        description="A larger share of failed episodes, or of failed calls of tools or retrieval, fails the "
        "command: that of an evaluation at once, that of the training at its end; none never fails.",
    )
    window: int = Field(20, ge=1, description="The newest samples with so many calls of a service decide.")
    probe_every_s: float = Field(30.0, gt=0, description="Seconds between probes of a pause.")
    give_up_after_s: float = Field(1800.0, ge=0, description="Seconds after which a pause ends the run.")


class ClusterConfig(Section):
    """The processes of a run."""

    learners: int = Field(
        1,
        ge=1,
        description="Processes that train together, each with a part of the weights; each takes a GPU of its "
        "own, or the CPU.",
    )


class RunConfig(Section):
    """The run as a whole."""

    name: str = Field("run", description="Name of the run; its default folder is runs/NAME.")
    dir: str | None = Field(
        None, description="Folder of the run; none takes a free one, runs/NAME, runs/NAME-2 ..."
    )
    seed: int = Field(0, ge=0, description="Seed of every random draw.")
    threads: int = Field(0, ge=0, description="Threads of torch; 0 leaves torch's choice.")
    dry_run: bool = Field(
        False, description="Check everything, print the plan and stop; nothing is allocated."
    )


class Config(Section):
    """One run."""

    dataset: str | None = Field(
        None, description="Questions (FlashRAG JSON lines), given to every environment."
    )
    corpus: str | None = Field(None, description="Passages (wiki-18 JSON lines), given to every environment.")
    env: EnvConfig = Field(default_factory=EnvConfig, description="Environment that is trained on.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="Evaluation.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="Model and sampler.")
    cold_start: ColdStartConfig = Field(default_factory=ColdStartConfig, description="Supervised start.")
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig, description="Credit and loss.")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="Trees and their limits.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimiser.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="Training loop.")
    served: ServedConfig = Field(default_factory=ServedConfig, description="Served model to evaluate.")
    health: HealthConfig = Field(default_factory=HealthConfig, description="Services that die.")
    cluster: ClusterConfig = Field(default_factory=ClusterConfig, description="Processes.")
    run: RunConfig = Field(default_factory=RunConfig, description="Folder, seed, threads.")

    @model_validator(mode="after")
    def _engines_follow_the_cold_start(self) -> Self:
        if self.model.lora is not None and self.model.vllm.lora_rank and self.cold_start.steps:
            raise ValueError(
                "cold_start changes the weights under the adapters, and with model.vllm.lora_rank the "
                "engines get new adapters alone; set model.vllm.lora_rank=0, which sends merged weights"
            )
        return self
