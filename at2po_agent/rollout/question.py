"""The growing tree of one question: its branches, round by round, and the nodes that each round forks."""

from enum import IntEnum
from typing import NoReturn

import numpy as np

from at2po_agent.expansion.registry import Expansion
from at2po_agent.rollout.branch import Branch, BranchOrigin
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.rollout.steps import Env
from at2po_agent.transcripts.inline import Transcript, TurnInput
from at2po_agent.tree import ROOT, Tree
from at2po_agent.types import IntArray
from at2po_env import Snapshot, fork, restore, snapshot
from at2po_env.errors import EnvError


class Purpose(IntEnum):
    """What a seed is for; two purposes never share a stream."""

    ENVIRONMENT = 0
    SAMPLING = 1
    EXPANSION = 2


def seed_sequence(seed: int, purpose: Purpose, *place: int) -> np.random.SeedSequence:
    """The seeds of one place in the trees: (question, branch, turn) or (question, round), never of a time."""
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), *place))


def derive_seed(seed: int, purpose: Purpose, *place: int) -> int:
    """A 63-bit seed of one place."""
    return int(seed_sequence(seed, purpose, *place).generate_state(1, np.uint64)[0] >> np.uint64(1))


class EnvPool:
    """Environments in any state, made by forking one; a finished branch's environment serves the next."""

    def __init__(self, env: Env) -> None:
        self.env = env
        self._idle: list[Env] = []

    def at(self, state: Snapshot) -> Env:
        """An environment in the given state, for the caller alone."""
        env = self._idle.pop() if self._idle else fork(self.env)
        restore(env, state)
        return env

    def give_back(self, branch: Branch) -> None:
        """Take the environment of a finished branch, unless it failed."""
        if not branch.env_failed:
            self._idle.append(branch.env)


class Question:
    """Grows the tree of one question, round by round.

    Turns enter the tree when a round is complete, in the order of the branches. So the indices of nodes, and
    everything that breaks ties by index, do not depend on which branch finished first.

    Args:
        index: Its place in the batch, which decides its draws.
        pool: Makes environments; its own is reset to the question here. A question that cannot be opened is a
            fault of data or configuration, so what `reset` raises is passed on (`sys.exit` as an EnvError).
        options: Options for `reset`, such as `{"index": 3}`; None lets the seed draw the question.
        transcript: Makes the prompt's ids.
        config: Shape and limits.
        expansion: Chooses the nodes to fork.
        seed: The rollout's.
        vocab_size: Size of the vocabulary, for adaptive rules.

    Attributes:
        tree: The tree.
        stop: Strings that end an action.
    """

    def __init__(
        self,
        index: int,
        pool: EnvPool,
        options: dict[str, object] | None,
        *,
        transcript: Transcript,
        config: RolloutConfig,
        expansion: Expansion,
        seed: int,
        vocab_size: int,
    ) -> None:
        try:
            prompt, info = pool.env.reset(seed=derive_seed(seed, Purpose.ENVIRONMENT, index), options=options)
        except SystemExit as error:  # it would end the program as if all were well
            raise EnvError(f"the environment's reset called sys.exit({error.code!r})") from error
        shown = transcript.first(prompt, info)
        # The first turn goes on from the root, whose ids are the prompt.
        origin = BranchOrigin(snapshot(pool.env), shown=TurnInput((), memory=shown.memory))
        self.index = index
        self.stop = tuple(info.get("stop", ()))
        self.tree = Tree(shown.ids, prompt, str(info.get("task_id", "")))
        self._pool = pool
        self._config = config
        self._expansion = expansion
        self._seed = seed
        self._vocab_size = vocab_size
        # For each node of the tree: where branches go on from it (None at a leaf), the entropy over the first
        # tokens of its turn (nats; 0 where it is not measured), and its chain of the first round (-1: root).
        self._origins: list[BranchOrigin | None] = [origin]
        self._first_entropy = [0.0]
        self._chain = [-1]
        self._branches: list[Branch] = []  # of the round under way
        self._started = 0
        self._rounds = 0

    def first_round(self) -> list[Branch]:
        """The chains from the root; none when the prompt is too long."""
        config, expansion = self._config, self._expansion
        if len(self.tree.prompt_ids) > config.max_prompt_tokens:
            return []
        count = config.leaves if expansion.rule is None else (expansion.first_chains or config.chains)
        self._branches = [self._branch(ROOT, chain) for chain in range(min(count, config.leaves))]
        return self._branches

    def next_round(self) -> list[Branch]:
        """Commit the finished round and start the next.

        Returns:
            The branches of the next round; none while this round runs, or when the tree is complete.

        Raises:
            ValueError: The rule chose a leaf, no node, or another number of nodes than it was asked for.
        """
        if not self._branches or any(branch.outcome is None for branch in self._branches):
            return []
        for branch in self._branches:
            self._commit(branch)
        chosen: list[tuple[int, int]] | None = []
        while chosen is not None and not chosen:  # an adaptive rule may pass over a round
            self._rounds += 1
            chosen = self._choose(self._rounds)
        self._branches = [self._fork(node, chain) for node, chain in chosen or ()]
        return self._branches

    def sampling_seed(self, branch: Branch) -> int:
        """Seed of the branch's next request; each further attempt at the same turn has another."""
        again = (branch.attempt,) if branch.attempt else ()
        place = (self.index, branch.number, branch.turn_number, *again)
        return derive_seed(self._seed, Purpose.SAMPLING, *place)

    def _choose(self, round: int) -> list[tuple[int, int]] | None:
        """The nodes to fork in a round, each with the chain that a fork of the root would belong to.

        None when the tree is complete; an empty list where an adaptive rule passes over the round.
        """
        rule, config, tree = self._expansion.rule, self._config, self.tree
        if rule is None or (round > config.rounds and not self._expansion.adaptive):
            return None
        generator = np.random.default_rng(seed_sequence(self._seed, Purpose.EXPANSION, self.index, round))
        if self._expansion.adaptive:
            nodes = rule(
                tree.parent,
                np.asarray(self._first_entropy, dtype=np.float64),
                tree.is_leaf,
                leaves=config.leaves,
                round=round,
                vocab_size=self._vocab_size,
                generator=generator,
                **config.expansion_options,
            )
            if nodes is None:
                return None
            left = config.leaves - len(tree.leaves())
            if len(nodes) > left or any(not 0 <= node < len(tree) for node in nodes):
                self._refuse(f"at most {left} nodes", len(tree), nodes)
            fresh = max(self._chain) + 1
            return [(node, fresh) for node in nodes]
        # A rule of scope "question" sees the whole tree. One of scope "chain" is asked once for each chain,
        # and sees the root and the nodes of that chain as a tree of its own.
        if self._expansion.scope == "question":
            groups: list[IntArray] = [np.arange(len(tree), dtype=np.int64)]
        else:
            chain = np.asarray(self._chain)
            groups = [np.flatnonzero((chain == number) | (chain < 0)) for number in range(config.chains)]
        chosen: list[tuple[int, int]] = []
        for number, members in enumerate(groups):
            # Parents become positions among the members. The root's parent, -1, reads the spare last entry of
            # `position`, which stays -1.
            position = np.full(len(tree) + 1, -1)
            position[members] = np.arange(len(members))
            is_leaf = tree.is_leaf[members]
            k = config.forks // len(groups)
            nodes = rule(
                position[tree.parent[members]],
                tree.entropy[members],
                is_leaf,
                k=k,
                alpha=config.alpha,
                generator=generator,
                **config.expansion_options,
            )
            nodes = list(nodes or [])
            if len(nodes) != k or any(not 0 <= node < len(members) or is_leaf[node] for node in nodes):
                self._refuse(f"{k} inner nodes", len(members), nodes)
            chosen += [(int(members[node]), number) for node in nodes]
        return chosen

    def _refuse(self, expected: str, size: int, nodes: list[int]) -> NoReturn:
        raise ValueError(
            f"expansion rule {self._expansion.name!r} must return {expected} of a tree of {size} nodes, "
            f"got {list(nodes)}"
        )

    def _fork(self, node: int, chain: int) -> Branch:
        """A branch that forks a chosen node: beside it, or below it where the rule continues its state."""
        if node == ROOT:
            return self._branch(ROOT, chain)
        below = node if self._expansion.attach == "child" else int(self.tree.parent[node])
        return self._branch(below, self._chain[node])

    def _branch(self, node: int, chain: int) -> Branch:
        """A new branch that hangs below a node."""
        origin = self._origins[node]
        assert origin is not None, "an inner node always has a state to go on from"
        number, self._started = self._started, self._started + 1
        return Branch(
            config=self._config,
            question=self.index,
            number=number,
            node=node,
            depth=len(self.tree.path(node)) - 1,
            env=self._pool.at(origin.state),
            origin=origin,
            prefix=tuple(self.tree.branch_ids(node)),
            used=self.tree.response_tokens(node),
            chain=chain,
        )

    def _commit(self, branch: Branch) -> None:
        """Move a finished branch's turns into the tree, and take its environment back."""
        node = branch.node
        for prefix_ids, turn, origin, first_entropy in branch.turns:
            node = self.tree.add(node, turn, prefix_ids=prefix_ids)
            self._origins.append(origin)
            self._first_entropy.append(first_entropy)
            self._chain.append(branch.chain)
        outcome = dict(branch.outcome or {})
        if self._expansion.scope == "chain":
            outcome["chain"] = branch.chain
        self.tree.close(node, branch.reward, outcome)
        self._pool.give_back(branch)
