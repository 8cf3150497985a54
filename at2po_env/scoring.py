r"""Answer normalisation, exact match, token F1 and the reward rules.

A rule scores the whole response of an episode: the policy's actions and the observations between them, in
order, without the prompt. EM and F1 are always those of the extracted answer, whatever the format made of the
reward.

References:
    AT²PO (arXiv 2601.04767): `boxed`. Search-R1 (arXiv 2503.09516): `tag`. Tree-GRPO (arXiv 2509.21240):
        `structured`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple, Protocol

from at2po_env.errors import ConfigError

WRONG_FORMAT_REWARD = -1.0
CALL_TAGS: Mapping[str, str] = {"search": "result", "python": "result"}
INFORMATION_TAGS: Mapping[str, str] = {"search": "information"}

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})
_BOX = "\\boxed{"
_BRACES = re.compile(r"[{}]")


class ScoredResponse(NamedTuple):
    """What a response is worth.

    Attributes:
        reward: What training sees.
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
    return _normalize_short(s) if len(s) <= 200 else _normalize(s)


def _normalize(s: str) -> str:
    text = s.lower().translate(_DROP_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


_normalize_short = lru_cache(maxsize=8192)(_normalize)


def _gold_list(golds: str | Iterable[str]) -> Iterable[str]:
    return (golds,) if isinstance(golds, str) else golds


def exact_match(prediction: str, golds: str | Iterable[str]) -> float:
    """1.0 when the normalised prediction equals any normalised gold, else 0.0; 0.0 without golds."""
    normal = normalize_answer(prediction)
    return 1.0 if any(normalize_answer(gold) == normal for gold in _gold_list(golds)) else 0.0


def token_f1(prediction: str, golds: str | Iterable[str]) -> float:
    """Best F1 over the golds of the multisets of normalised tokens; 0.0 without golds.

    A gold counts 0 when either side is yes, no or noanswer and they differ, and when no token is shared (so
    two sides that normalise to nothing have F1 0, as in HotpotQA's scorer, although they match exactly).
    """
    normal = normalize_answer(prediction)
    return max((_f1(normal, normalize_answer(gold)) for gold in _gold_list(golds)), default=0.0)


def _f1(prediction: str, gold: str) -> float:
    if prediction == gold:
        return 1.0 if gold else 0.0
    if prediction in _CLOSED_ANSWERS or gold in _CLOSED_ANSWERS:
        return 0.0
    ours, theirs = prediction.split(), gold.split()
    if set(ours).isdisjoint(theirs):
        return 0.0
    left: dict[str, int] = {}
    for token in theirs:
        left[token] = left.get(token, 0) + 1
    shared = 0
    for token in ours:
        if left.get(token, 0):
            left[token] -= 1
            shared += 1
    return 2.0 * shared / (len(ours) + len(theirs))


def extract_answer(text: str) -> str | None:
    """The content of the first completed `<answer>...</answer>`, stripped; None when there is none."""
    start = text.find("<answer>")
    end = text.find("</answer>", start) if start >= 0 else -1
    if end < 0:
        return None
    return text[text.rfind("<answer>", start, end) + len("<answer>") : end].strip()


def extract_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, stripped; None without one or with unbalanced braces."""
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
    r"""What is wrong with the format of an AT²PO response; None when nothing is.

    Right is: `<think>` and `</think>` equally often and at least once; exactly one `<answer>` and one
    `</answer>`, in this order; every call tag followed in order by its close, its result tag and that tag's
    close; `\boxed{` and a `}` inside the answer.
    """
    tags = text
    if len(text) > 2000:  # then collecting the tags costs less than counting in the whole text
        tags = "".join(_tag_pattern("think", "answer", *call_tags, *call_tags.values()).findall(text))
    opened, closed = tags.count("<think>"), tags.count("</think>")
    if opened != closed or opened == 0:
        return f"{opened} <think> and {closed} </think>, expected equally many and at least one"
    opened, closed = tags.count("<answer>"), tags.count("</answer>")
    if opened != 1 or closed != 1:
        return f"{opened} <answer> and {closed} </answer>, expected one of each"
    start, end = text.rfind("<answer>"), text.rfind("</answer>")
    if end < start:
        return "</answer> before <answer>"
    for call, result in call_tags.items():
        fault = _call_fault(tags, call, result)
        if fault is not None:
            return fault
    if text.find(_BOX, start, end) < 0 or text.find("}", start, end) < 0:
        return "no \\boxed{...} inside the answer"
    return None


@lru_cache(maxsize=64)
def _tag_pattern(*names: str) -> re.Pattern[str]:
    """Matches the opening and closing tags of these names."""
    return re.compile("</?(?:" + "|".join(map(re.escape, dict.fromkeys(names))) + ")>")


def _call_fault(tags: str, call: str, result: str) -> str | None:
    """The first `<call>` that is not followed by `</call>`, `<result>` and `</result>` in this order."""
    opening, close, shown, ended = f"<{call}>", f"</{call}>", f"<{result}>", f"</{result}>"
    number, start = 1, tags.find(opening)
    while start >= 0:
        closed, results = tags.find(close, start), tags.find(shown, start)
        if results >= 0 and (closed < 0 or results < closed):
            return f"{opening} number {number}: {shown} comes before {close}"
        end = tags.find(ended, results) if results >= 0 else -1
        if end < 0:
            missing = close if closed < 0 else shown if results < 0 else ended
            return f"{opening} number {number} is not followed by {missing}"
        number, start = number + 1, tags.find(opening, end)
    return None


def _scored(
    reward: float | None, answer: str | None, golds: str | Iterable[str], reason: str
) -> ScoredResponse:
    """EM and F1 of `answer`; a reward of None means the EM."""
    if answer is None:
        return ScoredResponse(0.0 if reward is None else reward, 0.0, 0.0, None, reason)
    normal = normalize_answer(answer)
    normal_golds = [normalize_answer(gold) for gold in _gold_list(golds)]
    em = 1.0 if normal in normal_golds else 0.0
    f1 = max([_f1(normal, gold) for gold in normal_golds], default=0.0)
    reason = reason or ("correct" if em else "wrong answer")
    return tuple.__new__(ScoredResponse, (em if reward is None else reward, em, f1, answer, reason))


def _score_boxed(text: str, golds: str | Iterable[str], call_tags: Mapping[str, str]) -> ScoredResponse:
    fault = format_fault(text, call_tags=call_tags)
    if fault is None:  # then there is one answer block, and it is found faster from the end
        block: str | None = text[text.rfind("<answer>") + len("<answer>") : text.rfind("</answer>")]
    else:
        block = extract_answer(text)
    answer = None if block is None else extract_boxed(block)
    if fault is None and answer is None:
        fault = "the braces of the last \\boxed{ do not balance"
    if fault is not None:
        return _scored(WRONG_FORMAT_REWARD, answer, golds, f"bad format: {fault}")
    return _scored(None, answer, golds, "")


def _score_tag(text: str, golds: str | Iterable[str]) -> ScoredResponse:
    answer = extract_answer(text)
    return _scored(None, answer, golds, "no answer: no <answer>...</answer>" if answer is None else "")


def score_response(
    text: str,
    golds: str | Iterable[str],
    *,
    answer_format: str = "boxed",
    call_tags: Mapping[str, str] | None = None,
) -> ScoredResponse:
    r"""Score a whole response.

    Args:
        text: Actions and observations of the episode in order, without the prompt.
        golds: The golden answers (a single string is one gold).
        answer_format: "boxed" (AT²PO): -1 for a wrong format, else the EM of the last `\boxed{...}` of the
            answer block. "tag" (Search-R1): the EM of `<answer> X </answer>`, no format term. "structured"
            (Tree-GRPO): `score_structured`.
        call_tags: Call tag -> result tag of the protocol in use. Default: search and python with `<result>`
            ("structured": search with `<information>`).

    Raises:
        ConfigError: Unknown answer format.
    """
    if answer_format == "boxed":
        return _score_boxed(text, golds, CALL_TAGS if call_tags is None else call_tags)
    if answer_format == "tag":
        return _score_tag(text, golds)
    if answer_format == "structured":
        return score_structured(text, golds, call_tags=INFORMATION_TAGS if call_tags is None else call_tags)
    raise ConfigError(f"unknown answer_format {answer_format!r}: expected 'boxed', 'tag' or 'structured'")


def structure_fault(text: str, *, call_tags: Mapping[str, str] = INFORMATION_TAGS) -> str | None:
    """What keeps `text` from the structure (think, call, result)*, think, answer; None when nothing does.

    Only white space may stand outside the tags.
    """
    results = dict(call_tags)
    tag = _tag_pattern("think", "answer", *results, *results.values())
    allowed, inside, end = ["think"], "", 0
    for match in tag.finditer(text):
        between, found, end = text[end : match.start()], match[0], match.end()
        if inside:
            if found != f"</{inside}>":
                return f"{found} inside <{inside}>"
            allowed = ["answer", *results] if inside == "think" else [results.get(inside, "think")]
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


def score_structured(
    text: str, golds: str | Iterable[str], *, call_tags: Mapping[str, str] = INFORMATION_TAGS
) -> ScoredResponse:
    """Tree-GRPO's reward.

    EM with structure 1.0, without 0.8; a wrong answer with structure 0.2, without 0.1; no answer (or a blank
    one): 0.2 with structure, else 0.
    """
    answer = extract_answer(text) or None
    fault = structure_fault(text, call_tags=call_tags)
    scored = _scored(None, answer, golds, "no answer" if answer is None else "")
    if answer is None:
        reward = 0.2 if fault is None else 0.0
    elif scored.em:
        reward = 1.0 if fault is None else 0.8
    else:
        reward = 0.2 if fault is None else 0.1
    reason = scored.reason if fault is None else f"{scored.reason}; bad structure: {fault}"
    return scored._replace(reward=reward, reason=reason)


class RewardRule(Protocol):
    """Scores a whole response against the golden answers."""

    def __call__(
        self, text: str, golds: str | Iterable[str], *, call_tags: Mapping[str, str] | None = None
    ) -> ScoredResponse:
        """Score `text`; `call_tags` are those of the protocol in use."""
        ...


def reward_rule(name: str) -> RewardRule:
    """The rule called `name`: "boxed", "tag" or "structured" (also "at2po", "search_r1", "tree_grpo").

    Raises:
        ConfigError: Unknown name.
    """
    aliases = {"at2po": "boxed", "search_r1": "tag", "tree_grpo": "structured"}
    answer_format = aliases.get(name, name)
    if answer_format not in ("boxed", "tag", "structured"):
        expected = ", ".join(["boxed", "tag", "structured", *aliases])
        raise ConfigError(f"unknown reward rule {name!r}: expected one of {expected}")

    def rule(
        text: str, golds: str | Iterable[str], *, call_tags: Mapping[str, str] | None = None
    ) -> ScoredResponse:
        return score_response(text, golds, answer_format=answer_format, call_tags=call_tags)

    return rule
