"""A rollout in a served environment grows the trees of the environment itself."""

import pytest
from helpers.guess_env import GuessEnv, GuessingPolicy
from helpers.slow_policy import dumps, tasks

pytest.importorskip("uvicorn", reason="needs the extra serve")

from at2po_agent.environments import number_of_tasks
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_env.serving import RemoteEnv
from at2po_env.serving.app import serving_env

SHAPE = RolloutConfig(chains=4, forks=3, rounds=2, max_response_tokens=1000)


def test_a_served_environment_grows_the_trees_of_the_environment() -> None:
    with serving_env(GuessEnv()) as url:
        env = RemoteEnv(url)
        assert number_of_tasks(env) == 10
        there = rollout(tasks(3), env, GuessingPolicy(), SHAPE, seed=5)
    here = rollout(tasks(3), GuessEnv(), GuessingPolicy(), SHAPE, seed=5)
    assert dumps(there) == dumps(here)
