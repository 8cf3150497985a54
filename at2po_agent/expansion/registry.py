"""Expansion rules by name: each chooses the nodes to fork, and says where a fork is attached."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from at2po_agent.expansion.adaptive import aepo_nodes, arpo_nodes
from at2po_agent.expansion.rules import Penalty, random_nodes, select_nodes, tree_grpo_nodes
from at2po_agent.types import BoolArray, FloatArray, IntArray
from at2po_env.errors import ConfigError

ExpansionRule = Callable[..., list[int] | None]
"""`rule(parent, entropy, is_leaf, *, k, alpha, generator) -> list[int]`: k node indices, repetition
allowed. Further keywords are options (`rollout.expansion_options`).

An adaptive rule is `rule(parent, first_entropy, is_leaf, *, leaves, round, vocab_size, generator)`; it
returns the nodes to fork in this round, perhaps none, and None when the tree is complete.
"""

Attach = Literal["sibling", "child"]
Scope = Literal["question", "chain"]
_GIVEN = frozenset({"k", "alpha", "generator", "leaves", "round", "vocab_size"})


@dataclass(frozen=True)
class Expansion:
    """One way to expand a tree.

    Attributes:
        name: What configurations call it.
        rule: Chooses the nodes to fork; None grows chains only, as many as the tree would have leaves.
        attach: `sibling` re-samples the node's own action after the same observation; `child` goes on from
            the state that the node's action led to.
        scope: `question` lets the rule choose from the whole tree; `chain` asks it once for each chain of the
            first round, and what grew from it is a tree of its own (each takes an equal share of the forks).
        adaptive: Whether the rule decides by itself how many rounds there are, and how large.
        first_chains: Chains of the first round; None takes `rollout.chains`.
    """

    name: str
    rule: ExpansionRule | None
    attach: Attach = "sibling"
    scope: Scope = "question"
    adaptive: bool = False
    first_chains: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Options that a configuration may set, with their defaults."""
        if self.rule is None:
            return {}
        parameters = inspect.signature(self.rule).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _GIVEN}


_REGISTRY: dict[str, Expansion] = {}


def register_expansion(
    name: str,
    rule: ExpansionRule | None,
    *,
    attach: Attach = "sibling",
    scope: Scope = "question",
    adaptive: bool = False,
    first_chains: int | None = None,
) -> Expansion:
    """Make an expansion rule known to configurations under a name.

    Args:
        name: The name, new.
        rule: Pure function `rule(parent, entropy, is_leaf, *, k, alpha, generator) -> list[int]` over the
            arrays of one tree (int64[N], float64[N], bool[N]); `generator` is its only source of randomness.
        attach: Where a fork of a chosen node goes, see `Expansion`.
        scope: What the rule chooses from, see `Expansion`.
        adaptive: Whether the rule is an adaptive one, see `ExpansionRule`.
        first_chains: Chains of the first round; None takes `rollout.chains`.

    Raises:
        ConfigError: The name is taken.
    """
    if name in _REGISTRY:
        raise ConfigError(f"an expansion rule named {name!r} is registered already; choose another name")
    _REGISTRY[name] = Expansion(name, rule, attach, scope, adaptive, first_chains)
    return _REGISTRY[name]


def expansion_rules() -> dict[str, Expansion]:
    """All registered expansion rules by name."""
    return dict(_REGISTRY)


def _by_entropy(
    parent: IntArray,
    entropy: FloatArray,
    is_leaf: BoolArray,
    *,
    k: int,
    alpha: float,
    generator: np.random.Generator,
    penalty: Penalty = "released",
) -> list[int]:
    """AT²PO's rule: the k inner nodes of highest entropy, less a penalty on siblings."""
    del generator
    return select_nodes(parent, entropy, is_leaf, k=k, alpha=alpha, penalty=penalty)


def _at_random(
    parent: IntArray,
    entropy: FloatArray,
    is_leaf: BoolArray,
    *,
    k: int,
    alpha: float,
    generator: np.random.Generator,
) -> list[int]:
    """AT²PO's ablation: k inner nodes at random."""
    del entropy, alpha
    return random_nodes(parent, is_leaf, k=k, rng=generator)


def _continued(
    parent: IntArray,
    entropy: FloatArray,
    is_leaf: BoolArray,
    *,
    k: int,
    alpha: float,
    generator: np.random.Generator,
) -> list[int]:
    """Tree-GRPO's rule: k inner nodes with replacement, each continued from its state."""
    del entropy, alpha
    return tree_grpo_nodes(parent, is_leaf, n=k, rng=generator)


register_expansion("entropy", _by_entropy)
register_expansion("random", _at_random)
register_expansion("continue", _continued, attach="child")
register_expansion("tree_grpo", _continued, attach="child", scope="chain")
register_expansion("arpo", arpo_nodes, adaptive=True)
register_expansion("aepo", aepo_nodes, adaptive=True, first_chains=1)
register_expansion("chains", None)
