"""Sampler against learner: how far their log-probs differ, and what can be done about it.

Both have the same weights. Their numbers differ all the same: other kernels, other number formats, KV kept
over a fork, weights that are a version older. Trees were then sampled from `pi_s` and are trained as if from
`pi_l`. This module measures that (`Mismatch`) and corrects it (`importance_weights`). It is pure: no model,
no configuration.

Shared tokens count once for each branch through them, as in the losses, so packs and rows give the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from at2po_agent.cluster.learners import Learners
from at2po_agent.losses.base import (
    LOG_RATIO_LIMIT,
    Metrics,
    RatioLevel,
    check_at_least,
    mask,
    prepare,
)
from at2po_agent.losses.segments import TurnSegments


class Mismatch:
    """Differences of log-probs, added up in float64 where they lie; reading them is what waits for a device.

    `d_t = log pi_l - log pi_s`, over trained tokens, which were drawn from pi_s. A difference that is not
    finite counts as 20 nats.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._largest: Tensor | None = None

    @torch.no_grad()
    def add(self, log_probs: Tensor, sampled_log_probs: Tensor, turn_ids: Tensor) -> None:
        """Add the trained tokens of some rows.

        Args:
            log_probs: float[B, T], nats, of the learner.
            sampled_log_probs: float[B, T], nats, as sampled.
            turn_ids: int64[B, T], -1 where not sampled.
        """
        trained = turn_ids >= 0
        difference = mask(log_probs.double() - sampled_log_probs.double(), trained)
        difference = difference.nan_to_num(LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT)
        bounded = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        k3 = torch.expm1(bounded) - bounded
        size = difference.abs()
        sums = torch.stack([trained.double().sum(), -difference.sum(), k3.sum(), size.sum()])
        self._sums = sums if self._sums is None else self._sums + sums
        largest = size.amax()
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def read(self, learners: Learners | None = None) -> dict[str, float]:
        """The figures, under `mismatch/`; empty when no token was added.

        Args:
            learners: Processes that each added some of the tokens; None for this process alone.

        Returns:
            tokens; kl_k1 and kl_k3, estimates of KL(pi_s || pi_l) in nats per token: `mean(-d)`, unbiased,
            and `mean(exp(d) - 1 - d)`, never negative and of less variance; mean_difference and
            max_difference of |d|.

        References:
            http://joschu.net/blog/kl-approx.html
        """
        sums, most = self._sums, self._largest
        if learners is not None and learners.count > 1:
            # One that added nothing has no tensor, and cannot know on which device the others have theirs.
            sums = learners.sum(torch.zeros(4, dtype=torch.float64) if sums is None else sums.cpu())
            most = learners.largest(torch.zeros((), dtype=torch.float64) if most is None else most.cpu())
        if sums is None or most is None:
            return {}
        tokens, k1, k3, size, largest = torch.cat([sums, most[None]]).tolist()
        if not tokens:
            return {}
        return {
            "mismatch/tokens": int(tokens),
            "mismatch/kl_k1": k1 / tokens,
            "mismatch/kl_k3": k3 / tokens,
            "mismatch/mean_difference": size / tokens,
            "mismatch/max_difference": largest,
        }


@torch.no_grad()
def importance_weights(
    old_log_probs: Tensor,
    sampled_log_probs: Tensor,
    turn_ids: Tensor,
    *,
    cap: float,
    level: RatioLevel = "token",
) -> tuple[Tensor, Metrics]:
    """Truncated importance sampling: how much a token sampled from pi_s counts for pi_l.

    `w_t = min(exp(mean over u of (log pi_l(u) - log pi_s(u))), cap)`: for level `token` u is token t alone,
    for `turn` the sampled tokens of its turn, for `branch` those of its branch. Below the cap the weight
    turns a loss's ratio, made of the same tokens in the same way, into the ratio to the sampler:
    `w_t * pi / pi_l = pi / pi_s`. So the level is that of the loss's ratio. With weights per token on a ratio
    per turn, tokens of one turn would no longer count alike, which is what a turn-level loss is for.

    The weights multiply advantages. All losses of the project are linear in them (for each sign), so that is
    the weight of the token's loss.

    Args:
        old_log_probs: float[B, T], nats, of the learner at the start of the update.
        sampled_log_probs: float[B, T], nats, as sampled.
        turn_ids: int64[B, T], -1 where not sampled.
        cap: Largest weight, at least 1.
        level: `token`, `turn` or `branch`.

    Returns:
        weights, float[B, T] without gradient, 1 where not sampled; metrics: `importance/mean` weight, and
        `importance/capped`, the share of the tokens whose weight was cut to the cap.

    References:
        Truncated importance sampling (Ionides 2008, https://doi.org/10.1198/106186008X320456) between
        sampler and learner, weights per token: https://fengyao.notion.site/off-policy-rl. The means over
        turns and branches are those of AT2PO's and GSPO's ratios, not in that source.
    """
    check_at_least(1.0, cap=cap)
    inputs = prepare(old_log_probs, sampled_log_probs, torch.zeros_like(old_log_probs), turn_ids)
    log_ratio = mask(inputs.log_probs - inputs.old_log_probs, inputs.sampled)
    if level == "turn":
        segments = TurnSegments.of(turn_ids, log_ratio.dtype)
        log_ratio = segments.expand(segments.mean(log_ratio), 0.0)
    elif level == "branch":
        means = log_ratio.sum(dim=1, keepdim=True) / inputs.lengths.clamp(min=1.0)[:, None]
        log_ratio = mask(means.expand_as(log_ratio), inputs.sampled)
    ratio = log_ratio.clamp(max=LOG_RATIO_LIMIT).exp()
    weights, tokens = ratio.clamp(max=cap), inputs.tokens
    return weights, {
        "importance/mean": mask(weights, inputs.sampled).sum() / tokens,
        "importance/capped": (ratio > cap).sum() / tokens,
    }
