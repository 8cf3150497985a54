"""Dead services: shares of failed calls, verdicts, and samples that are taken again."""

import gymnasium
import pytest
from helpers.guess_env import CharTokenizer

from at2po_agent.config.sections import HealthConfig
from at2po_agent.health import (
    HealthWatch,
    ServiceError,
    Tally,
    add_failures,
    check_failures,
    failed_share,
    judge,
    tally,
)
from at2po_agent.policies.scripted import ScriptedPolicy
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_env import register_tool_env, tool
from at2po_env.errors import ToolError

LIMITS = {"warn_at": 0.05, "pause_at": 0.5, "window": 50}


@pytest.mark.parametrize(
    ("failed", "calls", "level"),
    [
        (0, 100, "fine"),
        (4, 100, "fine"),
        (5, 100, "warn"),
        (49, 100, "warn"),
        (50, 100, "pause"),
        (8, 8, "pause"),
        (7, 7, "fine"),  # fewer than 8 calls say nothing
    ],
)
def test_the_share_of_failed_calls_decides(failed, calls, level):
    verdict = judge([{"tools": Tally(failed, calls), "steps": Tally(0, calls)}], **LIMITS)
    assert verdict.level == level
    assert verdict.failing == (() if level == "fine" else ("tools",))
    if calls >= 8:
        assert verdict.shares == {"tools": failed / calls, "steps": 0.0}


def test_thresholds_are_settings():
    sick = [{"tools": Tally(30, 100)}]
    assert judge(sick, **{**LIMITS, "pause_at": 0.3}).level == "pause"
    assert judge(sick, **{**LIMITS, "pause_at": None}).level == "warn"
    assert judge([{"tools": Tally(100, 100)}], **{**LIMITS, "pause_at": None}).level == "warn"
    assert judge(sick, **{**LIMITS, "warn_at": 0.4}).level == "fine"


def test_small_samples_are_judged_together_with_those_before_them():
    # 20 calls a sample: 20 of 60 failed within a window of 50, and all of the newest 20 within one of 20
    history = [{"tools": Tally(0, 20)}] * 5 + [{"tools": Tally(20, 20)}]
    assert judge(history, **LIMITS).shares["tools"] == pytest.approx(20 / 60)
    assert judge(history, **{**LIMITS, "window": 20}).level == "pause"


def test_calls_are_counted_by_service():
    # one episode: two turns that went on, then an answer
    tree = _episodes(_Service(), count=1)[0]
    assert len(tree) - 1 == 3
    assert tally([tree], {}) == {
        "tools": Tally(0, 2),
        "retrieval": Tally(0, 0),
        "steps": Tally(0, 3),
        "requests": Tally(0, 3),
    }
    counts = {"requests": 9, "failures": 4, "circuit_open": 3, "tool_failures": 2}
    assert tally([tree], counts)["retrieval"] == Tally(4, 9)
    assert tally([tree], counts)["tools"] == Tally(2, 2)


class _Service:
    """What the tool `ask` calls: down for its next `fails` calls."""

    def __init__(self) -> None:
        self.fails = self.calls = 0


_CURRENT = [_Service()]


@tool()
def ask(item: str) -> str:
    """Ask the service.

    Args:
        item: Anything.
    """
    service = _CURRENT[0]
    service.calls += 1
    if item == "nonsense":
        raise ToolError("nonsense is not an item")
    if service.fails > 0:
        service.fails -= 1
        raise ConnectionError("the service is down")
    return f"{item}: yes"


register_tool_env(
    "tests/Service-v0", tools=[ask], tasks=[{"question": "Well?", "golden_answers": "yes"}], max_turns=6
)
SHAPE = RolloutConfig(chains=1, forks=0, rounds=0, max_response_tokens=4000, max_turn_tokens=200)


def _episodes(service, *, count=5, item="tea"):
    _CURRENT[0] = service
    turns = [f"<ask>{item}</ask>", f"<ask>{item}</ask>", "<answer>yes</answer>"]
    env = gymnasium.make("tests/Service-v0", disable_env_checker=True)
    trees = []
    for _ in range(count):
        trees += rollout([{"index": 0}], env, ScriptedPolicy(turns, CharTokenizer()), SHAPE, seed=0)
    return trees


def _watch(messages, **changes):
    config = HealthConfig(**{"probe_every_s": 0.02, "give_up_after_s": 20.0, **changes})
    return HealthWatch(config, messages.append, "then go on with: NEXT")


def _sound(watch, service, **how):
    saved, ticks = [], []
    trees, figures = watch.sound(
        lambda: _episodes(service, **how),
        lambda trees: trees,
        probe=lambda: _episodes(service, count=1, **how),
        pausing=lambda: saved.append(service.calls),
        tick=lambda: ticks.append(1),
    )
    return trees, figures, saved, ticks


def test_a_tool_that_dies_and_comes_back_costs_only_time():
    service, messages = _Service(), []
    watch = _watch(messages, window=10)
    healthy, figures, saved, _ = _sound(watch, service)
    assert (figures["health/tools"], saved, messages) == (0.0, [], [])
    service.fails = 10 + 4  # a sample of ten calls, and two probes of two
    again, figures, saved, ticks = _sound(watch, service)
    assert [tree.to_json() for tree in again] == [tree.to_json() for tree in healthy]
    assert figures["health/tools"] == 0.0
    assert saved == [20]  # after the sample that failed, and once
    assert len(ticks) >= 3
    assert service.calls == 10 + 10 + 3 * 2 + 10
    assert messages[0].startswith("paused: 100% of tools fail")
    assert "answer again" in messages[1]


def test_a_tool_that_never_comes_back_ends_it():
    service, messages = _Service(), []
    service.fails = 10**6
    with pytest.raises(
        ServiceError, match=r"100% of tools fail, .* after 0\.1 s .*Fix: .*then go on with: NEXT"
    ):
        _sound(_watch(messages, give_up_after_s=0.1), service)
    assert service.calls > 10  # it was probed


def test_no_patience_means_no_probe():
    service = _Service()
    service.fails = 10**6
    with pytest.raises(ServiceError):
        _sound(_watch([], give_up_after_s=0.0), service)
    assert service.calls == 10


def test_a_run_that_never_pauses_warns_once():
    service, messages = _Service(), []
    watch = _watch(messages, pause_at=None, window=10)
    for _ in range(2):
        service.fails = 10
        _, figures, saved, _ = _sound(watch, service)
        assert (figures["health/tools"], saved) == (1.0, [])
    assert len(messages) == 1
    assert messages[0].startswith("warning: 100% of tools fail")


def test_what_the_policy_wrote_wrongly_is_no_failure_of_a_service():
    service, messages = _Service(), []
    trees, figures, _, _ = _sound(_watch(messages), service, item="nonsense")
    assert [tree.outcomes[leaf]["tool_errors"] for tree in trees for leaf in tree.leaves()] == [2] * 5
    assert figures["health/tools"] == 0.0
    assert messages == []


def test_the_largest_share_of_failures_decides_whether_figures_count():
    fine = {"env_error": Tally(1, 100), "env_timeout": Tally(2, 100), "requests": Tally(2, 100)}
    assert failed_share(fine) == pytest.approx(0.05)  # one episode fails in one way
    assert failed_share({**fine, "retrieval": Tally(6, 60)}) == pytest.approx(0.1)
    assert failed_share({**fine, "tools": Tally(7, 7)}) == pytest.approx(0.05)  # too few calls
    assert failed_share({}) == 0.0
    assert add_failures(fine, {"requests": Tally(3, 4)})["requests"] == Tally(5, 104)
    counts = {name: one.failed for name, one in fine.items()}
    check_failures("training", counts, 0.05, HealthConfig())
    check_failures("training", counts, 1.0, HealthConfig(fail_at=None))
    with pytest.raises(ServiceError, match=r"training: 6% failed \(env_error 1, env_timeout 2, requests 2\)"):
        check_failures("training", counts, 0.06, HealthConfig())
