from __future__ import annotations

from typing import Any

import pytest

from at2po_agent.policies.base import Request
from at2po_env.errors import PolicyError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefix_ids": ()}, "prefix_ids is empty"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**128}, "seed"),
        ({"stop": "</search>"}, "stop must be a tuple"),
        ({"stop": ("",)}, "stop must be a tuple"),
    ],
)
def test_a_field_out_of_range_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Request(**{"prefix_ids": (1,), "max_tokens": 1} | fields)


def test_lists_become_tuples() -> None:
    request = Request([1, 2], 3, stop=["a"])  # type: ignore[arg-type]
    assert (request.prefix_ids, request.stop) == ((1, 2), ("a",))
