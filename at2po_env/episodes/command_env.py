"""A world that is played by commands: the policy writes one command a turn, the world answers with text.

A world is four pure functions: `begin`, `obey`, `commands`, and its state as JSON. `CommandEnv` makes them an
environment: it reads the command out of what the policy wrote, counts turns, ends the episode at the limit,
keeps the transcript, and forks. A command that the world does not understand is data, like a failed call of
a tool.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from at2po_env.data.qa import Tasks, as_tasks
from at2po_env.data.tasks import Task, TaskSource
from at2po_env.episodes.episode import Episode, begin_turn, draw_task, dump_episode, load_episode
from at2po_env.errors import ConfigError, EnvError, SnapshotError
from at2po_env.forking.base import ForkableEnv
from at2po_env.forking.frozen import EMPTY
from at2po_env.spaces import Text

LONGEST_COMMAND = 1000
STOP = ("</action>",)
MALFORMED = "No command was read: {reason}. Write one command, as <action>command</action>."

FORMAT = """In each turn think first, between <think> and </think>; then write exactly one command between
<action> and </action>."""
"""How to write a turn; for the prompts of worlds."""

# The first block that is completed by its closing tag counts: a sampler with the stop string ended there.
_BLOCK = re.compile(r"<action>((?:(?!<action>).)*?)</action>", re.DOTALL)


class CommandResult(NamedTuple):
    """The world's answer to one command.

    Attributes:
        state: The world afterwards: immutable and hashable.
        observation: What it newly shows.
        reward: Of this command.
        terminated: Whether the task is over.
        valid: False for a command that the world did not understand or that is not possible now.
        metrics: Numbers to report at the end, such as `success` (0 or 1).
        info: More to tell, as JSON values.
    """

    state: Any
    observation: str
    reward: float = 0.0
    terminated: bool = False
    valid: bool = True
    metrics: Mapping[str, float] = EMPTY
    info: Mapping[str, Any] = EMPTY


class WorldEpisode(NamedTuple):
    """An episode and the world it has reached."""

    episode: Episode
    world: Any


class CommandEnv(ForkableEnv):
    """An environment over a world of text.

    Subclasses implement `begin`, `obey`, `commands`, `dump_world` and `load_world`; none of them may change
    the environment, since forks share it.

    Args:
        tasks: A `TaskSource`, or a list of tasks.
        instructions: The rules of the world, as a template with `{question}`. They open the episode; under a
            window transcript they open every turn.
        max_turns: Turns of an episode; after the last it is truncated.
        show_commands: Whether observations list the commands that are possible; the infos always do.
        render_mode: "ansi" makes `render` return the transcript.

    Raises:
        ConfigError: The arguments do not make an environment.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(
        self,
        *,
        tasks: Tasks,
        instructions: str,
        max_turns: int,
        show_commands: bool = True,
        render_mode: str | None = None,
    ) -> None:
        problems = []
        if max_turns < 1:
            problems.append(f"max_turns={max_turns}: expected at least 1")
        if render_mode not in (None, "ansi"):
            problems.append(f"render_mode={render_mode!r}: expected None or 'ansi'")
        if "{question}" not in instructions:
            problems.append("instructions: expected a template with {question}")
        if problems:
            raise ConfigError("; ".join(problems))
        self.tasks: TaskSource = as_tasks(tasks)
        self.instructions = instructions
        self.max_turns = max_turns
        self.show_commands = show_commands
        self.render_mode = render_mode
        self.action_space = Text()
        self.observation_space = Text()
        self._state: WorldEpisode | None = None

    @abstractmethod
    def begin(self, task: Task) -> tuple[Any, str]:
        """Return the world at the beginning of a task (immutable and hashable), and what it shows first."""

    @abstractmethod
    def obey(self, state: Any, command: str) -> CommandResult:
        """Return what a command does to a world; any text is a command, and none raises."""

    @abstractmethod
    def commands(self, state: Any) -> Sequence[str]:
        """Return the commands that are possible; a place for free text is written as `search[...]`."""

    @abstractmethod
    def dump_world(self, state: Any) -> Any:
        """Return a JSON value for a world."""

    @abstractmethod
    def load_world(self, data: Any) -> Any:
        """Return the world that `dump_world` wrote; raise a `ValueError` or `TypeError` if it is none."""

    def expert_commands(self) -> list[str] | None:
        """Return commands that solve the task from here, with full knowledge; None where there are none."""
        return None

    @property
    def admissible_commands(self) -> tuple[str, ...]:
        """The commands that are possible now; none before the first reset and after the end."""
        if self._state is None or self._state.episode.ended:
            return ()
        return tuple(self.commands(self._state.world))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Seeds the generator that draws tasks.
            options: {"task_id": ...} or {"index": ...} names the task; without it one is drawn.

        Returns:
            The instructions and what the world shows first; and an info with task_id, question, instructions,
            observation (the world's own words), admissible_commands, stop, max_turns and turn.

        Raises:
            EnvError: No such task, or another option.
        """
        super().reset(seed=seed)
        before = self._state
        given = self.np_random_seed if seed is not None or before is None else before.episode.seed
        task, drawn = draw_task(self.tasks, options, given)
        world, observation = self.begin(task)
        instructions = self.instructions.replace("{question}", task.question)
        commands = tuple(self.commands(world))
        prompt = instructions + self._show(observation, commands)
        self._state = WorldEpisode(Episode(task, prompt, seed=drawn), world)
        return prompt, {
            "task_id": task.id,
            "question": task.question,
            "instructions": instructions,
            "observation": observation,
            "admissible_commands": commands,
            "stop": STOP,
            "max_turns": self.max_turns,
            "turn": 0,
        }

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one turn.

        Args:
            action: What the policy wrote, verbatim; the command stands in its first complete
                `<action>` block, or is the whole of a single line. Bytes are read as UTF-8.

        Returns:
            What is newly shown; the reward; terminated; truncated (after the last turn); and an info with
            turn, command, outcome ("command", "invalid", "malformed"; at the end "success", "failure",
            "limit"), reason, observation, admissible_commands; at the end also metrics.

        Raises:
            EnvError: No episode is running.
        """
        episode, world = self._state or (None, None)
        if episode is None or episode.ended or not isinstance(action, str):
            episode, action = begin_turn(episode, action)
        command, reason = read_command(action)
        if command is None:
            result = CommandResult(world, MALFORMED.format(reason=reason), valid=False)
            outcome = "malformed"
        else:
            result = self.obey(world, command)
            outcome = "command" if result.valid else "invalid"
        info: dict[str, Any] = {"turn": episode.turn + 1, "command": command or "", "reason": reason}
        truncated = not result.terminated and episode.turn + 1 >= self.max_turns
        if not result.terminated and not truncated:
            commands = tuple(self.commands(result.state))
            shown = self._show(result.observation, commands)
            episode = episode.after(action, shown, outcome)
            if result.reward:
                episode = episode.ended_with(result.reward, "")
            self._state = WorldEpisode(episode, result.state)
            info.update(outcome=outcome, observation=result.observation, admissible_commands=commands)
            info.update(result.info)
            return shown, result.reward, False, False, info
        # The last observation lists no commands: none will be read.
        shown = self._show(result.observation, ())
        success = bool(result.metrics.get("success", 0.0))
        why = "limit" if truncated else "success" if success else "failure"
        self._state = WorldEpisode(
            episode.after(action, shown, outcome).ended_with(result.reward, why), result.state
        )
        info.update(
            outcome=why,
            reason=reason or ("max_turns" if truncated else ""),
            observation=result.observation,
            admissible_commands=(),
            task_id=episode.task.id,
            metrics={"success": 0.0, **result.metrics},
            **result.info,
        )
        return shown, result.reward, result.terminated, truncated, info

    def _show(self, observation: str, commands: Sequence[str]) -> str:
        """Frame what the world says, and list the commands where that is wanted."""
        listed = f"\nAdmissible commands: {' | '.join(commands)}" if self.show_commands and commands else ""
        return f"\n<observation>\n{observation}{listed}\n</observation>\n"

    def render(self) -> str | None:
        """Return the transcript so far in mode "ansi", else None."""
        if self.render_mode != "ansi":
            return None
        if self._state is None:
            raise EnvError("nothing to render yet. Fix: call reset first")
        return self._state.episode.render()

    def get_state(self) -> WorldEpisode | None:
        """Return the episode and its world; None before the first reset."""
        return self._state

    def set_state(self, state: WorldEpisode | None) -> None:
        """Continue from an episode."""
        self._state = state

    def dump_state(self, state: WorldEpisode | None) -> Any:
        """Return the episode and its world as JSON."""
        if state is None:
            return None
        return {"episode": dump_episode(state.episode), "world": self.dump_world(state.world)}

    def load_state(self, data: Any) -> WorldEpisode | None:
        """Return what `dump_state` wrote.

        Raises:
            SnapshotError: It is something else.
        """
        if data is None:
            return None
        try:
            return WorldEpisode(load_episode(data["episode"]), self.load_world(data["world"]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SnapshotError(
                f"this is no state of {type(self).__name__}: {type(error).__name__}: {error}"
            ) from error


def read_command(text: str) -> tuple[str | None, str]:
    """Read the command out of what the policy wrote.

    Args:
        text: One turn, verbatim.

    Returns:
        The command, white space collapsed, and ""; or None, and the reason that there is none.

    Example:
        >>> read_command("<think>The desk.</think><action> go to  desk 1 </action>")
        ('go to desk 1', '')
        >>> read_command("go to desk 1")
        ('go to desk 1', '')
        >>> read_command("<think>The desk.</think>")
        (None, 'no complete <action> block')
    """
    found = _BLOCK.search(text)
    if found is not None:
        written = found[1]
    elif "<" in text or "\n" in text.strip():
        return None, "no complete <action> block"
    else:
        written = text
    if len(written) > LONGEST_COMMAND:
        return None, f"a command of {len(written)} characters, expected at most {LONGEST_COMMAND}"
    command = " ".join(written.split())
    return (command, "") if command else (None, "the command is empty")
