"""The prefix tree against a dictionary of prefixes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.policies.hf.prefix_cache import Node, PrefixCache
from at2po_agent.policies.hf.slots import Segment


def segment(tokens: tuple[int, ...], start: int) -> Segment:
    """KV that say which id they belong to, and where it stands."""
    values = [[float(token), float(start + i)] for i, token in enumerate(tokens)]
    return (torch.tensor(values).view(1, 1, len(tokens), 2),)


def insert(cache: PrefixCache, ids: tuple[int, ...]) -> Node:
    path = cache.match(ids)
    known = sum(length for _, length in path)
    node = cache.extend(path, ids[known:])
    if known < len(ids):
        cache.fill(node, segment(ids[known:], known))
    return node


def read(path: list[tuple[Node, int]]) -> list[list[float]]:
    rows = []
    for node, length in path:
        assert node.segment is not None
        rows += node.segment[0][0, 0, :length].tolist()
    return rows


sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9).map(tuple), min_size=1, max_size=12)


@given(stored=sequences, asked=st.lists(st.integers(0, 3), max_size=12).map(tuple))
@settings(deadline=None)
def test_match_is_the_longest_stored_beginning_with_its_own_kv(
    stored: list[tuple[int, ...]], asked: tuple[int, ...]
) -> None:
    cache = PrefixCache(10_000)
    for ids in stored:
        assert insert(cache, ids).end == len(ids)
    known = {ids[:end] for ids in stored for end in range(len(ids) + 1)}
    path = cache.match(asked)
    matched = sum(length for _, length in path)
    assert matched == max(end for end in range(len(asked) + 1) if asked[:end] in known)
    assert read(path) == [[float(token), float(i)] for i, token in enumerate(asked[:matched])]
    assert all(length == len(node.tokens) for node, length in path[:-1])
    assert cache.tokens == len(known) - 1  # each distinct id is stored once


@given(stored=sequences, budget=st.integers(0, 20), pinned=st.integers(0, 11))
@settings(deadline=None)
def test_eviction_keeps_the_budget_the_pins_and_every_remaining_path(
    stored: list[tuple[int, ...]], budget: int, pinned: int
) -> None:
    cache = PrefixCache(budget)
    nodes = [insert(cache, ids) for ids in stored]
    kept = nodes[pinned % len(nodes)]
    kept.pins += 1
    cache.evict()
    assert cache.tokens <= max(budget, kept.end)
    ids = stored[pinned % len(nodes)]
    assert read(cache.match(ids)) == [[float(token), float(i)] for i, token in enumerate(ids)]
    for other in stored:
        path = cache.match(other)
        assert read(path) == [[float(t), float(i)] for i, t in enumerate(other[: sum(n for _, n in path)])]


def test_the_least_recently_used_leaf_goes_first() -> None:
    cache = PrefixCache(7)
    for ids in ((1, 2, 3), (1, 2, 4), (5, 6)):
        insert(cache, ids)
    assert cache.tokens == 6
    cache.match((1, 2, 3))
    insert(cache, (7, 8, 9))
    cache.evict()  # 9 ids stored, 7 allowed: (4,) is the oldest leaf, then (5, 6)
    assert [sum(n for _, n in cache.match(ids)) for ids in ((1, 2, 3), (1, 2, 4), (5, 6), (7, 8, 9))] == [
        3,
        2,
        0,
        3,
    ]


def test_a_split_keeps_the_nodes_identity_at_its_end() -> None:
    cache = PrefixCache(100)
    node = insert(cache, (1, 2, 3, 4))
    node.logits = torch.ones(3)
    upper = insert(cache, (1, 2))
    assert node.parent is upper
    assert (upper.tokens, node.tokens, node.start) == ((1, 2), (3, 4), 2)
    assert upper.logits is None
    assert node.logits is not None


def test_pending_nodes_split_like_others_and_are_never_evicted() -> None:
    cache = PrefixCache(0)
    node = cache.extend([], (1, 2, 3))
    node.packed = [10, 11, -1]
    upper = cache.extend(cache.match((1, 9)), (9,)).parent
    assert upper is not None
    assert (upper.packed, node.packed) == ([10], [11, -1])
    cache.evict()
    assert cache.match((1, 2, 3)) == [(upper, 1), (node, 2)]


def test_below_a_node_matching_and_extending_start_there() -> None:
    cache = PrefixCache(100)
    node = insert(cache, (1, 2))
    assert cache.match((1, 2), below=node) == []
    child = cache.extend([], (1, 2), below=node)
    cache.fill(child, segment((1, 2), 2))
    assert child.start == 2
    assert sum(n for _, n in cache.match((1, 2, 1, 2))) == 4
