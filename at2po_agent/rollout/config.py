"""The shape and the limits of a rollout."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from at2po_agent.rollout.uncertainty import SignalKind


class SignalConfig(BaseModel):
    """T2PO's uncertainty of a token, for both interventions."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: SignalKind = Field("paper", description="Signal of the paper, or that of the released code.")
    weight: float = Field(0.4, ge=0, le=1, description="a: weight of the entropy.")
    top: int = Field(10, ge=2, description="j: highest log-probs that the paper's confidence averages.")


class ThinkingConfig(BaseModel):
    """T2PO's thinking intervention; the forced tokens are not trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    enabled: bool = Field(False, description="End thinking that has stalled.")
    min_tokens: int = Field(32, ge=0, description="L_min: tokens of thinking before it can be ended.")
    max_tokens: int = Field(256, ge=1, description="L_max: tokens of thinking at which it is ended anyway.")
    window: int = Field(20, ge=1, description="N: changes of the signal that are looked at.")
    epsilon: float = Field(1e-4, ge=0, description="Changes below this mean that thinking has stalled.")
    share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the turns in which thinking is to be ended; epsilon is then a running quantile "
        "of what earlier steps have shown.",
    )
    force: str | None = Field(
        None,
        min_length=1,
        description="Text that is forced; none takes </think> and the tag that opens what the environment's "
        "first stop string closes, such as <search> or <action>.",
    )

    def in_force(self, running: float | None) -> float | None:
        """Return the epsilon to use: None where a share is configured and unknown yet."""
        return self.epsilon if self.share is None else running


class ResamplingConfig(BaseModel):
    """T2PO's dynamical sampling: a turn as uncertain as the one before is discarded and sampled again."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    enabled: bool = Field(False, description="Discard repetitive turns before the environment steps.")
    threshold: float = Field(0.3, ge=0, description="eta: difference in uncertainty that a turn must make.")
    share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the turns that are to be discarded at the first attempt; threshold is then a "
        "running quantile of what earlier steps have shown.",
    )
    attempts: int = Field(2, ge=0, description="B: most attempts at a turn that are discarded.")

    def in_force(self, running: float | None) -> float | None:
        """Return the eta to use: None where a share is configured and unknown yet."""
        return self.threshold if self.share is None else running


class RolloutConfig(BaseModel):
    """How the tree of one question is grown; the defaults are AT²PO's published settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    chains: int = Field(10, ge=1, description="M: chains that start at the prompt of a question.")
    forks: int = Field(6, ge=0, description="K: forks of one round of expansion.")
    rounds: int = Field(2, ge=0, description="L: rounds of expansion; leaves = chains + rounds * forks.")
    expansion: str = Field("entropy", description="Rule that chooses the nodes to fork (see `algorithms`).")
    expansion_options: dict[str, Any] = Field(default_factory=dict, description="Keywords of the rule.")
    alpha: float = Field(0.05, ge=0, description="Penalty on a turn's entropy for every sibling it has.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Nucleus: sample from the most likely tokens of this mass."
    )
    max_turn_tokens: int = Field(2048, ge=1, description="Most tokens that the policy may write in one turn.")
    max_response_tokens: int = Field(
        6192, ge=1, description="Most tokens after the prompt, observations included; then the branch is cut."
    )
    max_prompt_tokens: int = Field(2000, ge=1, description="A question whose prompt is longer is left out.")
    cut_reward: float = Field(-1.0, description="Reward of a branch cut by max_response_tokens.")
    error_reward: float = Field(0.0, description="Reward of a branch whose environment or policy failed.")

    overlong_share: float = Field(
        0.0, ge=0, le=1, description="Last share of max_response_tokens, over which the reward falls (DAPO)."
    )
    overlong_factor: float = Field(1.0, ge=0, description="How far it has fallen at the limit.")
    tool_workers: int = Field(
        64, ge=0, description="Most steps of slow environments at a time, each in a thread; 0: one, in line."
    )
    tool_deadline_s: float | None = Field(
        None,
        gt=0,
        description="Seconds after which an environment's step is given up, and its branch ends.",
    )
    max_requests: int | None = Field(
        None,
        ge=1,
        description="Most requests open at the policy; other branches wait, first come first served.",
    )
    signal: SignalConfig = Field(default_factory=SignalConfig, description="Uncertainty (T2PO).")
    thinking: ThinkingConfig = Field(
        default_factory=ThinkingConfig, description="Intervention in thinking (T2PO)."
    )
    resampling: ResamplingConfig = Field(
        default_factory=ResamplingConfig, description="Second attempts at a turn (T2PO)."
    )

    @model_validator(mode="after")
    def _rounds_need_forks(self) -> Self:
        if self.rounds and not self.forks:
            raise ValueError("rounds > 0 with forks = 0 expands nothing; set forks >= 1 or rounds = 0")
        return self

    @model_validator(mode="after")
    def _deadlines_need_workers(self) -> Self:
        if self.tool_deadline_s is not None and not self.tool_workers:
            raise ValueError(
                "tool_deadline_s needs threads (a step in line cannot be given up); set tool_workers >= 1"
            )
        return self

    @property
    def leaves(self) -> int:
        """Leaves of one question's tree, M + L * K."""
        return self.chains + self.rounds * self.forks
