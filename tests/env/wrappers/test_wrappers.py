"""The transcript view and the numeric view: faithful, forkable, within their spaces."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.wrappers import TimeLimit
from hypothesis import given
from hypothesis import strategies as st

import at2po_env
from at2po_env.contract.testing import EnvContract, PigEnv
from at2po_env.errors import EnvError
from at2po_env.forking.base import fork, restore, snapshot
from at2po_env.wrappers import FullTranscript, NumericView
from at2po_env.wrappers.numeric import decode_bytes, encode_bytes

gymnasium.register("at2po-test/ViewedPig-v0", entry_point="at2po_env.contract.testing:PigEnv")


class TestTranscriptContract(EnvContract):
    another_process = True

    def make_env(self) -> gymnasium.Env[Any, Any]:
        return FullTranscript(TimeLimit(gymnasium.make("at2po-test/ViewedPig-v0"), 10), max_length=10**6)


class TestChoicesContract(EnvContract):
    actions = (0, 2, 0, 1)

    def make_env(self) -> gymnasium.Env[Any, Any]:
        choices = ["roll", "hold", lambda text: text[:3]]
        return NumericView(FullTranscript(PigEnv()), length=64, choices=choices)


class TestTokensContract(EnvContract):
    def make_env(self) -> gymnasium.Env[Any, Any]:
        return NumericView(PigEnv(), length=32, action_length=16, scaled=True)


def test_the_transcript_is_prompt_actions_and_observations() -> None:
    env = FullTranscript(PigEnv())
    transcript, info = env.reset(seed=3)
    assert info["new"] == transcript
    for action in ("roll", "?", "hold"):
        observation, *_, info = env.step(action)
        transcript += action + info["new"]
        assert observation == transcript
        assert observation in env.observation_space
    assert env.reset(seed=3)[0] == "Say roll or hold."


def test_a_restored_transcript_is_the_old_one() -> None:
    env = FullTranscript(PigEnv())
    env.reset(seed=3)
    env.step("roll")
    snap = snapshot(env)
    expected = env.step("roll")
    restore(env, snap)
    assert env.step("roll") == expected


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    ids = encode_bytes(text)
    assert all(1 <= number <= 256 for number in ids)
    assert decode_bytes(ids) == text


def test_the_newest_ids_stand_at_the_end() -> None:
    env = NumericView(PigEnv(), length=30, choices=["roll", "hold"])
    observation, _ = env.reset(seed=0)
    assert observation[:13].tolist() == [0] * 13
    assert decode_bytes(observation[13:].tolist()) == "Say roll or hold."
    observation, *_ = env.step(0)
    assert decode_bytes(observation.tolist()) == "You rolled 6 and have 6 points."[-30:]
    assert observation.dtype == np.int32


def test_scaled_observations_lie_between_zero_and_one() -> None:
    plain = NumericView(PigEnv(), length=20, choices=["roll"])
    scaled = NumericView(PigEnv(), length=20, choices=["roll"], scaled=True)
    ids, numbers = plain.reset(seed=0)[0], scaled.reset(seed=0)[0]
    assert numbers in scaled.observation_space
    assert np.allclose(numbers * 256, ids)
    assert isinstance(scaled.observation_space, Box)


def test_choices_may_depend_on_what_is_shown() -> None:
    env = NumericView(PigEnv(), choices=["roll", lambda text: "hold" if "points" in text else "roll"])
    env.reset(seed=0)
    assert env.action_space == Discrete(2)
    assert env.step(np.int64(1))[4]["action"] == "roll"
    *_, terminated, _, info = env.step(1)
    assert (info["action"], terminated) == ("hold", True)


def test_token_actions_end_at_the_first_zero() -> None:
    env = NumericView(PigEnv(), action_length=8)
    env.reset(seed=0)
    assert env.action_space == MultiDiscrete([257] * 8)
    action = np.array([*encode_bytes("hold"), 0, 5, 5, 5])
    assert env.step(action)[4]["action"] == "hold"
    assert env.write(np.array(encode_bytes("12345678"))) == "12345678"
    assert env.write(np.array([200] * 8)) == "\ufffd" * 8


def test_another_tokenizer_can_be_used() -> None:
    words = ["<pad>", "Say", "roll", "or", "hold."]
    env = NumericView(
        PigEnv(),
        length=6,
        action_length=2,
        encode=lambda text: [words.index(word) for word in text.split()],
        decode=lambda ids: " ".join(words[number] for number in ids),
        vocabulary=len(words),
    )
    assert env.reset(seed=0)[0].tolist() == [0, 0, 1, 2, 3, 4]
    assert env.write(np.array([2, 0])) == "roll"
    assert fork(env)._encode is env._encode


def test_ids_outside_the_vocabulary_are_refused() -> None:
    env = NumericView(PigEnv(), vocabulary=50)
    with pytest.raises(EnvError, match=r"encode gave ids from 33 to 122\. Expected 1 to 49"):
        env.reset(seed=0)
    with pytest.raises(EnvError, match="choices that are not empty, got"):
        NumericView(PigEnv(), choices=[])
    with pytest.raises(EnvError, match="length"):
        NumericView(PigEnv(), length=0)


def test_a_shipped_environment_can_be_viewed_and_played_by_numbers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it falls back to the shipped sample
        env = gymnasium.make("at2po/MiniWiki-v0")
    view = NumericView(FullTranscript(env), length=256, choices=["<search>x</search>", "<answer>y</answer>"])
    view.reset(seed=0)
    *_, terminated, truncated, info = view.step(0)
    assert not terminated
    child = at2po_env.fork(view)
    ours, theirs = view.step(1), child.step(1)
    assert np.array_equal(ours[0], theirs[0])
    assert ours[1:] == theirs[1:]
    assert ours[2]
    assert info["outcome"] == "tool"
    assert not truncated
