"""Where the next branches of a tree start: what an expansion rule chose, as nodes to hang branches from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from at2po_agent.expansion.registry import Expansion
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.tree import ROOT, Tree
from at2po_agent.types import IntArray


class Start(NamedTuple):
    """Where a branch starts: the node below which it hangs, and the chain whose tree it belongs to."""

    node: int
    chain: int


class Grown(NamedTuple):
    """A tree as an expansion rule sees it.

    Attributes:
        tree: The tree, all branches of it ended.
        first_entropy: Entropy over the first tokens of each node's turn, nats; zeros where nobody measures.
        chain: The chain of the first round that each node grew from; -1 for the root.
    """

    tree: Tree
    first_entropy: list[float]
    chain: list[int]


def first_starts(expansion: Expansion, config: RolloutConfig) -> list[Start]:
    """The chains of the first round."""
    count = config.leaves if expansion.rule is None else (expansion.first_chains or config.chains)
    return [Start(ROOT, chain) for chain in range(min(count, config.leaves))]


def next_starts(
    grown: Grown,
    expansion: Expansion,
    config: RolloutConfig,
    *,
    round: int,
    vocab_size: int,
    generator: np.random.Generator,
) -> list[Start] | None:
    """The branches of a further round; None when the tree is complete.

    Raises:
        ValueError: The rule chose a leaf, no node, or another number of nodes than it was asked for.
    """
    if expansion.rule is None or (round > config.rounds and not expansion.adaptive):
        return None
    if expansion.adaptive:
        tree = grown.tree
        nodes = expansion.rule(
            tree.parent,
            np.asarray(grown.first_entropy, dtype=np.float64),
            tree.is_leaf,
            leaves=config.leaves,
            round=round,
            vocab_size=vocab_size,
            generator=generator,
            **config.expansion_options,
        )
        if nodes is None:
            return None
        left = config.leaves - len(tree.leaves())
        _check(expansion, nodes, len(tree), None, f"at most {left} nodes" if len(nodes) > left else "")
        fresh = max(grown.chain, default=-1) + 1
        return [_start(expansion, grown, node, fresh) for node in nodes]
    if expansion.scope == "question":
        members: list[IntArray] = [np.arange(len(grown.tree), dtype=np.int64)]
    else:
        chain = np.asarray(grown.chain)
        members = [np.flatnonzero((chain == number) | (chain < 0)) for number in range(config.chains)]
    starts: list[Start] = []
    for number, nodes_of_tree in enumerate(members):
        chosen = _ask(expansion, grown.tree, nodes_of_tree, config.forks // len(members), config, generator)
        starts += [_start(expansion, grown, int(nodes_of_tree[index]), number) for index in chosen]
    return starts


def _ask(
    expansion: Expansion,
    tree: Tree,
    members: IntArray,
    forks: int,
    config: RolloutConfig,
    generator: np.random.Generator,
) -> list[int]:
    """What the rule chooses from some nodes of a tree, as places among these nodes."""
    assert expansion.rule is not None
    place = np.full(len(tree) + 1, -1)
    place[members] = np.arange(len(members))
    leaf = tree.is_leaf[members]
    chosen = expansion.rule(
        place[tree.parent[members]],
        tree.entropy[members],
        leaf,
        k=forks,
        alpha=config.alpha,
        generator=generator,
        **config.expansion_options,
    )
    nodes = list(chosen or [])
    ended = any(leaf[node] for node in nodes if 0 <= node < len(leaf))
    _check(expansion, nodes, len(leaf), forks, "inner nodes" if ended or len(nodes) != forks else "")
    return nodes


def _check(expansion: Expansion, nodes: Sequence[int], size: int, forks: int | None, fault: str) -> None:
    if fault or any(not 0 <= node < size for node in nodes):
        expected = f"{forks} inner nodes" if forks is not None else fault or "nodes"
        raise ValueError(
            f"expansion rule {expansion.name!r} must return {expected} of a tree of {size} nodes, "
            f"got {list(nodes)}"
        )


def _start(expansion: Expansion, grown: Grown, node: int, chain: int) -> Start:
    """Where a fork of a chosen node hangs, and the chain it belongs to (the given one at the root)."""
    if node == ROOT:
        return Start(ROOT, chain)
    below = node if expansion.attach == "child" else int(grown.tree.parent[node])
    return Start(below, grown.chain[node])
