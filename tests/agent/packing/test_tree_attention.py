from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from at2po_agent.packing.prefixes import Layout, lay_out, sort_branches
from at2po_agent.packing.tree_attention import tree_attention_cpu, tree_attention_plain
from at2po_agent.packing.tree_attention.flex import (
    BLOCK,
    block_mask,
    block_visibility,
    bucket,
    tree_attention_flex,
)

SEEDS = st.integers(0, 10**6)


def random_layout(seed: int, *, rows: int = 8, longest: int = 12) -> Layout:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(2, size=rng.integers(1, longest)) for _ in range(rows)]
    ordered = sort_branches(ids)
    return lay_out(ordered.lengths, ordered.shared)


def inputs(layout: Layout, *, heads: int = 4, kv_heads: int = 2, width: int = 8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads)
    tokens = len(layout.last)
    drawn = (torch.randn(1, n, tokens, width, generator=generator, dtype=dtype) for n in sizes)
    return [tensor.requires_grad_() for tensor in drawn]


def dense(query, key, value, layout: Layout, *, window=None, softcap=None):
    """All pairs of tokens and a mask, from the paths alone."""
    tokens = query.shape[2]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for path in layout.paths:
        for depth, place in enumerate(path):
            seen[place, path[max(0, depth + 1 - window) if window else 0 : depth + 1]] = True
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=seen)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 / softcap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value


def gradients(function, tensors):
    out = function(*tensors)
    weights = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return out.detach(), torch.autograd.grad((out * weights).sum(), tensors)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
@pytest.mark.parametrize("attend", [tree_attention_cpu, tree_attention_plain])
def test_values_and_gradients_are_those_of_the_dense_mask(attend, seed):
    layout = random_layout(seed)
    tensors = inputs(layout)
    expected, expected_grads = gradients(lambda *x: dense(*x, layout), tensors)
    got, grads = gradients(lambda *x: attend(*x, layout), tensors)
    torch.testing.assert_close(got, expected)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_narrow_numbers_and_long_runs(dtype, tolerance):
    layout = random_layout(1, rows=5, longest=700)
    tensors = inputs(layout, dtype=torch.float64)
    expected, expected_grads = gradients(lambda *x: dense(*x, layout), tensors)
    narrow = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    got, grads = gradients(lambda *x: tree_attention_cpu(*x, layout), narrow)
    for one, other in zip((got, *grads), (expected, *expected_grads), strict=True):
        assert float((one.double() - other).norm() / other.norm()) < tolerance


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_windows_and_soft_caps(seed):
    layout = random_layout(seed)
    tensors = inputs(layout)
    expected = dense(*tensors, layout, window=3, softcap=2.0)
    got = tree_attention_plain(*tensors, layout, window=3, softcap=2.0)
    torch.testing.assert_close(got, expected)


def test_calls_are_few():
    # One causal call per run, and one per segment above: never more than two per branch.
    for seed in range(20):
        layout = random_layout(seed)
        assert len(layout.runs) <= 8
        assert len(layout.segments) < len(layout.runs) or not layout.segments


@pytest.mark.parametrize("fault", ["missing ancestor", "sibling seen"])
def test_a_wrong_layout_is_noticed(fault):
    layout = random_layout(3)
    tensors = inputs(layout)
    if fault == "missing ancestor":
        wrong = replace(layout, segments=layout.segments[1:])
    else:
        assert layout.last[0] <= layout.runs[-1].start
        wrong = replace(layout, segments=[*layout.segments, (slice(0, 1), layout.runs[-1])])
    difference = tree_attention_cpu(*tensors, wrong) - dense(*tensors, layout)
    assert float(difference.detach().abs().max()) > 1e-2


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_block_masks_hold_what_the_dense_mask_holds(seed):
    layout = random_layout(seed, rows=6, longest=300)
    tokens = len(layout.last)
    size = bucket(tokens)
    last = np.concatenate([layout.last, np.arange(tokens + 1, size + 1)])
    seen = (np.arange(size) <= np.arange(size)[:, None]) & (np.arange(size)[:, None] < last)
    blocks = seen.reshape(size // BLOCK, BLOCK, size // BLOCK, BLOCK).swapaxes(1, 2)
    some, whole = block_visibility(last)
    assert np.array_equal(some, blocks.any(axis=(2, 3)))
    assert np.array_equal(whole, blocks.all(axis=(2, 3)))
    mask = block_mask(layout, torch.device("cpu"))
    assert mask.to_dense().bool()[0, 0].numpy().tolist() == some.tolist()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, 3)])
def test_flex_attention_equals_the_dense_mask(softcap, window):
    layout = random_layout(5, rows=6, longest=60)
    tensors = [tensor.detach() for tensor in inputs(layout)]
    got = tree_attention_flex(*tensors, layout, softcap=softcap, window=window)
    torch.testing.assert_close(got, dense(*tensors, layout, softcap=softcap, window=window))


def test_buckets_are_few_and_close():
    sizes = {bucket(tokens) for tokens in range(1, 65_537)}
    assert len(sizes) < 60
    assert all(bucket(n) >= n and bucket(n) <= max(BLOCK, 1.125 * n + BLOCK) for n in range(1, 65_537, 97))
