import dataclasses
import json

import numpy as np
import pytest
from helpers.guess_env import CharTokenizer, GuessEnv, GuessingPolicy

from at2po_agent.config.sections import Config, HealthConfig
from at2po_agent.evaluation.evaluate import evaluate, evaluate_mode, summarise
from at2po_agent.evaluation.metrics import sampled_tokens, tree_metrics, wilson_interval
from at2po_agent.health import HealthWatch, ServiceError
from at2po_agent.policies.scripted import ScriptedPolicy
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_agent.runs.progress import Progress

TREES = RolloutConfig(chains=4, forks=2, rounds=1, temperature=0.7)
TASKS = [{"index": index} for index in range(10)]


def test_one_chain_per_question_whatever_the_shape_of_training():
    policy = GuessingPolicy()
    figures, trees = evaluate(TASKS, GuessEnv(), policy, TREES, seed=0)
    assert figures.questions == 10
    assert all(len(tree.leaves()) == 1 for tree in trees)
    assert {request.temperature for request in policy.requests} == {0.0}


def test_sampled_evaluation_uses_its_own_temperature():
    policy = GuessingPolicy()
    evaluate(TASKS[:1], GuessEnv(), policy, TREES, seed=0, temperature=1.0)
    assert {request.temperature for request in policy.requests} == {1.0}


def test_figures_are_means_over_the_questions():
    # "3!" at every turn: right at once for question 3; the others need four turns of two tokens and are wrong
    policy = ScriptedPolicy(lambda _: "3!", CharTokenizer())
    figures, _ = evaluate(TASKS, GuessEnv(), policy, TREES, seed=0)
    assert figures.em == figures.f1 == figures.reward == pytest.approx(0.1)
    assert figures.turns == pytest.approx((1 + 9 * 4) / 10)
    assert figures.tokens == pytest.approx(2 * (1 + 9 * 4) / 10)
    assert figures.outcomes == {"answer": 1, "limit": 9}
    assert figures.em_low < 0.1 < figures.em_high


class Heard(Progress):
    """Keeps what it is told of the bar."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def start(self, phase, total):
        del phase
        self.told.append(("start", total))

    def advance(self, phase, amount=1, **values):
        del phase, values
        self.told.append(("advance", amount))

    def finish(self, phase):
        del phase
        self.told.append(("finish", 0))


def test_the_batch_decides_how_many_run_at_once():
    seen = []

    class Counts(GuessingPolicy):
        def generate(self, requests):
            seen.append(len(requests))
            return super().generate(requests)

    heard = Heard()
    evaluate(TASKS, GuessEnv(), Counts(), TREES, seed=0, batch=4, progress=heard)
    assert max(seen) == 4
    assert heard.told == [("start", 10), ("advance", 0), *[("advance", 1)] * 10, ("finish", 0)]


def test_a_question_that_was_left_out_counts_as_wrong():
    policy = ScriptedPolicy(lambda _: "3!", CharTokenizer())
    short = TREES.model_copy(update={"max_prompt_tokens": 2})
    figures, _ = evaluate(TASKS[3:4], GuessEnv(), policy, short, seed=0)
    assert (figures.questions, figures.em, figures.turns) == (1, 0.0, 0.0)
    one = RolloutConfig(chains=1, rounds=0)
    skipped = one.model_copy(update={"max_prompt_tokens": 2})
    both = [rollout(TASKS[3:4], GuessEnv(), policy, shape, seed=0) for shape in (one, skipped)]
    half = summarise(both[0] + both[1])
    assert half.em == pytest.approx(0.5)


def test_no_questions_give_no_figures():
    figures, trees = evaluate([], GuessEnv(), GuessingPolicy(), TREES, seed=0)
    assert (figures.questions, figures.em, figures.tokens, trees) == (0, 0.0, 0.0, [])


@pytest.mark.parametrize(
    ("mean", "count", "low", "high"),
    [
        # Wilson's interval by hand for z = 1.96 (z^2 = 3.8416)
        (0.5, 200, 0.4314, 0.5686),  # centre 0.5; half = 1.96 sqrt(0.00125 + 2.401e-5) / 1.0192 = 0.0686
        (0.0, 10, 0.0, 0.2775),  # high = z^2/n / (1 + z^2/n) = 0.38416 / 1.38416
        (1.0, 10, 0.7225, 1.0),
        (0.0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(mean, count, low, high):
    assert wilson_interval(mean, count) == pytest.approx((low, high), abs=1e-4)


def test_the_normal_interval_would_be_empty_where_wilsons_is_not():
    # negative control: mean +- 1.96 sqrt(p(1-p)/n) is a single point when every answer is right
    low, high = wilson_interval(1.0, 10)
    assert high - low > 0.2


def test_tree_metrics_count_leaves_turns_and_outcomes():
    policy = ScriptedPolicy(lambda _: "3!", CharTokenizer())
    shape = RolloutConfig(chains=2, rounds=0)
    trees = rollout([{"index": 3}, {"index": 5}], GuessEnv(), policy, shape, seed=0)
    figures = tree_metrics(trees)
    assert figures["leaves"] == 4
    assert figures["reward"] == 0.5
    assert figures["groups_without_signal"] == 1.0
    assert figures["turns"] == pytest.approx((1 + 1 + 4 + 4) / 4)
    # question 3: "3!" is 2 tokens; question 5: 4 x 2 tokens and three times "higher\n" of 7
    assert figures["response_tokens"] == pytest.approx((2 + 2 + 29 + 29) / 4)
    assert figures["tool_calls"] == 6
    assert (figures["outcome/answer"], figures["outcome/limit"]) == (2, 2)
    assert sampled_tokens(trees) == 2 * (1 + 1 + 4 + 4)


def test_an_environment_that_scores_nothing_has_no_exact_match():
    class Unscored(GuessEnv):
        def step(self, action):
            observation, reward, terminated, truncated, info = super().step(action)
            return observation, reward, terminated, truncated, {"outcome": info["outcome"]}

    trees = rollout(TASKS[:2], Unscored(), GuessingPolicy(), TREES, seed=0)
    assert "em" not in tree_metrics(trees)
    assert "reward" in tree_metrics(trees)
    figures = summarise(trees)
    assert (figures.em, figures.em_low, figures.em_high, figures.f1) == (None, None, None, None)
    # Where every episode failed, nothing was scored either, but it was meant to be.
    failed, _ = evaluate(TASKS[:2], Outage([9]), GuessingPolicy(), TREES, seed=0)
    assert failed.em == 0.0


def test_every_number_that_an_environment_reports_is_averaged():
    class Reporting(GuessEnv):
        def step(self, action):
            observation, reward, terminated, truncated, info = super().step(action)
            more = {"cost": np.float32(2.0), "won": True, "note": "text", "lost": float("nan")}
            return observation, reward, terminated, truncated, {**info, "metrics": more}

    figures, trees = evaluate(TASKS[:3], Reporting(), GuessingPolicy(), TREES, seed=0)
    assert figures.metrics == {"cost": 2.0, "won": 1.0}
    assert json.loads(json.dumps(trees[0].to_json()))


class Outage(GuessEnv):
    """Fails at every step while an outage lasts; forks and copies share the count of the steps that fail."""

    def __init__(self, left: list[int]) -> None:
        super().__init__()
        self.left = left

    def step(self, action):
        if self.left[0] > 0:
            self.left[0] -= 1
            raise OSError("the world is down")
        return super().step(action)


def test_questions_of_an_outage_are_asked_again():
    expected, _ = evaluate(TASKS, GuessEnv(), GuessingPolicy(), TREES, seed=0, batch=8)
    left, messages, heard = [13], [], Heard()
    watch = HealthWatch(HealthConfig(probe_every_s=0.01), messages.append, "go on")
    found, _ = evaluate(
        TASKS, Outage(left), GuessingPolicy(), TREES, seed=0, batch=8, health=watch, progress=heard
    )
    assert left == [0]  # 8 questions and two probes of 4 met the outage
    assert found == expected
    # The bar begins, runs to 8, begins anew with none answered, and is left alone while the pause lasts.
    begins = [number for number, (kind, _) in enumerate(heard.told) if kind == "start"]
    assert begins == [0, 10]
    assert heard.told[11] == ("advance", 0)
    assert sum(amount for kind, amount in heard.told[11:] if kind == "advance") == 10
    assert "100% of steps fail" in messages[0]
    assert "answer again" in messages[1]


def test_an_evaluation_ends_where_a_service_stays_down():
    def ask(**health):
        config = Config(env={"id": "GuessEnv"}, eval={"questions": 10}, health=health)
        return evaluate_mode(config, "greedy", Outage([10**6]), GuessingPolicy(), Progress(), go_on="again")

    with pytest.raises(ServiceError, match=r"100% of steps fail.*again"):
        ask(give_up_after_s=0.0)
    assert ask(pause_at=None).outcomes == {"env_error": 10}


def test_failures_are_counted_and_the_first_traceback_is_told():
    told = []
    config = Config(env={"id": "GuessEnv"}, eval={"questions": 10}, health={"pause_at": None})
    figures = evaluate_mode(
        config, "greedy", Outage([3]), GuessingPolicy(), Progress(), go_on="again", on_error=told.append
    )
    assert figures.failures == {"env_error": 3, "env_timeout": 0, "requests": 0, "retrieval": 0, "tools": 0}
    assert figures.failed_share == 0.3
    assert len(told) == 1
    assert told[0].startswith("Traceback")
    assert told[0].rstrip().endswith("OSError: the world is down")


def test_requests_that_the_policy_gave_up_are_failures():
    class Silent(GuessingPolicy):
        def answer(self, request):
            return dataclasses.replace(super().answer(request), stop_reason="abort")

    figures, _ = evaluate(TASKS[:2], GuessEnv(), Silent(), TREES, seed=0)
    assert (figures.failures["requests"], figures.failed_share) == (2, 1.0)
