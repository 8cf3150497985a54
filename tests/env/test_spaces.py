"""The text space accepts what policies write and stays small."""

from __future__ import annotations

import pickle

import pytest
from gymnasium.utils.passive_env_checker import check_action_space, check_observation_space

from at2po_env.errors import EnvError
from at2po_env.forking.capture import clone_space
from at2po_env.spaces import MAX_SAMPLE, Text


@pytest.mark.parametrize("text", ["", " ", "a b\n", "käse 🙂", "\x00", "\ud800", "<tag>"])
def test_any_short_text_is_inside(text: str) -> None:
    assert text in Text()


@pytest.mark.parametrize("value", [b"bytes", 3, None, ["a"]])
def test_other_types_are_outside(value: object) -> None:
    assert value not in Text()


def test_length_is_the_only_limit() -> None:
    space = Text(max_length=3)
    assert "abc" in space
    assert "abcd" not in space


def test_samples_are_bounded_printable_and_seeded() -> None:
    samples = [Text(seed=7).sample() for _ in range(2)]
    assert samples[0] == samples[1]
    space = Text(seed=0)
    drawn = [space.sample() for _ in range(200)]
    assert all(len(text) <= MAX_SAMPLE and text.isascii() for text in drawn)
    assert len(set(drawn)) > 150
    assert Text(max_length=0, seed=0).sample() == ""


def test_a_fork_samples_alike_and_independently() -> None:
    space = Text(seed=3)
    space.sample()
    twin = clone_space(space)
    ours = [space.sample() for _ in range(3)]
    assert [twin.sample() for _ in range(3)] == ours


def test_gymnasium_accepts_it_and_it_pickles_small() -> None:
    check_action_space(Text())
    check_observation_space(Text())
    assert len(pickle.dumps(Text())) < 1_000
    assert pickle.loads(pickle.dumps(Text(5))) == Text(5)
    assert Text(5) != Text(6)
    assert len({Text(5), Text(5)}) == 1


def test_json_is_the_text_itself() -> None:
    assert Text().from_jsonable(Text().to_jsonable(["a", "\ud800"])) == ["a", "\ud800"]


def test_masks_and_negative_lengths_are_refused() -> None:
    with pytest.raises(EnvError, match="no mask"):
        Text().sample(mask=[1])
    with pytest.raises(EnvError, match="max_length >= 0, got -1"):
        Text(-1)
