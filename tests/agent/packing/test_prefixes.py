from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.packing.prefixes import cut_branches, lay_out, lower_bound, sort_branches

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=7)


def arrays(rows: list[list[int]]) -> list[np.ndarray]:
    return [np.array(row, dtype=np.int64) for row in rows]


def prefixes(rows: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(row[: end + 1]) for row in rows for end in range(len(row))}


def test_depth_first_order_by_hand():
    # 5 | 7 8 | 7 8 9 1 | 7 8 9 2, each row but what it shares with the one before: 5 | 7 8 | 9 1 | 2
    rows = sort_branches(arrays([[7, 8, 9, 2], [7, 8], [5], [7, 8, 9, 1]]))
    assert rows.order.tolist() == [2, 1, 3, 0]
    assert rows.shared.tolist() == [0, 0, 2, 3]
    assert rows.unique_tokens == 6
    layout = lay_out(rows.lengths, rows.shared)
    # places: 5 | 7 8 | 9 1 | 2
    assert layout.runs == [slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 6)]
    assert layout.positions.tolist() == [0, 0, 1, 2, 3, 3]
    assert layout.last.tolist() == [1, 6, 6, 6, 5, 6]
    assert [path.tolist() for path in layout.paths] == [[0], [1, 2], [1, 2, 3, 4], [1, 2, 3, 5]]


def test_large_ids_keep_their_order():
    rows = sort_branches(arrays([[256, 1], [1, 256], [70000]]))
    assert rows.order.tolist() == [1, 0, 2]


@given(ROWS)
def test_every_unique_prefix_has_one_place_and_sees_its_ancestors(rows):
    ordered = sort_branches(arrays(rows))
    layout = lay_out(ordered.lengths, ordered.shared)
    assert len(layout.last) == ordered.unique_tokens == len(prefixes(rows))
    place_of = {}
    for index, path in zip(ordered.order, layout.paths, strict=True):
        for depth, place in enumerate(path.tolist()):
            assert layout.positions[place] == depth
            assert place_of.setdefault(tuple(rows[index][: depth + 1]), place) == place
    for prefix, place in place_of.items():
        seen = {j for j in range(len(layout.last)) if j <= place < layout.last[j]}
        assert seen == {place_of[prefix[: end + 1]] for end in range(len(prefix))}


@given(ROWS, st.data())
def test_some_rows_share_what_they_share(rows, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    kept = sort_branches(arrays(rows)).keep(np.array(chosen))
    fresh = sort_branches(arrays([rows[index] for index in chosen]))
    assert kept.shared.tolist() == fresh.shared.tolist()
    assert kept.order.tolist() == [chosen[index] for index in fresh.order]


@settings(max_examples=200)
@given(ROWS, st.integers(1, 30))
def test_cuts_keep_to_the_budget_and_no_other_cut_of_the_order_repeats_less(rows, budget):
    ordered = sort_branches(arrays(rows))
    cuts = cut_branches(ordered, budget)
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(len(rows)))

    def size(start: int, stop: int) -> int:
        return len(prefixes([rows[index] for index in ordered.order[start:stop]]))

    def fits(start: int, stop: int) -> bool:
        return size(start, stop) <= max(budget, *ordered.lengths[start:stop].tolist())

    assert all(fits(cut.start, cut.stop) for cut in cuts)
    total = sum(size(cut.start, cut.stop) for cut in cuts)
    best = [0]
    for stop in range(1, len(rows) + 1):
        best.append(min(best[start] + size(start, stop) for start in range(stop) if fits(start, stop)))
    assert total == best[-1]
    if budget >= ordered.lengths.max():
        assert lower_bound(ordered, budget) <= total


def test_the_lower_bound_is_met_by_an_even_tree():
    # prompt of 4, four branches of 3 more: 16 tokens; packs of 10 hold two branches each: 20.
    rows = sort_branches(arrays([[0, 0, 0, 0, i, i, i] for i in range(4)]))
    assert lower_bound(rows, 10) == sum(
        int((rows.lengths[c] - rows.shared[c]).sum() + rows.shared[c.start]) for c in cut_branches(rows, 10)
    )
    assert lower_bound(rows, 10) == 20


def test_packs_are_even_where_that_costs_nothing():
    # prompt of 2, six branches of 4 more: packs of 22 tokens could hold 5 + 1 branches; 3 + 3 are smaller
    rows = sort_branches(arrays([[0, 0, i, i, i, i] for i in range(6)]))
    assert cut_branches(rows, 22) == [slice(0, 3), slice(3, 6)]
