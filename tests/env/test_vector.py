"""Many episodes step concurrently, and one that fails fails alone."""

from __future__ import annotations

import threading
import time
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from at2po_env.contract.testing import PigEnv
from at2po_env.episodes.infos import add_info, info_of
from at2po_env.errors import EnvError, SnapshotError
from at2po_env.forking.base import fork, snapshot
from at2po_env.vector import TextVectorEnv, make_vector

gymnasium.register(
    "at2po-test/VectorPig-v0",
    entry_point="at2po_env.contract.testing:PigEnv",
    vector_entry_point=lambda **options: make_vector(PigEnv, **options),
    max_episode_steps=7,
)
MODES = list(AutoresetMode)


class Fragile(PigEnv):
    """Raises on some actions, as a tool with a bug does."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if options and options.get("fail") == "exit":
            raise SystemExit(0)
        if options and options.get("fail"):
            raise LookupError(options["fail"])
        return super().reset(seed=seed)

    def step(self, action: str) -> Any:
        if action.startswith("raise"):
            raise ZeroDivisionError(action)
        if action == "exit":
            raise SystemExit(0)
        return super().step(action)


def made(count: int = 3, **options: Any) -> TextVectorEnv:
    return TextVectorEnv([Fragile] * count, **options)


@pytest.mark.parametrize("mode", ["vector_entry_point", None])
def test_make_vec_uses_the_own_entry_point(mode: str | None) -> None:
    envs = gymnasium.make_vec("at2po-test/VectorPig-v0", num_envs=3, vectorization_mode=mode, max_turns=5)
    assert isinstance(envs, TextVectorEnv)
    assert envs.num_envs == 3
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert envs.call("max_turns") == (5, 5, 5)
    observations, infos = envs.reset(seed=0)
    assert observations in envs.observation_space
    assert infos["turn"].tolist() == [0, 0, 0]
    for _ in range(5):
        *_, truncated, infos = envs.step(("?",) * 3)
    assert truncated.all()
    envs.close()


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_it_equals_single_environments_with_the_same_seeds(workers: int | None) -> None:
    envs = made(3, max_workers=workers)
    singles = [Fragile() for _ in range(3)]
    observations, _ = envs.reset(seed=[5, 6, 7])
    assert observations == tuple(
        env.reset(seed=seed)[0] for env, seed in zip(singles, (5, 6, 7), strict=True)
    )
    for _ in range(6):
        batch = envs.step(["roll"] * 3)
        for number, env in enumerate(singles):
            single = env.step("roll")
            assert (batch[0][number], *(batch[i][number] for i in (1, 2, 3))) == single[:4]
            assert info_of(batch[4], number) == single[4]
    assert envs.np_random_seed == (5, 6, 7)
    assert envs.reset(seed=5)[0] == envs.reset(seed=[5, 6, 7])[0]
    envs.close()


@pytest.mark.parametrize("mode", MODES)
def test_one_failure_stays_its_own(mode: AutoresetMode) -> None:
    envs = made(autoreset_mode=mode)
    reference = made(autoreset_mode=mode)
    for vector in (envs, reference):
        vector.reset(seed=3)
    observations, rewards, terminated, truncated, infos = envs.step(["roll", "raise now", "roll"])
    expected = reference.step(["roll", "roll", "roll"])
    assert (observations[0], observations[2]) == (expected[0][0], expected[0][2])
    assert rewards.tolist() == [0.0, 0.0, 0.0]
    assert terminated.tolist() == [False, False, False]
    assert truncated.tolist() == [False, True, False]
    lost = infos["final_info"] if mode is AutoresetMode.SAME_STEP else infos
    assert lost["_error"].tolist() == [False, True, False]
    assert lost["error"][1] == "ZeroDivisionError: raise now"
    assert "in step" in lost["traceback"][1]
    assert "final_obs" in infos if mode is AutoresetMode.SAME_STEP else observations[1] == ""
    if mode is AutoresetMode.DISABLED:
        observations, _ = envs.reset(options={"reset_mask": truncated})
        assert observations[1] == "Say roll or hold."
    after, *_, infos = envs.step(["roll", "roll", "roll"])
    assert after[::2] == reference.step(["roll"] * 3)[0][::2]
    assert "error" not in infos
    envs.close()


def test_ended_episodes_begin_at_the_next_step() -> None:
    envs = made(2)
    envs.reset(seed=1)
    _, rewards, terminated, _, _ = envs.step(["hold", "roll"])
    assert (rewards.tolist(), terminated.tolist()) == ([0.0, 0.0], [True, False])
    observations, rewards, terminated, truncated, infos = envs.step(["ignored", "hold"])
    assert observations[0] == "Say roll or hold."
    assert infos["turn"].tolist() == [0, 2]
    assert terminated.tolist() == [False, True]
    assert not truncated.any()


def test_ended_episodes_begin_in_the_same_step() -> None:
    envs = made(2, autoreset_mode="SameStep")
    envs.reset(seed=1)
    observations, _, terminated, _, infos = envs.step(["hold", "roll"])
    assert observations[0] == "Say roll or hold."
    assert terminated.tolist() == [True, False]
    assert infos["final_obs"][0] == "You hold 0 points."
    assert infos["_final_obs"].tolist() == [True, False]
    assert info_of(infos, 0)["final_info"] == {"turn": 1}
    assert info_of(infos, 0)["turn"] == 0


def test_with_autoreset_disabled_an_ended_episode_has_to_be_reset() -> None:
    envs = made(2, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=1)
    envs.step(["hold", "roll"])
    with pytest.raises(EnvError, match=r"Environments \[0\] have ended.*reset_mask"):
        envs.step(["roll", "roll"])
    mask = np.array([True, False])
    observations, infos = envs.reset(options={"reset_mask": mask})
    assert observations[0] == "Say roll or hold."
    assert observations[1].startswith("You rolled")
    assert infos["_turn"].tolist() == [True, False]
    envs.step(["roll", "roll"])


@pytest.mark.parametrize("max_workers", [None, 0])
def test_an_environment_that_exits_takes_no_neighbour_with_it(max_workers: int | None) -> None:
    envs = made(max_workers=max_workers)
    envs.reset(seed=1)
    observations, _, _, truncated, infos = envs.step(["roll", "exit", "roll"])
    assert observations[0] == "You rolled 3 and have 3 points."
    assert observations[1] == ""
    assert observations[2]
    assert truncated.tolist() == [False, True, False]
    assert infos["error"][1] == "EnvError: the environment called sys.exit(0)"
    assert "SystemExit" in infos["traceback"][1]
    with pytest.raises(EnvError, match=r"called sys\.exit"):
        envs.reset(options={"fail": "exit"})
    envs.close()


def test_a_reset_fails_alone_or_raises_when_all_fail() -> None:
    envs = made(2)
    observations, infos = envs.reset(seed=0, options={"per_env": [{"fail": "no such task"}, {}]})
    assert observations[0] == ""
    assert infos["error"][0] == "LookupError: no such task"
    observations, *_, truncated, infos = envs.step(["roll", "roll"])
    assert observations[0] == "Say roll or hold."
    assert not truncated.any()
    with pytest.raises(LookupError, match="wrong for all"):
        envs.reset(options={"fail": "wrong for all"})


def test_steps_run_at_the_same_time() -> None:
    barrier = threading.Barrier(8, timeout=20)

    class Meets(PigEnv):
        def step(self, action: str) -> Any:
            barrier.wait()  # only passes if all eight are inside step at once
            return super().step(action)

    envs = TextVectorEnv([Meets] * 8)
    envs.reset(seed=0)
    assert "error" not in envs.step(["roll"] * 8)[-1]
    envs.close()


def test_waiting_environments_overlap() -> None:
    class Slow(PigEnv):
        def step(self, action: str) -> Any:
            time.sleep(0.05)
            return super().step(action)

    envs = TextVectorEnv([Slow] * 16)
    envs.reset(seed=0)
    began = time.perf_counter()
    envs.step(["roll"] * 16)
    assert time.perf_counter() - began < 0.4  # one after the other: 0.8 s
    envs.close()


def test_an_episode_inside_can_be_forked() -> None:
    envs = made(2)
    envs.reset(seed=4)
    envs.step(["roll", "roll"])
    child = fork(envs.envs[1])
    assert child.step("roll")[0] == envs.step(["roll", "roll"])[0][1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda envs: envs.step(["roll"]), "Expected 2 actions"),
        (lambda envs: envs.step("ab"), "Expected 2 actions"),
        (lambda envs: envs.reset(seed=[1]), "Expected 2 seeds"),
        (lambda envs: envs.reset(options={"reset_mask": np.array([0, 1])}), "boolean array"),
        (lambda envs: envs.reset(options={"reset_mask": np.zeros(2, bool)}), "with a True in it"),
        (lambda envs: envs.reset(options={"per_env": [{}]}), "must have 2 entries, got 1"),
    ],
)
def test_wrong_arguments_are_errors_of_the_caller(call: Any, message: str) -> None:
    envs = made(2)
    envs.reset(seed=0)
    with pytest.raises(EnvError, match=message):
        call(envs)


def test_wrong_construction_is_explained() -> None:
    with pytest.raises(EnvError, match="got no environment"):
        TextVectorEnv([])
    with pytest.raises(EnvError, match=r"Environment 0 has the space .*SyncVectorEnv"):
        TextVectorEnv([lambda: gymnasium.make("CartPole-v1")])
    with pytest.raises(EnvError, match="Expected an AutoresetMode or one of"):
        made(autoreset_mode="sometimes")
    with pytest.raises(EnvError, match=r"never reset\. Fix: call reset"):
        made().step(["roll"] * 3)


def test_closing_closes_all_and_may_be_repeated() -> None:
    closed = []

    class Closing(PigEnv):
        def close(self) -> None:
            closed.append(self)
            if len(closed) == 1:
                raise OSError("stuck")

    envs = TextVectorEnv([Closing] * 3)
    threads = threading.active_count()
    envs.reset(seed=0)
    with pytest.raises(OSError, match="stuck"):
        envs.close()
    assert len(closed) == 3
    assert threading.active_count() <= threads
    calm = made()
    calm.close()
    calm.close()


def test_rendering_gives_one_text_each() -> None:
    envs = TextVectorEnv([lambda: PigEnv(render_mode="ansi")] * 2)
    envs.reset(seed=0)
    assert envs.render_mode == "ansi"
    assert envs.render() == ("turn 0: 0 points",) * 2
    assert envs.observation_space.contains(("a", "b"))
    envs.action_space.seed(0)
    first, second = envs.action_space.sample()
    assert first != second


def test_a_vector_environment_is_not_forked_but_those_in_it_are() -> None:
    envs = TextVectorEnv([PigEnv, PigEnv])
    envs.reset(seed=0)
    for refused in (fork, snapshot):
        with pytest.raises(SnapshotError, match=r"steps 2 episodes together.*fork\(envs\.envs\[0\]\)"):
            refused(envs)
    child = fork(envs.envs[0])
    assert child.step("roll")[0] == envs.step(("roll", "hold"))[0][0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_gymnasiums_processes_refuse_texts_in_shared_memory_alone() -> None:
    # what docs/environments.md says of AsyncVectorEnv
    with pytest.raises(ValueError, match="shared_memory=False"):
        gymnasium.vector.AsyncVectorEnv([PigEnv, PigEnv])
    envs = gymnasium.vector.AsyncVectorEnv([PigEnv, Fragile], shared_memory=False)
    assert envs.reset(seed=1)[0] == ("Say roll or hold.",) * 2
    with pytest.raises(ZeroDivisionError):
        envs.step(("roll", "raise"))
    envs.close(terminate=True)


def test_infos_of_different_types_never_fail() -> None:
    values = [1, 2.5, "text", None, ("a", "b"), np.arange(3), np.arange(4), {"deep": 1}, True, 2**80, [1]]
    for one in values:
        for other in values:
            infos: dict[str, Any] = {}
            add_info(infos, {"x": one}, 0, 3)
            add_info(infos, {"x": other}, 2, 3)
            assert info_of(infos, 1) == {}
            for number, value in ((0, one), (2, other)):
                assert np.array_equal(info_of(infos, number)["x"], value), (one, other)
