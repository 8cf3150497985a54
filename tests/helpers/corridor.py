"""A world of three places and a door: what tests of commands and of window transcripts play in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium

from at2po_env import CommandEnv, CommandResult, Task

INSTRUCTIONS = "Open the door.\nTask: {question}\n"


class Corridor(CommandEnv):
    """A corridor of three places, of which the last has a door; each step forward is worth 0.25."""

    def __init__(self, **options: Any) -> None:
        tasks = [Task("near", "leave from place 2", metadata={"at": 2}), Task("far", "leave")]
        super().__init__(**{"tasks": tasks, "instructions": INSTRUCTIONS, "max_turns": 4, **options})

    def begin(self, task: Task) -> tuple[int, str]:
        at = int(task.metadata.get("at", 1))
        return at, f"You are at place {at}."

    def obey(self, state: int, command: str) -> CommandResult:
        if command == "open door" and state == 3:
            return CommandResult(state, "It opens.", 1.0, terminated=True, metrics={"success": 1.0})
        if command == "jump":
            return CommandResult(state, "You fall.", -1.0, terminated=True, metrics={"jumps": 1.0})
        if command == "forward" and state < 3:
            return CommandResult(state + 1, f"You are at place {state + 1}.", 0.25)
        return CommandResult(state, "Nothing happens.", valid=False)

    def commands(self, state: int) -> Sequence[str]:
        return ["open door", "jump"] if state == 3 else ["forward", "jump"]

    def dump_world(self, state: int) -> Any:
        return state

    def load_world(self, data: Any) -> int:
        if type(data) is not int:
            raise TypeError("a place is a number")
        return data

    def example_actions(self) -> Sequence[str]:
        return ["<action>forward</action>", "<action>sing</action>", "forward", "<action>open door</action>"]


gymnasium.register(
    "at2po-test/Corridor-v0", entry_point="helpers.corridor:Corridor", disable_env_checker=True
)
