"""Notices that a service on which a run depends has died, so that nothing is trained on garbage.

When a retrieval server or a tool dies, episodes still end: every call is answered with an error, and the
rewards mean nothing. So the calls of each sample are tallied (`tally`), and the share of failed ones decides
(`judge`). Below `health.warn_at` all is well; above it a person is told. From `health.pause_at` on the sample
is thrown away: `HealthWatch` waits, probes the services, takes the sample again when they are back, and gives
up after `health.give_up_after_s`.

Failures below that are counted beside every score (`failures`), and a command whose share of them exceeds
`health.fail_at` fails at its end (`check_failures`): a broken environment must not look like a bad model.

A tool's complaint about what the policy wrote (wrong arguments, an empty query) is no failure of a service.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from at2po_agent.config.sections import HealthConfig
from at2po_agent.environments import EnvCounters
from at2po_agent.tree import Tree
from at2po_env.errors import At2poError

SampleT = TypeVar("SampleT")

FEW = 8
"""Fewer calls of a service than this say nothing about it."""
PROBES = 4
"""Questions that are asked to find out whether a service is back."""
_FIXES = {
    "tools": "bring the servers back that the tools call",
    "retrieval": "bring the retrieval server back (env.kwargs.retriever names it)",
    "steps": "look at the environment's error, and bring back what it needs",
    "requests": "look at the policy's server or engine",
}


class ServiceError(At2poError):
    """A service is down and has not come back in time, or too much has failed.

    Attributes:
        summary: What `summary.json` holds, where the run was complete all the same.
    """

    summary: dict[str, Any] | None = None


class Tally(NamedTuple):
    """Calls of one service.

    Attributes:
        failed: Those that failed.
        calls: All of them.
    """

    failed: int
    calls: int


Tallies = Mapping[str, Tally]
"""The calls of `tools`, `retrieval`, `steps` (of environments) and `requests` (to the policy)."""


LOST = {"env_error": "env_error", "env_timeout": "env_timeout", "abort": "requests"}
"""Outcomes of the episodes that failed, and the names under which they are counted."""


def failures(trees: Sequence[Tree], tallies: Tallies) -> dict[str, Tally]:
    """Count what failed in some episodes, for the tables that show their scores.

    Returns:
        env_error, env_timeout and requests: episodes that ended because the environment raised, because it
        was late, and because the policy gave a request up; of all episodes. retrieval and tools: calls.
    """
    kinds = Counter(
        str((tree.outcomes[leaf] or {}).get("outcome")) for tree in trees for leaf in tree.leaves()
    )
    lost = {name: Tally(kinds[kind], kinds.total()) for kind, name in LOST.items()}
    return {**lost, **{name: tallies.get(name, Tally(0, 0)) for name in ("retrieval", "tools")}}


def add_failures(first: Tallies, second: Tallies) -> dict[str, Tally]:
    """Add what failed in two parts of a run."""
    names = dict.fromkeys([*first, *second])
    both = {name: (first.get(name, Tally(0, 0)), second.get(name, Tally(0, 0))) for name in names}
    return {name: Tally(a.failed + b.failed, a.calls + b.calls) for name, (a, b) in both.items()}


def failed_share(counted: Tallies) -> float:
    """Compute the largest share that failed: of the episodes, or of the calls of retrieval or tools."""
    lost = [counted[name] for name in LOST.values() if name in counted]
    shares = [sum(one.failed for one in lost) / max(1, *(one.calls for one in lost))] if lost else [0.0]
    calls = [counted[name] for name in ("retrieval", "tools") if name in counted]
    return max(shares + [one.failed / one.calls for one in calls if one.calls >= FEW])


def check_failures(what: str, counts: Mapping[str, int], share: float, config: HealthConfig) -> None:
    """Refuse figures that say more about what broke than about the policy.

    Args:
        what: The part of the run, for the message.
        counts: How often what failed.
        share: What `failed_share` returned.
        config: The share that is put up with.

    Raises:
        ServiceError: More than `health.fail_at` of it failed.
    """
    if config.fail_at is None or share <= config.fail_at:
        return
    said = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    raise ServiceError(
        f"{what}: {share:.0%} failed ({said}), more than health.fail_at ({config.fail_at:g}), so its figures "
        "are not the policy's alone. Fix: mend what failed, or raise health.fail_at"
    )


def first_traceback(trees: Sequence[Tree]) -> str | None:
    """The traceback of the first step of an environment that raised; None where none did."""
    outcomes = (tree.outcomes[leaf] or {} for tree in trees for leaf in tree.leaves())
    return next((str(one["traceback"]) for one in outcomes if "traceback" in one), None)


class Verdict(NamedTuple):
    """What failure shares mean.

    Attributes:
        level: Whether to go on, to warn, or to pause.
        shares: Share of failed calls of each service that was called often enough.
        failing: The services whose shares decided the level.
    """

    level: Literal["fine", "warn", "pause"]
    shares: dict[str, float]
    failing: tuple[str, ...]


def tally(trees: Sequence[Tree], counts: Mapping[str, int]) -> dict[str, Tally]:
    """Count the calls of each service, and the failed ones.

    Args:
        trees: What was grown.
        counts: What the environments counted meanwhile (`EnvCounters.counts`).
    """
    leaves = [tree.outcomes[leaf] or {} for tree in trees for leaf in tree.leaves()]
    turns = sum(len(tree) - 1 for tree in trees)
    kinds = Counter(str(outcome.get("outcome")) for outcome in leaves)
    lost, aborted = kinds["env_error"] + kinds["env_timeout"], kinds["abort"]
    broken, unanswered = counts.get("tool_failures", 0), counts.get("failures", 0)
    # A turn after which the episode went on is taken for a call of a tool. A search that the retriever
    # refused without a request counts as a call.
    return {
        "tools": Tally(broken, max(broken, turns - len(leaves))),
        "retrieval": Tally(unanswered, max(unanswered, counts.get("requests", 0))),
        "steps": Tally(lost, turns - aborted),
        "requests": Tally(aborted, turns),
    }


def judge(
    history: Sequence[Tallies],
    *,
    warn_at: float,
    pause_at: float | None,
    window: int,
    few: int = FEW,
) -> Verdict:
    """Decide what the newest tallies of some samples mean.

    Args:
        history: Tallies of the samples, oldest first.
        warn_at: Share of failed calls of a service from which a person is told.
        pause_at: Share from which a run pauses; None never pauses.
        window: The newest tallies that together hold so many calls of a service decide about it.
        few: Fewer calls than this decide nothing.
    """
    shares: dict[str, float] = {}
    for service in dict.fromkeys(name for tallies in history for name in tallies):
        failed = calls = 0
        for tallies in reversed(history):
            if calls >= window:
                break
            newest = tallies.get(service, Tally(0, 0))
            failed, calls = failed + newest.failed, calls + newest.calls
        if calls >= max(1, few):
            shares[service] = failed / calls
    for level, threshold in (("pause", pause_at), ("warn", warn_at)):
        failing = tuple(
            name for name, share in shares.items() if threshold is not None and share >= threshold
        )
        if failing:
            return Verdict("pause" if level == "pause" else "warn", shares, failing)
    return Verdict("fine", shares, ())


class HealthWatch:
    """Takes samples, and takes one again whose services had died.

    Args:
        config: Thresholds and patience.
        report: Takes a line that a person should read.
        resume: The end of the error's message: how to go on by hand.
        on_error: Takes the first traceback of each sample in which an environment raised.
        together: Does some work and returns when all processes of the run have done it; None does it.

    Attributes:
        history: Tallies of the samples so far that may still count, oldest first. A run keeps them in its
            checkpoints, because a resumed run has to judge as one in one piece does.
    """

    def __init__(
        self,
        config: HealthConfig,
        report: Callable[[str], None],
        resume: str,
        on_error: Callable[[str], None] | None = None,
        together: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        self._together = together or (lambda work: work())
        self._config = config
        self._on_error = on_error
        self._report = report
        self._resume = resume
        self.history: list[Tallies] = []
        self._warned: set[str] = set()

    def sound(
        self,
        sample: Callable[[], SampleT],
        trees_of: Callable[[SampleT], Sequence[Tree]],
        *,
        probe: Callable[[], Sequence[Tree]],
        pausing: Callable[[], None],
        tick: Callable[[], None],
    ) -> tuple[SampleT, dict[str, float]]:
        """Take a sample for as long as a service fails in it.

        Args:
            sample: Takes it; called again after a pause, it must begin anew.
            trees_of: The trees of a sample.
            probe: Calls all services a few times; returns its trees.
            pausing: Called before a pause, to save what there is.
            tick: Called about every second of a pause; what it raises ends the pause.

        Returns:
            A sample in which no service failed too often, and the shares of failed calls under
            `health/SERVICE`.

        Raises:
            ServiceError: A service was still down after `health.give_up_after_s`.
        """
        down_since: float | None = None
        while True:
            counters = EnvCounters()
            result = sample()
            trees = trees_of(result)
            traceback = first_traceback(trees)
            if traceback is not None and self._on_error is not None:
                self._on_error(traceback)
            tallies = tally(trees, counters.counts())
            verdict = self._judge([*self.history, tallies])
            if verdict.level != "pause":
                self.history = [*self.history[-99:], tallies]
                self._warn(verdict)
                return result, {f"health/{name}": share for name, share in verdict.shares.items()}
            if down_since is None:
                down_since = time.monotonic()
                self._report(
                    f"paused: {_describe(verdict, trees)}; nothing of this is trained on. The services are "
                    f"probed every {self._config.probe_every_s:g} s (health.probe_every_s)"
                )
            pausing()
            self._wait(verdict, trees, down_since, probe, tick)

    def _wait(
        self,
        verdict: Verdict,
        trees: Sequence[Tree],
        down_since: float,
        probe: Callable[[], Sequence[Tree]],
        tick: Callable[[], None],
    ) -> None:
        """Sleep and probe until the services answer."""
        config = self._config
        give_up = down_since + config.give_up_after_s

        def sleep(verdict: Verdict, trees: Sequence[Tree]) -> None:
            """Wait for the next probe."""
            next_probe = time.monotonic() + config.probe_every_s
            while (now := time.monotonic()) < next_probe:
                if now >= give_up:
                    fixes = "; ".join(_FIXES[name] for name in verdict.failing)
                    raise ServiceError(
                        f"{_describe(verdict, trees)}, and it was not over after "
                        f"{config.give_up_after_s:g} s (health.give_up_after_s). Fix: {fixes}; {self._resume}"
                    )
                time.sleep(max(0.0, min(1.0, next_probe - now, give_up - now)))
                tick()

        while True:
            self._together(partial(sleep, verdict, trees))
            counters = EnvCounters()
            trees = probe()
            found = self._judge([tally(trees, counters.counts())], few=1)
            if found.level != "pause":
                self._report(
                    f"the services answer again after {time.monotonic() - down_since:.0f} s; going on"
                )
                return
            verdict = found

    def _judge(self, history: Sequence[Tallies], *, few: int = FEW) -> Verdict:
        config = self._config
        return judge(history, warn_at=config.warn_at, pause_at=config.pause_at, window=config.window, few=few)

    def _warn(self, verdict: Verdict) -> None:
        """Tell a person once about each service, until it is well again."""
        for name in verdict.failing:
            if name not in self._warned:
                self._report(
                    f"warning: {verdict.shares[name]:.0%} of {name} fail, at least health.warn_at "
                    f"({self._config.warn_at:g}); {_FIXES[name]}"
                )
        self._warned = set(verdict.failing)


def _describe(verdict: Verdict, trees: Sequence[Tree]) -> str:
    """The failing services with their shares, and the first reason that a tree gives."""
    failed = ("env_error", "env_timeout", "abort")
    outcomes = [tree.outcomes[leaf] or {} for tree in trees for leaf in tree.leaves()]
    reasons = [str(outcome.get("reason")) for outcome in outcomes if outcome.get("outcome") in failed]
    shares = ", ".join(f"{verdict.shares[name]:.0%} of {name} fail" for name in verdict.failing)
    return f"{shares} ({reasons[0]})" if reasons else shares
