import gymnasium
import numpy as np
import pytest
import torch

import at2po_env  # noqa: F401  registers the ids
from at2po_agent.agents.cold_start import Demonstration, cold_start, record_demonstrations
from at2po_agent.agents.model import ModelShape, build_model, train_tokenizer
from at2po_agent.config.sections import ColdStartConfig

EPISODE = "<think> country</think><search> Ab</search>\n<answer>\\boxed{ Cd}</answer> The city is in."


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([EPISODE], vocab_size=300, kind="words")


@pytest.fixture(scope="module")
def env():
    return gymnasium.make("at2po/MiniWiki-v0", worlds=2, hops=(1,))


def settings(**changes: object) -> ColdStartConfig:
    return ColdStartConfig.model_validate({"steps": 2, "batch_size": 2, "demonstrations": 3, **changes})


def test_only_the_experts_own_tokens_are_trained(env, tokenizer):
    (demonstration,) = record_demonstrations(
        env, tokenizer, settings(demonstrations=1, expert={"half_query": 0.0}), rng=np.random.default_rng(1)
    )
    trained = tokenizer.decode(demonstration.ids[demonstration.trained].tolist())
    shown = tokenizer.decode(demonstration.ids[~demonstration.trained].tolist())
    assert trained.startswith("<think>")
    assert trained.endswith("</answer>")
    assert "<result>" not in trained
    assert shown.startswith("Question: ")
    assert "</result>" in shown
    assert "<search>" not in shown


def test_the_same_generator_records_the_same_demonstrations(env, tokenizer):
    one, two, other = (
        record_demonstrations(env, tokenizer, settings(), rng=np.random.default_rng(seed))
        for seed in (0, 0, 1)
    )
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(one, two, strict=True))
    assert not all(np.array_equal(a.ids, b.ids) for a, b in zip(one, other, strict=True))


def test_another_expert_can_be_given(env, tokenizer):
    def guess(task, *, rng):  # noqa: ARG001
        yield f"<think> x</think><answer>\\boxed{{{task.golden_answers[0]}}}</answer>"

    (demonstration,) = record_demonstrations(
        env, tokenizer, settings(demonstrations=1), rng=np.random.default_rng(0), script=guess
    )
    assert "<think> x</think>" in tokenizer.decode(demonstration.ids[demonstration.trained].tolist())


def demonstration(ids: list[int], trained: list[bool]) -> Demonstration:
    return Demonstration(np.array(ids, dtype=np.int64), np.array(trained, dtype=np.bool_))


def model_after(rows: list[Demonstration], **changes: object) -> tuple[torch.nn.Module, dict[str, float]]:
    model = build_model(
        ModelShape(vocab_size=32, hidden_size=32, layers=1, heads=2, head_dim=16, kv_heads=1), seed=0
    )
    figures = cold_start(model, rows, settings(**changes), rng=np.random.default_rng(0))
    return model, figures


def test_a_model_learns_what_the_expert_writes_and_nothing_else():
    # After 5 always 6; what follows 6 is an observation and must stay unlearnt.
    rows = [demonstration([5, 6, 7], [False, True, False])] * 4
    model, figures = model_after(rows, steps=150, lr=0.05)
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([[5, 6]])).logits[0].log_softmax(-1)
    assert figures["loss"] < 0.05
    assert log_probs[0, 6] > -0.05
    assert log_probs[1, 7] < -1.0


def test_padding_of_shorter_rows_is_never_trained():
    long, short = demonstration([5, 6, 8, 9], [False, True, True, True]), demonstration([5, 6], [False, True])
    model, _ = model_after([long, short], steps=150, lr=0.05)
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([[5, 6]])).logits[0].log_softmax(-1)
    assert log_probs[1, 8] > -0.1  # token 0, the padding, took no probability


def test_the_same_seed_gives_the_same_weights():
    rows = [demonstration([5, 6, 7], [False, True, True]), demonstration([4, 3, 2], [False, True, True])]
    one, two = (model_after(rows, steps=5)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
