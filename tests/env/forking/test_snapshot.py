"""A snapshot is a value: frozen, versioned, JSON both ways, equal exactly when the state is."""

from __future__ import annotations

import copy
import datetime
import json
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import NormalizeReward, RecordEpisodeStatistics, TimeLimit
from pydantic import BaseModel, ValidationError

from at2po_env.contract.testing import PigEnv
from at2po_env.errors import SnapshotError
from at2po_env.forking.base import restore, snapshot
from at2po_env.forking.snapshots import Snapshot

Env = gymnasium.Env[Any, Any]


class Colour:
    def __init__(self, name: str) -> None:
        self.name = name
        self.scores = [1.5, float("inf")]


class Keeper(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Holds one value of each kind that JSON does not know."""

    def __init__(self, env: Env, **values: Any) -> None:
        super().__init__(env)
        self.function = len
        self.generator = np.random.default_rng(1)
        self.values = {
            "tuple": (1, (2,)),
            1: "int key",
            "$dollar": "not a tag",
            "bytes": b"\xff\x00",
            "array": np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::2],
            "scalar": np.float32(0.1),
            "zero-d": np.array(3.0),
            "object": Colour("red"),
            "nan": float("nan"),
            "set": {3, 1, 2},
            "frozenset": frozenset({"b", "a"}),
            "complex": 1 + 2j,
            "text": "\ud800 käse",
            "big": 2**200,
            "empty": [],
            "base": env.unwrapped,
        }
        self.alias = self.values["empty"]
        vars(self).update(values)


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


def test_json_brings_every_kind_of_value_back() -> None:
    env = begun(Keeper(PigEnv()), "roll")
    env.alias.append("x")
    other = begun(Keeper(PigEnv()))
    restore(other, through_json(snapshot(env)))
    values, theirs = env.values, other.values
    assert theirs.keys() == values.keys()
    for key in values.keys() - {"array", "zero-d", "object", "nan", "base"}:
        assert theirs[key] == values[key], key
        assert type(theirs[key]) is type(values[key]), key
    assert theirs["array"].tolist() == [[0, 2], [3, 5]]
    assert theirs["array"].dtype == np.int16
    assert theirs["zero-d"].shape == ()
    assert theirs["nan"] != theirs["nan"]
    assert vars(theirs["object"]) == {"name": "red", "scores": [1.5, float("inf")]}
    assert theirs["base"] is other.unwrapped
    assert other.alias is theirs["empty"]
    assert theirs["empty"] is not values["empty"]
    assert other.generator.random() == env.generator.random()
    theirs["array"][0, 0] = 9
    assert snapshot(env).digest != snapshot(other).digest


def test_a_snapshot_does_not_change_when_its_environment_does() -> None:
    env = begun(NormalizeReward(Keeper(PigEnv())), "roll")
    snap = snapshot(env)
    reference = snapshot(env).to_json()
    env.step("roll")
    env.get_wrapper_attr("values")["empty"].append(1)
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
        lambda env: setattr(env, "function", max),
        lambda env: env.values["array"].__setitem__((0, 0), 7),
        lambda env: env.values["set"].add(9),
        lambda env: env.values["object"].scores.append(1),
        lambda env: env.generator.random(),
        lambda env: setattr(env, "alias", []),
        lambda env: setattr(env, "extra", None),
        lambda env: env.values.__setitem__("tuple", [1, [2]]),
    ],
    ids=lambda change: change.__code__.co_names[-1] if change.__code__.co_names else "",
)
def test_different_states_have_different_digests(change: Any) -> None:
    env = begun(Keeper(PigEnv()), "roll")
    before = snapshot(env).digest
    change(env)
    assert snapshot(env).digest != before


@pytest.mark.parametrize("keys", [("a", "b"), (1, 2), (None, ("x", 1))])
def test_the_order_of_keys_does_not_count(keys: Any) -> None:
    def keeper(names: Any) -> Snapshot:
        shared: list[Any] = []
        values = {name: [str(name), shared] for name in names}
        return snapshot(begun(Keeper(PigEnv(), d=values, seen=set(names))))

    one, two = keeper(keys), keeper(keys[::-1])
    assert one.digest == two.digest == through_json(two).digest
    assert one.to_json() != two.to_json()  # the order is kept, it just does not count
    assert keeper((*keys, "more")).digest != one.digest


def test_the_order_of_an_ordered_dict_counts() -> None:
    one = Keeper(PigEnv(), d=OrderedDict([("a", 1), ("b", 2)]))
    two = Keeper(PigEnv(), d=OrderedDict([("b", 2), ("a", 1)]))
    assert snapshot(begun(one)).digest != snapshot(begun(two)).digest


def test_aliases_count() -> None:
    shared: list[Any] = []
    one = Keeper(PigEnv(), d={"a": shared, "b": shared})
    two = Keeper(PigEnv(), d={"a": [], "b": []})
    assert snapshot(begun(one)).digest != snapshot(begun(two)).digest


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alias", {"$unknown": 1}),
        ("alias", {"$ref": 77}),
        ("alias", {"$object": "subprocess:Popen", "attributes": {}}),
        ("alias", {"$object": "gymnasium.core:np.ndarray", "attributes": {}}),
        ("alias", {"$object": "builtins:object", "attributes": {"__class__": 1}}),
        ("alias", {"$array": "AAAA", "dtype": "O", "shape": [1]}),
        ("alias", {"$array": "!", "dtype": "<i8", "shape": [1]}),
        ("alias", {"$layer": 99}),
        ("alias", {"$config": "os:system"}),
        ("alias", {"$tuple": 5}),
        ("alias", {"$generator": {"state": {"bit_generator": "Evil"}, "seeds": None}}),
        ("function", {"$config": "builtins:max"}),
    ],
)
def test_damaged_wrapper_state_changes_nothing(name: str, value: Any) -> None:
    env = begun(Keeper(PigEnv()), "roll")
    data = json.loads(snapshot(env).to_json())
    data["wrappers"][0]["attributes"][name] = value
    before = snapshot(env).digest
    env.step("roll")
    after = snapshot(env).digest
    with pytest.raises(SnapshotError, match=rf"Keeper\.{name}|generator|bit generator"):
        restore(env, Snapshot.from_json(json.dumps(data)))
    assert before != after == snapshot(env).digest


@pytest.mark.parametrize("part", ["state", "wrappers"])
@pytest.mark.parametrize("value", [None, 3, {}, [], [3], {"episode": 3, "rng": None, "seed": None}])
def test_damaged_parts_are_one_clear_error(part: str, value: Any) -> None:
    env = begun(Keeper(PigEnv()), "roll")
    data = {**json.loads(snapshot(env).to_json()), part: value}
    before = snapshot(env).digest
    with pytest.raises(SnapshotError):
        restore(env, Snapshot.from_json(json.dumps(data)))
    assert snapshot(env).digest == before


def test_a_value_without_a_json_form_is_named() -> None:
    env = begun(Keeper(PigEnv(), when=datetime.datetime(2026, 1, 1)))
    child_ready = snapshot(env)  # forks and in-process restores still work
    restore(env, child_ready)
    with pytest.raises(
        SnapshotError, match=r"Keeper\.when holds a datetime:datetime, which has no JSON form"
    ):
        child_ready.to_json()


def test_nesting_too_deep_is_one_clear_error() -> None:
    deep: list[Any] = []
    for _ in range(5_000):
        deep = [deep]
    env = begun(Keeper(PigEnv(), deep=deep))
    with pytest.raises(SnapshotError, match=r"Keeper\.deep is nested too deeply"):
        snapshot(env)
    with pytest.raises(SnapshotError, match="not a snapshot"):
        Snapshot.from_json("[" * 100_000)
