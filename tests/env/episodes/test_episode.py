"""An episode shares its past and never recurses over it."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import pytest

from at2po_env.data.tasks import Task, TaskList
from at2po_env.episodes.episode import Episode, TurnLink, dump_episode, load_episode, turns
from at2po_env.errors import DataError, SnapshotError
from at2po_env.forking.frozen import EMPTY, FrozenDict, freeze, thaw

TASK = Task("q1", "Who?", ("Ada", "Lovelace"), {"hops": [1, {"two": 2}]})


def episode(length: int) -> Episode:
    last = None
    for turn in range(length):
        last = TurnLink(last, f"a{turn}", f"o{turn}", 0.0, "tool")
    return Episode(TASK, "prompt", last, length, length, freeze({"tool": {"seen": [1, 2]}}), 7, "")


def test_json_brings_every_field_back() -> None:
    before = episode(3)._replace(ended="answer")
    after = load_episode(json.loads(json.dumps(dump_episode(before))))
    assert after == before
    assert [link.action for link in after.turns] == ["a0", "a1", "a2"]
    assert after.tool_states == {"tool": {"seen": (1, 2)}}


def test_ten_thousand_turns_do_not_recurse() -> None:
    long = episode(10_000)
    assert sys.getrecursionlimit() < 10_000
    other = load_episode(json.loads(json.dumps(dump_episode(long))))
    assert other == long
    assert hash(other.last) == hash(long.last)
    assert pickle.loads(pickle.dumps(long)) == long
    assert copy.deepcopy(long) is long
    assert "turn=10000" in repr(long)


def test_a_difference_in_the_first_of_many_turns_is_seen() -> None:
    one, other = episode(5_000), episode(4_999)
    assert one.last != other.last
    row = dump_episode(one)
    row["turns"][0][0] = "changed"
    assert load_episode(row) != one


def test_a_longer_episode_shares_its_past() -> None:
    one = episode(50)
    two = one._replace(last=TurnLink(one.last, "a", "o", 0.0, "answer"))
    assert two.last is not None
    assert two.last.previous is one.last
    assert len(turns(two.last)) == 51


@pytest.mark.parametrize(
    "damage", [{}, {"task": 3}, {"turns": [["too", "short"]]}, {"turns": 5}, {"tool_states": None, "seed": 1}]
)
def test_damaged_json_is_one_clear_error(damage: dict[str, object]) -> None:
    data = {} if not damage else {**dump_episode(episode(2)), **damage}
    if damage.get("seed") == 1:
        del data["ended"]
    with pytest.raises(SnapshotError, match="not an episode"):
        load_episode(data)


def test_frozen_values_refuse_every_change() -> None:
    frozen = freeze({"a": [1, {"b": {2}}]})
    assert frozen == {"a": (1, {"b": frozenset({2})})}
    for change in (
        lambda: frozen.__setitem__("a", 1),
        lambda: frozen.pop("a"),
        lambda: frozen.update(b=1),
        lambda: frozen.clear(),
        lambda: frozen.setdefault("z", 1),
        lambda: frozen.__delitem__("a"),
    ):
        with pytest.raises(TypeError, match="does not change"):
            change()
    assert freeze(frozen) is frozen
    assert copy.deepcopy(frozen) is frozen
    assert pickle.loads(pickle.dumps(FrozenDict(a=1))) == {"a": 1}
    assert thaw(freeze({"a": [1, {"b": 2}]})) == {"a": [1, {"b": 2}]}
    assert not EMPTY


def test_task_lists_find_by_index_and_id() -> None:
    tasks = TaskList([TASK, Task("q2", "Where?")], name="file.jsonl")
    assert tasks[1] == tasks.by_id("q2") == tasks[-1]
    assert tasks[:1] == (TASK,)
    with pytest.raises(DataError, match=r"file.jsonl: no task with id 'q9'.* 2 .*'q1', 'q2'"):
        tasks.by_id("q9")
    with pytest.raises(DataError, match="'q1' occurs twice"):
        TaskList([TASK, TASK])
    with pytest.raises(DataError, match="no tasks"):
        TaskList([])
