"""Worlds of commands: reading commands, turns and limits, infos, forks."""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest
from helpers.corridor import Corridor

from at2po_env import Snapshot, fork, restore, snapshot
from at2po_env.contract.testing import EnvContract
from at2po_env.episodes.command_env import LONGEST_COMMAND, read_command
from at2po_env.errors import ConfigError, EnvError, SnapshotError


class TestCorridor(EnvContract):
    another_process = False  # it would not find the test helpers

    def make_env(self) -> gymnasium.Env[Any, Any]:
        return gymnasium.make("at2po-test/Corridor-v0", render_mode="ansi")


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("<action>go  to\ndesk 1 </action>", "go to desk 1"),
        ("<think>or <action>look?</think><action>open door</action>", "open door"),
        ("<action>first</action><action>second</action>", "first"),
        ("  look ", "look"),
        ("search[red shoe]", "search[red shoe]"),
        ("a\nb", None),
        ("<think>look</think>", None),
        ("<action>look", None),
        ("<action> \n </action>", None),
        ("", None),
        (f"<action>{'x' * (LONGEST_COMMAND + 1)}</action>", None),
        ("\ud800", "\ud800"),
    ],
)
def test_the_first_complete_block_or_a_bare_line_is_the_command(text: str, command: str | None) -> None:
    read, reason = read_command(text)
    assert read == command
    assert bool(reason) == (command is None)


def test_an_episode_from_its_instructions_to_success() -> None:
    env = Corridor(render_mode="ansi")
    prompt, info = env.reset(options={"task_id": "near"})
    assert prompt == (
        "Open the door.\nTask: leave from place 2\n\n<observation>\nYou are at place 2.\n"
        "Admissible commands: forward | jump\n</observation>\n"
    )
    assert info["instructions"] == "Open the door.\nTask: leave from place 2\n"
    assert (info["observation"], info["admissible_commands"]) == ("You are at place 2.", ("forward", "jump"))
    assert (info["stop"], info["max_turns"], info["turn"]) == (("</action>",), 4, 0)

    shown, reward, terminated, truncated, info = env.step("<think>On.</think><action>forward</action>")
    assert shown == (
        "\n<observation>\nYou are at place 3.\nAdmissible commands: open door | jump\n</observation>\n"
    )
    assert (reward, terminated, truncated) == (0.25, False, False)
    assert (info["outcome"], info["command"], info["turn"]) == ("command", "forward", 1)
    assert "metrics" not in info

    shown, reward, terminated, truncated, info = env.step("open door")
    assert (shown, reward) == ("\n<observation>\nIt opens.\n</observation>\n", 1.0)
    assert (terminated, truncated, info["outcome"]) == (True, False, "success")
    assert info["metrics"] == {"success": 1.0}
    assert env.render() == (
        f"[near]\n{prompt}\n[turn 1: command]\n<think>On.</think><action>forward</action>\n<observation>\n"
        "You are at place 3.\nAdmissible commands: open door | jump\n</observation>\n\n[turn 2: command]\n"
        "open door\n<observation>\nIt opens.\n</observation>\n\n[ended: success, reward 1]"
    )
    with pytest.raises(EnvError, match="ended after turn 2"):
        env.step("look")


def test_an_end_without_success_is_a_failure_and_keeps_its_metrics() -> None:
    env = Corridor()
    env.reset(options={"index": 1})
    *_, info = env.step("jump")
    assert (info["outcome"], info["metrics"]) == ("failure", {"success": 0.0, "jumps": 1.0})


def test_commands_that_mean_nothing_cost_a_turn_until_the_limit() -> None:
    env = Corridor(show_commands=False)
    env.reset(options={"index": 1})
    outcomes = []
    for action in ("<action>sing</action>", "I wonder\nwhy", "<action></action>"):
        shown, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated) == (0.0, False, False)
        assert "Admissible" not in shown
        outcomes.append(info["outcome"])
    assert outcomes == ["invalid", "malformed", "malformed"]
    _, reward, terminated, truncated, info = env.step("forward")
    assert (reward, terminated, truncated) == (0.25, False, True)
    assert (info["outcome"], info["reason"], info["metrics"]) == ("limit", "max_turns", {"success": 0.0})


def test_a_fork_of_a_fork_plays_the_same_world() -> None:
    env = Corridor()
    env.reset(options={"index": 1})
    env.step("forward")
    child = fork(fork(env))
    assert child.step("forward") == env.step("forward")
    env.step("jump")
    assert child.step("open door")[1] == 1.0


def test_a_snapshot_goes_through_json_and_a_foreign_one_is_refused() -> None:
    env = Corridor()
    env.reset(options={"index": 1})
    env.step("forward")
    kept = snapshot(env)
    text = kept.to_json()
    env.step("forward")
    restore(env, Snapshot.from_json(text))
    assert snapshot(env).digest == kept.digest
    assert env.step("forward")[4]["observation"] == "You are at place 3."
    with pytest.raises(SnapshotError, match="no state of Corridor"):
        env.load_state({"episode": env.dump_state(env.get_state())["episode"], "world": "2"})


def test_bad_arguments_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"max_turns=0.*render_mode='human'.*instructions"):
        Corridor(max_turns=0, render_mode="human", instructions="no place")


def test_before_reset_and_of_a_wrong_kind_actions_are_errors() -> None:
    env = Corridor()
    with pytest.raises(EnvError, match="before the first reset"):
        env.step("look")
    env.reset()
    with pytest.raises(EnvError, match="got int"):
        env.step(3)  # type: ignore[arg-type]
    assert env.step(b"<action>jump</action>")[1] == -1.0
