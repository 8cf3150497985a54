"""How what an environment shows becomes token ids: inline, or as the messages of a chat.

A transcript makes the pieces between the policy's actions. Only these are ever tokenised: sampled ids are
taken as they are, so that what the trainer scores is what the sampler saw (invariant 1).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from at2po_agent.transcripts.chat_rendering import Renderer
from at2po_agent.transcripts.chat_templates import OWN, SETTING, find_template, remedy, template_marks
from at2po_agent.transcripts.tokenizer import HFTokenizer, Tokenizer
from at2po_env.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@runtime_checkable
class Transcript(Protocol):
    """Text of the environment to token ids, piece by piece, in the order of an episode."""

    def open(self, prompt: str) -> list[int]:
        """Ids before the first action."""
        ...

    def observe(self, observation: str, *, closed: bool) -> list[int]:
        """Ids between two actions.

        Args:
            observation: What the environment newly showed.
            closed: Whether the action before it ended with the end-of-sequence id itself.
        """
        ...


class InlineTranscript:
    """Prompt, actions and observations as one running text, as AT2PO and Search-R1 do it.

    Args:
        tokenizer: Encodes each piece by itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def open(self, prompt: str) -> list[int]:
        """The prompt's ids."""
        return self._tokenizer.encode(prompt)

    def observe(self, observation: str, *, closed: bool) -> list[int]:
        """The observation's ids, whatever the action ended with."""
        del closed
        return self._tokenizer.encode(observation)


class ChatTranscript:
    """An episode as a chat: the prompt is the user's, actions are the assistant's, observations come between.

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
    ) -> None:
        hf, options = tokenizer.hf, template_options or {}
        text = find_template(template, hf, options)
        self._renderer = Renderer(hf, text, system=system, role=observation_role, options=options)
        self._renderer.check()
        self._end = _closing_token(self._renderer)
        self.tokenizer = _ending_with(tokenizer, self._end, text)
        self._specials = _any_of({*_special_tokens(hf), *template_marks(template), self._end})

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

    def _as_text(self, content: str) -> str:
        """Content without tokens that would be the template's: `<|im_end|>` becomes `< |im_end|>`."""
        return self._specials.sub(lambda match: match[0][0] + " " + match[0][1:], content)


def _closing_token(renderer: Renderer) -> str:
    """The special token that ends an assistant's message.

    Raises:
        ConfigError: The message ends otherwise.
    """
    text, hf = renderer.between("It says so."), renderer.hf
    first = hf.convert_ids_to_tokens(hf.encode(text, add_special_tokens=False)[:1])
    token = first[0] if first else ""
    if token not in hf.get_added_vocab() or not text.startswith(token):
        raise ConfigError(
            f"{SETTING}: after an assistant's message the template writes {text[:40]!r}, but a turn has to "
            f"end with a special token that can be sampled. {remedy(hf, renderer.template)}"
        )
    return str(token)


def _ending_with(tokenizer: HFTokenizer, end: str, template: str) -> HFTokenizer:
    """The tokenizer that a checkpoint needs in order to be served as it was trained; the given one stays."""
    hf = tokenizer.hf
    if hf.eos_token == end and hf.chat_template == template:
        return tokenizer
    own = copy.deepcopy(hf)
    own.eos_token = end
    own.chat_template = template
    return HFTokenizer(own)


def _special_tokens(hf: PreTrainedTokenizerFast) -> set[str]:
    flagged = {token.content for token in hf.added_tokens_decoder.values() if token.special}
    return flagged | set(hf.all_special_tokens)


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
