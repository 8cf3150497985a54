"""A snapshot is a value: frozen, versioned, JSON both ways, equal exactly when the state is."""

from __future__ import annotations

import copy
import datetime
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import NormalizeReward, RecordEpisodeStatistics, TimeLimit
from pydantic import BaseModel, ValidationError

from at2po_env.contract.testing import PigEnv
from at2po_env.errors import SnapshotError
from at2po_env.forking import snapshots
from at2po_env.forking.base import fork, restore, snapshot
from at2po_env.forking.snapshots import Snapshot

Env = gymnasium.Env[Any, Any]


class Keeper(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Holds what JSON does not know, and says itself what its state is."""

    def __init__(self, env: Env, note: Any = None) -> None:
        super().__init__(env)
        self.generator = np.random.default_rng(1)
        self.seen: set[str] = set()
        self.note = note

    def step(self, action: Any) -> Any:
        self.seen.add(action)
        observation, reward, terminated, truncated, info = self.env.step(action)
        shown = {"seen": sorted(self.seen), "drawn": float(self.generator.random())}
        return observation, reward, terminated, truncated, {**info, **shown}

    def get_state(self) -> Any:
        drawn = self.generator.bit_generator.state
        return {"generator": drawn, "seen": sorted(self.seen), "note": self.note}

    def set_state(self, state: Any) -> None:
        self.note = state["note"]
        self.seen = set(state["seen"])
        self.generator.bit_generator.state = state["generator"]


class Silent(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Holds state and does not say how to write it."""

    def __init__(self, env: Env, thing: Any = None) -> None:
        super().__init__(env)
        self.thing = thing


def begun(env: Env, *actions: str, seed: int = 0) -> Env:
    env.reset(seed=seed)
    for action in actions:
        env.step(action)
    return env


def through_json(snap: Snapshot) -> Snapshot:
    return Snapshot.from_json(snap.to_json())


def test_it_is_a_frozen_versioned_model() -> None:
    snap = snapshot(begun(PigEnv()))
    assert isinstance(snap, BaseModel)
    assert (snap.version, snap.env_id) == (1, "at2po_env.contract.testing:PigEnv")
    with pytest.raises(ValidationError, match="frozen"):
        snap.version = 2  # type: ignore[misc]
    assert copy.deepcopy(snap) is snap
    assert set(json.loads(snap.to_json())) == {"version", "env_id", "state", "wrappers"}
    assert json.loads(snap.model_dump_json()) == json.loads(snap.to_json())
    assert pickle.loads(pickle.dumps(snap)) == snap


def test_a_wrapper_may_say_what_its_state_is() -> None:
    env = begun(Keeper(PigEnv(), "\ud800 käse"), "roll", "what?")
    snap = snapshot(env)
    read = through_json(snap)
    assert read.digest == snap.digest
    expected = [env.step(action) for action in ("roll", "hold")]
    for target, state in ((env, snap), (env, read), (Keeper(PigEnv()), read)):
        restore(target, state)
        assert snapshot(target).digest == snap.digest
        assert [target.step(action) for action in ("roll", "hold")] == expected


def test_a_wrappers_state_stays_as_it_was_captured() -> None:
    note = ["a"]
    env = begun(Keeper(PigEnv(), note))
    snap = snapshot(env)
    note.append("b")
    restore(env, snap)
    env.note.append("c")
    restore(env, snap)
    assert env.note == ["a"]
    read = through_json(snap)
    restore(env, read)
    env.note.append("d")
    restore(env, read)
    assert env.note == ["a"]


@pytest.mark.parametrize(
    "thing",
    [3, None, [1], {"a": 1}, np.arange(3), np.random.default_rng(0), datetime.datetime(2026, 1, 1)],
    ids=lambda thing: type(thing).__name__,
)
def test_a_wrapper_that_does_not_say_it_forks_but_is_not_written(thing: Any) -> None:
    env = begun(Silent(PigEnv(), thing))
    snap = snapshot(env)
    restore(env, snap)
    assert type(fork(env).thing) is type(thing)
    asks: list[Any] = [snap.to_json, lambda: snap.digest, lambda: hash(snap), lambda: pickle.dumps(snap)]
    for ask in asks:
        with pytest.raises(
            SnapshotError,
            match=r"Silent\.thing holds a .* cannot write\. Fix: .*get_state\(\) -> JSON.*fork_config",
        ):
            ask()


def test_callables_the_stack_itself_and_declared_configuration_need_no_words() -> None:
    class Sharing(Silent):
        fork_config = ("thing",)

    def stack() -> Env:
        env = Sharing(Silent(PigEnv(), len), [1])
        env.below = env.env
        return env

    env = begun(stack(), "roll")
    other = stack()
    restore(other, through_json(snapshot(env)))
    assert other.step("roll") == env.step("roll")


def test_a_snapshot_does_not_change_when_its_environment_does() -> None:
    env = begun(NormalizeReward(Keeper(PigEnv(), ["a"])), "roll")
    snap = snapshot(env)
    reference = snapshot(env).to_json()
    env.step("roll")
    env.get_wrapper_attr("note").append(1)
    assert snap.to_json() == reference


def test_equal_states_have_equal_digests() -> None:
    def stack() -> Env:
        return RecordEpisodeStatistics(TimeLimit(PigEnv(), 9))

    one, two = begun(stack(), "roll", "roll"), begun(stack(), "roll", "roll")
    assert snapshot(one).digest == snapshot(two).digest == through_json(snapshot(one)).digest
    assert snapshot(one) == snapshot(two)
    assert hash(snapshot(one)) == hash(snapshot(two))
    lazy, drawn = PigEnv(), PigEnv()
    lazy.reset(seed=3)
    drawn.reset(seed=3)
    _ = drawn.np_random  # building the generator is not drawing from it
    assert snapshot(lazy).digest == snapshot(drawn).digest


@pytest.mark.parametrize(
    "change",
    [
        lambda env: env.step("roll"),
        lambda env: env.step("?"),
        lambda env: env.unwrapped.np_random.random(),
        lambda env: env.reset(seed=1),
        lambda env: env.seen.add("x"),
        lambda env: env.generator.random(),
        lambda env: setattr(env, "note", [1]),
        lambda env: setattr(env, "note", 0),
    ],
    ids=lambda change: change.__code__.co_names[-1] if change.__code__.co_names else "",
)
def test_different_states_have_different_digests(change: Any) -> None:
    env = begun(Keeper(PigEnv()), "roll")
    before = snapshot(env).digest
    change(env)
    assert snapshot(env).digest != before


def test_the_order_of_keys_does_not_count() -> None:
    def keeper(*names: str) -> Snapshot:
        return snapshot(begun(Keeper(PigEnv(), {name: [name] for name in names})))

    one, two = keeper("a", "b"), keeper("b", "a")
    assert one.digest == two.digest == through_json(two).digest
    assert one.to_json() != two.to_json()  # the order is kept, it just does not count
    assert keeper("a", "b", "more").digest != one.digest


def test_another_process_continues_the_episode(tmp_path: Path) -> None:
    env = begun(NormalizeReward(TimeLimit(PigEnv(), 9)), "roll", "roll", "what?")
    snap = snapshot(env)
    path = tmp_path / "snapshot.json"
    path.write_text(snap.to_json(), encoding="ascii")
    code = """
import json, pathlib, sys
from gymnasium.wrappers import NormalizeReward, TimeLimit
from at2po_env.forking.base import restore, snapshot
from at2po_env.forking.snapshots import Snapshot
from at2po_env.contract.testing import PigEnv
env = NormalizeReward(TimeLimit(PigEnv(), 9))
restore(env, Snapshot.from_json(pathlib.Path(sys.argv[1]).read_text()))
print(json.dumps([snapshot(env).digest, [env.step(a) for a in ("roll", "roll", "hold")]]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    digest, steps = json.loads(done.stdout)
    assert digest == snap.digest
    assert steps == json.loads(json.dumps([env.step(action) for action in ("roll", "roll", "hold")]))


class Careless(PigEnv):
    """Writes something that is not JSON."""

    written: Any = None

    def dump_state(self, state: Any) -> Any:
        del state
        return {"turns": [0, self.written]}


@pytest.mark.parametrize(
    ("written", "what"),
    [
        ({1, 2}, r"snapshot\.state\.episode\.turns\[1\] is a builtins:set"),
        (float("nan"), r"turns\[1\] is nan"),
        ({(1, 2): 3}, r"turns\[1\], key \(1, 2\) is a tuple"),
        (object(), r"turns\[1\] is a builtins:object"),
    ],
)
def test_a_state_that_is_not_json_names_the_place(written: Any, what: str) -> None:
    env = Careless()
    env.written = written
    with pytest.raises(SnapshotError, match=what + ".*dump_state must return only"):
        snapshot(begun(env)).to_json()
    kept = begun(Keeper(PigEnv(), written))
    with pytest.raises(SnapshotError, match=r"wrappers\[0\]\.state\.note.*so must a wrapper's get_state"):
        snapshot(kept).to_json()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"version": 2}', '{"version": 1}', '{"version": 1, "env_id": 3}', b"\xff\xfe"],
)
def test_what_is_not_a_snapshot_is_refused(text: str | bytes) -> None:
    with pytest.raises(SnapshotError, match="snapshot"):
        Snapshot.from_json(text)


def test_an_unknown_key_is_refused() -> None:
    data = json.loads(snapshot(begun(PigEnv())).to_json())
    with pytest.raises(SnapshotError, match="surprise"):
        Snapshot.from_json(json.dumps({**data, "surprise": 1}))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1" * 5000])
def test_what_json_has_no_numbers_for_is_refused(number: str) -> None:
    text = snapshot(begun(PigEnv())).to_json()
    with pytest.raises(SnapshotError, match="not a snapshot"):
        Snapshot.from_json(text.replace('"seed":0', f'"seed":{number}'))


def test_a_text_without_end_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    text = snapshot(begun(PigEnv())).to_json()
    monkeypatch.setattr(snapshots, "MAX_CHARACTERS", len(text) - 1)
    with pytest.raises(SnapshotError, match=rf"has {len(text)} characters"):
        Snapshot.from_json(text)


@pytest.mark.parametrize("part", ["state", "wrappers"])
@pytest.mark.parametrize("value", [None, 3, {}, [], [3], {"episode": 3, "rng": None, "seed": None}])
def test_damaged_parts_are_one_clear_error(part: str, value: Any) -> None:
    env = begun(TimeLimit(PigEnv(), 9), "roll")
    data = {**json.loads(snapshot(env).to_json()), part: value}
    before = snapshot(env).digest
    with pytest.raises(SnapshotError):
        restore(env, Snapshot.from_json(json.dumps(data)))
    assert snapshot(env).digest == before


def test_a_set_state_that_refuses_changes_nothing() -> None:
    env = begun(TimeLimit(Keeper(PigEnv()), 9), "roll")
    data = json.loads(snapshot(env).to_json())
    data["wrappers"][1]["state"] |= {"seen": None, "note": "half done"}
    env.step("roll")
    before = snapshot(env)
    with pytest.raises(SnapshotError, match="set_state refused the state: TypeError"):
        restore(env, Snapshot.from_json(json.dumps(data)))
    assert snapshot(env) == before
    assert env.get_wrapper_attr("note") is None


def test_nesting_too_deep_is_one_clear_error() -> None:
    deep: list[Any] = []
    for _ in range(5_000):
        deep = [deep]
    env = begun(Silent(PigEnv(), deep))
    with pytest.raises(SnapshotError, match=r"Silent\.thing is nested too deeply"):
        snapshot(env)
    with pytest.raises(SnapshotError, match="not a snapshot"):
        Snapshot.from_json("[" * 100_000)
