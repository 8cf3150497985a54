"""The shape and the limits of a rollout."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RolloutConfig(BaseModel):
    """How the tree of one question is grown; the defaults are AT²PO's published settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chains: int = Field(10, ge=1, description="M: chains that start at the prompt of a question.")
    forks: int = Field(6, ge=0, description="K: forks of one round of expansion.")
    rounds: int = Field(2, ge=0, description="L: rounds of expansion; leaves = chains + rounds * forks.")
    expansion: str = Field("entropy", description="Rule that chooses the nodes to fork (see `algorithms`).")
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
    cut_reward: float = Field(
        -1.0, allow_inf_nan=False, description="Reward of a branch cut by max_response_tokens."
    )
    error_reward: float = Field(
        0.0, allow_inf_nan=False, description="Reward of a branch whose environment or policy failed."
    )

    @model_validator(mode="after")
    def _rounds_need_forks(self) -> Self:
        if self.rounds and not self.forks:
            raise ValueError("rounds > 0 with forks = 0 expands nothing; set forks >= 1 or rounds = 0")
        return self

    @property
    def leaves(self) -> int:
        """Leaves of one question's tree, M + L * K."""
        return self.chains + self.rounds * self.forks
