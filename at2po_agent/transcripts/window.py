"""Writes a prompt of its own for each turn: the task, the last few turns, what is seen now, what can be done.

T2PO, GiGPO and other methods for long episodes show an episode in this way, so that a prompt stays short
however long the episode is. Each turn is a sequence of its own then: the prompt of one turn is not the
beginning of that of the next. Token in, token out holds turn by turn.

An environment helps by telling in its infos what belongs where, as `at2po_env.CommandEnv` does:
`instructions` (what stays true all the episode), `observation` (the world's words without frame), `command`
(the part of the action that was carried out, without the thoughts before it) and `admissible_commands`. Where
one is missing, the first observation, the observation, the whole action, and nothing take its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from at2po_agent.transcripts.inline import GrowingTranscript, TurnInput

TEMPLATE = """{task}
{history}You are at turn {turn}. You see:
{observation}
{commands}"""
_FIELDS = ("task", "history", "observation", "commands", "turn")
_PLACE = re.compile("{(" + "|".join(_FIELDS) + ")}")
_SUMMARY = re.compile(r"<summary>((?:(?!<summary>).)*?)</summary>", re.DOTALL)
_CUT = " [cut]"
SUMMARY_RULE = """Before anything else, write what is worth remembering of all turns so far between <summary>
and </summary>: you will see only this summary and the last turns again."""


class WindowConfig(BaseModel):
    """The prompt of each turn."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    turns: int = Field(2, ge=0, description="How many of the last turns a prompt shows.")
    memory: Literal["commands", "actions", "summary"] = Field(
        "commands",
        description="A prompt shows the command that a turn carried out (commands), or all that was written "
        "(actions); with summary the model also writes a summary in each turn, and sees the last one.",
    )
    written_as: Literal["inline", "chat"] = Field(
        "inline", description="Write a prompt as it is, or as the user's message of a chat (model.chat)."
    )
    template: str = Field(
        TEMPLATE,
        description="The prompt; {task}, {history}, {observation}, {commands} and {turn} are replaced.",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens of a prompt: older turns are left out first, then the observation is cut; "
        "none takes rollout.max_prompt_tokens.",
    )

    @field_validator("template")
    @classmethod
    def _says_what_is_seen(cls, template: str) -> str:
        missing = [name for name in ("task", "observation") if f"{{{name}}}" not in template]
        if missing:
            raise ValueError(f"template lacks {', '.join(f'{{{name}}}' for name in missing)}")
        return template


class View(NamedTuple):
    """What a prompt is written from.

    Attributes:
        task: What stays true all the episode.
        observation: What is seen now.
        commands: What can be done now; none where the environment does not say.
        past: Observation and action of the last turns, oldest first.
        turn: Number of the turn that is to be taken, from 1.
        summary: The model's own, where it was asked for one.
    """

    task: str
    observation: str
    commands: tuple[str, ...]
    past: tuple[tuple[str, str], ...] = ()
    turn: int = 1
    summary: str = ""


class WindowTranscript:
    """Writes each turn's prompt afresh (`Transcript`).

    Args:
        inner: Makes the ids of a prompt, as running text or as the user's message of a chat.
        config: What a prompt holds.
        max_tokens: Most tokens of a prompt.
    """

    def __init__(self, inner: GrowingTranscript, config: WindowConfig, *, max_tokens: int) -> None:
        self._inner = inner
        self._config = config
        self._max_tokens = config.max_tokens or max_tokens

    def first(self, prompt: str, info: Mapping[str, Any]) -> TurnInput:
        """Ids before the first action."""
        task = info.get("instructions")
        if task is None:
            view = View(prompt, "", ())
        else:
            view = View(str(task), str(info.get("observation", "")), _commands(info))
        return self._write(view)

    def next(
        self, before: TurnInput, action: str, observation: str, info: Mapping[str, Any], *, closed: bool
    ) -> TurnInput:
        """Ids before the next action: a whole prompt."""
        del closed
        view: View = before.memory
        summary = view.summary
        if self._config.memory == "summary":
            found = _SUMMARY.findall(action)
            summary = found[-1].strip() if found else summary
        done = action if self._config.memory == "actions" else str(info.get("command") or action)
        past = (*view.past, (view.observation, done.strip()))
        return self._write(
            View(
                view.task,
                str(info.get("observation", observation)).strip("\n"),
                _commands(info),
                past[max(0, len(past) - self._config.turns) :],
                view.turn + 1,
                summary,
            )
        )

    def _write(self, view: View) -> TurnInput:
        """Write a prompt that fits: leave out older turns, then cut what is seen and can be done."""
        shown = view
        ids = self._inner.open(self._text(shown))
        while len(ids) > self._max_tokens and shown.past:
            shown = shown._replace(past=shown.past[1:])
            ids = self._inner.open(self._text(shown))
        if len(ids) > self._max_tokens:
            # Keep the longest beginning that fits, found by halving: longer texts have more tokens.
            whole = "\n".join(filter(None, (shown.observation, self._listed(shown.commands))))
            low, high = 0, len(whole)
            while low < high:
                middle = (low + high + 1) // 2
                fits = len(self._cut(shown, whole[:middle])) <= self._max_tokens
                low, high = (middle, high) if fits else (low, middle - 1)
            ids = self._cut(shown, whole[:low])
        return TurnInput(tuple(ids), fresh=True, memory=view)

    def _cut(self, view: View, seen: str) -> list[int]:
        return self._inner.open(self._text(view._replace(observation=seen + _CUT, commands=())))

    def _text(self, view: View) -> str:
        history = ""
        if self._config.memory == "summary":
            history += SUMMARY_RULE + "\n"
            if view.summary:
                history += f"Your summary so far: {view.summary}\n"
        if view.past:
            history += f"The last {len(view.past)} of {view.turn - 1} turns:\n"
            first = view.turn - len(view.past)
            for number, (observation, action) in enumerate(view.past, first):
                seen = f" You saw: {observation}\n" if observation else "\n"
                history += f"Turn {number}.{seen}You did: {action}\n"
        values = {
            "task": view.task.rstrip("\n"),
            "history": history,
            "observation": view.observation or "Nothing yet.",
            "commands": self._listed(view.commands),
            "turn": str(view.turn),
        }
        # One pass, so that braces in an observation are not taken for places.
        return _PLACE.sub(lambda place: values[place[1]], self._config.template)

    @staticmethod
    def _listed(commands: tuple[str, ...]) -> str:
        return f"You can: {' | '.join(commands)}\n" if commands else ""


def _commands(info: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(map(str, info.get("admissible_commands", ())))
