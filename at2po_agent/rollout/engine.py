"""Grows the trees of a whole batch together, and keeps the policy busy meanwhile.

Read `rollout` and then `Scheduler`: a branch goes `ready` -> asked -> stepping -> ready until it ends. A
`Question` (question.py) says which branches there are, a `Branch` (branch.py) holds one of them.

There is no barrier. Each branch goes on as soon as its own generation or observation is there, and each tree
begins its next round as soon as its own branches have ended, so the slowest tool holds up its own tree alone.
Results are independent of timing all the same, for two reasons. A seed belongs to a place in a tree
(question, branch, turn, attempt) and never to a time. And turns enter a tree round by round, in the order of
its branches.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from at2po_agent.expansion.registry import Expansion, expansion_rules
from at2po_agent.policies.base import Policy, Request, transcript_of
from at2po_agent.rollout.branch import Branch
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.rollout.question import EnvPool, Question
from at2po_agent.rollout.requests import PolicyRequests
from at2po_agent.rollout.steps import Env, Steps
from at2po_agent.rollout.uncertainty import Thresholds
from at2po_agent.rollout.watch import Watch, vocabulary_size
from at2po_agent.transcripts.inline import GrowingTranscript, Transcript, TurnInput
from at2po_agent.tree import Tree
from at2po_agent.types import Generation
from at2po_env.errors import ConfigError

Options = Mapping[str, Any] | None
"""Options of `reset` for one question, such as `{"index": 3}`; None lets the seed draw it."""


class RolloutStats(NamedTuple):
    """What a rollout cost.

    Attributes:
        sampled_tokens: Tokens that the policy sampled.
        policy_seconds: Seconds inside the policy.
        env_seconds: Seconds in all the rest: steps in line, waiting for tools, and the scheduler itself.
        turns: Actions that were taken.
        tool_seconds: Seconds that steps of environments took, added up over all threads.
        changes: With T2PO's thinking intervention, for each action that was sampled the least that its signal
            moved (`Watch.lowest_change`); in no order.
        differences: With its dynamical sampling, |Phi_k - Phi_{k-1}| of each first attempt; in no order.
        tool_calls: Turns that reached a tool; one that branches share was taken once and counts once.
    """

    sampled_tokens: int
    policy_seconds: float
    env_seconds: float
    turns: int
    tool_seconds: float
    changes: tuple[float, ...] = ()
    differences: tuple[float, ...] = ()
    tool_calls: int = 0


class GrownTrees(list[Tree]):
    """The trees of a rollout, one per task in order.

    Attributes:
        stats: What they cost.
    """

    def __init__(self, trees: Iterable[Tree], stats: RolloutStats) -> None:
        super().__init__(trees)
        self.stats = stats


def rollout(
    tasks: Sequence[Options],
    env: Env,
    policy: Policy,
    config: RolloutConfig,
    *,
    seed: int,
    expansion: Expansion | None = None,
    thresholds: Thresholds | None = None,
    on_leaf: Callable[[], None] | None = None,
    places: Sequence[int] | None = None,
) -> GrownTrees:
    """Grow one tree for each task.

    M chains start at the prompt; then, L times, K nodes are chosen by the expansion rule and forked. Slow
    steps of environments are taken in threads while the policy goes on. Results depend only on the arguments,
    never on timing (`docs/rollout.md`).

    Args:
        tasks: Reset options of each question.
        env: Any forkable environment, wrappers included; it is reset, and forked for every branch.
        policy: Samples the actions; its `transcript`, where it has one, makes the ids of what the environment
            shows.
        config: Shape and limits.
        seed: Decides every draw of environment, policy and expansion.
        expansion: The rule; None takes the registered rule that `config.expansion` names.
        thresholds: Of T2PO's interventions, where `config` gives a share of the turns instead of a number.
        on_leaf: Called whenever a branch has ended; what it raises stops the rollout.
        places: The place of each task in a larger batch of which these tasks are a share; a place decides the
            draws of its tree, so the shares give the trees of the whole. None counts from 0.

    Returns:
        One tree per task, in order; a tree without leaves where the prompt was too long.

    Raises:
        ConfigError: No such expansion rule.
        PolicyError: The policy broke its contract.
    """
    start = time.perf_counter()
    rules = expansion_rules()
    rule = expansion or rules.get(config.expansion)
    if rule is None:
        raise ConfigError(
            f"rollout.expansion: no rule named {config.expansion!r}; known: {', '.join(sorted(rules))}"
        )
    watched = rule.adaptive or config.thinking.enabled or config.resampling.enabled
    normalised = rule.adaptive or (watched and config.signal.kind == "released")
    vocab_size = vocabulary_size(policy) if normalised else 2

    def watch(stop: Sequence[str]) -> Watch | None:
        if not watched:
            return None
        return Watch(
            config,
            policy.tokenizer,
            probe=rule.adaptive,
            vocab_size=vocab_size,
            stop=stop,
            thresholds=thresholds or Thresholds(),
        )

    transcript = _Remembering(transcript_of(policy))
    pool = EnvPool(env)
    questions = [
        Question(
            index,
            pool,
            None if options is None else dict(options),
            transcript=transcript,
            config=config,
            expansion=rule,
            seed=seed,
            vocab_size=vocab_size,
        )
        for index, options in zip(range(len(tasks)) if places is None else places, tasks, strict=True)
    ]
    scheduler = Scheduler(
        questions, policy, config, env=env, transcript=transcript, watch=watch, on_leaf=on_leaf
    )
    scheduler.run()
    asked, steps = scheduler.requests, scheduler.steps
    rest = time.perf_counter() - start - asked.seconds
    stats = RolloutStats(
        asked.tokens,
        asked.seconds,
        rest,
        scheduler.turns,
        steps.seconds,
        tuple(scheduler.changes),
        tuple(scheduler.differences),
        scheduler.tool_calls,
    )
    return GrownTrees((question.tree for question in questions), stats)


class Scheduler:
    """Grows the trees of some questions; the caller's thread decides everything.

    Args:
        questions: The trees to grow; a branch knows the index of its question.
        policy: Samples the actions.
        config: Shape and limits.
        env: The environment whose forks are stepped; its hung steps are bounded over all rollouts.
        transcript: Makes the ids of observations.
        watch: Makes the intervention of one request with these stop strings, or None.
        on_leaf: Called whenever a branch has ended.

    Attributes:
        requests: The policy's side.
        steps: The environments' side.
        turns: Actions that were taken.
        tool_calls: Those that reached a tool.
        changes: As in `RolloutStats`.
        differences: As there.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        policy: Policy,
        config: RolloutConfig,
        *,
        env: Env,
        transcript: Transcript,
        watch: Callable[[Sequence[str]], Watch | None],
        on_leaf: Callable[[], None] | None,
    ) -> None:
        self._questions = {question.index: question for question in questions}
        self._tokenizer = policy.tokenizer
        self._transcript = transcript
        self._config = config
        self._watch = watch
        self._on_leaf = on_leaf
        self._ready: deque[Branch] = deque()  # wait for a place at the policy
        self._asked: dict[int, tuple[Branch, Watch | None]] = {}  # by ticket
        self.requests = PolicyRequests(policy)
        self.steps: Steps[Branch] = Steps(config.tool_workers, config.tool_deadline_s, owner=env.unwrapped)
        self.turns = self.tool_calls = 0
        self.changes: list[float] = []
        self.differences: list[float] = []

    def run(self) -> None:
        """Grow all trees to their ends. An exception leaves no request and no thread behind."""
        try:
            for question in self._questions.values():
                self._ready.extend(question.first_round())
            while self._ready or self._asked or self.steps.pending:
                self._advance()
        finally:
            try:
                self.requests.cancel_all()
            finally:
                self.steps.close()

    def _advance(self) -> None:
        # 1. Hand out requests first, so that the policy has them before this thread may sleep.
        self._ask()
        # 2. Take in what the environments have answered. `patience` says how long this may sleep: not at all
        #    while a streaming policy has work, and until the next answer where nothing else can happen.
        for branch, stepped in self.steps.collect(self.requests.patience(self.steps.pending)):
            called = branch.origin.tool_calls
            branch.arrive(stepped, self._transcript)
            self.tool_calls += branch.origin.tool_calls - called
            self._go_on(branch)
        # 3. Branches that have just got their observation join the batch that is being decoded.
        self._ask()
        # 4. Let the policy decode for a moment (a whole wave, if it does not stream); pass its answers on.
        if self.requests.patience(self.steps.pending) == 0:
            for ticket, generation in self.requests.collect():
                self._hand_over(*self._asked.pop(ticket), generation)

    def _ask(self) -> None:
        """Let ready branches ask the policy, first come first served, as many as it may have open."""
        config = self._config
        while self._ready and (config.max_requests is None or self.requests.open < config.max_requests):
            branch = self._ready.popleft()
            question = self._questions[branch.question]
            watch = self._watch(question.stop)
            request = Request(
                prefix_ids=branch.request_ids,
                max_tokens=branch.room,
                temperature=config.temperature,
                top_p=config.top_p,
                stop=question.stop,
                seed=question.sampling_seed(branch),
                intervention=watch,
            )
            self._asked[self.requests.submit(request)] = branch, watch

    def _hand_over(self, branch: Branch, watch: Watch | None, generation: Generation) -> None:
        """Give a branch its action and begin its step, or note that the turn is to be sampled again."""
        first_entropy, uncertainty = 0.0, None
        if watch is not None:
            watch.check(generation)
            first_entropy, uncertainty = watch.first_entropy, watch.uncertainty
            before = branch.origin.uncertainty
            if self._config.thinking.enabled:
                self.changes.append(watch.lowest_change)
            if self._config.resampling.enabled and before is not None and branch.attempt == 0:
                self.differences.append(abs(uncertainty - before))
            if watch.wants_another(generation, previous=before, attempts=branch.attempt):
                branch.discard(generation, self._tokenizer, uncertainty=uncertainty)
                self._ready.append(branch)
                return
        self.turns += 1
        action = branch.write(
            generation, self._tokenizer, first_entropy=first_entropy, uncertainty=uncertainty
        )
        if action is None:
            self._go_on(branch)
        else:
            self.steps.begin(branch, branch.env, action)

    def _go_on(self, branch: Branch) -> None:
        """Let a branch ask for its next turn; where it has ended, start what its question grows next."""
        if branch.outcome is None:
            self._ready.append(branch)
            return
        if self._on_leaf is not None:
            self._on_leaf()
        self._ready.extend(self._questions[branch.question].next_round())


class _Remembering:
    """A transcript that tokenises a text once: branches of a question are often shown the same passages."""

    def __init__(self, transcript: Transcript) -> None:
        self.first = transcript.first
        self._transcript = transcript
        self._known: dict[tuple[str, bool], TurnInput] = {}

    def next(
        self, before: TurnInput, action: str, observation: str, info: Mapping[str, Any], *, closed: bool
    ) -> TurnInput:
        """Ids before the next action; those of a growing transcript depend on the observation alone."""
        if not isinstance(self._transcript, GrowingTranscript):
            return self._transcript.next(before, action, observation, info, closed=closed)
        key = observation, closed
        if key not in self._known:
            self._known[key] = self._transcript.next(before, action, observation, info, closed=closed)
        return self._known[key]
