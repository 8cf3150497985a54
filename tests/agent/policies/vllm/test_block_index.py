import random

from hypothesis import given
from hypothesis import strategies as st

from at2po_agent.policies.vllm.exact_prefixes.block_index import BlockIndex, Found


def agreement(left, right):
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def test_the_block_that_agrees_longest_is_found():
    index = BlockIndex()
    index.put(3, "root", (1, 2, 3, 4))
    index.put(5, "root", (1, 2, 9))
    index.put(7, "other", (1, 2, 3, 4, 5))
    assert index.find("root", (1, 2, 3, 9)) == Found(3, 3)
    assert index.find("root", (1, 2, 9, 9)) == Found(5, 3)
    assert index.find("root", (1, 2)) == Found(3, 2)  # the first of several
    assert index.find("root", (8,)) == index.find("nobody", (1,)) == index.find("root", ()) == Found(None, 0)


def test_a_block_that_is_given_away_is_not_found_at_its_old_place():
    index = BlockIndex()
    index.put(3, "root", (1, 2, 3))
    index.put(3, "other", (1, 2))
    assert index.find("root", (1, 2, 3)) == Found(None, 0)
    assert index.find("other", (1, 2, 3)) == Found(3, 2)
    index.drop(3)
    index.drop(3)
    assert len(index) == 0
    assert index.find("other", (1,)) == Found(None, 0)


def test_one_index_takes_over_another():
    ready, coming = BlockIndex(), BlockIndex()
    ready.put(1, "root", (1, 2))
    ready.put(2, "root", (4, 5))
    coming.put(1, "later", (7,))
    ready.take(coming)
    assert len(coming) == 0
    assert ready.find("root", (1, 2)) == Found(None, 0)
    assert ready.find("later", (7, 7)) == Found(1, 1)
    ready.clear()
    assert len(ready) == 0


@given(st.integers(0, 10_000))
def test_as_by_searching_all_blocks(seed):
    rng = random.Random(seed)
    index, blocks = BlockIndex(), {}
    for _ in range(40):
        block = rng.randrange(6)
        if rng.random() < 0.2:
            index.drop(block)
            blocks.pop(block, None)
        else:
            blocks[block] = (rng.randrange(2), tuple(rng.randrange(2) for _ in range(rng.randrange(1, 6))))
            index.put(block, *blocks[block])
        assert len(index) == len(blocks)
    for _ in range(10):
        parent, wanted = rng.randrange(3), tuple(rng.randrange(2) for _ in range(rng.randrange(6)))
        found = index.find(parent, wanted)
        shared = [agreement(tokens, wanted) for place, tokens in blocks.values() if place == parent]
        assert found.tokens == max(shared, default=0)
        if found.tokens:
            place, tokens = blocks[found.block]
            assert (place, tokens[: found.tokens]) == (parent, wanted[: found.tokens])
        else:
            assert found.block is None
