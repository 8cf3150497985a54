"""The growing tree of one question: which branches run, and when their turns enter the tree."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium

from at2po_agent.policies.base import Tokenizer
from at2po_agent.rollout.branch import Branch, Env, Place
from at2po_agent.rollout.expansions import Expansion
from at2po_agent.rollout.seeds import Purpose, derive_generator, derive_seed
from at2po_agent.rollout.settings import RolloutConfig
from at2po_agent.tree import ROOT, Tree
from at2po_env import Snapshot, fork, restore, snapshot


class EnvPool:
    """Environments in any state, made by forking one; a finished branch's environment serves the next."""

    def __init__(self, env: Env) -> None:
        self.env = env
        self._idle: list[Env] = []

    def at(self, state: Snapshot) -> Env:
        """An environment of its own in the given state."""
        env = self._idle.pop() if self._idle else fork(self.env)
        restore(env, state)
        return env

    def give_back(self, branch: Branch) -> None:
        """Take the environment of a finished branch, unless it failed."""
        if not branch.env_failed:
            self._idle.append(branch.env)


class Opening(NamedTuple):
    """A question as the environment opened it."""

    task_id: str
    prompt: str
    stop: tuple[str, ...]
    state: Snapshot


def open_question(env: gymnasium.Env[str, str], options: Mapping[str, Any] | None, seed: int) -> Opening:
    """Reset the environment to one question.

    Whatever `reset` raises is passed on: a question that cannot be opened is a fault of data or
    configuration.
    """
    prompt, info = env.reset(seed=seed, options=None if options is None else dict(options))
    stop = tuple(info.get("stop", ()))
    return Opening(str(info.get("task_id", "")), prompt, stop, snapshot(env))


class Question:
    """Grows one tree, round by round.

    Turns enter the tree when a round is complete, in the order of the branches: node indices, and with them
    everything that breaks ties by index, do not depend on which branch finished first.
    """

    def __init__(
        self,
        index: int,
        opening: Opening,
        *,
        tokenizer: Tokenizer,
        pool: EnvPool,
        config: RolloutConfig,
        expansion: Expansion,
        seed: int,
    ) -> None:
        self.index = index
        self.stop = opening.stop
        self.tree = Tree(tokenizer.encode(opening.prompt), opening.prompt, opening.task_id)
        self._places: list[Place | None] = [Place(opening.state, "", ())]
        self._pool = pool
        self._config = config
        self._expansion = expansion
        self._seed = seed
        self._branches: list[Branch] = []
        self._started = 0
        self._rounds = 0

    def first_round(self) -> list[Branch]:
        """The chains from the root; none when the prompt is too long."""
        if len(self.tree.prompt_ids) > self._config.max_prompt_tokens:
            return []
        grows = self._expansion.rule is not None
        return self._start([ROOT] * (self._config.chains if grows else self._config.leaves))

    def next_round(self) -> list[Branch]:
        """Commit the finished round and start the next; empty when the tree is complete or the round runs."""
        if not self._branches or any(branch.outcome is None for branch in self._branches):
            return []
        for branch in self._branches:
            self._commit(branch)
        self._branches = []
        if self._expansion.rule is None or self._rounds == self._config.rounds:
            return []
        self._rounds += 1
        return self._start(self._choose())

    def sampling_seed(self, branch: Branch) -> int:
        """Seed of the branch's next request."""
        return derive_seed(self._seed, Purpose.SAMPLING, self.index, branch.number, branch.turn_number)

    def _choose(self) -> list[int]:
        tree, rule = self.tree, self._expansion.rule
        assert rule is not None
        nodes = rule(
            tree.parent,
            tree.entropy,
            tree.is_leaf,
            k=self._config.forks,
            alpha=self._config.alpha,
            generator=derive_generator(self._seed, Purpose.EXPANSION, self.index, self._rounds),
        )
        self._check_choice(nodes)
        if self._expansion.attach == "child":
            return list(nodes)
        return [ROOT if node == ROOT else int(tree.parent[node]) for node in nodes]

    def _check_choice(self, nodes: Sequence[int]) -> None:
        leaf = self.tree.is_leaf
        wrong = [node for node in nodes if not 0 <= node < len(leaf) or leaf[node]]
        if wrong or len(nodes) != self._config.forks:
            raise ValueError(
                f"expansion rule {self._expansion.name!r} must return {self._config.forks} inner nodes "
                f"of a tree of {len(leaf)} nodes, got {list(nodes)}"
            )

    def _start(self, nodes: Sequence[int]) -> list[Branch]:
        self._branches = [self._branch(node) for node in nodes]
        return self._branches

    def _branch(self, node: int) -> Branch:
        place = self._places[node]
        assert place is not None, "an inner node always has a place to go on from"
        number, self._started = self._started, self._started + 1
        return Branch(
            question=self.index,
            number=number,
            node=node,
            depth=len(self.tree.path(node)) - 1,
            env=self._pool.at(place.state),
            place=place,
            prefix=tuple(self.tree.branch_ids(node)),
            prompt_length=len(self.tree.prompt_ids),
        )

    def _commit(self, branch: Branch) -> None:
        node = branch.node
        for prefix_ids, turn, place in branch.turns:
            node = self.tree.add(node, turn, prefix_ids=prefix_ids)
            self._places.append(place)
        self.tree.close(node, branch.reward, branch.outcome)
        self._pool.give_back(branch)
