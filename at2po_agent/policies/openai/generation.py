"""A served answer as a generation over bytes: where it ended, its ids, and where its log-probs stand.

Servers take the stop string out of the text; it is put back, because environments read it. Log-probs are
those of the server's own tokens, at temperature 1 with most servers. Each stands on the last byte of its
token, the other bytes hold 0 and are marked as not sampled: the sum over an answer, the number of tokens and
their mean surprisal are the server's. Where the tokens do not spell the text (a parser rewrote it) they are
spread evenly over the ids, so that these three still hold; without log-probs all are 0 and no id counts as
sampled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from at2po_agent.policies.openai.messages import NO_STOP, Answer, SpelledToken
from at2po_agent.policies.openai.tokens import EOS, Action, ByteTokenizer, action_ids, encode
from at2po_agent.types import BoolArray, Float32Array, Generation, StopReason

_CLOSING_TAG = re.compile(r"</([^<>/\s]+)>")
_ABORTS = frozenset({"content_filter", "abort", "error"})


def end_of_text(text: str, stops: Sequence[str], *, finish: str, stop: object) -> tuple[str, StopReason]:
    """A text up to and with its stop string, and why it ended.

    Args:
        text: As the server returned it.
        stops: The request's stop strings.
        finish: The server's `finish_reason`.
        stop: The stop string that it names, None for another end, `NO_STOP` where it does not tell. Then a
            closing tag is put back if its opening tag is the last of those that stand open.
    """
    ends = [text.find(mark) + len(mark) for mark in stops if mark in text]
    if ends:
        return text[: min(ends)], "stop"
    if finish in _ABORTS:
        return text, "abort"
    if finish == "length":
        return text, "length"
    if stop in stops:
        return f"{text}{stop}", "stop"
    if stop is NO_STOP and finish == "stop":
        tags = [(_CLOSING_TAG.fullmatch(mark), mark) for mark in stops]
        opened = [(text.rfind(f"<{tag[1]}>"), mark) for tag, mark in tags if tag is not None]
        place, mark = max(opened, key=lambda entry: entry[0], default=(-1, ""))
        if place >= 0:
            return text + mark, "stop"
    return text, "eos"


def make_generation(answer: Answer, stops: Sequence[str] = ()) -> Generation:
    """The generation that an answer is."""
    text, reason = end_of_text(answer.text, stops, finish=answer.finish, stop=answer.stop)
    call = None if reason == "stop" else answer.call  # the text had ended before the call
    thinking = reason == "length" and not text and call is None
    ids = action_ids(Action(answer.reasoning, text, call), thinking=thinking)
    if call is not None and reason == "eos":
        reason = "stop"
    if reason == "eos":
        ids.append(EOS)
    log_probs, sampled = place_log_probs(ids, answer.tokens)
    return Generation(tuple(ids), log_probs, reason, sampled)


def place_log_probs(
    ids: Sequence[int], tokens: Sequence[SpelledToken] | None
) -> tuple[Float32Array, BoolArray]:
    """Log-probs of tokens on ids, and which ids hold one.

    Args:
        ids: T ids of an action.
        tokens: Its tokens in order; those of an end, and of what a server cut away, may follow.

    Returns:
        float32[T] in nats and bool[T]; all 0 and False without tokens.
    """
    log_probs, sampled = np.zeros(len(ids), dtype=np.float64), np.zeros(len(ids), dtype=np.bool_)
    if tokens and ids:
        values = [token.log_prob for token in tokens]
        places = _spelled_places(ids, tokens)
        if places is None:
            places = [(number + 1) * len(ids) // len(tokens) - 1 for number in range(len(tokens))]
            places = [max(place, 0) for place in places]
        np.add.at(log_probs, places, values[: len(places)])
        sampled[places] = True
    return log_probs.astype(np.float32), sampled


def _spelled_places(ids: Sequence[int], tokens: Sequence[SpelledToken]) -> list[int] | None:
    """The id that each token ends at, fewer where the text was cut; None where they do not spell the ids."""
    ended = ids[-1] == EOS
    body = encode(ByteTokenizer().decode(ids[:-1] if ended else ids))
    if len(body) != len(ids) - ended:
        return None  # there are marks, which stand for more than one byte
    spelled = b"".join(token.spelling for token in tokens)
    if not spelled.startswith(body) and not body.startswith(spelled):
        return None
    places, start = [], 0
    for token in tokens:
        if start >= len(body) and not ended:
            break
        end = start + len(token.spelling)
        beyond = end > len(body) or start >= len(body)
        places.append(len(ids) - 1 if beyond else max(end - 1, 0))
        start = end
    return places
