"""The candidate table never misses the end that decoding everything would find."""

from __future__ import annotations

import pytest
from helpers.policy_reference import VOCABULARY, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.policies.stops import StopTable

TEXTS = st.text(alphabet="ab <>/search\u00e9\u65e5", min_size=1, max_size=30)


def first_end(ids: list[int], marks: tuple[str, ...]) -> int | None:
    """The reference: decode everything after every id."""
    for end in range(1, len(ids) + 1):
        if any(mark in tiny_tokenizer().decode(ids[:end]) for mark in marks):
            return end
    return None


@given(text=TEXTS, mark=st.text(alphabet="ab <>/search\u00e9\u65e5", min_size=1, max_size=9))
@settings(deadline=None, max_examples=150)
def test_the_table_finds_the_first_end(text: str, mark: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text + mark + text)
    table = STOPS
    number = table.number((mark,))
    found = None
    for end in range(1, len(ids) + 1):
        if table.candidates[number, ids[end - 1]] and table.ends(number, ids[:end]) == "stop":
            found = end
            break
    assert found == first_end(ids, (mark,))


STOPS = StopTable(tiny_tokenizer(), VOCABULARY, [0])


def test_end_of_sequence_wins_and_any_of_several_strings_ends() -> None:
    table = StopTable(tiny_tokenizer(), VOCABULARY, [0, 17, 10**6])
    number = table.number(("zz", "q"))
    assert table.ends(number, [5, 17]) == "eos"
    assert table.ends(number, tiny_tokenizer().encode("aq")) == "stop"
    assert table.ends(number, tiny_tokenizer().encode("az")) is None
    assert table.candidates[number, [0, 17]].all()


def test_few_ids_are_candidates() -> None:
    number = STOPS.number(("</search>",))
    assert 0 < STOPS.candidates[number].sum() < VOCABULARY / 20


def test_a_set_of_strings_keeps_its_number() -> None:
    assert STOPS.number(("x",)) == STOPS.number(("x",)) != STOPS.number(("x", "y"))


class SpaceEater:
    """Decodes as SentencePiece does: the space that begins a text is dropped."""

    eos_id = 0
    texts = ("", " a", " b", "b", " ")

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: object) -> str:
        return "".join(self.texts[i] for i in ids).removeprefix(" ")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("mark", "ids"), [("a b", [3, 1, 2]), (" b", [1, 2]), ("b ", [3, 4])])
def test_spaces_that_only_show_inside_a_text_are_seen(mark: str, ids: list[int]) -> None:
    table = StopTable(SpaceEater(), 5, [0])
    number = table.number((mark,))
    assert table.candidates[number, ids[-1]]
    assert table.ends(number, ids) == "stop"
