"""Stable-Baselines3 learns a game of the household through numbers, with impossible commands masked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import pytest
from at2po_envs.household.games import generated_game, write_game
from at2po_envs.household.published import Words

import at2po_env
from at2po_env.contract.testing import PigEnv
from at2po_env.errors import EnvError
from at2po_env.wrappers import NumericView

Act = Callable[[npt.NDArray[Any], npt.NDArray[np.bool_]], int]


def numeric(file: Path) -> NumericView:
    """One game as numbers: the bytes of the newest observation, and every command that it may ever allow."""
    env = gymnasium.make("at2po/Household-v0", dataset=str(file), max_turns=30)
    env.reset(seed=0)
    choices = env.get_wrapper_attr("conceivable_commands")()
    return NumericView(env, length=600, choices=choices, scaled=True)


@pytest.fixture
def game(tmp_path: Path) -> Path:
    write_game(
        generated_game("small", "train", "pick_and_place_simple", 0, Words()), tmp_path / "game.tw-pddl"
    )
    return tmp_path / "game.tw-pddl"


def share_of_wins(env: NumericView, act: Act, episodes: int) -> float:
    won = 0.0
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        ended = False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(act(observation, env.action_masks()))
            ended = terminated or truncated
            won += float(reward)
    return won / episodes


def test_the_mask_says_which_choices_are_possible(game: Path) -> None:
    env = numeric(game)
    _, info = env.reset(seed=0)
    assert env.choices is not None
    for _ in range(10):
        possible = {str(env.choices[number]) for number in np.flatnonzero(env.action_masks())}
        assert possible == set(info["admissible_commands"])
        child = at2po_env.fork(env)
        assert child.action_masks().tolist() == env.action_masks().tolist()
        *_, info = env.step(int(np.flatnonzero(env.action_masks())[-1]))
    with pytest.raises(EnvError, match="needs choices"):
        NumericView(env.env, length=8).action_masks()


def test_without_word_of_what_is_possible_everything_is() -> None:
    env = NumericView(PigEnv(), length=8, choices=["roll", "hold"])
    env.reset(seed=0)
    assert env.action_masks().tolist() == [True, True]


@pytest.mark.slow
def test_maskable_ppo_beats_random_play(game: Path) -> None:
    contrib = pytest.importorskip("sb3_contrib", reason="Stable-Baselines3 is not installed (extra dev)")
    rng = np.random.default_rng(0)
    by_chance = share_of_wins(numeric(game), lambda _, mask: int(rng.choice(np.flatnonzero(mask))), 100)
    model = contrib.MaskablePPO(
        "MlpPolicy",
        numeric(game),
        n_steps=512,
        batch_size=64,
        n_epochs=4,
        learning_rate=1e-3,
        gamma=0.97,
        ent_coef=0.02,
        seed=0,
        device="cpu",
        policy_kwargs={"net_arch": [64]},
    )
    model.learn(4_096)
    learnt = share_of_wins(
        numeric(game),
        lambda seen, mask: int(model.predict(seen, action_masks=mask, deterministic=False)[0]),
        50,
    )
    # Chance wins 10% of the episodes; a learner that works wins nearly all.
    assert by_chance < 0.3
    assert learnt > 0.7
