"""Grows random trees of given shapes, as a sampler would have left them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from at2po_agent.credit.values import node_advantages, node_values, normalize_leaf_rewards
from at2po_agent.expansion import select_nodes
from at2po_agent.tree import Tree
from at2po_agent.types import Turn

Bounds = tuple[int, int]


@dataclass(frozen=True)
class TreeShape:
    """How a tree grows; lengths are drawn uniformly from (low, high).

    Attributes:
        chains: M, chains from the root.
        forks: K, turns forked in a round.
        rounds: L, rounds of forks; the tree has M + L K leaves.
        turns: Turns of a chain.
        prompt: Tokens of the prompt.
        action: Tokens of an action, all sampled.
        observation: Tokens of an observation.
    """

    chains: int = 10
    forks: int = 6
    rounds: int = 2
    turns: Bounds = (3, 7)
    prompt: Bounds = (150, 250)
    action: Bounds = (40, 100)
    observation: Bounds = (20, 60)


def random_tree(shape: TreeShape, *, vocabulary: int, seed: int) -> Tree:
    """Grow a tree by the published rule: the turns of the highest score are sampled again, to a new end."""
    rng = np.random.default_rng(seed)
    tree = Tree(_ids(rng, shape.prompt, vocabulary))
    for _ in range(shape.chains):
        _chain(tree, 0, (), shape, vocabulary, rng)
    for _ in range(shape.rounds):
        for node in select_nodes(tree.parent, tree.entropy, tree.is_leaf, k=shape.forks):
            turn = tree.turns[node]
            above = 0 if turn is None else int(tree.parent[node])
            _chain(tree, above, () if turn is None else turn.observation_ids, shape, vocabulary, rng)
    return tree


def advantages(tree: Tree) -> NDArray[np.float64]:
    """AT2PO's advantages, float64[N]; 1 where all are 0, so that there is something to compute."""
    values = node_values(tree.parent, tree.entropy, normalize_leaf_rewards(tree.leaf_reward))
    found = node_advantages(tree.parent, values)
    return found if found.any() else np.ones_like(found)


def _chain(
    tree: Tree,
    node: int,
    observation: tuple[int, ...],
    shape: TreeShape,
    vocabulary: int,
    rng: np.random.Generator,
) -> None:
    depth = len(tree.path(node)) - 1
    end = max(depth + 1, int(rng.integers(*shape.turns, endpoint=True)))
    for level in range(depth, end):
        if level > depth:
            observation = _ids(rng, shape.observation, vocabulary)
        action = _ids(rng, shape.action, vocabulary)
        log_probs = -rng.exponential(size=len(action)).astype(np.float32)
        turn = Turn(observation, action, log_probs, None, "", "", float(rng.uniform(0.2, 1.0)), "stop")
        node = tree.add(node, turn)
    tree.close(node, float(rng.integers(2)))


def _ids(rng: np.random.Generator, bounds: Bounds, vocabulary: int) -> tuple[int, ...]:
    return tuple(rng.integers(vocabulary, size=rng.integers(*bounds, endpoint=True)).tolist())
