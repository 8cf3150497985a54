import gymnasium
import numpy as np
import pytest
from helpers.vllm_rules import Broken, Hurry, OutOfRange
from helpers.vllm_tiny_engine import drain, tiny_tokenizer, worst_error

import at2po_env  # noqa: F401  registers the environments
from at2po_agent.policies.base import Request
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_env.errors import PolicyError


def requests_with(rules, **more):
    return [
        Request((4, 5, 6 + seed), 16, seed=seed, intervention=rule, **more) for seed, rule in enumerate(rules)
    ]


def test_forced_tokens_are_written_marked_and_seen_as_with_the_transformers_policy(policy, model):
    end = tiny_tokenizer().encode("</search>")
    ours, theirs = ([Hurry(limit, end) for limit in range(3, 9)] for _ in range(2))
    requests = requests_with(ours, stop=("</search>",), temperature=0.9)
    generations = policy.generate(requests)
    expected = HFPolicy(model, tiny_tokenizer()).generate(
        requests_with(theirs, stop=("</search>",), temperature=0.9)
    )
    assert worst_error(model, requests, generations) < 1e-4
    for one, other, mine, reference in zip(generations, expected, ours, theirs, strict=True):
        assert (one.ids, one.stop_reason) == (other.ids, other.stop_reason)
        np.testing.assert_array_equal(one.sampled, other.sampled)
        if len(one.ids) > mine.limit:  # it has not ended before
            assert one.sampled is not None
            assert one.sampled.tolist() == [True] * mine.limit + [False]
        np.testing.assert_allclose(mine.seen, reference.seen, atol=1e-3)
    assert sum(one.sampled is not None for one in generations) >= 3


def test_a_rule_goes_on_where_it_was_when_weights_change_under_way(policy):
    rule = Hurry(8, [11, 12])
    ticket = policy.submit(Request((4, 5), 14, seed=0, intervention=rule))
    for _ in range(5):
        policy.poll()
    policy.weights_changed()
    generation = drain(policy, {ticket})[ticket]
    assert [count for count, _, _ in rule.seen] == [*range(9), *range(10, 14)]  # not asked while it forces
    assert generation.ids[8:10] == (11, 12)
    assert generation.sampled is not None
    assert np.flatnonzero(~generation.sampled).tolist() == [8, 9]


@pytest.mark.parametrize(("rule", "message"), [(Broken(), "this rule is broken"), (OutOfRange(), "10000")])
def test_a_rule_that_fails_costs_its_own_request_only(policy, rule, message):
    good = policy.submit(Request((1, 2), 6, seed=0))
    bad = policy.submit(Request((1, 3), 6, seed=0, intervention=rule))
    with pytest.raises(PolicyError, match=message):
        drain(policy, {bad})  # the other one takes longer
    assert len(drain(policy, {good})[good].ids) == 6
    assert policy.idle


def test_trees_are_those_of_the_transformers_policy(policy, model):
    env = gymnasium.make("at2po/MiniWiki-v0", max_turns=3)
    shape = RolloutConfig(
        chains=3, forks=2, rounds=1, max_turn_tokens=12, max_response_tokens=300, max_prompt_tokens=600
    )
    tasks = [{"index": index} for index in range(3)]
    ours = rollout(tasks, env, policy, shape, seed=3)
    theirs = rollout(tasks, env, HFPolicy(model, tiny_tokenizer()), shape, seed=3)
    assert [tree.parent.tolist() for tree in ours] == [tree.parent.tolist() for tree in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert [turn and turn.ids for turn in one.turns] == [turn and turn.ids for turn in other.turns]
