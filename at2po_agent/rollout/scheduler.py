"""Keeps the policy busy: every branch goes on as soon as its own generation or observation is there.

One thread decides everything. It alternates between the policy, which decodes for a moment at every call, and
the steps of environments that have been taken meanwhile; where neither has anything, it sleeps. What is
sampled depends on places in the trees, and turns enter a tree round by round in the order of its branches, so
that nothing of a result depends on who was first.
"""

from collections import deque
from collections.abc import Callable, Sequence

from at2po_agent.policies.base import Request
from at2po_agent.rollout.branch import Branch
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.rollout.question import Question
from at2po_agent.rollout.requests import Sampler
from at2po_agent.rollout.steps import Steps
from at2po_agent.rollout.watch import Watch
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_agent.transcripts.transcripts import Transcript
from at2po_agent.types import Generation


class Scheduler:
    """Grows the trees of some questions.

    Args:
        questions: What to grow; a branch knows the index of its question.
        sampler: Asks the policy.
        tokenizer: The policy's.
        transcript: Makes the ids of observations.
        config: Shape and limits.
        watch: Makes what looks into the sampling of one turn, or None.
        on_leaf: Called whenever a branch has ended.

    Attributes:
        steps: The environments' side.
        turns: Actions that were taken.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        sampler: Sampler,
        *,
        tokenizer: Tokenizer,
        transcript: Transcript,
        config: RolloutConfig,
        watch: Callable[[], Watch | None],
        on_leaf: Callable[[], None],
    ) -> None:
        self._questions = questions
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._transcript = transcript
        self._config = config
        self._watch = watch
        self._on_leaf = on_leaf
        self._ready: deque[Branch] = deque()
        self._asked: dict[int, tuple[Branch, Watch | None]] = {}
        self.steps: Steps[Branch] = Steps(config.tool_workers, config.tool_deadline_s)
        self.turns = 0

    def run(self) -> None:
        """Grow all trees to their ends. Whatever is raised meanwhile leaves no request and no thread."""
        try:
            for question in self._questions:
                self._ready.extend(question.first_round())
            while self._ready or self._asked or self.steps.pending:
                self._advance()
        finally:
            try:
                self._sampler.cancel_all()
            finally:
                self.steps.close()

    def _advance(self) -> None:
        """Take in what the environments have answered, then let the policy work."""
        self._ask()
        for branch, stepped in self.steps.collect(self._sampler.patience(self.steps.pending)):
            branch.arrive(stepped, self._transcript, self._config)
            self._go_on(branch)
        self._ask()
        if self._sampler.patience(self.steps.pending) == 0:
            for ticket, generation in self._sampler.collect():
                self._hand_over(*self._asked.pop(ticket), generation)

    def _ask(self) -> None:
        """Let ready branches ask the policy, first come first served, as many as it may have open."""
        most = self._config.max_requests
        while self._ready and (most is None or self._sampler.open < most):
            branch, watching = self._ready.popleft(), self._watch()
            question, config = self._questions[branch.question], self._config
            request = Request(
                prefix_ids=branch.request_ids,
                max_tokens=branch.room(config),
                temperature=config.temperature,
                top_p=config.top_p,
                stop=question.stop,
                seed=question.sampling_seed(branch),
                intervention=watching,
            )
            self._asked[self._sampler.submit(request)] = branch, watching

    def _hand_over(self, branch: Branch, watching: Watch | None, generation: Generation) -> None:
        """Give a branch its action, or note that the turn is to be sampled again."""
        first, uncertainty = 0.0, None
        if watching is not None:
            watching.check(generation)
            first, uncertainty = watching.first_entropy, watching.uncertainty
            if watching.wants_another(generation, previous=branch.place.uncertainty, attempts=branch.attempt):
                branch.discard(generation, self._tokenizer, uncertainty=uncertainty)
                self._ready.append(branch)
                return
        self.turns += 1
        action = branch.write(
            generation, self._tokenizer, self._config, first_entropy=first, uncertainty=uncertainty
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
        self._on_leaf()
        self._ready.extend(self._questions[branch.question].next_round())
