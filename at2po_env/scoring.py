r"""Scores answers: normalisation, exact match (EM), token F1 and the reward rules.

A rule scores the whole response of an episode: the policy's actions and the observations between them, in
order, without the prompt. EM and F1 are always those of the extracted answer, even where a wrong format
decides the reward.

References:
    AT²PO (arXiv 2601.04767): `boxed`. Search-R1 (arXiv 2503.09516): `tag`. Tree-GRPO (arXiv 2509.21240):
        `structured`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from at2po_env.errors import ConfigError

WRONG_FORMAT_REWARD = -1.0
CALL_TAGS: Mapping[str, str] = {"search": "result", "python": "result"}
INFORMATION_TAGS: Mapping[str, str] = {"search": "information"}

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})
_BOX = "\\boxed{"
_BRACES = re.compile(r"[{}]")

Golds = str | Iterable[str]


class ScoredResponse(NamedTuple):
    """The score of a response.

    Attributes:
        reward: The reward for training.
        em: Exact match of the extracted answer, 0.0 or 1.0, independent of the format.
        f1: Token F1 of the extracted answer, independent of the format.
        answer: The extracted answer; None when the response has none, which is not the empty answer.
        reason: "correct", "wrong answer", "no answer: ..." or "bad format: ...", with what was found.
    """

    reward: float
    em: float
    f1: float
    answer: str | None
    reason: str


def normalize_answer(s: str) -> str:
    """Lowercase, drop ASCII punctuation, drop the words a, an and the, collapse spaces, in this order."""
    return _normalize(s) if len(s) <= 200 else _normalize.__wrapped__(s)  # only short texts are remembered


@lru_cache(maxsize=8192)
def _normalize(s: str) -> str:
    text = s.lower().translate(_DROP_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, golds: Golds) -> float:
    """Return 1.0 when the normalised prediction equals any normalised gold, else 0.0; 0.0 without golds."""
    golds = (golds,) if isinstance(golds, str) else golds
    return 1.0 if normalize_answer(prediction) in map(normalize_answer, golds) else 0.0


def token_f1(prediction: str, golds: Golds) -> float:
    """Return the best F1 over the golds of the multisets of normalised tokens; 0.0 without golds.

    A gold counts 0 when either side is yes, no or noanswer and they differ, and when no token is shared (so
    two sides that normalise to nothing have F1 0, as in HotpotQA's scorer, although they match exactly).
    """
    normal, best = normalize_answer(prediction), 0.0
    for gold in map(normalize_answer, (golds,) if isinstance(golds, str) else golds):
        if normal == gold:
            best = max(best, 1.0 if gold else 0.0)
        elif normal not in _CLOSED_ANSWERS and gold not in _CLOSED_ANSWERS:
            ours, theirs = normal.split(), gold.split()
            if not set(ours).isdisjoint(theirs):
                shared = (Counter(ours) & Counter(theirs)).total()
                best = max(best, 2.0 * shared / (len(ours) + len(theirs)))
    return best


def extract_answer(text: str) -> str | None:
    """Return the content of the first completed `<answer>...</answer>`, stripped; None without one."""
    start = text.find("<answer>")
    end = text.find("</answer>", start) if start >= 0 else -1
    if end < 0:
        return None
    return text[text.rfind("<answer>", start, end) + len("<answer>") : end].strip()


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, stripped; None without one or with unbalanced braces."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
    depth = 1
    for match in _BRACES.finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : match.start()].strip()
    return None


def format_fault(text: str, *, call_tags: Mapping[str, str] = CALL_TAGS) -> str | None:
    r"""Return what is wrong with the format of an AT²PO response; None when nothing is.

    In a right format, `<think>` and `</think>` occur equally often and at least once; there is exactly one
    `<answer>` and one `</answer>`, in this order; every call tag is followed in order by its close, its
    result tag and that tag's close; and the answer holds `\boxed{` and a `}`.
    """
    opened, closed = text.count("<think>"), text.count("</think>")
    if opened != closed or opened == 0:
        return f"{opened} <think> and {closed} </think>, expected equally many and at least one"
    opened, closed = text.count("<answer>"), text.count("</answer>")
    if opened != 1 or closed != 1:
        return f"{opened} <answer> and {closed} </answer>, expected one of each"
    start, end = text.find("<answer>"), text.find("</answer>")
    if end < start:
        return "</answer> before <answer>"
    for call, result in call_tags.items():
        fault = _call_fault(text, call, result)
        if fault is not None:
            return fault
    if text.find(_BOX, start, end) < 0 or text.find("}", start, end) < 0:
        return "no \\boxed{...} inside the answer"
    return None


def _call_fault(text: str, call: str, result: str) -> str | None:
    """Name the first `<call>` that is not followed by `</call>`, `<result>` and `</result>` in this order."""
    opening, close, shown, ended = f"<{call}>", f"</{call}>", f"<{result}>", f"</{result}>"
    number, start = 1, text.find(opening)
    while start >= 0:
        closed, results = text.find(close, start), text.find(shown, start)
        if results >= 0 and (closed < 0 or results < closed):
            return f"{opening} number {number}: {shown} comes before {close}"
        end = text.find(ended, results) if results >= 0 else -1
        if end < 0:
            missing = close if closed < 0 else shown if results < 0 else ended
            return f"{opening} number {number} is not followed by {missing}"
        number, start = number + 1, text.find(opening, end)
    return None


def structure_fault(text: str, *, call_tags: Mapping[str, str] = INFORMATION_TAGS) -> str | None:
    """Return what keeps `text` from the structure (think, call, result)*, think, answer; None when nothing.

    Only white space may stand outside the tags.
    """
    names = "|".join(map(re.escape, ("think", "answer", *call_tags, *call_tags.values())))
    allowed, inside, end = ["think"], "", 0
    for match in re.finditer(f"</?(?:{names})>", text):
        between, found, end = text[end : match.start()], match[0], match.end()
        if inside:
            if found != f"</{inside}>":
                return f"{found} inside <{inside}>"
            allowed = ["answer", *call_tags] if inside == "think" else [call_tags.get(inside, "think")]
            if inside == "answer":
                allowed = []
            inside = ""
            continue
        if between.strip():
            return f"text outside the tags before {found}"
        inside = found.strip("</>")
        if found.startswith("</") or inside not in allowed:
            return f"{found} where {' or '.join(f'<{name}>' for name in allowed) or 'the end'} was expected"
    if inside or allowed:
        return f"<{inside}> is not closed" if inside else "it does not end with an answer"
    return "text after the answer" if text[end:].strip() else None


def score_boxed(text: str, golds: Golds, call_tags: Mapping[str, str] | None = None) -> ScoredResponse:
    r"""AT²PO's reward: -1 for a wrong format, else the EM of the last `\boxed{...}` of the answer block."""
    fault = format_fault(text, call_tags=CALL_TAGS if call_tags is None else call_tags)
    block = extract_answer(text)
    answer = None if block is None else extract_boxed(block)
    if fault is None and answer is None:
        fault = "the braces of the last \\boxed{ do not balance"
    scored = _score_answer(answer, golds)
    if fault is not None:
        return scored._replace(reward=WRONG_FORMAT_REWARD, reason=f"bad format: {fault}")
    return scored


def score_tag(text: str, golds: Golds, call_tags: Mapping[str, str] | None = None) -> ScoredResponse:
    """Search-R1's reward: the EM of `<answer> X </answer>`, without a format term."""
    del call_tags
    scored = _score_answer(extract_answer(text), golds)
    return (
        scored if scored.answer is not None else scored._replace(reason="no answer: no <answer>...</answer>")
    )


def score_structured(text: str, golds: Golds, call_tags: Mapping[str, str] | None = None) -> ScoredResponse:
    """Tree-GRPO's reward.

    EM with structure 1.0, without 0.8; a wrong answer with structure 0.2, without 0.1; no answer (or a blank
    one): 0.2 with structure, else 0.
    """
    scored = _score_answer(extract_answer(text) or None, golds)
    fault = structure_fault(text, call_tags=INFORMATION_TAGS if call_tags is None else call_tags)
    if fault is None:
        return scored._replace(reward=1.0 if scored.em else 0.2)
    reward = 0.0 if scored.answer is None else 0.8 if scored.em else 0.1
    return scored._replace(reward=reward, reason=f"{scored.reason}; bad structure: {fault}")


def _score_answer(answer: str | None, golds: Golds) -> ScoredResponse:
    """Score an extracted answer by its EM."""
    if answer is None:
        return ScoredResponse(0.0, 0.0, 0.0, None, "no answer")
    golds = (golds,) if isinstance(golds, str) else tuple(golds)
    em = exact_match(answer, golds)
    return ScoredResponse(em, em, token_f1(answer, golds), answer, "correct" if em else "wrong answer")


RewardRule = Callable[..., ScoredResponse]
"""Scores a whole response: (text, golds, call_tags=None) -> `ScoredResponse`."""

_RULES: Mapping[str, RewardRule] = {"boxed": score_boxed, "tag": score_tag, "structured": score_structured}
_ALIASES = {"at2po": "boxed", "search_r1": "tag", "tree_grpo": "structured"}


def reward_rule(name: str) -> RewardRule:
    """Return the rule called "boxed", "tag" or "structured" (also "at2po", "search_r1", "tree_grpo").

    Raises:
        ConfigError: Unknown name.
    """
    rule = _RULES.get(_ALIASES.get(name, name))
    if rule is None:
        expected = ", ".join([*_RULES, *_ALIASES])
        raise ConfigError(f"unknown reward rule {name!r}: expected one of {expected}")
    return rule


def score_response(
    text: str, golds: Golds, *, answer_format: str = "boxed", call_tags: Mapping[str, str] | None = None
) -> ScoredResponse:
    r"""Score a whole response.

    Args:
        text: Actions and observations of the episode in order, without the prompt.
        golds: The golden answers (a single string is one gold).
        answer_format: "boxed" (AT²PO): `score_boxed`. "tag" (Search-R1): `score_tag`. "structured"
            (Tree-GRPO): `score_structured`.
        call_tags: Call tag -> result tag of the protocol in use. Default: search and python with `<result>`
            ("structured": search with `<information>`).

    Raises:
        ConfigError: Unknown answer format.
    """
    if answer_format not in _RULES:
        raise ConfigError(f"unknown answer_format {answer_format!r}: expected 'boxed', 'tag' or 'structured'")
    return _RULES[answer_format](text, golds, call_tags)
