"""Conversations rendered by a chat template, and the check that a template preserves prefixes.

A template preserves prefixes if the rendering of a conversation begins with the rendering of its beginning:
the generation prompt and the assistant's text stay, letter by letter, when further messages follow. Only then
is what a model sees in one turn the beginning of what it sees in the next, and a branch one sequence of ids.

The check tries conversations that hold what templates are known to change. It can miss a template that reacts
to something else; so each rendering of a run is compared with its beginning too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from at2po_agent.transcripts.chat_templates import SETTING, remedy
from at2po_env.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]

_QUESTION, _ACTION, _RESULT = "Who directed it?", "Let me look.", "It says so."
_CLOCK = "{%- macro strftime_now(format) -%}<<clock>>{%- endmacro -%}"
_SHOWN = 60
_PROBES = {
    "thoughts": (
        "<think>\nWhere to look?\n</think>\n\n<search>Ann</search>",
        "<think>Not there.</think><search>Bea</search>",
        "<think>\nNow I know.\n</think>\n\n<answer>Bea</answer>",
    ),
    "plain text": ("Let me look.", "I see.", "It is Ann."),
    "a thought without its opening": ("Where?\n</think>\n\n<search>Ann</search>", "ok</think>", "Bea"),
    "white space at both ends": (" \n a look \n\n", "\tsee ", "\n\n It is Ann. \n"),
    "tool calls": (
        '<tool_call>\n{"name": "search", "arguments": {"query": "Ann"}}\n</tool_call>',
        '\n<tool_call>{"name": "search", "arguments": {}}</tool_call>\n',
        "{{ messages }} <answer>\\boxed{Ann}</answer> {% if %}",
    ),
    "an empty message": ("", "", ""),
}


class Renderer:
    """Renders the conversation of an episode with one template.

    Args:
        hf: The tokenizer; its special tokens and its rendering are used.
        template: Jinja text.
        system: The system message, if any.
        role: Role of observations.
        options: Variables for the template.
    """

    def __init__(
        self,
        hf: PreTrainedTokenizerFast,
        template: str,
        *,
        system: str | None,
        role: str,
        options: Mapping[str, Any],
    ) -> None:
        self.hf = hf
        self.template = template
        self.role = role
        self._system: list[Message] = [] if system is None else [_message("system", system)]
        self._options = dict(options)
        self._before = [self.opening(_QUESTION), _ACTION]

    def messages(self, prompt: str, turns: Sequence[tuple[str, str | None]] = ()) -> list[Message]:
        """The messages of an episode.

        Args:
            prompt: What the environment opened with.
            turns: Action and following observation of each turn; None where none follows.
        """
        messages = [*self._system, _message("user", prompt)]
        for action, observation in turns:
            messages.append(_message("assistant", action))
            if observation is not None:
                messages.append(_message(self.role, observation))
        return messages

    def render(self, messages: Sequence[Message], *, opened: bool = True, preamble: str = "") -> str:
        """The text of messages, with the opening of the assistant's next message unless told otherwise.

        Raises:
            ConfigError: The template refuses them.
        """
        try:
            text = self.hf.apply_chat_template(
                list(messages),
                chat_template=preamble + self.template,
                add_generation_prompt=opened,
                tokenize=False,
                **self._options,
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(
                f"{SETTING}: the template refuses a conversation of {roles}: {error}. "
                f"Set model.chat.system or observation_role otherwise. {remedy(self.hf, self.template)}"
            ) from error
        return str(text)

    def opening(self, prompt: str) -> str:
        """The text before the first action."""
        return self.render(self.messages(prompt))

    def between(self, observation: str) -> str:
        """The text between two actions: the end of the first, the observation, the opening of the second.

        Raises:
            ConfigError: The template changed what precedes it.
        """
        messages = self.messages(_QUESTION, [(_ACTION, observation)])
        text = self.render(messages)
        before = "".join(self._before)
        if not text.startswith(before):
            raise self._refusal("plain text", messages, self._before, text)
        return text[len(before) :]

    def check(self) -> None:
        """Make sure that the template preserves prefixes and does not read the clock.

        Raises:
            ConfigError: It does not; says which message changed, how, and what to set instead.
        """
        for kind, actions in _PROBES.items():
            for messages, pieces, opened in self._probe(actions):
                text = self.render(messages, opened=opened)
                expected = "".join(pieces)
                if text != expected if opened else not text.startswith(expected):
                    raise self._refusal(kind, messages, pieces, text)
        if "<<clock>>" in self.render(self.messages(_QUESTION), preamble=_CLOCK):
            raise ConfigError(
                f"{SETTING}: the template writes today's date, so that the same question would have other "
                "tokens tomorrow. Fix: give the date in model.chat.template_options (such as "
                f"{{date_string: 26 Jul 2024}}). Or: {remedy(self.hf, self.template).removeprefix('Fix: ')}"
            )

    def _probe(self, actions: Sequence[str]) -> Iterator[tuple[list[Message], list[str], bool]]:
        """Growing conversations, the text expected of each message, and whether another is opened."""
        pieces = [self.opening(_QUESTION)]
        turns: list[tuple[str, str | None]] = []
        for number, action in enumerate(actions):
            pieces.append(action)
            yield self.messages(_QUESTION, [*turns, (action, None)]), list(pieces), False
            observation = f"{_RESULT} {number}"
            turns.append((action, observation))
            pieces.append(self.between(observation))
            yield self.messages(_QUESTION, turns), list(pieces), True

    def _refusal(
        self, kind: str, messages: Sequence[Message], pieces: Sequence[str], text: str
    ) -> ConfigError:
        first = len(self._system)
        place = _first_difference(pieces, text, [message["content"] for message in messages[first:]])
        number = first + 1 + place.message
        role = messages[number - 1]["role"]
        return ConfigError(
            f"{SETTING}: the template does not preserve prefixes, so that a model would be trained on "
            f"another text than it saw. With {kind}, in a conversation of {len(messages)} messages, message "
            f"{number} ({role}) should read {place.expected!r} but reads {place.got!r}. "
            f"{remedy(self.hf, self.template)}"
        )


class _Difference(NamedTuple):
    message: int
    expected: str
    got: str


def _first_difference(pieces: Sequence[str], text: str, contents: Sequence[str]) -> _Difference:
    """Where a text first leaves the concatenation of its pieces, and what stands there."""
    expected = "".join(pieces)
    pairs = enumerate(zip(expected, text, strict=False))
    place = next((index for index, (a, b) in pairs if a != b), min(len(expected), len(text)))
    message, start = 0, 0
    while message < len(pieces) - 1 and place >= start + len(pieces[message]):
        start += len(pieces[message])
        message += 1
    content = contents[message].strip()
    if message % 2 == 0 and place > start + pieces[message].rfind(content) + len(content):
        message = min(message + 1, len(contents) - 1)  # what opens the assistant's message belongs to it
    shown = max(start, place - 10)
    return _Difference(message, expected[shown : shown + _SHOWN], text[shown : shown + _SHOWN])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
