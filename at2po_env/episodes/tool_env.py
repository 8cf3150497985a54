"""ToolEnv: episodes in which a policy calls tools over several turns, then answers.

The error model: a bad rollout is data. Text that is no action, calls of tools that do not exist, arguments
that do not fit, and tools that fail or hang become outcomes in `info` and, where the episode goes on,
observations. `ToolEnv` raises only for mistakes of the caller (stepping an ended episode, a task id that does
not exist) and for bugs. A reward function or a tool's `start` that calls `sys.exit` is a bug: it raises
`EnvError`, and does not end the process.

The whole episode is one immutable `Episode`, replaced at every turn; everything else of the environment is
configuration, shared by its forks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from at2po_env.data.qa import Tasks, as_tasks
from at2po_env.data.tasks import Task, TaskSource
from at2po_env.episodes.actions import (
    ActionProtocol,
    FinalAnswer,
    Malformed,
    ToolCall,
    make_protocol,
)
from at2po_env.episodes.episode import Episode, begin_turn, draw_task, dump_episode, load_episode
from at2po_env.episodes.prompts import Prompt, example_arguments, function_schema, make_prompt
from at2po_env.errors import ConfigError, EnvError
from at2po_env.forking.base import ForkableEnv
from at2po_env.forking.frozen import EMPTY, FrozenDict, freeze
from at2po_env.scoring import ScoredResponse, exact_match, reward_rule, token_f1
from at2po_env.spaces import Text
from at2po_env.tools.base import UNCHANGED, Tool, ToolContext, ToolResult, call_tool
from at2po_env.tools.function import as_tool

LIMIT_NOTICE = "\nThe limit of tool calls is reached. Give the final answer now."
MALFORMED_NOTICE = "\nThat was neither a tool call nor a final answer ({reason}). Try again.\n"


class Ending(NamedTuple):
    """An ended episode, as a reward function sees it.

    Attributes:
        task: The task, golden answers included.
        answer: The content of the final `<answer>` block; None when the episode ended without one.
        response: All actions and observations in order, without the prompt.
        tool_states: Tool name -> what the tool remembers.
        reason: Why it ended: "answer", "malformed", "max_turns" or "tool".
    """

    task: Task
    answer: str | None
    response: str
    tool_states: Mapping[str, Any]
    reason: str


Reward = str | Callable[[Ending], float | ScoredResponse]
StepResult = tuple[str, float, bool, bool, dict[str, Any]]


class ToolEnv(ForkableEnv):
    """A Gymnasium environment of text: the policy writes one turn, the environment shows what is new.

    Args:
        tasks: A `TaskSource`, a list of tasks or of dicts with `question` and `golden_answers`, or the
            path of a FlashRAG file.
        tools: Tools, or plain typed functions.
        reward: A rule of `scoring.reward_rule` ("boxed", "tag", "structured"), which scores what the policy
            wrote, or a function of an `Ending`.
        protocol: How calls are written: "tagged", "search_r1", "hermes", or an `ActionProtocol`.
        prompt: A template with `{question}` and `{tools}`, a function of the task, or a name of
            `prompts.PROMPTS`. Default: the one that goes with the reward rule.
        max_turns: Turns of an episode; the last one has to answer.
        on_malformed: "end": a turn that neither calls nor answers ends the episode, scored by its format.
            "notice": it is answered with a notice and the episode goes on.
        render_mode: "ansi" makes `render` return the transcript.

    Attributes:
        splits: Names of the splits of tasks that it can be made with, where it was registered with several.

    Raises:
        ConfigError, ToolError, DataError: The arguments do not make an environment.
    """

    splits: tuple[str, ...] = ()
    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(
        self,
        *,
        tasks: Tasks,
        tools: Sequence[Tool | Callable[..., Any]],
        reward: Reward = "tag",
        protocol: str | ActionProtocol = "tagged",
        prompt: Prompt | None = None,
        max_turns: int = 7,
        on_malformed: Literal["end", "notice"] = "end",
        render_mode: str | None = None,
    ) -> None:
        problems = []
        if max_turns < 1:
            problems.append(f"max_turns={max_turns}: expected at least 1")
        if on_malformed not in ("end", "notice"):
            problems.append(f"on_malformed={on_malformed!r}: expected 'end' or 'notice'")
        if render_mode not in (None, "ansi"):
            problems.append(f"render_mode={render_mode!r}: expected None or 'ansi'")
        if not tools:
            problems.append("tools is empty: expected at least one tool or typed function")
        if problems:
            raise ConfigError("; ".join(problems))
        self.tasks: TaskSource = as_tasks(tasks)
        self.tools: dict[str, Tool] = {}
        for tool in map(as_tool, tools):
            if tool.name in self.tools:
                raise ConfigError(f"two tools are called {tool.name!r}: names have to differ")
            self.tools[tool.name] = tool
        self.protocol = make_protocol(protocol, list(self.tools.values()))
        self.max_turns = max_turns
        self.on_malformed = on_malformed
        self.render_mode = render_mode
        self.action_space = Text()
        self.observation_space = Text()
        if prompt is None:
            prompt = "boxed" if reward in ("boxed", "at2po") else "tag"
        described = self.protocol.describe(list(self.tools.values()))
        self._prompt = make_prompt(prompt, tools=described, calls=max_turns - 1)
        self._answer_form = r"\boxed{%s}" if reward in ("boxed", "at2po") else "%s"
        self._score = _score_function(reward, self.protocol.call_tags)
        self._blank_result = self.protocol.format_result("") if isinstance(reward, str) else None
        self._parse = getattr(self.protocol, "parse_call", self.protocol.parse)
        self._with_state = any(type(tool).start is not Tool.start for tool in self.tools.values())
        self._tool_infos = {name: dict(tool.info) for name, tool in self.tools.items() if tool.info}
        # Tools with a common backend keep one state, under its key.
        self._state_keys = {
            name: tool.backend.key if tool.backend is not None else name for name, tool in self.tools.items()
        }
        self._backends = list(
            dict.fromkeys(tool.backend for tool in self.tools.values() if tool.backend is not None)
        )
        keys = [backend.key for backend in self._backends]
        if len({*keys, *self.tools}) < len(keys) + len(self.tools):
            raise ConfigError(
                f"backends of tools are called {', '.join(keys)}: each needs a name that no tool and no "
                "other backend has"
            )
        for backend in self._backends:
            backend.attach(self)
        self._episode: Episode | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Seeds the generator that draws tasks and episode seeds.
            options: {"task_id": ...} or {"index": ...} names the task; without it one is drawn.

        Returns:
            The prompt, and an info with task_id, question, stop (strings that end one turn), max_turns
            and turn; and with tools, where a tool has an info of its own.

        Raises:
            EnvError: No such task, or another option.
        """
        super().reset(seed=seed)
        before = self._episode
        given = self.np_random_seed if seed is not None or before is None else before.seed
        task, drawn = draw_task(self.tasks, options, given)
        prompt = self._prompt(task)
        states = EMPTY
        if self._with_state:
            try:
                keys = self._state_keys
                started = {keys[name]: freeze(tool.start(task)) for name, tool in self.tools.items()}
            except SystemExit as error:
                raise EnvError(f"a tool's start called sys.exit({error.code!r})") from error
            states = FrozenDict({name: state for name, state in started.items() if state is not None})
        self._episode = Episode(task, prompt, None, 0, 0, states, drawn)
        info = {
            "task_id": task.id,
            "question": task.question,
            "stop": self.protocol.stop,
            "max_turns": self.max_turns,
            "turn": 0,
        }
        if self._tool_infos:
            info["tools"] = copy.deepcopy(self._tool_infos)
        return prompt, info

    def step(self, action: str) -> StepResult:
        """Take one turn.

        Args:
            action: What the policy wrote, verbatim. Any text is allowed; bytes are read as UTF-8.

        Returns:
            What is newly shown; the reward (0.0 before the end); terminated (answered, or malformed under
            "end"); truncated (the last turn did not answer); and an info with turn, outcome ("tool",
            "tool_error", "malformed", "answer", "limit") and reason, at the end also em and f1 (where
            the task has golden answers), answer, score_reason and task_id.

        Raises:
            EnvError: No episode is running.
        """
        episode = self._episode
        if episode is None or episode.ended or not isinstance(action, str):
            episode, action = begin_turn(episode, action)
        parsed = self._parse(action)
        last = episode.turn + 1 >= self.max_turns
        if isinstance(parsed, ToolCall) and not last:
            return self._call(episode, action, parsed)
        if isinstance(parsed, FinalAnswer):
            return self._end(episode.after(action, "", "answer"), "answer", answer=parsed.text)
        if isinstance(parsed, Malformed) and self.on_malformed == "end":
            return self._end(episode.after(action, "", "malformed"), "malformed", reason=parsed.reason)
        if last or isinstance(parsed, ToolCall):  # a call on the last turn is not made
            return self._end(episode.after(action, "", "limit"), "max_turns", reason="max_turns")
        # The reason stands in the transcript without the tags that the format rules count.
        reason = parsed.reason.replace("<", "").replace(">", "")
        observation = MALFORMED_NOTICE.format(reason=reason)
        if episode.turn + 1 == self.max_turns - 1:
            observation += LIMIT_NOTICE.lstrip() + "\n"
        self._episode = episode = episode.after(action, observation, "malformed")
        info = {"turn": episode.turn, "outcome": "malformed", "reason": parsed.reason}
        return observation, 0.0, False, False, info

    def _call(self, episode: Episode, action: str, call: ToolCall) -> StepResult:
        """Take a turn that calls a tool."""
        name, states = call.name, episode.tool_states
        tool = self.tools.get(name)
        if tool is None:
            result = ToolResult(f"there is no tool {name[:80]!r}; tools: {', '.join(self.tools)}", ok=False)
        else:
            state = states.get(self._state_keys[name]) if states else None
            context = ToolContext(episode.task, state, episode.seed, episode.turn)
            result = call_tool(tool, call.arguments, context)
        text, state, ok, ends = result
        if state is not UNCHANGED:
            states = FrozenDict({**states, self._state_keys[name]: state})
        shown = text if ok else f"Error: {text}"
        if episode.turn + 1 == self.max_turns - 1 and not ends:
            shown += LIMIT_NOTICE
        observation = self.protocol.format_result(shown)
        outcome = "tool" if ok else "tool_error"
        episode = episode.after(action, observation, outcome, 1, states)
        reason = "" if ok else text
        if ends:
            return self._end(episode, "tool", reason=reason, tool=name)
        self._episode = episode
        info = {"turn": episode.turn, "outcome": outcome, "reason": reason, "tool": name}
        return observation, 0.0, False, False, info

    def _end(
        self, episode: Episode, why: str, *, reason: str = "", answer: str | None = None, **more: str
    ) -> StepResult:
        """Score an episode whose last turn is taken, and end it."""
        last = episode.last
        assert last is not None
        ending = Ending(episode.task, answer, self._response(episode), episode.tool_states, why)
        reward, em, f1, extracted, score_reason = self._score(ending)
        self._episode = episode.ended_with(reward, why)
        info = {
            "turn": episode.turn,
            "outcome": last.outcome,
            "reason": reason or score_reason,
            **more,
            "em": em,
            "f1": f1,
            "answer": extracted,
            "score_reason": score_reason,
            "task_id": episode.task.id,
        }
        if not episode.task.golden_answers:  # nothing to match: 0 would look like a wrong answer
            del info["em"], info["f1"]
        truncated = why == "max_turns"
        return last.observation, reward, not truncated, truncated, info

    def _response(self, episode: Episode) -> str:
        """Join all actions and observations in order, as the reward function sees them.

        The named rules see every tool's result as an empty one. They score what the policy wrote, and the
        content of a result must neither supply an answer that is open around it (`<answer><search>q</search>`
        in one turn, `</answer>` in the next) nor complete a tag. For the same reason an answer is written
        within one turn: a `</answer>` that would close the `<answer>` of an earlier turn is left out. A
        function sees the whole text.
        """
        blank = self._blank_result
        if blank is None:
            return "".join([link.action + link.observation for link in episode.turns])
        turns, shown = episode.turns, ("tool", "tool_error")
        pieces = [link[1] + (blank if link[4] in shown else link[2]) for link in turns]
        text = "".join(pieces)
        # Nearly always no earlier turn opens an answer.
        if text.find("<answer>", 0, len(text) - len(pieces[-1])) < 0:
            return text
        parts, is_open = [], False  # whether an earlier turn has left an <answer> open
        for _, action, observation, _, outcome in turns:
            written, start = action, action.find("<answer>")
            if is_open:
                own = start if start >= 0 else len(action)
                written = action[:own].replace("</answer>", "") + action[own:]
            if start >= 0:
                is_open = action.rfind("<answer>") > action.rfind("</answer>")
            parts += [written, blank if outcome in shown else observation]
        return "".join(parts)

    def close(self) -> None:
        """Close what the tools share, such as the session of a server, once no fork uses it any more."""
        for backend in self._backends:
            backend.detach(self)

    def _hand_over(self, twin: Self) -> None:
        twin.set_state(self.get_state())
        for backend in self._backends:
            backend.attach(twin)

    def render(self) -> str | None:
        """Return the transcript so far in mode "ansi", else None."""
        if self.render_mode != "ansi":
            return None
        if self._episode is None:
            raise EnvError("nothing to render yet. Fix: call reset first")
        return self._episode.render()

    def example_actions(self) -> Sequence[str]:
        """Return a call of each tool, and an answer."""
        tools = self.tools.values()
        calls = [ToolCall(tool.name, example_arguments(tool.Arguments), "why") for tool in tools]
        return [*map(self.protocol.format_call, calls), "<think>why</think><answer>none</answer>"]

    def format_answer(self, text: str, *, think: str = "") -> str:
        r"""Write a final answer as the reward reads it: in an `<answer>` block, in `\boxed{}` or plain."""
        thought = f"<think>{think}</think>" if think else ""
        return f"{thought}<answer> {self._answer_form.replace('%s', text)} </answer>"

    @property
    def tool_schemas(self) -> list[dict[str, Any]]:
        """The tools as chat endpoints take them: functions with the JSON schemas of their arguments."""
        return [function_schema(tool) for tool in self.tools.values()]

    def get_state(self) -> Episode | None:
        """Return the episode; None before the first reset."""
        return self._episode

    def set_state(self, state: Episode | None) -> None:
        """Continue from an episode."""
        self._episode = state

    def dump_state(self, state: Episode | None) -> Any:
        """Return the episode as JSON."""
        return None if state is None else dump_episode(state)

    def load_state(self, data: Any) -> Episode | None:
        """Return the episode that `dump_state` wrote."""
        return None if data is None else load_episode(data)


def _score_function(reward: Reward, call_tags: Mapping[str, str]) -> Callable[[Ending], ScoredResponse]:
    """Return the function that scores an ending, by a rule's name or by the user's own function."""
    if isinstance(reward, str):
        rule = reward_rule(reward)
        return lambda ending: rule(ending.response, ending.task.golden_answers, call_tags=call_tags)

    def score(ending: Ending) -> ScoredResponse:
        try:
            value = reward(ending)
        except SystemExit as error:
            raise EnvError(f"the reward function called sys.exit({error.code!r})") from error
        if isinstance(value, ScoredResponse):
            return value
        golds, answer = ending.task.golden_answers, ending.answer
        em, f1 = (0.0, 0.0) if answer is None else (exact_match(answer, golds), token_f1(answer, golds))
        return ScoredResponse(float(value), em, f1, answer, "own reward")

    return score
