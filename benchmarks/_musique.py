"""Which passages support a MuSiQue question: found again in a corpus that keeps the questions' paragraphs.

FlashRAG rows of MuSiQue name a supporting paragraph by its number among the question's twenty. The corpus in
`../shared/data` ends with those twenty of every question in turn, less what had occurred before, so a
question starts at most 20 rows after the one before it. The starts are chosen (dynamic programming) so that
as many hops as possible find their answer in the row that their number points to; a hop whose answer is in
none of the rows is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

FEWEST, MOST = 12, 20  # rows of a question
SLACK = 4  # rows by which repeated paragraphs shift a number
FIRST = 400  # rows among which the first question starts


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def supporting_rows(questions: Sequence[dict[str, Any]], contents: Sequence[str]) -> list[list[int]]:
    """Return the rows of the supporting passages of each question; `contents` are the corpus' rows."""
    rows = [_plain(text) for text in contents]
    hops = [
        [
            (hop["paragraph_support_idx"], _plain(hop["answer"]))
            for hop in question["metadata"]["question_decomposition"]
        ]
        for question in questions
    ]

    def row_of(start: int, number: int, answer: str) -> int | None:
        near = (start + number - shift for shift in range(SLACK))
        return next((row for row in near if 0 <= row < len(rows) and answer in rows[row]), None)

    def score(question: int, start: int) -> float:
        found = [(row_of(start, number, answer), start + number) for number, answer in hops[question]]
        return sum((1 - 0.1 * (wanted - row) for row, wanted in found if row is not None), 0.0)

    earliest = max(len(rows) - MOST * len(questions), 0)
    latest = min(earliest + FIRST, len(rows))
    steps = [{start: (score(0, start), -1) for start in range(earliest, latest)}]
    for question in range(1, len(questions)):
        reached: dict[int, tuple[float, int]] = {}
        scores: dict[int, float] = {}
        for before, (total, _) in steps[-1].items():
            for start in range(before + FEWEST, min(before + MOST + 1, len(rows))):
                if start not in scores:
                    scores[start] = score(question, start)
                value = total + scores[start]
                if start not in reached or value > reached[start][0]:
                    reached[start] = (value, before)
        steps.append(reached)
    starts = [max(steps[-1], key=lambda start: steps[-1][start][0])]
    for question in range(len(questions) - 1, 0, -1):
        starts.append(steps[question][starts[-1]][1])
    starts.reverse()
    found = [
        [row_of(start, number, answer) for number, answer in asked]
        for start, asked in zip(starts, hops, strict=True)
    ]
    return [[row for row in question if row is not None] for question in found]
