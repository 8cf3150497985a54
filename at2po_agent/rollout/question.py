"""The growing tree of one question: which branches run, and when their turns enter the tree."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from at2po_agent.expansion.registry import Expansion
from at2po_agent.rollout.branch import Branch, Place
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.rollout.growth import Grown, Start, first_starts, next_starts
from at2po_agent.rollout.seeds import Purpose, derive_generator, derive_seed
from at2po_agent.rollout.steps import Env
from at2po_agent.transcripts.transcripts import Transcript
from at2po_agent.tree import Tree
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


def open_question(env: Env, options: Mapping[str, Any] | None, seed: int) -> Opening:
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
        transcript: Transcript,
        pool: EnvPool,
        config: RolloutConfig,
        expansion: Expansion,
        seed: int,
        vocab_size: int = 2,
    ) -> None:
        self.index = index
        self.stop = opening.stop
        self.tree = Tree(transcript.open(opening.prompt), opening.prompt, opening.task_id)
        self._places: list[Place | None] = [Place(opening.state, "", ())]
        self._grown = Grown(self.tree, [0.0], [-1])
        self._pool = pool
        self._config = config
        self._expansion = expansion
        self._seed = seed
        self._vocab_size = vocab_size
        self._branches: list[Branch] = []
        self._started = 0
        self._rounds = 0

    def first_round(self) -> list[Branch]:
        """The chains from the root; none when the prompt is too long."""
        if len(self.tree.prompt_ids) > self._config.max_prompt_tokens:
            return []
        return self._start(first_starts(self._expansion, self._config))

    def next_round(self) -> list[Branch]:
        """Commit the finished round and start the next; empty when the tree is complete or the round runs."""
        if not self._branches or any(branch.outcome is None for branch in self._branches):
            return []
        for branch in self._branches:
            self._commit(branch)
        self._branches = []
        starts: list[Start] | None = []
        while starts is not None and not starts:  # an adaptive rule may pass over a round
            self._rounds += 1
            starts = next_starts(
                self._grown,
                self._expansion,
                self._config,
                round=self._rounds,
                vocab_size=self._vocab_size,
                generator=derive_generator(self._seed, Purpose.EXPANSION, self.index, self._rounds),
            )
        return self._start(starts or [])

    def sampling_seed(self, branch: Branch) -> int:
        """Seed of the branch's next request."""
        again = (branch.attempt,) if branch.attempt else ()
        return derive_seed(
            self._seed, Purpose.SAMPLING, self.index, branch.number, branch.turn_number, *again
        )

    def _start(self, starts: Iterable[Start]) -> list[Branch]:
        self._branches = [self._branch(*start) for start in starts]
        return self._branches

    def _branch(self, node: int, chain: int) -> Branch:
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
            chain=chain,
        )

    def _commit(self, branch: Branch) -> None:
        node = branch.node
        for prefix_ids, turn, place, first_entropy in branch.turns:
            node = self.tree.add(node, turn, prefix_ids=prefix_ids)
            self._places.append(place)
            self._grown.first_entropy.append(first_entropy)
            self._grown.chain.append(branch.chain)
        outcome = dict(branch.outcome or {})
        if self._expansion.scope == "chain":
            outcome["chain"] = branch.chain
        self.tree.close(node, branch.reward, outcome)
        self._pool.give_back(branch)
