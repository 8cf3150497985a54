"""Looks into the sampling of one turn: the entropy that ARPO branches by, and T2PO's two interventions.

There is one `Watch` per request. It sees each token's distribution before the token is drawn, and may force
tokens.
"""

import math
from collections.abc import Sequence

from at2po_agent.expansion import top_entropy
from at2po_agent.policies.base import NextToken, Policy
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.rollout.uncertainty import RunningSignal, Thresholds, recent_change, turn_uncertainty
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_agent.types import Float32Array, Generation
from at2po_env.errors import ConfigError, PolicyError

FIRST_TOKENS = 20
"""k: tokens after a tool result whose entropy decides about branching."""
TOP_TOKENS = 10
"""Log-probs of each that the entropy is computed from."""
_CONTEXT = 24  # ids that are decoded to find a mark that the last of them completed


class Watch:
    """An intervention (`policies.base.Intervention`) that measures, and forces an end to stalled thinking.

    Attributes:
        top_log_probs: How many of the largest log-probs every step must carry.
        lowest_change: The least that the signal moved while the policy was thinking; infinite if it thought
            too little to tell.

    Args:
        config: The interventions.
        tokenizer: The policy's.
        probe: Whether the entropy of the first tokens is wanted.
        vocab_size: Size of the vocabulary.
        stop: The environment's stop strings.
        thresholds: Those in force where a share of the turns is configured.
    """

    def __init__(
        self,
        config: RolloutConfig,
        tokenizer: Tokenizer,
        *,
        probe: bool,
        vocab_size: int,
        stop: Sequence[str],
        thresholds: Thresholds,
    ) -> None:
        thinking, resampling = config.thinking, config.resampling
        # A threshold that is not known yet is 0: no change is below it.
        self._epsilon = thinking.in_force(thresholds.epsilon) or 0.0
        self._eta = resampling.in_force(thresholds.eta) or 0.0
        self._force = thinking.force or "</think>" + (
            f"<{stop[0][2:]}" if stop and stop[0].startswith("</") else ""
        )
        self.lowest_change = math.inf
        self._config = config
        self._tokenizer = tokenizer
        self._probe = probe
        self._measures = config.thinking.enabled or config.resampling.enabled
        signal = config.signal
        self._signal = RunningSignal(signal.kind, weight=signal.weight, top=signal.top, vocab_size=vocab_size)
        self.top_log_probs = max(TOP_TOKENS if probe else 0, signal.top if self._measures else 0)
        self._first: list[Float32Array] = []
        self._asked = False
        self._thinking_since: int | None = None
        self._intervened = False

    def __call__(self, step: NextToken) -> Sequence[int]:
        """Measure the distribution of the next token; returns ids to force instead of it, mostly none."""
        self._asked = True
        if self._probe and len(self._first) < FIRST_TOKENS:
            self._first.append(step.top_log_probs[:TOP_TOKENS])
        if not self._measures:
            return ()
        self._signal.add(step.entropy, step.top_log_probs)
        return self._end_of_thinking(step.ids) if self._config.thinking.enabled else ()

    @property
    def first_entropy(self) -> float:
        """Entropy over the turn's first tokens in nats."""
        return top_entropy(self._first) if self._first else 0.0

    @property
    def uncertainty(self) -> float:
        """Phi of the turn: over the tokens that were sampled."""
        return turn_uncertainty(self._signal.values)

    def check(self, generation: Generation) -> None:
        """Make sure that the policy called this intervention.

        Raises:
            PolicyError: It sampled without calling it.
        """
        if generation.ids and not self._asked:
            raise PolicyError(
                "the policy ignores Request.intervention, but rollout.expansion, rollout.thinking or "
                "rollout.resampling needs it; use a policy that honours it (HFPolicy), or turn these off"
            )

    def wants_another(self, generation: Generation, *, previous: float | None, attempts: int) -> bool:
        """Dynamical sampling: whether the turn is to be discarded and sampled again.

        A turn as uncertain as the one before, `|Phi_k - Phi_{k-1}| < eta`, is repetitive.

        Args:
            generation: The turn.
            previous: Phi of the turn before it; None on the first turn.
            attempts: Attempts at this turn that were discarded already.
        """
        config = self._config.resampling
        if not config.enabled or previous is None or attempts >= config.attempts:
            return False
        return generation.stop_reason != "abort" and abs(self.uncertainty - previous) < self._eta

    def _end_of_thinking(self, ids: Sequence[int]) -> Sequence[int]:
        """The ids that end thinking, once per turn: when the signal has stalled, or at the hard cap."""
        config = self._config.thinking
        if self._intervened:
            return ()
        # Thinking has begun when its mark is complete; only the last ids can have completed one.
        tail = self._tokenizer.decode(ids[-_CONTEXT:])
        opened, closed = tail.rfind("<think>"), tail.rfind("</think>")
        if closed > opened:  # the policy ended it itself
            self._intervened = True
            return ()
        if opened >= 0 and self._thinking_since is None:
            self._thinking_since = len(ids)
        if self._thinking_since is None:
            return ()
        length = len(ids) - self._thinking_since
        stalled = False
        if length >= config.min_tokens:
            thought = self._signal.values[-length - 1 :]
            change = recent_change(thought, kind=self._config.signal.kind, window=config.window)
            self.lowest_change = min(self.lowest_change, change)
            stalled = change < self._epsilon
        if not stalled and length < config.max_tokens:
            return ()
        self._intervened = True
        return self._tokenizer.encode(self._force)


def vocabulary_size(policy: Policy) -> int:
    """V of a policy's tokenizer.

    Raises:
        ConfigError: The tokenizer does not tell.
    """
    size = getattr(policy.tokenizer, "__len__", None)
    if size is None:
        raise ConfigError(
            f"{type(policy.tokenizer).__name__} has no __len__, but the size of the vocabulary normalises "
            "the entropy that this rollout decides by; give the tokenizer one"
        )
    return max(2, int(size()))
