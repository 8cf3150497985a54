import math
from collections.abc import Sequence

import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit
from helpers.guess_env import TURNS, CharTokenizer, GuessEnv, GuessingPolicy
from helpers.slow_policy import SlowPolicy, dumps, tasks
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.evaluation.metrics import tree_metrics
from at2po_agent.expansion.registry import Expansion
from at2po_agent.policies.base import Request
from at2po_agent.policies.scripted import ScriptedPolicy
from at2po_agent.rollout import RolloutConfig, register_expansion, rollout
from at2po_agent.types import Generation
from at2po_env.errors import ConfigError, PolicyError

SHAPE = RolloutConfig(chains=4, forks=3, rounds=2, max_response_tokens=1000)


def test_a_tree_has_chains_plus_rounds_times_forks_leaves():
    trees = rollout(tasks(3), GuessEnv(), GuessingPolicy(), SHAPE, seed=0)
    assert [len(tree.leaves()) for tree in trees] == [10, 10, 10]
    assert [tree.task_id for tree in trees] == ["0", "1", "2"]
    assert all(0 < len(tree.path(leaf)) - 1 <= TURNS for tree in trees for leaf in tree.leaves())


@pytest.mark.parametrize("order", range(5))
def test_results_do_not_depend_on_which_branch_finishes_first(order):
    waves = rollout(tasks(4), GuessEnv(), GuessingPolicy(), SHAPE, seed=7)
    streamed = rollout(tasks(4), GuessEnv(), SlowPolicy(order), SHAPE, seed=7)
    assert dumps(streamed) == dumps(waves)


def test_a_share_of_the_questions_grows_the_trees_of_the_whole():
    whole = rollout(tasks(5), GuessEnv(), GuessingPolicy(), SHAPE, seed=7)
    odd = [tasks(5)[place] for place in (1, 3)]
    share = rollout(odd, GuessEnv(), GuessingPolicy(), SHAPE, seed=7, places=(1, 3))
    assert dumps(share) == dumps([whole[1], whole[3]])
    elsewhere = rollout(odd, GuessEnv(), GuessingPolicy(), SHAPE, seed=7)
    assert dumps(elsewhere) != dumps(share)


def test_another_seed_gives_other_trees():
    one, two = (rollout(tasks(2), GuessEnv(), GuessingPolicy(), SHAPE, seed=seed) for seed in (0, 1))
    assert dumps(one) != dumps(two)


def test_no_two_requests_of_a_rollout_share_a_seed():
    policy = GuessingPolicy()
    rollout(tasks(3), GuessEnv(), policy, SHAPE, seed=0)
    seeds = [request.seed for request in policy.requests]
    assert len(set(seeds)) == len(seeds)


def test_a_fork_samples_again_after_the_very_same_observation():
    (tree,) = rollout([{"index": 5}], GuessEnv(), GuessingPolicy(), SHAPE, seed=3)
    parent = tree.parent
    forked = [node for node in range(1, len(tree)) if len(tree.children(int(parent[node]))) > 1]
    assert forked
    for node in forked:
        mine = tree.turns[node]
        sibling = tree.turns[tree.children(int(parent[node]))[0]]
        assert mine.observation_ids == sibling.observation_ids
        assert mine.observation == sibling.observation


def test_every_leaf_has_the_reward_of_its_own_transcript():
    # Playing a branch's actions in a fresh environment must end in the same reward: forks did not leak.
    for index, tree in enumerate(rollout(tasks(10), GuessEnv(), GuessingPolicy(), SHAPE, seed=11)):
        for leaf in tree.leaves():
            env = GuessEnv()
            env.reset(options={"index": index})
            for node in tree.path(leaf)[1:]:
                observation, reward, _, _, _ = env.step(tree.turns[node].action)
                children = tree.children(node)
                assert all(tree.turns[child].observation == observation for child in children)
            assert tree.leaf_reward[leaf] == reward


def test_a_time_limit_counts_the_turns_of_each_branch_alone():
    env = TimeLimit(GuessEnv(), max_episode_steps=2)
    trees = rollout(tasks(5), env, GuessingPolicy(), SHAPE, seed=0)
    for tree in trees:
        for leaf in tree.leaves():
            turns = len(tree.path(leaf)) - 1
            assert turns <= 2
            assert tree.outcomes[leaf]["truncated"] == (turns == 2)
            if turns == 2 and tree.leaf_reward[leaf] == 0.0:
                assert tree.outcomes[leaf]["outcome"] == "limit"


def test_the_entropy_of_a_turn_is_its_mean_surprisal():
    (tree,) = rollout([{"index": 1}], GuessEnv(), GuessingPolicy(), SHAPE, seed=0)
    # ln 0.1 and 0 have the mean surprisal ln(10) / 2
    assert tree.entropy[1:] == pytest.approx(math.log(10) / 2)
    assert tree.entropy[0] == 0.0


def test_expansion_starts_as_soon_as_the_own_tree_is_ready():
    class HoldsBackTheFirstQuestion(SlowPolicy):
        """Answers ticket 0 (a chain of question 0) only when nothing else is open."""

        def pick(self) -> int:
            others = [ticket for ticket in self._open if ticket != 0]
            return others[0] if others else 0

        def poll(self) -> list[tuple[int, Generation]]:
            finished = super().poll()
            self.log.append(("answer", finished[0][0]))
            return finished

    policy = HoldsBackTheFirstQuestion(0)
    rollout(tasks(2), GuessEnv(), policy, SHAPE, seed=5)
    held = policy.log.index(("answer", 0))
    before = [entry for entry in policy.log[:held] if entry[0] == "answer"]
    # question 1 is complete by then: 10 leaves of at least one turn each, beside 3 chains of question 0
    assert len(before) >= 13


def test_a_branch_is_cut_when_the_response_is_full():
    # "5!" answered by "lower\n" is 2 + 6 tokens a turn: 12 leave room for two turns (2 + 6 + 2), no more.
    policy = ScriptedPolicy(lambda _: "5!", CharTokenizer())
    shape = RolloutConfig(chains=2, rounds=0, max_response_tokens=12, cut_reward=-0.5)
    (tree,) = rollout([{"index": 1}], GuessEnv(), policy, shape, seed=0)
    for leaf in tree.leaves():
        assert len(tree.path(leaf)) - 1 == 2
        assert tree.leaf_reward[leaf] == -0.5
        assert tree.outcomes[leaf]["outcome"] == "length"
        assert tree.outcomes[leaf]["truncated"]


@settings(max_examples=30, deadline=None)
@given(limit=st.integers(1, 40), turn=st.integers(1, 3), seed=st.integers(0, 1000))
def test_no_branch_is_longer_than_the_response_limit(limit, turn, seed):
    shape = SHAPE.model_copy(update={"max_response_tokens": limit, "max_turn_tokens": turn})
    policy = ScriptedPolicy(lambda seen: "3" * (len(seen) % 3) + "7!", CharTokenizer())
    (tree,) = rollout([{"index": 2}], GuessEnv(), policy, shape, seed=seed)
    assert len(tree.leaves()) == 10
    for leaf in tree.leaves():
        assert len(tree.branch_ids(leaf)) - len(tree.prompt_ids) <= limit


def test_a_failing_environment_ends_its_own_branch_only():
    trees = rollout(tasks(5), GuessEnv(broken_guess=7), GuessingPolicy(), SHAPE, seed=0)
    outcomes = [tree.outcomes[leaf] for tree in trees for leaf in tree.leaves()]
    failed = [outcome for outcome in outcomes if outcome["outcome"] == "env_error"]
    assert failed
    assert len(failed) < len(outcomes)
    assert {outcome["reason"] for outcome in failed} == {"RuntimeError: the server is down"}
    guesses = {
        tree.turns[leaf].action
        for tree in trees
        for leaf in tree.leaves()
        if tree.outcomes[leaf]["outcome"] == "env_error"
    }
    assert guesses == {"7!"}


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_an_outcome(reward):
    class Miscounts(GuessEnv):
        def step(self, action: str):
            observation, _, terminated, truncated, info = super().step(action)
            return observation, reward, terminated, truncated, info

    shape = SHAPE.model_copy(update={"error_reward": -0.25})
    (tree,) = rollout([{"index": 1}], Miscounts(), GuessingPolicy(), shape, seed=0)
    assert {tree.outcomes[leaf]["outcome"] for leaf in tree.leaves()} == {"env_error"}
    assert set(tree.leaf_reward[tree.is_leaf]) == {-0.25}


def test_an_aborted_generation_is_an_outcome():
    class Aborts(GuessingPolicy):
        def answer(self, request: Request) -> Generation:
            del request
            return Generation((), np.zeros(0, dtype=np.float32), "abort")

    (tree,) = rollout([{"index": 1}], GuessEnv(), Aborts(), SHAPE, seed=0)
    assert {tree.outcomes[leaf]["outcome"] for leaf in tree.leaves()} == {"abort"}


@pytest.mark.parametrize(
    ("generations", "message"),
    [
        ([], "0 generations for 4 requests"),
        ([Generation((53,), np.array([math.nan], dtype=np.float32), "stop")] * 4, "finite"),
        ([Generation((53,), np.array([0.7], dtype=np.float32), "stop")] * 4, "at most 0"),
    ],
)
def test_a_policy_that_breaks_its_contract_is_an_error(generations, message):
    class Broken(GuessingPolicy):
        def generate(self, requests: Sequence[Request]) -> list[Generation]:
            del requests
            return list(generations)

    with pytest.raises(PolicyError, match=message):
        rollout([{"index": 1}], GuessEnv(), Broken(), SHAPE, seed=0)


def test_an_error_leaves_no_request_behind():
    class Dies(SlowPolicy):
        def poll(self) -> list[tuple[int, Generation]]:
            raise PolicyError("the engine died")

    policy = Dies(0)
    with pytest.raises(PolicyError, match="engine died"):
        rollout(tasks(2), GuessEnv(), policy, SHAPE, seed=0)
    assert policy.log
    assert not policy._open


def test_the_end_of_sequence_token_is_not_part_of_the_action():
    class Ends(GuessingPolicy):
        def answer(self, request: Request) -> Generation:
            del request
            return Generation((ord("1"), 0), np.zeros(2, dtype=np.float32), "eos")

    (tree,) = rollout([{"index": 1}], GuessEnv(), Ends(), SHAPE, seed=0)
    assert tree.turns[1].action == "1"
    assert tree.turns[1].action_ids == (ord("1"), 0)


def test_a_prompt_that_is_too_long_is_left_out():
    trees = rollout(
        tasks(2), GuessEnv(), GuessingPolicy(), SHAPE.model_copy(update={"max_prompt_tokens": 5}), seed=0
    )
    assert [len(tree.leaves()) for tree in trees] == [0, 0]


def test_chains_have_as_many_leaves_as_the_tree_would():
    policy = GuessingPolicy()
    shape = SHAPE.model_copy(update={"expansion": "chains"})
    (tree,) = rollout([{"index": 4}], GuessEnv(), policy, shape, seed=0)
    assert len(tree.leaves()) == 10
    assert len(tree.children(0)) == 10
    assert len({request.seed for request in policy.requests}) == len(policy.requests)


def test_a_child_fork_goes_on_from_the_state_of_its_node():
    chosen: list[int] = []

    def first_inner(parent, entropy, is_leaf, *, k, **rest):
        del entropy, rest
        inner = [node for node in range(1, len(parent)) if not is_leaf[node]]
        chosen.append(inner[0])
        return [inner[0]] * k

    shape = RolloutConfig(chains=3, forks=2, rounds=1)
    for attach in ("child", "sibling"):
        rule = Expansion("first_inner", first_inner, attach)
        (tree,) = rollout([{"index": 5}], GuessEnv(), GuessingPolicy(), shape, seed=3, expansion=rule)
        node = chosen[-1]
        where = node if attach == "child" else int(tree.parent[node])
        late = [child for child in tree.children(where) if child > max(tree.leaves()[:3])]
        assert len(late) == 2


def test_an_expansion_rule_must_choose_inner_nodes():
    rule = Expansion("wrong", lambda *arrays, **_: [int(np.flatnonzero(arrays[2])[0])] * 3)
    with pytest.raises(ValueError, match="must return 3 inner nodes"):
        rollout([{"index": 4}], GuessEnv(), GuessingPolicy(), SHAPE, seed=0, expansion=rule)


def test_an_unknown_expansion_rule_is_named():
    with pytest.raises(ConfigError, match=r"no rule named 'entropic'; known: .*chains, continue, entropy"):
        rollout(
            [{"index": 4}],
            GuessEnv(),
            GuessingPolicy(),
            SHAPE.model_copy(update={"expansion": "entropic"}),
            seed=0,
        )


def test_an_expansion_name_cannot_be_taken_twice():
    with pytest.raises(ConfigError, match="registered already"):
        register_expansion("entropy", None)


def test_the_random_rule_depends_on_the_seed_alone():
    shape = SHAPE.model_copy(update={"expansion": "random"})
    first, second = (rollout(tasks(2), GuessEnv(), SlowPolicy(order), shape, seed=1) for order in (0, 1))
    assert dumps(first) == dumps(second)


def test_statistics_count_what_was_sampled():
    trees = rollout(tasks(2), GuessEnv(), GuessingPolicy(), SHAPE, seed=0)
    assert trees.stats.sampled_tokens == 2 * sum(len(tree) - 1 for tree in trees)
    assert trees.stats.policy_seconds >= 0
    assert trees.stats.env_seconds >= 0


def test_a_tool_call_that_branches_share_counts_once():
    trees = rollout(tasks(4), GuessEnv(), GuessingPolicy(), SHAPE, seed=0)
    # Every guess that does not end an episode calls the tool, so each inner node but the root is one call.
    assert trees.stats.tool_calls == sum(len(tree) - 1 - len(tree.leaves()) for tree in trees)
    # negative control: the leaves count a shared call once each
    assert trees.stats.tool_calls < tree_metrics(trees)["tool_calls"]


def test_without_options_the_seed_draws_the_question():
    trees = rollout([None] * 6, GuessEnv(), GuessingPolicy(), SHAPE, seed=0)
    again = rollout([None] * 6, GuessEnv(), GuessingPolicy(), SHAPE, seed=0)
    assert len({tree.task_id for tree in trees}) > 1
    assert dumps(trees) == dumps(again)


def test_overlong_answers_lose_reward():
    # "5!" and "lower\n" make 8 tokens a turn, the last one 2: 26 tokens of at most 30, and the last 30% cost.
    # DAPO: -(26 - (30 - 9)) / 9 = -5/9 comes on top of the 0 of four wrong guesses.
    policy = ScriptedPolicy(lambda _: "5!", CharTokenizer())
    shape = RolloutConfig(chains=2, rounds=0, max_response_tokens=30, overlong_share=0.3)
    (tree,) = rollout([{"index": 1}], GuessEnv(), policy, shape, seed=0)
    assert tree.leaf_reward[tree.leaves()] == pytest.approx([-5 / 9, -5 / 9])
    plain = shape.model_copy(update={"overlong_share": 0.0})
    (tree,) = rollout([{"index": 1}], GuessEnv(), policy, plain, seed=0)
    assert tree.leaf_reward[tree.leaves()] == pytest.approx([0.0, 0.0])


def test_rounds_without_forks_are_refused():
    with pytest.raises(ValueError, match="expands nothing"):
        RolloutConfig(forks=0, rounds=1)
