"""The append-only tree of one question: invariants only, no policy.

A node is one turn; the root (index 0, parent -1) is the prompt alone. Parents precede their children,
so one pass over the indices is a top-down pass and a reversed one is bottom-up. This module does not know
which nodes are forked (`expansion`), what they are worth (`credit`) or how they are trained (`packing`).

Token in, token out: concatenating the pieces along a path gives exactly the ids that the policy saw and
sampled. `add` checks it against the ids that were sent to the policy. A turn with a prompt of its own (a
window transcript) begins a new sequence, and the same holds sequence by sequence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from at2po_agent.types import BoolArray, FloatArray, IntArray, Turn

Scalar = TypeVar("Scalar", bound=np.generic)

FORMAT_VERSION = 1
ROOT = 0
NO_PARENT = -1


class Tree:
    """All turns of one question, as one struct of arrays that only grows.

    The arrays `parent`, `entropy`, `is_leaf` and `leaf_reward` are read-only views of the nodes there are; a
    view taken earlier keeps its length, and sees a leaf that is closed later.

    Attributes:
        prompt_ids: Ids of the root.
        prompt: The root's text.
        task_id: The question's id.
        turns: One entry per node; None for the root.
        outcomes: One entry per node: how the episode ended (em, f1, answer, reason, terminated, truncated);
            None unless the node is a closed leaf.
    """

    def __init__(self, prompt_ids: Sequence[int], prompt: str = "", task_id: str = "") -> None:
        self.prompt_ids: tuple[int, ...] = tuple(prompt_ids)
        self.prompt = prompt
        self.task_id = task_id
        self.turns: list[Turn | None] = [None]
        self.outcomes: list[dict[str, Any] | None] = [None]
        # Room for more nodes than there are; `add` doubles it when it is full.
        self._parent = np.full(16, NO_PARENT, dtype=np.int64)
        self._entropy = np.zeros(16)
        self._reward = np.full(16, np.nan)

    def __len__(self) -> int:
        return len(self.turns)

    def __repr__(self) -> str:
        return f"Tree(task_id={self.task_id!r}, nodes={len(self)}, leaves={len(self.leaves())})"

    @property
    def parent(self) -> IntArray:
        """int64[N]: index of each node's parent, -1 for the root."""
        return _read_only(self._parent[: len(self)])

    @property
    def entropy(self) -> FloatArray:
        """float64[N]: mean surprisal of each turn's sampled tokens in nats, 0 for the root."""
        return _read_only(self._entropy[: len(self)])

    @property
    def leaf_reward(self) -> FloatArray:
        """float64[N]: terminal reward of each leaf, nan elsewhere."""
        return _read_only(self._reward[: len(self)])

    @property
    def is_leaf(self) -> BoolArray:
        """bool[N]: whether the node's turn ended the episode (an unfinished turn is no leaf)."""
        open_turns: BoolArray = np.isnan(self._reward[: len(self)])
        return ~open_turns

    def add(self, parent: int, turn: Turn, *, prefix_ids: Sequence[int] | None = None) -> int:
        """Append a turn below a node.

        Args:
            parent: Index of the node after which the turn happened.
            turn: The turn.
            prefix_ids: What was sent to the policy when it sampled the turn's action. Must equal the turn's
                own prompt, or else the ids up to `parent` followed by the turn's observation. None where
                nothing was sent (a file).

        Returns:
            The new node's index.

        Raises:
            IndexError: `parent` is no node.
            ValueError: `parent` is a closed leaf, or the policy saw other ids than this path records.
        """
        self._check_index(parent)
        if not math.isnan(self._reward[parent]):
            raise ValueError(f"node {parent} ended its episode and cannot have children")
        if prefix_ids is not None:
            self._check_prefix(parent, turn, tuple(prefix_ids))
        node = len(self)
        if node == len(self._parent):
            self._parent = np.concatenate([self._parent, np.full(node, NO_PARENT)])
            self._entropy = np.concatenate([self._entropy, np.zeros(node)])
            self._reward = np.concatenate([self._reward, np.full(node, np.nan)])
        self._parent[node] = parent
        self._entropy[node] = turn.entropy
        self.turns.append(turn)
        self.outcomes.append(None)
        return node

    def close(self, node: int, reward: float, outcome: Mapping[str, Any] | None = None) -> None:
        """Mark a turn as the end of its episode.

        Args:
            node: The turn's index.
            reward: Terminal reward, finite.
            outcome: How the episode ended: em, f1, answer, reason, terminated, truncated.

        Raises:
            IndexError: `node` is no node.
            ValueError: It is the root, has children, is closed already, or the reward is not finite.
        """
        self._check_index(node)
        if node == ROOT:
            raise ValueError("the root is the prompt, not a turn: it cannot end an episode")
        if not math.isnan(self._reward[node]) or self.children(node):
            raise ValueError(f"node {node} is already closed or has children")
        if not math.isfinite(reward):
            raise ValueError(f"reward of node {node} must be finite, got {reward}")
        self._reward[node] = reward
        self.outcomes[node] = dict(outcome or {})

    def with_leaf_rewards(self, rewards: ArrayLike) -> Self:
        """The same tree with other terminal rewards; turns are shared, and neither changes the other.

        Args:
            rewards: float[L], one per leaf in order of creation, finite.

        Raises:
            ValueError: Of another shape, or not finite.
        """
        given = np.asarray(rewards, dtype=np.float64)
        leaves = self.leaves()
        if given.shape != (len(leaves),) or not np.isfinite(given).all():
            raise ValueError(f"need one finite reward for each of {len(leaves)} leaves, got {given}")
        other = type(self)(self.prompt_ids, self.prompt, self.task_id)
        other.turns, other.outcomes = list(self.turns), list(self.outcomes)
        other._parent, other._entropy = self._parent.copy(), self._entropy.copy()
        other._reward = self._reward.copy()
        other._reward[leaves] = given
        return other

    def children(self, node: int) -> tuple[int, ...]:
        """Indices of a node's children in the order of their creation."""
        self._check_index(node)
        return tuple(np.flatnonzero(self._parent[: len(self)] == node).tolist())

    def leaves(self) -> list[int]:
        """Indices of the turns that ended an episode, in the order of their creation."""
        return np.flatnonzero(self.is_leaf).tolist()

    def path(self, node: int) -> list[int]:
        """Indices from the root to a node, both included."""
        self._check_index(node)
        indices = [node]
        while indices[-1] != ROOT:
            indices.append(int(self._parent[indices[-1]]))
        return indices[::-1]

    def branch_ids(self, node: int) -> list[int]:
        """The ids up to the end of a node's turn, as the policy saw and sampled them then."""
        return self.sequences(node)[-1]

    def sequences(self, node: int) -> list[list[int]]:
        """All token ids of the path to a node, exactly as seen and sampled.

        One sequence from the prompt to the end of the node's turn; another begins at each turn that has a
        prompt of its own.
        """
        found = [list(self.prompt_ids)]
        for index in self.path(node)[1:]:
            turn = self.turns[index]
            assert turn is not None, "only the root has no turn"
            if turn.prompt_ids is not None:
                found.append([])
            found[-1] += turn.ids
        return found

    def response_tokens(self, node: int) -> int:
        """Tokens of all observations and actions on the path to a node; prompts do not count."""
        return sum(
            turn.response_tokens for index in self.path(node) if (turn := self.turns[index]) is not None
        )

    def to_json(self) -> str:
        """The whole tree as JSON text, pure ASCII (lone surrogates survive); `from_json` gives it back."""
        nodes = [self._node_json(node) for node in range(1, len(self))]
        body = {
            "version": FORMAT_VERSION,
            "task_id": self.task_id,
            "prompt": self.prompt,
            "prompt_ids": list(self.prompt_ids),
            "nodes": nodes,
        }
        return json.dumps(body, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: Not JSON, another format version, a field missing, or a broken invariant.
        """
        body = json.loads(text)
        if not isinstance(body, dict) or body.get("version") != FORMAT_VERSION:
            got = body.get("version") if isinstance(body, dict) else type(body).__name__
            raise ValueError(f"not a tree of format version {FORMAT_VERSION}: got {got!r}")
        try:
            tree = cls(body["prompt_ids"], body["prompt"], body["task_id"])
            for entry in body["nodes"]:
                node = tree.add(entry["parent"], _turn_from_json(entry))
                if entry["reward"] is not None:
                    tree._reward[node] = float(entry["reward"])
                    tree.outcomes[node] = dict(entry["outcome"])
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not a complete tree: {type(error).__name__} {error}") from error
        return tree

    def _node_json(self, node: int) -> dict[str, Any]:
        turn = self.turns[node]
        assert turn is not None
        return {
            "parent": int(self._parent[node]),
            "observation": turn.observation,
            "action": turn.action,
            "observation_ids": list(turn.observation_ids),
            "action_ids": list(turn.action_ids),
            "sampled_log_probs": turn.sampled_log_probs.tolist(),
            "sampled": None if turn.sampled is None else turn.sampled.tolist(),
            "entropy": turn.entropy,
            "stop_reason": turn.stop_reason,
            "reward": None if math.isnan(self._reward[node]) else float(self._reward[node]),
            "outcome": self.outcomes[node],
            **({"version": turn.version} if turn.version else {}),
            **({} if turn.prompt_ids is None else {"prompt_ids": list(turn.prompt_ids)}),
        }

    def _check_prefix(self, parent: int, turn: Turn, prefix: tuple[int, ...]) -> None:
        expected = turn.prompt_ids or (*self.branch_ids(parent), *turn.observation_ids)
        if prefix == expected:
            return
        shared = next((i for i, (a, b) in enumerate(zip(prefix, expected, strict=False)) if a != b), None)
        where = min(len(prefix), len(expected)) if shared is None else shared
        raise ValueError(
            f"token in, token out is broken below node {parent}: the policy saw {len(prefix)} ids, the path "
            f"records {len(expected)}, first difference at position {where}; "
            "send `branch_ids(parent) + observation_ids`"
        )

    def _check_index(self, node: int) -> None:
        if not 0 <= node < len(self):
            raise IndexError(f"no node {node}: the tree has nodes 0 to {len(self) - 1}")


def _read_only(array: NDArray[Scalar]) -> NDArray[Scalar]:
    array.flags.writeable = False  # of this view alone
    return array


def _turn_from_json(entry: Mapping[str, Any]) -> Turn:
    return Turn(
        observation_ids=tuple(entry["observation_ids"]),
        action_ids=tuple(entry["action_ids"]),
        sampled_log_probs=np.array(entry["sampled_log_probs"], dtype=np.float32),
        sampled=None if entry["sampled"] is None else np.array(entry["sampled"], dtype=np.bool_),
        observation=entry["observation"],
        action=entry["action"],
        entropy=float(entry["entropy"]),
        stop_reason=entry["stop_reason"],
        version=int(entry.get("version", 0)),
        prompt_ids=entry.get("prompt_ids"),
    )


def check_parent(parent: ArrayLike) -> IntArray:
    """Check that an array is a tree in order of creation.

    Args:
        parent: int[N], -1 for the root at index 0, a smaller index elsewhere.

    Returns:
        int64[N].

    Raises:
        ValueError: It is not.
    """
    parents = np.asarray(parent)
    if parents.ndim != 1 or parents.size == 0 or parents.dtype.kind not in "iu":
        raise ValueError(f"parent must be int[N] with N >= 1, got {parents.dtype}{list(parents.shape)}")
    parents = parents.astype(np.int64, copy=False)
    if parents[0] != -1:
        raise ValueError(f"parent[0] must be -1 (the root), got {parents[0]}")
    wrong = np.flatnonzero((parents[1:] < 0) | (parents[1:] >= np.arange(1, len(parents))))
    if wrong.size:
        node = int(wrong[0]) + 1
        raise ValueError(f"parents must precede their children: node {node} has parent {parents[node]}")
    return parents
