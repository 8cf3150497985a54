"""at2po/WebShop-v0: its contract, its commands, its limits, and any text as an action."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from at2po_envs.webshop.env import WebShopEnv
from helpers.playthrough import header_of
from helpers.playthrough import play as play_golden

import at2po_env
from at2po_env import Snapshot
from at2po_env.contract.testing import EnvContract
from at2po_env.data import At2poSampleWarning
from at2po_env.errors import ConfigError, EnvError, RetrievalError, SnapshotError

pytestmark = pytest.mark.filterwarnings("ignore::at2po_env.data.At2poSampleWarning")

BOTTLE = "B0SAMPLE05-h0"  # a leak proof stainless steel water bottle in teal, 32 ounce


def make(**options: Any) -> gymnasium.Env[Any, Any]:
    return gymnasium.make("at2po/WebShop-v0", **{"split": "all", "nouns": "rule", **options})


def base(env: gymnasium.Env[Any, Any]) -> WebShopEnv:
    assert isinstance(env.unwrapped, WebShopEnv)
    return env.unwrapped


def play(env: gymnasium.Env[Any, Any], task_id: str, *commands: str) -> tuple[Any, ...]:
    env.reset(options={"task_id": task_id})
    last: tuple[Any, ...] = ()
    for command in commands:
        last = env.step(f"<action>{command}</action>")
    return last


class TestContract(EnvContract):
    another_process = True

    def make_env(self) -> gymnasium.Env[Any, Any]:
        return make(render_mode="ansi")


def test_the_options_of_the_retriever_change_what_is_found() -> None:
    def found(options: dict[str, float]) -> list[tuple[int, ...]]:
        env = make(retriever_options=options)
        return [base(env).searcher.find(query) for query in ("water bottle", "black shirt", "gift for women")]

    assert found({"b": 0.0}) != found({"b": 1.0})
    with pytest.raises(RetrievalError, match="k9"):
        make(retriever_options={"k9": 1})


def test_the_environment_of_the_sample_needs_no_arguments_and_says_that_it_is_a_sample() -> None:
    with pytest.warns(At2poSampleWarning, match="at2po data get webshop"):
        env = gymnasium.make("at2po/WebShop-v0")
    prompt, info = env.reset(seed=0)
    assert info["question"] in prompt
    assert info["max_turns"] == 15
    assert info["admissible_commands"] == ("search[...]",)
    assert "Admissible commands: search[...]" in prompt


def test_the_expert_satisfies_every_goal_of_the_sample() -> None:
    env = make()
    for kind in ("human", "synthetic"):
        env = make(goals=kind)
        for index in range(len(base(env).tasks)):
            _, info = env.reset(options={"index": index})
            commands = base(env).expert_commands()
            *others, last = [env.step(f"<action>{command}</action>") for command in commands]
            assert all(info["outcome"] == "command" for *_, info in others), commands
            assert (last[1], last[2], last[4]["outcome"]) == (1.0, True, "success"), (info, commands)
            assert last[4]["metrics"]["success"] == 1.0


def test_a_purchase_without_its_options_is_worth_less() -> None:
    env = make()
    bought = play(env, BOTTLE, "search[steel bottle]", "click[b0sample05]", "click[buy now]")
    # Two attributes and the price of 2 attributes + 2 options + 1 price.
    assert bought[1] == pytest.approx(3 / 5)
    assert bought[2:4] == (True, False)
    info = bought[4]
    assert (info["outcome"], info["asin"], info["options"], info["nouns"]) == (
        "failure",
        "B0SAMPLE05",
        {},
        "rule",
    )
    assert info["metrics"]["r_option"] == 0.0
    assert info["metrics"]["success"] == 0.0


def test_what_cannot_be_done_changes_nothing_but_takes_a_turn() -> None:
    env = make(max_turns=3)
    first = env.reset(options={"task_id": BOTTLE})[1]["observation"]
    observation, reward, terminated, truncated, info = env.step("<action>click[teal]</action>")
    assert (reward, terminated, truncated, info["outcome"]) == (0.0, False, False, "invalid")
    assert info["observation"] == first
    assert env.step("I buy it\nnow")[4]["outcome"] == "malformed"
    observation, reward, terminated, truncated, info = env.step("<action>search[bottle]</action>")
    assert (reward, terminated, truncated, info["outcome"]) == (0.0, False, True, "limit")
    assert "Page 1 (Total results: " in observation
    assert info["metrics"] == {"success": 0.0}


def test_commands_can_be_left_out_of_the_observations() -> None:
    shown = play(make(show_commands=False), BOTTLE, "search[bottle]")
    assert "Admissible" not in shown[0]
    assert "click[b0sample05]" in shown[4]["admissible_commands"]


def test_the_rich_text_marks_what_was_clicked() -> None:
    env = make(observation_mode="text_rich")
    page = play(env, BOTTLE, "search[bottle]", "click[b0sample05]", "click[teal]")[4]["observation"]
    assert page.startswith("You have clicked teal.\nInstruction:\n")
    assert "  [clicked button] teal [clicked button_]\n  [button] rose gold [button_]\n" in page
    back = env.step("<action>click[< prev]</action>")[4]["observation"]
    assert "\n[clicked button] B0SAMPLE05 [clicked button_]\n" in back
    assert "\n[button] B0SAMPLE06 [button_]\n" in back


def test_a_fork_chooses_its_own_options() -> None:
    env = make()
    play(env, BOTTLE, "search[bottle]", "click[b0sample05]")
    child = at2po_env.fork(env)
    for command in ("click[teal]", "click[32 ounce]"):
        child.step(f"<action>{command}</action>")
    assert child.step("<action>click[buy now]</action>")[1] == 1.0
    assert env.step("<action>click[buy now]</action>")[1] == pytest.approx(3 / 5)


def test_snapshots_name_the_goal_and_refuse_what_is_no_session_of_this_shop() -> None:
    env = make()
    play(env, BOTTLE, "search[bottle]", "click[b0sample05]", "click[teal]")
    snap = at2po_env.snapshot(env)
    world = json.loads(snap.to_json())["state"]["episode"]["world"]
    assert world == [BOTTLE, "item", "bottle", 1, "B0SAMPLE05", [["color", "teal"]], ["B0SAMPLE05"], 0.0]
    twin = make()
    at2po_env.restore(twin, Snapshot.from_json(snap.to_json()))
    assert at2po_env.snapshot(twin).digest == snap.digest
    wrong = [
        ["B0SAMPLE05-h9", *world[1:]],
        [5, *world[1:]],
        [[BOTTLE], *world[1:]],
        None,
        {"goal": BOTTLE},
        [*world[:4], "B0NOTHERE0", *world[5:]],
        [world[0], "cellar", *world[2:]],
        world[:5],
        [*world[:3], -1, *world[4:]],
        [*world[:5], [["color"]], *world[6:]],
    ]
    for value in wrong:
        data = json.loads(snap.to_json())
        data["state"]["episode"]["world"] = value
        with pytest.raises(SnapshotError):
            at2po_env.restore(twin, Snapshot.from_json(json.dumps(data)))


def test_ten_thousand_malformed_commands_are_recorded_outcomes() -> None:
    env = make(max_turns=10_001)
    env.reset(options={"task_id": BOTTLE})
    generator = random.Random(0)
    parts = [
        "search[", "click[", "]", "[", "<action>", "</action>", "teal", "< prev", "next >", "b0sample05",
        "\x00", "\ud800", "\n", " ", "back to search", "<think>", "search", "q" * 1200, "é", "'", '"', "\\",
    ]  # fmt: skip
    outcomes: Counter[str] = Counter()
    for _ in range(10_000):
        text = "".join(generator.choices(parts, k=generator.randrange(6)))
        if generator.random() < 0.5:
            text = f"<action>{text}</action>"
        *_, terminated, truncated, info = env.step(text)
        assert not terminated
        assert not truncated
        outcomes[info["outcome"]] += 1
    assert set(outcomes) == {"command", "invalid", "malformed"}
    assert at2po_env.snapshot(env).to_json()


def test_environments_of_a_process_share_the_shop_and_are_stepped_together() -> None:
    envs = gymnasium.make_vec("at2po/WebShop-v0", num_envs=3, split="all")
    assert isinstance(envs, at2po_env.TextVectorEnv)
    one, two, _ = (base(env) for env in envs.envs)
    assert one.shop is two.shop
    assert one.searcher is two.searcher
    envs.reset(seed=0)
    observations, rewards, *_, infos = envs.step(["search[tea]", "search[shirt]", "nothing"])
    assert "B0SAMPLE12" in observations[0]
    assert infos["outcome"].tolist() == ["command", "command", "invalid"]
    np.testing.assert_array_equal(rewards, [0.0, 0.0, 0.0])
    envs.close()


def test_the_transcript_is_rendered() -> None:
    env = make(render_mode="ansi")
    play(env, BOTTLE, "search[bottle]", "click[b0sample05]", "click[buy now]")
    shown = env.render()
    assert isinstance(shown, str)
    assert "[turn 2: command]\n<action>click[b0sample05]</action>" in shown
    assert shown.endswith("[ended: failure, reward 0.6]")


def test_the_playthrough_is_as_it_was_written_down() -> None:
    golden = Path(__file__).parent / "playthrough.txt"
    assert play_golden(header_of(golden)) == golden.read_text("utf-8")


def test_splits_hold_different_goals_in_the_shuffled_order() -> None:
    ids = {}
    for split in ("train", "dev", "test", "all"):
        tasks = base(make(split=split)).tasks
        ids[split] = [tasks[index].id for index in range(len(tasks))]
        assert all(tasks.by_id(task_id).id == task_id for task_id in ids[split])
    assert [len(ids[split]) for split in ("test", "dev", "train")] == [4, 8, 13]
    assert ids["test"] + ids["dev"] + ids["train"] == ids["all"]
    assert len(set(ids["all"])) == 25
    with pytest.raises(EnvError, match="not in the split 'train'"):
        make(split="train").reset(options={"task_id": ids["test"][0]})
    with pytest.raises(EnvError, match="there is no goal 'B0SAMPLE05-s0'"):
        make(split="train").reset(options={"task_id": "B0SAMPLE05-s0"})


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"split": "validation"}, "split='validation'"),
        ({"goals": "robot"}, "goals='robot'"),
        ({"observation_mode": "html"}, "observation_mode='html'"),
        ({"nouns": "nltk"}, "nouns='nltk'"),
        ({"max_turns": 0}, "max_turns=0"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        make(**options)


def test_the_expert_goes_on_from_wherever_the_customer_stands() -> None:
    env = make()
    for index in range(len(base(env).tasks)):
        for detour in ([], ["search[shoes]"], ["search[tea]", "click[next >]"], ["search[tea]", "wander"]):
            env.reset(options={"index": index})
            for command in detour:
                names = base(env).commands(base(env).get_state().world)
                env.step(names[-1] if command == "wander" else command)
            success = 0.0
            for _ in range(12):
                *_, terminated, truncated, info = env.step(base(env).expert_commands()[0])
                if terminated or truncated:
                    success = info["metrics"]["success"]
                    break
            assert success == 1.0, (index, detour)
