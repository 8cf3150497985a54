"""Rollouts that never wait for the slowest tool: same trees, bounded, and nothing left behind."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit
from helpers.guess_env import CharTokenizer, GuessEnv, GuessingPolicy
from helpers.slow_env import SlowEnv, small_policy, step_threads
from helpers.slow_policy import SlowPolicy, dumps, tasks
from helpers.watched_policy import WatchedPolicy

from at2po_agent.evaluation.evaluate import evaluate
from at2po_agent.policies.base import Request
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.policies.scripted import ScriptedPolicy
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_agent.rollout.requests import PolicyRequests
from at2po_agent.runs.interrupts import StopRequested
from at2po_agent.transcripts.inline import GrowingTranscript
from at2po_agent.types import Generation
from at2po_env import deadlines
from at2po_env.errors import EnvError, PolicyError, SnapshotError

LIMITS = {"max_turn_tokens": 6, "max_response_tokens": 80}
SHAPE = RolloutConfig(chains=5, forks=3, rounds=2, **LIMITS)
IN_LINE = SHAPE.model_copy(update={"tool_workers": 0})
IN_THREADS = SHAPE.model_copy(update={"tool_workers": 8, "tool_deadline_s": 60.0})


def changed(shape: RolloutConfig, **changes: Any) -> RolloutConfig:
    return RolloutConfig.model_validate({**shape.model_dump(), **changes})


def random_wait(seed: int) -> Callable[[str], None]:
    """Up to 4 ms, now and then 20 ms: another order of events at every call."""
    rng, lock = np.random.default_rng(seed), threading.Lock()

    def wait(action: str) -> None:
        del action
        with lock:
            seconds = 0.02 if rng.random() < 0.1 else float(rng.random()) * 0.004
        time.sleep(seconds)

    return wait


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert not step_threads()
    assert threading.active_count() <= before


# Same results, whatever the timing --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> HFPolicy:
    return small_policy()


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_decides_the_trees_whatever_the_tools_take(seed):
    expected = dumps(rollout(tasks(3), SlowEnv(), small_policy(), IN_LINE, seed=seed))
    for noise in range(2):
        env = SlowEnv(random_wait(noise))
        bound = 4 + 9 * noise
        shapes = [IN_THREADS, SHAPE, changed(IN_THREADS, tool_workers=2, max_requests=bound)]
        for shape in shapes:
            policy = small_policy()  # an empty prefix cache: what is computed together differs as well
            assert dumps(rollout(tasks(3), env, policy, shape, seed=seed)) == expected
            assert policy.idle


def test_draws_in_order_of_arrival_would_depend_on_timing(policy):
    class Arrival:
        """Seeds requests by the order in which they are asked: the mistake that the test above must see."""

        def __init__(self) -> None:
            self.tokenizer, self.poll, self.cancel = policy.tokenizer, policy.poll, policy.cancel
            self.generate, self._count = policy.generate, 0

        def submit(self, request: Request) -> int:
            self._count += 1
            fields = {"prefix_ids": request.prefix_ids, "max_tokens": request.max_tokens}
            return policy.submit(Request(**fields, stop=request.stop, seed=self._count))

    results = [
        dumps(rollout(tasks(3), SlowEnv(random_wait(noise)), Arrival(), IN_THREADS, seed=0))
        for noise in range(3)
    ]
    assert any(result != results[0] for result in results)


@pytest.mark.parametrize("kind", ["arpo", "aepo"])
def test_adaptive_expansion_does_not_depend_on_timing(kind):
    results = []
    for env, shape in ((SlowEnv(), IN_LINE), (SlowEnv(random_wait(0)), IN_THREADS)):
        adaptive = changed(shape, expansion=kind, chains=4, forks=6, rounds=1)
        results.append(dumps(rollout(tasks(3), env, WatchedPolicy(), adaptive, seed=2)))
    assert results[0] == results[1]


def test_turns_are_sampled_again_before_the_environment_steps_in_a_thread():
    steps: list[str] = []
    resampling = {"resampling": {"enabled": True, "threshold": 0.2}}
    results = []
    for env, shape in ((SlowEnv(), IN_LINE), (SlowEnv(steps.append), IN_THREADS)):
        trees = rollout(tasks(3), env, WatchedPolicy(), changed(shape, **resampling), seed=2)
        results.append(dumps(trees))
    assert results[0] == results[1]
    assert "discarded" in results[0][0]
    assert len(steps) == trees.stats.turns == sum(len(tree) - 1 for tree in trees)


def test_forks_of_forks_behind_wrappers_are_the_same_episodes_in_threads():
    def grow(shape: RolloutConfig, env: GuessEnv) -> list[str]:
        return dumps(rollout(tasks(6), TimeLimit(env, max_episode_steps=3), GuessingPolicy(), shape, seed=4))

    class SlowGuess(GuessEnv):
        def step(self, action: str) -> Any:
            random_wait(int(action[0]))(action)
            return super().step(action)

    deep = {"chains": 2, "forks": 2, "rounds": 4}
    assert grow(changed(IN_THREADS, **deep), SlowGuess()) == grow(changed(IN_LINE, **deep), GuessEnv())


def test_evaluation_steps_in_threads_too(policy):
    both = [
        evaluate(tasks(7), env, policy, shape, seed=0, temperature=1.0, batch=4)
        for env, shape in ((SlowEnv(), IN_LINE), (SlowEnv(random_wait(1)), IN_THREADS))
    ]
    assert both[0][0] == both[1][0]
    assert dumps(both[0][1]) == dumps(both[1][1])


def test_a_policy_that_does_not_stream_grows_the_same_trees():
    expected = dumps(rollout(tasks(4), SlowEnv(), SlowPolicy(1), IN_LINE, seed=7))
    for noise in range(2):
        waves = rollout(tasks(4), SlowEnv(random_wait(noise)), GuessingPolicy(), IN_THREADS, seed=7)
        assert dumps(waves) == expected


def test_a_wave_is_patient_for_as_long_as_the_last_one_took():
    class Sleeps(GuessingPolicy):
        def generate(self, requests: Any) -> list[Generation]:
            time.sleep(0.05)
            return super().generate(requests)

    requests = PolicyRequests(Sleeps())
    assert requests.patience(5) == float("inf")  # nothing to ask: the next tool's result is all there is
    requests.submit(Request((65,), 2))
    assert requests.patience(100) == 0.0  # the first wave has no measure
    requests.collect()
    requests.submit(Request((65,), 2))
    assert requests.patience(1) == 0.0  # half of the branches are here
    assert 0.0 < requests.patience(2) <= requests.seconds
    streaming = PolicyRequests(SlowPolicy(0))
    streaming.submit(Request((65,), 2))
    assert streaming.patience(100) == 0.0


# Where steps are taken --------------------------------------------------------------------------------------


def test_quick_steps_stay_in_the_callers_thread_and_slow_ones_leave_it():
    def threads_of(wait: Callable[[str], None]) -> set[bool]:
        main, seen = threading.get_ident(), set()

        def note(action: str) -> None:
            seen.add(threading.get_ident() == main)
            wait(action)

        rollout(tasks(2), SlowEnv(note), GuessingPolicy(), SHAPE, seed=0)
        return seen

    assert threads_of(lambda _: None) == {True}
    assert threads_of(lambda _: time.sleep(0.03)) == {True, False}


def test_no_thread_is_used_where_none_is_allowed():
    main, seen = threading.get_ident(), set()

    def wait(action: str) -> None:
        del action
        time.sleep(0.005)
        seen.add(threading.get_ident())

    rollout(tasks(1), SlowEnv(wait), GuessingPolicy(), IN_LINE, seed=0)
    assert seen == {main}


def test_as_many_steps_run_together_as_allowed_and_no_more():
    running, peak, lock = 0, 0, threading.Lock()
    meeting, met = threading.Barrier(3), threading.Event()

    def wait(action: str) -> None:
        nonlocal running, peak
        del action
        with lock:
            running += 1
            peak = max(peak, running)
        if not met.is_set():
            meeting.wait(timeout=20)  # breaks unless three steps run at once
            met.set()
        time.sleep(0.002)
        with lock:
            running -= 1

    rollout(tasks(3), SlowEnv(wait), GuessingPolicy(), changed(IN_THREADS, tool_workers=3), seed=0)
    assert (peak, meeting.broken) == (3, False)


class Counting(SlowPolicy):
    """Streams; notes how many requests were open, and who asked."""

    def __init__(self) -> None:
        super().__init__(0)
        self.peak = 0
        self.seeds: list[int] = []

    def submit(self, request: Request) -> int:
        ticket = super().submit(request)
        self.peak = max(self.peak, len(self._open))
        self.seeds.append(request.seed)
        return ticket


@pytest.mark.parametrize("bound", [1, 3])
def test_no_more_requests_are_open_than_allowed(bound):
    unbounded, bounded = Counting(), Counting()
    expected = rollout(tasks(3), SlowEnv(), unbounded, IN_THREADS, seed=3)
    trees = rollout(tasks(3), SlowEnv(), bounded, changed(IN_THREADS, max_requests=bound), seed=3)
    assert dumps(trees) == dumps(expected)
    assert (bounded.peak, unbounded.peak) == (bound, 15)


def test_a_wave_is_no_larger_than_allowed():
    sizes: list[int] = []

    class Waves(GuessingPolicy):
        def generate(self, requests: Any) -> list[Generation]:
            sizes.append(len(requests))
            return super().generate(requests)

    rollout(tasks(3), SlowEnv(), Waves(), changed(IN_LINE, max_requests=4), seed=3)
    assert max(sizes) == 4


def test_branches_wait_their_turn():
    policy = Counting()
    rollout(tasks(2), SlowEnv(), policy, changed(IN_LINE, rounds=0, forks=0, max_requests=2), seed=3)
    free = Counting()
    rollout(tasks(2), SlowEnv(), free, changed(IN_LINE, rounds=0, forks=0), seed=3)
    # the ten first turns are asked before any second one
    assert policy.seeds[:10] == free.seeds[:10]


# Deadlines --------------------------------------------------------------------------------------------------


class Hangs:
    """Hangs within a step for every guess of "7!", until it is released."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.hanging = 0

    def __call__(self, action: str) -> None:
        if action == "7!":
            self.hanging += 1
            self.release.wait(30)

    @contextmanager
    def released_at_the_end(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.release.set()
            for thread in [*step_threads(), *(thread for _, thread in deadlines._abandoned)]:
                thread.join(10)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_hung_tool_costs_its_own_branch_and_no_other(threads):
    hangs = Hangs()
    shape = changed(IN_THREADS, tool_workers=threads, tool_deadline_s=0.3, error_reward=-0.5)
    shape = changed(shape, chains=12, forks=0, rounds=0)
    with hangs.released_at_the_end():
        trees = rollout(tasks(2), SlowEnv(hangs), GuessingPolicy(), shape, seed=1)
        plain = rollout(tasks(2), SlowEnv(), GuessingPolicy(), changed(shape, tool_deadline_s=None), seed=1)
    ends = [(tree, leaf) for tree in trees for leaf in tree.leaves()]
    late = [(tree, leaf) for tree, leaf in ends if tree.outcomes[leaf]["outcome"] == "env_timeout"]
    assert len(late) == hangs.hanging > threads  # more than there are threads: the pool was not starved
    for tree, leaf in late:
        assert tree.turns[leaf].action == "7!"
        assert tree.leaf_reward[leaf] == -0.5
        assert tree.outcomes[leaf]["truncated"]
        assert "tool_deadline_s = 0.3 s" in tree.outcomes[leaf]["reason"]
    others = {tuple(tree.branch_ids(leaf)) for tree, leaf in ends if (tree, leaf) not in late}
    unhindered = {tuple(tree.branch_ids(leaf)): tree for tree in plain for leaf in tree.leaves()}
    assert others <= unhindered.keys()
    assert len(others) > 5


def test_an_environment_that_hangs_is_never_used_again():
    hanging: set[int] = set()
    reused: list[int] = []
    kept: list[SlowEnv] = []
    hangs = Hangs()

    class Watched(SlowEnv):
        def step(self, action: str) -> Any:
            kept.append(self)  # so that no id is given twice
            if id(self) in hanging:
                reused.append(id(self))
            if action == "7!":
                hanging.add(id(self))
            return super().step(action)

    shape = changed(IN_THREADS, tool_deadline_s=0.05)
    with hangs.released_at_the_end():
        rollout(tasks(4), Watched(hangs), GuessingPolicy(), shape, seed=1)
    assert hanging
    assert not reused


def test_hung_steps_are_bounded_for_each_environment_over_all_rollouts(monkeypatch):
    monkeypatch.setattr(deadlines, "MAX_ABANDONED", 2)
    shape = changed(IN_THREADS, tool_workers=2, tool_deadline_s=0.2, chains=12, forks=0, rounds=0)

    def late(env: SlowEnv) -> int:
        trees = rollout(tasks(2), TimeLimit(env, 100), GuessingPolicy(), shape, seed=1)
        return [outcome["outcome"] for tree in trees for outcome in tree.outcomes if outcome].count(
            "env_timeout"
        )

    hangs = Hangs()
    with hangs.released_at_the_end():
        hung = SlowEnv(hangs)
        assert late(hung) > 2
        assert deadlines.abandoned_calls(hung) in (
            2,
            3,
        )  # two, and one begun before
        assert late(hung) == 24  # no thread is left for it
        assert late(SlowEnv()) == 0
    assert late(hung) == 0


def test_a_deadline_needs_threads():
    with pytest.raises(ValueError, match="tool_deadline_s needs threads"):
        RolloutConfig(tool_workers=0, tool_deadline_s=1.0)


# What fails -------------------------------------------------------------------------------------------------


def test_a_step_that_raises_in_a_thread_is_an_outcome():
    trees = rollout(tasks(5), GuessEnv(broken_guess=7), GuessingPolicy(), IN_THREADS, seed=0)
    in_line = rollout(tasks(5), GuessEnv(broken_guess=7), GuessingPolicy(), IN_LINE, seed=0)
    assert dumps(trees) == dumps(in_line)
    reasons = [tree.outcomes[leaf]["reason"] for tree in trees for leaf in tree.leaves()]
    assert "RuntimeError: the server is down" in reasons


@pytest.mark.parametrize("shape", [IN_LINE, IN_THREADS])
def test_an_environment_that_exits_costs_its_own_branch(shape):
    def leave(action: str) -> None:
        if action == "7!":
            raise SystemExit(0)

    trees = rollout(tasks(4), SlowEnv(leave), GuessingPolicy(), shape, seed=1)
    outcomes = [tree.outcomes[leaf] for tree in trees for leaf in tree.leaves()]
    assert {outcome["outcome"] for outcome in outcomes} > {"env_error"}
    assert "SystemExit: 0" in {outcome.get("reason") for outcome in outcomes}


class Leaving(SlowEnv):
    """Calls `sys.exit(0)` when it is reset."""

    def reset(self, **_):
        raise SystemExit(0)


def test_an_environment_that_exits_from_reset_is_an_error_and_no_success():
    with pytest.raises(EnvError, match=r"reset called sys\.exit\(0\)"):
        rollout(tasks(2), Leaving(lambda _: None), GuessingPolicy(), IN_LINE, seed=1)
    with pytest.raises(EnvError, match=r"reset called sys\.exit\(0\)"):
        evaluate(tasks(2), Leaving(lambda _: None), GuessingPolicy(), IN_LINE, seed=1)


class Unforkable(SlowEnv):
    """Its state cannot be taken after a step: a bug of the environment's author, not of a rollout."""

    def step(self, action: str) -> Any:
        result = super().step(action)
        self._state = None
        return result

    def get_state(self) -> tuple[int, int]:
        if self._state is None:
            raise SnapshotError("no state")
        return self._state


def test_a_bug_in_a_thread_is_raised_with_its_traceback(policy):
    with pytest.raises(SnapshotError, match="no state") as caught:
        rollout(tasks(2), Unforkable(), policy, IN_THREADS, seed=0)
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "get_state"
    assert "take_step" in frames
    assert policy.idle


# Giving up --------------------------------------------------------------------------------------------------


class StopsAt:
    """Wraps the transformers policy and raises at the n-th poll."""

    def __init__(self, policy: HFPolicy, error: BaseException, polls: int) -> None:
        self.tokenizer, self.submit, self.cancel = policy.tokenizer, policy.submit, policy.cancel
        self.generate = policy.generate
        self._policy, self._error, self._left = policy, error, polls

    def poll(self) -> list[tuple[int, Generation]]:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return self._policy.poll()


@pytest.mark.parametrize("error", [PolicyError("the engine died"), KeyboardInterrupt()])
@pytest.mark.parametrize("polls", [0, 5, 12])
def test_a_failing_policy_leaves_no_request_and_no_thread(policy, error, polls):
    with pytest.raises(type(error)) as caught:
        rollout(tasks(3), SlowEnv(random_wait(0)), StopsAt(policy, error, polls), IN_THREADS, seed=0)
    assert caught.value is error
    assert policy.idle
    assert not step_threads()


def test_a_policy_that_has_died_is_not_asked_to_be_tidy():
    class Dead(SlowPolicy):
        def poll(self) -> list[tuple[int, Generation]]:
            raise PolicyError("the engine died")

        def cancel(self, ticket: int) -> None:
            raise PolicyError(f"no engine to cancel {ticket}")

    with pytest.raises(PolicyError, match="engine died"):
        rollout(tasks(2), SlowEnv(), Dead(0), IN_THREADS, seed=0)


@pytest.mark.parametrize("shape", [IN_LINE, IN_THREADS])
def test_a_stop_between_branches_leaves_no_request_and_no_thread(policy, shape):
    ended = 0

    def on_leaf() -> None:
        nonlocal ended
        ended += 1
        if ended == 4:
            raise StopRequested

    with pytest.raises(StopRequested):
        rollout(tasks(3), SlowEnv(random_wait(0)), policy, shape, seed=0, on_leaf=on_leaf)
    assert ended == 4
    assert policy.idle
    assert not step_threads()
    assert len(rollout(tasks(1), SlowEnv(), policy, shape, seed=0)[0].leaves()) == 11  # and goes on working


def test_ctrl_c_ends_a_rollout_that_sleeps_until_a_tool_answers(policy):
    interrupted = threading.Event()

    def wait(action: str) -> None:
        del action
        if not interrupted.is_set():
            interrupted.set()
            time.sleep(0.05)  # by now everybody waits for this step
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.05)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            rollout(tasks(1), SlowEnv(wait), policy, changed(IN_THREADS, chains=1), seed=0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert policy.idle
    assert not step_threads()


def test_giving_up_does_not_wait_for_a_hung_tool(monkeypatch):
    monkeypatch.setattr("at2po_agent.rollout.steps._GRACE_S", 0.01)
    hangs = Hangs()
    policy = ScriptedPolicy(lambda _: "7!", CharTokenizer())

    class Leaves(ScriptedPolicy):
        def generate(self, requests: Any) -> list[Generation]:
            if hangs.hanging:
                raise PolicyError("enough")
            return policy.generate(requests)

    with hangs.released_at_the_end():
        with pytest.raises(PolicyError, match="enough"):
            rollout(
                tasks(2),
                SlowEnv(hangs),
                Leaves(lambda _: "7!", CharTokenizer()),
                changed(IN_THREADS, max_requests=1),
                seed=0,
            )
        assert step_threads()  # they hang still: a thread cannot be stopped, only left


# Transcripts ------------------------------------------------------------------------------------------------


def test_the_transcript_makes_every_piece_that_was_not_sampled():
    closings: list[bool] = []

    class Framed(GrowingTranscript):
        def open(self, prompt: str) -> list[int]:
            return [1, *prompt.encode()]

        def observe(self, observation: str, *, closed: bool) -> list[int]:
            closings.append(closed)
            return [2, *observation.encode()]

    class Ends(GuessingPolicy):
        transcript = Framed()

        def answer(self, request: Request) -> Generation:
            digit, rest = super().answer(request).ids
            last, reason = (0, "eos") if request.seed % 2 else (rest, "stop")
            return Generation((digit, last), np.zeros(2, dtype=np.float32), reason)

    (tree,) = rollout(tasks(1), SlowEnv(), Ends(), IN_THREADS, seed=0)
    assert tree.prompt_ids == (1, *b"Task 0?\n")
    later = [node for node in range(1, len(tree)) if tree.parent[node] > 0]
    assert later
    for node in later:
        assert tree.turns[node].observation_ids == (2, *tree.turns[node].observation.encode())
    assert set(closings) == {True, False}
