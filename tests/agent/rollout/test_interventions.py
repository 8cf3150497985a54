import dataclasses

import numpy as np
import pytest
from helpers.guess_env import GuessEnv, GuessingPolicy
from helpers.watched_policy import CountedTokenizer, WatchedPolicy, guess, seeded_entropy

from at2po_agent.evaluation.metrics import intervention_shares, tree_metrics
from at2po_agent.packing.rows import pack_rows
from at2po_agent.policies.base import NextToken
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_agent.rollout.uncertainty import Thresholds, running_threshold
from at2po_agent.rollout.watch import Watch
from at2po_env.errors import ConfigError, PolicyError

CHAINS = {"expansion": "chains", "chains": 4, "forks": 0, "rounds": 0, "max_turn_tokens": 60}
TASKS = [{"index": index} for index in range(4)]


def config(**changes) -> RolloutConfig:
    return RolloutConfig.model_validate({**CHAINS, **changes})


def grow(shape: RolloutConfig, policy=None, seed: int = 0):
    return rollout(TASKS, GuessEnv(), policy or WatchedPolicy(), shape, seed=seed)


def texts(trees) -> list[list[str]]:
    return [[turn.action for turn in tree.turns[1:]] for tree in trees]


def think(text: str, request) -> str:
    """Thinks for ever: "<think>aaaa...", until somebody closes it; then the guess."""
    opening = "<think>"
    if len(text) < len(opening):
        return opening[len(text)]
    if "</think>" not in text:
        return "a"
    return guess("" if text.endswith("</think>") else "5", request)


def constant(text: str, request) -> float:
    del text, request
    return 1.0


def thinking(**settings) -> RolloutConfig:
    defaults = {"enabled": True, "min_tokens": 3, "max_tokens": 40, "window": 2, "force": "</think>"}
    return config(thinking={**defaults, **settings})


def first_action(shape: RolloutConfig, entropy=constant) -> str:
    return grow(shape, WatchedPolicy(think, entropy))[0].turns[1].action


# Thinking intervention -------------------------------------------------------------------------------------


def test_stalled_thinking_is_ended_once_and_its_end_is_not_trained():
    (tree, *_) = grow(thinking(), WatchedPolicy(think, constant))
    turn = tree.turns[1]
    assert turn.action.startswith("<think>aaa</think>")
    assert turn.action.count("</think>") == 1
    assert tree_metrics([tree])["forced_tokens"] >= len("</think>")
    assert "forced_tokens" not in tree_metrics(grow(config()))
    forced = [index for index, sampled in enumerate(turn.sampled_mask) if not sampled]
    assert "".join(turn.action[index] for index in forced) == "</think>"
    batch = pack_rows([tree], [np.ones(len(tree.leaves()))])
    start = len(tree.prompt_ids)
    trained = batch.turn_ids[0, start : start + len(turn.action_ids)] >= 0
    assert trained.tolist() == turn.sampled_mask.tolist()


def test_without_the_intervention_thinking_goes_on():
    assert first_action(config()) == "<think>" + "a" * 53


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({}, 3),
        ({"min_tokens": 9}, 9),  # L_min
        ({"window": 20}, 20),  # the signal must be seen for longer (it also saw the opening)
        ({"min_tokens": 30, "max_tokens": 12}, 12),  # the hard cap comes first
    ],
)
def test_every_setting_of_the_intervention_moves_the_end(settings, length):
    assert first_action(thinking(**settings)).split("</think>")[0] == "<think>" + "a" * length


def test_lively_thinking_is_only_ended_by_the_cap():
    def lively(text, request):
        del request
        return 0.2 if len(text) % 2 else 1.8

    assert first_action(thinking(), lively).split("</think>")[0] == "<think>" + "a" * 40
    eased = thinking(epsilon=9.0)
    assert first_action(eased, lively).split("</think>")[0] == "<think>" + "a" * 3


def test_what_is_forced_can_be_chosen():
    assert first_action(thinking(force="</think>9!")) == "<think>aaa</think>9!"


def test_the_signal_decides_when():
    def one_jump(text, request):
        del request
        return 1.0 if len(text) < 10 else 1.0005 + 0.0005 * (len(text) % 2)

    kinds = {}
    for kind in ("paper", "released"):
        shape = thinking(window=4, epsilon=1e-3)
        shape = shape.model_copy(update={"signal": shape.signal.model_copy(update={"kind": kind})})
        kinds[kind] = first_action(shape, one_jump)
    # The paper's is normalised over the turn, so small changes stay large; the released one sees no change.
    assert kinds["paper"] != kinds["released"]


class _Stopping(GuessEnv):
    """Its first stop string closes an action."""

    def reset(self, **kwargs):
        prompt, info = super().reset(**kwargs)
        return prompt, {**info, "stop": ("</act>", "!")}


def test_what_is_forced_opens_what_the_environment_reads():
    shape = thinking(force=None)
    (tree, *_) = rollout(TASKS, _Stopping(), WatchedPolicy(think, constant), shape, seed=0)
    assert tree.turns[1].action.startswith("<think>aaa</think><act>")
    assert first_action(shape).startswith("<think>aaa</think>3")  # "!" closes no tag: it goes on by itself


# Shares of the turns ---------------------------------------------------------------------------------------


def test_a_share_has_no_threshold_until_a_step_has_shown_its_scale():
    policy = WatchedPolicy(guess)
    share = resampling(share=0.5)
    first = rollout(TASKS, GuessEnv(), policy, share, seed=0)
    assert texts(first) == texts(grow(config()))
    later = sum(len(tree.path(leaf)) - 2 for tree in first for leaf in tree.leaves())
    assert len(first.stats.differences) == later
    eta = running_threshold(None, first.stats.differences, 0.5)
    again = rollout(TASKS, GuessEnv(), WatchedPolicy(guess), share, seed=0, thresholds=Thresholds(eta=eta))
    fixed = rollout(TASKS, GuessEnv(), WatchedPolicy(guess), resampling(threshold=eta), seed=0)
    assert texts(again) == texts(fixed) != texts(first)
    shares = intervention_shares(again)
    assert 0.2 < shares["resampling"] < 0.6
    assert shares["thinking"] == 0.0


def test_a_share_of_the_turns_is_ended_while_thinking():
    shape = thinking(share=0.25, window=4, max_tokens=1000)
    tasks = [{"index": index % 10} for index in range(40)]
    policy = WatchedPolicy(think, lambda text, request: seeded_entropy(text, request) * (request.seed % 7))
    first = rollout(tasks, GuessEnv(), policy, shape, seed=0)
    assert intervention_shares(first)["thinking"] == 0.0
    assert len(first.stats.changes) == first.stats.turns
    epsilon = running_threshold(None, first.stats.changes, 0.25)
    again = rollout(tasks, GuessEnv(), policy, shape, seed=0, thresholds=Thresholds(epsilon=epsilon))
    opening = {tree.turns[1].action for tree in first}
    ended = [tree.turns[1] for tree in again if not tree.turns[1].sampled_mask.all()]
    assert opening
    assert len(ended) > 0
    assert intervention_shares(again)["thinking"] == pytest.approx(0.25, abs=0.1)


# Dynamical sampling ----------------------------------------------------------------------------------------


def resampling(**settings) -> RolloutConfig:
    return config(resampling={"enabled": True, **settings})


def test_a_turn_as_uncertain_as_the_last_is_sampled_again_before_the_environment_steps():
    policy = WatchedPolicy(guess, constant)
    trees = rollout(TASKS, GuessEnv(), policy, resampling(), seed=0)
    turns = [turn for tree in trees for turn in tree.turns[1:]]
    discarded = [
        entry
        for tree in trees
        for leaf in tree.leaves()
        for entry in tree.outcomes[leaf].get("discarded", [])
    ]
    later = sum(len(tree.path(leaf)) - 2 for tree in trees for leaf in tree.leaves())
    # a constant signal never differs: every turn but the first is discarded twice, and then taken
    assert len(discarded) == 2 * later > 0
    assert len(policy.requests) == len(turns) + len(discarded)
    assert tree_metrics(trees)["discarded_turns"] == len(discarded)
    assert trees.stats.sampled_tokens == sum(len(request_ids) for request_ids in _ids(turns, discarded))
    assert len({request.seed for request in policy.requests}) == len(policy.requests)
    assert {entry["turn"] for entry in discarded} <= {1, 2, 3}
    assert all(entry["uncertainty"] == pytest.approx(0.5) for entry in discarded)


def _ids(turns, discarded):
    return [turn.action_ids for turn in turns] + [range(entry["tokens"]) for entry in discarded]


def test_the_environment_sees_accepted_turns_only():
    for tree in grow(resampling(), WatchedPolicy(guess, constant)):
        for leaf in tree.leaves():
            env = GuessEnv()
            env.reset(options={"index": int(tree.task_id)})
            for node in tree.path(leaf)[1:]:
                _, reward, _, _, _ = env.step(tree.turns[node].action)
            assert reward == tree.leaf_reward[leaf]


@pytest.mark.parametrize("off", [{"enabled": False}, {"attempts": 0}, {"threshold": 0.0}])
def test_resampling_that_is_off_changes_nothing(off):
    assert texts(grow(resampling(**off))) == texts(grow(config()))


@pytest.mark.parametrize("on", [{}, {"attempts": 1}, {"threshold": 0.05}])
def test_every_setting_of_the_resampling_changes_the_rollout(on):
    base = grow(resampling(attempts=5, threshold=0.8))
    assert texts(grow(resampling(**on))) != texts(base)


def long_guess(text, request) -> str:
    return guess(text if len(text) in (0, 6) else "5", request) if len(text) in (0, 6) else "a"


def test_signal_settings_change_what_is_sampled_again():
    base = resampling(threshold=0.05, attempts=4)
    for change in ({"kind": "released"}, {"weight": 0.9}, {"top": 2}):
        other = base.model_copy(update={"signal": base.signal.model_copy(update=change)})
        trees = [
            grow(shape, WatchedPolicy(long_guess), seed=seed) for seed in range(3) for shape in (base, other)
        ]
        logged = [
            [tree.outcomes[leaf].get("discarded") for tree in grown for leaf in tree.leaves()]
            for grown in trees
        ]
        assert logged[0::2] != logged[1::2], change


# The watch itself ------------------------------------------------------------------------------------------


def test_the_first_entropy_is_that_of_the_first_twenty_tokens():
    watch = Watch(config(), CountedTokenizer(), probe=True, vocab_size=100, stop=(), thresholds=Thresholds())
    certain, even = np.full(10, -np.inf), np.full(10, -np.log(10.0))
    certain[0] = 0.0
    for index in range(25):
        top = certain if index < 20 else even
        assert watch(NextToken((), 0.0, top.astype(np.float32))) == ()
    assert watch.first_entropy == 0.0  # the later tokens, of entropy ln 10, do not count


def test_a_policy_that_does_not_ask_is_named():
    class Deaf(GuessingPolicy):
        tokenizer = CountedTokenizer()

    for shape in (config(expansion="arpo", rounds=1, forks=2), resampling(), thinking()):
        with pytest.raises(PolicyError, match=r"ignores Request\.intervention"):
            grow(shape, Deaf())


def test_the_size_of_the_vocabulary_must_be_known():
    policy = WatchedPolicy()
    policy.tokenizer = GuessingPolicy.tokenizer
    with pytest.raises(ConfigError, match="no __len__"):
        grow(config(expansion="arpo", rounds=1, forks=2), policy)
    assert grow(resampling(), policy)  # the paper's signal needs none


# Adaptive and separate trees -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["arpo", "aepo"])
def test_adaptive_trees_have_the_budgets_leaves(rule):
    shape = config(expansion=rule, chains=4, forks=4, rounds=1)
    for tree in grow(shape):
        assert len(tree.leaves()) == 8
        for node in range(1, len(tree)):
            if tree.parent[node] != 0:
                siblings = tree.children(int(tree.parent[node]))
                assert len(siblings) <= 2
                assert len({tree.turns[sibling].observation for sibling in siblings}) == 1


def test_arpo_branches_more_where_it_is_told_to():
    def branched(base: float) -> int:
        options = {"base": base, "weight": 0.0}
        shape = config(expansion="arpo", chains=4, forks=4, rounds=1, expansion_options=options)
        return sum(len(tree.children(node)) > 1 for tree in grow(shape) for node in range(1, len(tree)))

    assert branched(0.0) == 0  # the rest of the budget starts at the root
    assert branched(1.0) > 4


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("arpo", {"base": 0.9}),
        ("arpo", {"weight": 20.0}),
        ("arpo", {"copies": 4}),
        ("arpo", {"penalty": 1.0}),
        ("aepo", {"penalty": 1.0}),
        ("aepo", {"beta": 9.0}),
    ],
)
def test_every_option_of_an_adaptive_rule_changes_the_rollout(rule, change):
    shape = config(expansion=rule, chains=6, forks=12, rounds=1)
    other = shape.model_copy(update={"expansion_options": change})
    assert texts(grow(shape)) != texts(grow(other))


def test_the_papers_penalty_ranks_as_the_released_one():
    # alpha * n and alpha * (n - 1) differ by alpha for every node of a tree that has a chain.
    shape = config(expansion="entropy", chains=3, forks=3, rounds=3, alpha=0.5)
    other = shape.model_copy(update={"expansion_options": {"penalty": "paper"}})
    assert texts(grow(shape)) == texts(grow(other))
    with pytest.raises(ValueError, match="penalty must be"):
        grow(shape.model_copy(update={"expansion_options": {"penalty": "papr"}}))


@pytest.mark.parametrize("change", [{"alpha": 2.0}, {"expansion": "random"}, {"expansion": "continue"}])
def test_every_part_of_the_expansion_changes_the_rollout(change):
    shape = config(expansion="entropy", chains=3, forks=3, rounds=3)
    assert texts(grow(shape)) != texts(grow(shape.model_copy(update=change)))


def test_separate_trees_share_the_forks_and_never_mix():
    shape = config(expansion="tree_grpo", chains=2, forks=4, rounds=2)
    for tree in grow(shape):
        chain = [tree.outcomes[leaf]["chain"] for leaf in tree.leaves()]
        assert sorted(chain) == [0] * 5 + [1] * 5
        first_turns = [tree.path(leaf)[1] for leaf in tree.leaves()]
        for turn in set(first_turns):
            assert len({c for c, first in zip(chain, first_turns, strict=True) if first == turn}) == 1


def test_results_do_not_depend_on_which_branch_finishes_first():
    class Backwards(WatchedPolicy):
        def generate(self, requests):
            return super().generate(requests[::-1])[::-1]

    for rule in ("arpo", "aepo", "tree_grpo"):
        shape = config(expansion=rule, chains=4, forks=4, rounds=1, resampling={"enabled": True})
        forwards, backwards = grow(shape), grow(shape, Backwards())
        assert [tree.to_json() for tree in forwards] == [tree.to_json() for tree in backwards]


def test_a_seed_decides_everything_but_nothing_else_does():
    shape = config(expansion="arpo", chains=4, forks=4, rounds=1)
    assert texts(grow(shape, seed=1)) == texts(grow(shape, seed=1))
    assert texts(grow(shape, seed=1)) != texts(grow(shape, seed=2))


def test_entropies_are_drawn_per_token():
    request = dataclasses.replace(_request(), seed=3)
    assert seeded_entropy("", request) != seeded_entropy("a", request)


def _request():
    policy = WatchedPolicy()
    grow(config(chains=2), policy)
    return policy.requests[0]
