"""The measurement of policy gradients: its statistics on a process solved exactly, and its sampling."""

import csv
import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from at2po_agent.agents.model import ModelShape, build_model
from at2po_agent.config.loading import load_config
from at2po_agent.credit import group_advantages
from at2po_agent.packing.rows import pack_rows
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_agent.tree import Tree
from at2po_agent.types import Turn
from at2po_env.errors import ConfigError
from benchmarks import gradient, gradient_sampling
from benchmarks.gradient_estimates import (
    Quality,
    correlation,
    measure,
    minibatch_mean_square,
    sum_groups,
    with_errors,
)
from benchmarks.gradient_sampling import (
    Grown,
    Player,
    Row,
    advantage_of,
    grow_rows,
    leave_one_out,
    per_branch,
    question_vectors,
    some_chains,
    true_turns,
)
from benchmarks.race import BASE
from tests.helpers.guess_env import GuessEnv, GuessingPolicy, SmallTokenizer

BUDGET = 400.0


class Process:
    """Twelve questions of two turns with three actions each, under a softmax policy with 15 logits.

    The first turn's state is the parity of the question, the second's is the first action. Of each of the 9
    courses of a question the table has its probability, its reward and the gradient of its log-prob.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        logits = rng.normal(size=(5, 3))
        policy = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        courses = list(itertools.product(range(3), range(3)))
        self.rewards = (rng.random((12, 9)) < 0.3).astype(float)
        self.probability = np.zeros((12, 9))
        self.turns = np.zeros((12, 9, 2, 5, 3))
        for question in range(12):
            for number, actions in enumerate(courses):
                states = (question % 2, 2 + actions[0])
                self.probability[question, number] = np.prod(policy[states, actions])
                for turn, (state, action) in enumerate(zip(states, actions, strict=True)):
                    self.turns[question, number, turn, state] = np.eye(3)[action] - policy[state]
        self.turns = self.turns.reshape(12, 9, 2, 15)

    def vectors(self, question: int, courses: np.ndarray, *, last_turn_only: bool = False) -> np.ndarray:
        """`1/B sum_b A_b grad log p_b` for [M, B] courses, A_b the reward less the mean of the others'."""
        rewards, count = self.rewards[question, courses], courses.shape[1]
        advantages = (rewards - rewards.mean(axis=1, keepdims=True)) * count / (count - 1)
        turns = self.turns[question, courses]
        gradients = turns[:, :, 1] if last_turn_only else turns.sum(axis=2)
        return (advantages[:, :, None] * gradients).mean(axis=1)

    def draw(self, rng: np.random.Generator, questions: np.ndarray, chains: int, **how: bool) -> np.ndarray:
        found = np.zeros((len(questions), 15))
        for question in range(12):
            (places,) = np.nonzero(questions == question)
            courses = rng.choice(9, size=(len(places), chains), p=self.probability[question])
            found[places] = self.vectors(question, courses, **how)
        return found

    @functools.cache  # noqa: B019  the process lives as long as the module
    def exact(self, chains: int, *, last_turn_only: bool = False) -> tuple[np.ndarray, float]:
        """E f and E |f|^2, by enumerating every tuple of courses of every question."""
        courses = np.array(list(itertools.product(range(9), repeat=chains)))
        mean, square = np.zeros(15), 0.0
        for question in range(12):
            probability = self.probability[question, courses].prod(axis=1) / 12
            vectors = self.vectors(question, courses, last_turn_only=last_turn_only)
            mean += probability @ vectors
            square += float(probability @ (vectors**2).sum(axis=1))
        return mean, square

    def gradient(self) -> np.ndarray:
        """The true gradient, `mean_q sum_c p(c) R(c) grad log p(c)`."""
        weights = self.probability * self.rewards / 12
        return np.einsum("qc,qctp->p", weights, self.turns)


PROCESS = Process()


def exact_quality(chains: int, baseline: int, **how: bool) -> Quality:
    """The figures by their definitions; the token ratio by bisection over the tokens."""
    true = PROCESS.gradient()

    def cosine(count: int, tokens: float, **how: bool) -> float:
        mean, square = PROCESS.exact(count, **how)
        number = tokens / (2 * count)
        length = mean @ mean + (square - mean @ mean) / number
        return float(mean @ true / np.sqrt(length * (true @ true)))

    mean, square = PROCESS.exact(chains, **how)
    number = BUDGET / (2 * chains)
    aim, low, high = cosine(baseline, BUDGET), 1.0, 1e6
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if cosine(chains, middle, **how) < aim else (low, middle)
    return Quality(
        cosine(chains, BUDGET, **how),
        float(number * (mean @ mean) / (square - mean @ mean)),
        1 - cosine(chains, 1e12, **how),
        BUDGET / low if low < 1e5 else 0.0,
    )


def experiment(seed: int, *, questions: int = 1500, **how: bool) -> tuple[Any, Any]:
    """Sums of a method with 2 chains, and of the baseline with 3, beside a reference of 4."""
    rng = np.random.default_rng(seed)
    asked = rng.integers(12, size=questions)
    groups = np.arange(questions) * 20 // questions
    reference = PROCESS.draw(rng, asked, 4)
    sums = [
        sum_groups(
            PROCESS.draw(rng, asked, chains, **given),
            reference,
            np.full(questions, 2.0 * chains),
            groups,
        )
        for chains, given in ((2, how), (3, {}))
    ]
    return sums[0], sums[1]


def test_figures_agree_with_the_exact_ones_within_their_errors():
    exact = np.array(exact_quality(2, 3))
    assert exact[2] == pytest.approx(0.0, abs=1e-9)  # leave-one-out is unbiased
    found, errors = np.array([with_errors(*experiment(seed), budget=BUDGET) for seed in range(30)]).swapaxes(
        0, 1
    )
    scores = (found - exact) / errors
    # 30 scores of mean 0 and variance 1: the mean's error is 0.18, that of the mean square 0.26.
    assert np.abs(scores.mean(axis=0)).max() < 0.8
    assert ((scores**2).mean(axis=0) > 0.4).all()
    assert ((scores**2).mean(axis=0) < 2.2).all()
    assert errors.mean(axis=0)[0] < 0.06


def test_a_biased_credit_is_found_biased_and_an_unbiased_one_is_not():
    exact = exact_quality(2, 3, last_turn_only=True)
    assert exact.bias > 0.1
    found, errors = with_errors(*experiment(1, last_turn_only=True), budget=BUDGET)
    assert found.bias > 4 * errors.bias
    assert abs(found.bias - exact.bias) < 3 * errors.bias
    assert abs(found.token_ratio - exact.token_ratio) < 3 * errors.token_ratio
    found, errors = with_errors(*experiment(1), budget=BUDGET)
    assert abs(found.bias) < 3 * errors.bias


def test_pairs_of_a_question_with_itself_would_bias_the_figures():
    exact = exact_quality(2, 3)
    ours, naive = [], []
    for seed in range(100):
        method, baseline = experiment(seed, questions=100)
        ours.append(measure(method, baseline, budget=BUDGET).signal_to_noise)
        length, square = method.own.sum() / 100**2, method.own_squares.sum() / 100
        naive.append(BUDGET / 4 * length / (square - length))
    error = np.std(ours, ddof=1) / np.sqrt(100)
    assert abs(np.mean(ours) - exact.signal_to_noise) < 3 * error
    assert np.mean(naive) - exact.signal_to_noise > 10 * error


def test_several_vectors_of_a_question_give_the_same_figures_with_smaller_errors():
    # Three pairs of the same three courses of each question, which depend on one another.
    exact, scores, shrunk = np.array(exact_quality(2, 2)), [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        asked = rng.integers(12, size=1500)
        samples = np.zeros((1500, 3, 15))
        for question in range(12):
            (places,) = np.nonzero(asked == question)
            courses = rng.choice(9, size=(len(places), 3), p=PROCESS.probability[question])
            for number, pair in enumerate(([0, 1], [1, 2], [2, 0])):
                samples[places, number] = PROCESS.vectors(question, courses[:, pair])
        rest = (PROCESS.draw(rng, asked, 4), np.full(1500, 4.0), np.arange(1500) // 75)
        single, several = sum_groups(samples[:, 0], *rest), sum_groups(samples, *rest)
        found, errors = with_errors(several, several, budget=BUDGET)
        _, wide = with_errors(single, single, budget=BUDGET)
        scores.append((np.array(found) - exact)[:3] / np.array(errors)[:3])
        shrunk.append(errors.signal_to_noise / wide.signal_to_noise)
    assert np.abs(np.mean(scores, axis=0)).max() < 0.9
    assert (np.mean(np.square(scores), axis=0) < 2.4).all()
    assert np.mean(shrunk) < 0.9


def test_noise_of_the_reference_adds_nothing():
    rng = np.random.default_rng(0)
    asked = rng.integers(12, size=600)
    vectors, tokens = PROCESS.draw(rng, asked, 2), np.full(600, 4.0)
    exact = exact_quality(2, 2).cosine
    for chains in (2, 8):
        sums = sum_groups(vectors, PROCESS.draw(rng, asked, chains), tokens, np.arange(600) // 30)
        found, errors = with_errors(sums, sums, budget=BUDGET)
        assert abs(found.cosine - exact) < 3 * errors.cosine


def test_the_baseline_has_a_token_ratio_of_exactly_one():
    _, baseline = experiment(3)
    found, errors = with_errors(baseline, baseline, budget=BUDGET)
    assert found.token_ratio == pytest.approx(1.0, abs=1e-9)
    assert errors.token_ratio == pytest.approx(0.0, abs=1e-9)


def test_a_method_that_points_elsewhere_never_reaches_the_baseline():
    method, baseline = experiment(3)
    away = method._replace(cross=-method.cross, cross_products=-method.cross_products)
    assert measure(away, baseline, budget=BUDGET).token_ratio == 0.0


def test_a_metric_is_that_of_scaled_coordinates():
    rng = np.random.default_rng(2)
    f, g, weights = rng.normal(size=(8, 3)), rng.normal(size=(8, 3)), np.array([4.0, 1.0, 0.25])
    groups, tokens = np.arange(8) // 2, np.ones(8)
    weighted = sum_groups(f, g, tokens, groups, weights=weights)
    scaled = sum_groups(f * [2, 1, 0.5], g * [2, 1, 0.5], tokens, groups)
    for one, other in zip(weighted, scaled, strict=True):
        assert np.allclose(one, other)


def test_the_second_moment_is_that_of_minibatches():
    # f is 1 or 3 with equal chance: E f^2 = 5, (E f)^2 = 4; a mean of two has 4 + 1/2 as mean square.
    values = np.array([1.0, 3.0] * 4000)
    found = minibatch_mean_square(
        np.array([values.sum()]), np.array([(values**2).sum()]), questions=8000, minibatch=2
    )
    assert found[0] == pytest.approx(4.5, rel=1e-3)


def test_correlation_and_its_error_are_pearsons():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=400)
    advantages = 0.6 * truth + 0.8 * rng.normal(size=400)
    found, error = correlation(truth, advantages)
    assert found == pytest.approx(np.corrcoef(truth, advantages)[0, 1])
    assert error == pytest.approx((1 - 0.6**2) / 20, rel=0.25)  # of Pearson's for normal variables
    assert np.isnan(correlation(truth, np.zeros(400))[0])


# Sampling --------------------------------------------------------------------------------------------------


def guess_model() -> Any:
    shape = ModelShape(
        vocab_size=len(SmallTokenizer.alphabet),
        hidden_size=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=8,
        ffn_size=16,
        max_positions=256,
        init_std=0.3,
    )
    return build_model(shape, seed=0)


def guess_trees(seed: int, **shape: Any) -> list[Tree]:
    class Policy(GuessingPolicy):
        tokenizer = SmallTokenizer()

        def answer(self, request: Any) -> Any:
            generation = super().answer(request)
            ids = self.tokenizer.encode("".join(map(chr, generation.ids)))
            return type(generation)(ids, generation.log_probs, "stop")

    config = RolloutConfig(**shape)
    return rollout([{"index": 3}, {"index": 8}], GuessEnv(), Policy(), config, seed=seed)


def plain_vector(tree: Tree, advantages: np.ndarray, model: torch.nn.Module) -> np.ndarray:
    """The gradient by one padded row per branch and one backward pass."""
    batch = pack_rows([tree], [advantages])
    (_, micro), *_ = batch.micro_batches(1 << 20)
    loss = -(micro.advantages * micro.log_probs(model)).sum() / len(tree.leaves())
    model.zero_grad()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return -torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).numpy()


def test_vectors_are_the_gradients_of_plain_rows():
    model = guess_model()
    (tree, _) = guess_trees(0, chains=3, forks=2, rounds=1)
    rewards = np.arange(5.0)
    credits = [
        per_branch(tree, group_advantages(rewards)),
        per_branch(tree, group_advantages(rewards, normalization="mean")),
        per_branch(tree, np.sin(np.arange(len(tree)))),
        np.zeros((5, len(tree))),
    ]
    found = question_vectors(tree, credits, model)
    for vector, advantages in zip(found, credits, strict=True):
        assert np.abs(vector - plain_vector(tree, advantages, model)).max() < 1e-5
    assert np.abs(found[2]).max() > 0.01
    cut = question_vectors(tree, credits, model, token_budget=25)
    assert np.abs(np.array(cut) - found).max() < 1e-5


def test_credits_that_are_combinations_of_others_share_backward_passes(monkeypatch):
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    (tree, _) = guess_trees(0, chains=4, forks=0, rounds=0)
    first, second = (per_branch(tree, np.array(given)) for given in ([1.0, 0, 0, -1], [0, 2.0, -2, 0]))
    question_vectors(tree, [first, 3 * first, second, first - second, 0 * first], guess_model())
    assert len(calls) == 2


def test_fewer_chains_are_the_first_of_more():
    shape = {"expansion": "chains", "forks": 0, "rounds": 0}
    many, few = guess_trees(7, chains=12, **shape), guess_trees(7, chains=5, **shape)
    for tree, expected in zip(many, few, strict=True):
        part, nodes = some_chains(tree, range(5))
        assert part.to_json() == expected.to_json()
        assert nodes == list(range(len(expected)))


def test_credit_of_some_chains_gives_the_vector_of_these_alone():
    (tree, _) = guess_trees(7, expansion="chains", chains=12, forks=0, rounds=0)
    rewards = np.arange(12) % 3
    model, row = guess_model(), Row("a", gradient.chains(5), "group")
    grown = Grown.credit(row, tree.with_leaf_rewards(rewards), [9, 10, 11, 0, 1])
    (vector,) = question_vectors(tree, [grown.whole], model)
    assert grown.tree.leaf_reward[grown.tree.is_leaf].tolist() == [0, 1, 2, 0, 1]
    advantages = group_advantages([0.0, 1, 2, 0, 1])
    assert np.abs(vector - plain_vector(grown.tree, advantages, model)).max() < 1e-5


def test_fewer_chains_take_three_parts_of_all():
    rows = [Row("few", gradient.chains(8), "group"), Row("all", gradient.chains(12), "group")]
    player = guessing_player(GuessingPolicy())
    ((numbers, ((tree, (few, whole)),)),) = grow_rows(player, rows, [{"index": 4}], seed=2)
    assert numbers == [0, 1]
    assert [len(part.tree.leaves()) for part in (*few, *whole)] == [8, 8, 8, 12]
    rewards = tree.leaf_reward[tree.is_leaf].tolist()
    expected = [rewards[:8], rewards[4:], rewards[8:] + rewards[:4]]
    assert [part.tree.leaf_reward[part.tree.is_leaf].tolist() for part in few] == expected


def test_the_reference_leaves_each_chain_out_of_its_baseline():
    tree = Tree([1])
    for reward in (1.0, 0.0, 0.5):
        turn = Turn((), (2, 3), np.array([-1.0, -2.0]), None, "", "", 1.5, "stop")
        tree.close(tree.add(0, turn), reward)
    assert leave_one_out(tree).tolist() == [0.75, -0.75, 0.0]  # 1 - 0.25, 0 - 0.75, 0.5 - 0.5


def guessing_player(policy: GuessingPolicy) -> Player:
    config: Any = SimpleNamespace(rollout=RolloutConfig(max_turn_tokens=4))
    agent: Any = SimpleNamespace(policy=policy)
    return Player(config, agent, GuessEnv(), None)  # type: ignore[arg-type]


def test_true_advantages_of_turns_agree_with_the_exact_ones():
    # The policy guesses one of ten digits at random, four times at most: with r guesses left a question is
    # solved with probability 1 - 0.9^r, before turn k with r = 4 - k and behind a wrong guess with 3 - k.
    tasks = [{"index": index % 10} for index in range(20)]
    rows = (Row("a", gradient.chains(12), "group"),)
    found = true_turns(guessing_player(GuessingPolicy()), rows, tasks, seed=1)
    assert {turn.turn for turn in found} == {0, 1, 2, 3}
    ended = [turn for turn in found if turn.q == 1.0 or turn.turn == 3]
    scores = []
    for turn in found:
        solved = turn.q if turn in ended else 1 - 0.9 ** (3 - turn.turn)
        exact = solved - (1 - 0.9 ** (4 - turn.turn))
        scores.append((turn.q - turn.v - exact) / np.sqrt(turn.noise))
    assert {turn.q for turn in ended} <= {0.0, 1.0}
    assert np.mean(np.square(scores)) == pytest.approx(1.0, abs=0.8)


def test_forks_share_no_draw_with_the_trees_that_are_judged():
    policy = GuessingPolicy()
    player, tasks = guessing_player(policy), [{"index": index} for index in range(4)]
    rows = (*gradient.rows_of([])[:1], Row("tree", gradient.ENTROPY, "tree"))
    list(grow_rows(player, rows, tasks, seed=3))
    judged = {request.seed for request in policy.requests}
    policy.requests.clear()
    rollout(tasks, GuessEnv(), policy, RolloutConfig(**gradient.chains(12)), seed=3)
    chains = {request.seed for request in policy.requests}
    policy.requests.clear()
    true_turns(player, rows, tasks, seed=3)
    forks = {request.seed for request in policy.requests} - chains
    assert len(forks) > 4 * 128
    assert chains & judged == chains
    assert not forks & judged


def test_a_turns_advantage_is_the_mean_over_the_branches_through_it():
    def turn() -> Turn:
        return Turn((), (2,), np.array([-1.0]), None, "", "", 1.0, "stop")

    tree = Tree([1])
    shared = tree.add(0, turn())
    for reward in (1.0, 0.0):
        tree.close(tree.add(shared, turn()), reward)
    tree.close(tree.add(0, turn()), 0.5)
    given = per_branch(tree, np.array([0.8, -0.4, 9.0]))
    grown = Grown(tree, given, given)
    assert advantage_of(grown, 0) == pytest.approx(0.2)
    assert advantage_of(grown, 1) == pytest.approx(0.8)
    given = per_branch(tree, np.array([0.0, 3.0, 1.0, 2.0, 4.0]))
    by_node = Grown(tree, given, given)
    assert advantage_of(by_node, 0) == 3.0


# The command -----------------------------------------------------------------------------------------------


def test_every_row_grows_the_leaves_that_it_names():
    rows = gradient.rows_of([])
    assert len({row.name for row in rows}) == len(rows)
    shape = load_config(BASE).rollout.model_dump()
    for row in rows:
        leaves = int(row.name.split()[1].strip(",")) if row.name.startswith("chains") else 12
        assert RolloutConfig(**{**shape, **row.rollout}).leaves == leaves


def test_further_credit_rules_get_rows_for_chains_and_trees():
    rows = gradient.rows_of(["gigpo:gamma=0.9,normalization=mean"])[len(gradient.rows_of([])) :]
    assert [row.rollout["chains"] for row in rows] == [4, 6, 8, 12, 6]
    assert rows[-1].rollout["expansion"] == "entropy"
    assert rows[0].options == {"gamma": 0.9, "normalization": "mean"}
    with pytest.raises(ConfigError, match=r"no rule named 'gigpoo'; known: .*gigpo"):
        gradient.rows_of(["gigpoo"])


class AnyGuess(GuessEnv):
    """Every action is a guess of one of three digits, and 1 is right: a gradient that few questions show."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        del options
        return super().reset(seed=seed, options={"index": 1})

    def step(self, action: str) -> Any:
        return super().step(str(ord(action[:1] or "\0") % 3))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a command that takes seconds."""
    gymnasium.register("test/AnyGuess-v0", lambda **_: AnyGuess())
    monkeypatch.setattr(gradient, "GROUPS", 3)
    monkeypatch.setattr(gradient_sampling, "FORKS", 4)
    monkeypatch.setattr(gradient_sampling, "ADAM_QUESTIONS", 8)
    model = ("hidden_size=16", "layers=1", "heads=2", "kv_heads=1", "head_dim=8", "ffn_size=16")
    task = ["env.id=test/AnyGuess-v0", "eval.questions=0", "cold_start.steps=0", "rollout.max_turn_tokens=2"]
    task += [f"model.{setting}" for setting in model]
    yield ["--em", "0", "--questions", "6", "--credit-turns", "3", "--json", "--task", *task]
    del gymnasium.registry["test/AnyGuess-v0"]


@pytest.mark.slow
def test_the_command_measures_reports_and_goes_on_with_the_same_figures(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    report = tmp_path / "report"
    gradient.main(["--out", str(tmp_path / "whole"), "--report", str(report), *tiny])
    (whole,) = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in whole["methods"]}
    assert (whole["questions"], whole["credit_turns"]) == (6, 3)
    assert set(rows) == {row.name for row in gradient.rows_of([])}
    for prefix in ("", "adam_"):
        assert rows["chains 12, group"][f"{prefix}token_ratio"] == pytest.approx(1.0, abs=1e-6)
    # Six chains of 12 are the tokens of 6; a tree shares some.
    tokens = {name: row["tokens_per_question"] for name, row in rows.items()}
    assert tokens["chains 6, group"] < tokens["entropy tree, group"] < tokens["chains 12, group"]

    measured = gradient_sampling.measure_group
    monkeypatch.setattr(gradient, "measure_group", lambda job: stop() if job.group == 1 else measured(job))

    def stop() -> str:
        raise KeyboardInterrupt

    again = ["--out", str(tmp_path / "stopped"), "--policy", str(tmp_path / "whole" / "policies" / "em_0")]
    with pytest.raises(SystemExit, match="the same command goes on"):
        gradient.main([*again, *tiny])
    monkeypatch.setattr(gradient, "measure_group", measured)
    capsys.readouterr()
    gradient.main([*again, *tiny])
    printed = capsys.readouterr()
    (resumed,) = json.loads(printed.out)
    assert resumed["methods"] == whole["methods"]
    assert "[2/3]" in printed.err
    assert "[1/3]" not in printed.err

    with pytest.raises(SystemExit, match="other settings"):
        gradient.main([*again, *tiny, "--seed", "1"])

    with (report / "gradient.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == list(rows)
    assert "| chains 12, group | " in (report / "gradient.md").read_text(encoding="utf-8")


def test_a_report_keeps_the_rows_of_other_tasks(tmp_path: Path):
    method = {"method": "m", "tokens_per_question": 12.0}
    for prefix in ("", "adam_"):
        for name in Quality._fields:
            method |= {f"{prefix}{name}": 0.5, f"{prefix}{name}_error": None}
    method |= {"correlation": 0.25, "correlation_error": 0.125}
    about = {"policy": "em 0.1", "exact_match": 0.1, "questions": 40, "tokens": 6000.0}
    result = {**about, "credit_turns": 9, "credit_reliability": None, "methods": [method]}
    gradient.write_report([result], "hops 2-3", tmp_path)
    text = (tmp_path / "gradient.md").read_text(encoding="utf-8")
    (tmp_path / "gradient.md").write_text(text + "Words of a person.\n", encoding="utf-8")
    gradient.write_report([result], "hops 3-4", tmp_path)
    gradient.write_report([{**result, "questions": 41}], "hops 2-3", tmp_path)
    text = (tmp_path / "gradient.md").read_text(encoding="utf-8")
    assert text.index("### hops 3-4, em 0.1") < text.index("### hops 2-3, em 0.1")
    assert text.endswith("Words of a person.\n")
    assert "41 questions" in text
    assert text.count("| m | 12 | 0.500 | ") == 2
    assert "| 0.250 (0.125) |" in text
