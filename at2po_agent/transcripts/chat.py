"""Writes episodes as chats, and refuses chat templates that do not preserve prefixes.

A template preserves prefixes if the rendering of a conversation begins with the rendering of its beginning:
the generation prompt and the assistant's text stay, letter by letter, when further messages follow. Only then
is what a model sees in one turn the beginning of what it sees in the next, and a branch one sequence of ids.

The check tries conversations that hold what templates are known to change. It can miss a template that reacts
to something else; so each rendering of a run is compared with its beginning too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from at2po_agent.transcripts.chat_templates import OWN, SETTING, find_template, remedy, template_marks
from at2po_agent.transcripts.inline import GrowingTranscript
from at2po_agent.transcripts.tokenizer import HFTokenizer, OutsideText
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


class ChatTranscript(GrowingTranscript):
    """Writes an episode as a chat: a prompt of the user, actions of the assistant, observations between them.

    The tokens that the template writes around messages belong to the observations. An action that did not end
    with the token that closes a message (it completed a stop string, or was cut) is closed by the next piece.
    The template's special tokens in a prompt or an observation are text from outside; they are broken up, so
    that a retrieved page can neither end its message nor speak as the assistant.

    Args:
        tokenizer: The model's; the policy is to be given the transcript's own `tokenizer`, which knows the
            template and ends a sequence where the template ends a message.
        template: A name of `chat_templates.TEMPLATES`, "tokenizer" for its own, or a .jinja file.
        system: The system message, if any.
        observation_role: Whose messages observations are.
        template_options: Variables for the template, such as `enable_thinking`.
        growing: Whether an episode is one chat. False for one message at a time (a window transcript), where
            a template need not preserve prefixes.

    Raises:
        ConfigError: The template does not preserve prefixes, reads the clock, refuses the roles, or does not
            close a message with a special token; the message names a template that does.
    """

    def __init__(
        self,
        tokenizer: HFTokenizer,
        *,
        template: str = OWN,
        system: str | None = None,
        observation_role: Literal["user", "tool"] = "user",
        template_options: Mapping[str, Any] | None = None,
        growing: bool = True,
    ) -> None:
        hf, options = tokenizer.hf, template_options or {}
        text = find_template(template, hf, options)
        self._renderer = Renderer(hf, text, system=system, role=observation_role, options=options)
        if growing:
            self._renderer.check()
        self._renderer.check_clock()

        # A turn ends with the special token that closes an assistant's message: the first after an action.
        rest = self._renderer.between(_RESULT) if growing else self._renderer.ending()
        first = hf.convert_ids_to_tokens(hf.encode(rest, add_special_tokens=False)[:1])
        end = str(first[0]) if first else ""
        if end not in hf.get_added_vocab() or not rest.startswith(end):
            raise ConfigError(
                f"{SETTING}: after an assistant's message the template writes {rest[:40]!r}, but a turn has "
                f"to end with a special token that can be sampled. {remedy(hf, text)}"
            )

        # A checkpoint is served as it was trained if its tokenizer has this end and this template.
        self.tokenizer = tokenizer
        if hf.eos_token != end or hf.chat_template != text:
            own = copy.deepcopy(hf)
            own.eos_token, own.chat_template = end, text
            self.tokenizer = HFTokenizer(own)

        self._as_text = OutsideText([*tokenizer.control_tokens, *template_marks(template), end])

    def open(self, prompt: str) -> list[int]:
        """Ids of the system message, the prompt and the opening of the assistant's message."""
        return self.tokenizer.encode(self._renderer.opening(self._as_text(prompt)))

    def observe(self, observation: str, *, closed: bool) -> list[int]:
        """Ids from the end of the assistant's message to the opening of its next.

        Raises:
            ConfigError: With this observation the template changes what precedes it.
        """
        ids = self.tokenizer.encode(self._renderer.between(self._as_text(observation)))
        assert ids[0] == self.tokenizer.eos_id, "the piece begins with the token that was found at first"
        return ids[1:] if closed else ids


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
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._options = dict(options)
        self._before = [self.opening(_QUESTION), _ACTION]

    def messages(self, prompt: str, turns: Sequence[tuple[str, str | None]] = ()) -> list[Message]:
        """The messages of an episode.

        Args:
            prompt: What the environment opened with.
            turns: Action and following observation of each turn; None where none follows.
        """
        messages = [*self._system, {"role": "user", "content": prompt}]
        for action, observation in turns:
            messages.append({"role": "assistant", "content": action})
            if observation is not None:
                messages.append({"role": self.role, "content": observation})
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

    def ending(self) -> str:
        """The text after an action that nothing follows."""
        text = self.render(self.messages(_QUESTION, [(_ACTION, None)]), opened=False)
        return text[text.rfind(_ACTION) + len(_ACTION) :]

    def check(self) -> None:
        """Make sure that the template preserves prefixes.

        Raises:
            ConfigError: It does not; says which message changed, how, and what to set instead.
        """
        for kind, actions in _PROBES.items():
            for messages, pieces, opened in self._probe(actions):
                text = self.render(messages, opened=opened)
                expected = "".join(pieces)
                if text != expected if opened else not text.startswith(expected):
                    raise self._refusal(kind, messages, pieces, text)

    def check_clock(self) -> None:
        """Make sure that the template does not read the clock.

        Raises:
            ConfigError: It does; the message says what to set.
        """
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
        """Say which message first leaves the text that was expected, and what to set instead."""
        expected = "".join(pieces)
        pairs = enumerate(zip(expected, text, strict=False))
        place = next((index for index, (a, b) in pairs if a != b), min(len(expected), len(text)))
        # Find the piece that holds this place; pieces alternate between the environment's and the action's.
        piece, start = 0, 0
        while piece < len(pieces) - 1 and place >= start + len(pieces[piece]):
            start += len(pieces[piece])
            piece += 1
        # The end of an environment's piece opens the assistant's message, and belongs to that one.
        contents = [message["content"] for message in messages[len(self._system) :]]
        number, content = piece, contents[piece].strip()
        if piece % 2 == 0 and place > start + pieces[piece].rfind(content) + len(content):
            number = min(piece + 1, len(contents) - 1)
        number += len(self._system) + 1
        shown = slice(max(start, place - 10), max(start, place - 10) + _SHOWN)
        return ConfigError(
            f"{SETTING}: the template does not preserve prefixes, so that a model would be trained on "
            f"another text than it saw. With {kind}, in a conversation of {len(messages)} messages, message "
            f"{number} ({messages[number - 1]['role']}) should read {expected[shown]!r} but reads "
            f"{text[shown]!r}. {remedy(self.hf, self.template)}"
        )
