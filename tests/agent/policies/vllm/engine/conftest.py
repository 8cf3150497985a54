"""Engines are slow to start: the tests of a module share one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.vllm_tiny_engine import running, tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is marked `vllm`, and skipped where vLLM is absent."""
    found = importlib.util.find_spec("vllm")
    missing = found is None or found.origin is None  # a folder of tests may carry the name
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.filterwarnings("default"))
            if missing:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm"))


@pytest.fixture(scope="session")
def model() -> Any:
    """The learner's model of the shared engines."""
    return tiny_model(seed=0)


@pytest.fixture(scope="module")
def shared_policy(model: Any) -> Iterator[Any]:
    """An engine in this process, which can hold one: the next module starts its own."""
    with running(model, slots=32, asynchronous=False) as policy:
        yield policy


@pytest.fixture
def policy(shared_policy: Any) -> Any:
    """The engine of this process, idle and with nothing cached."""
    for ticket in list(shared_policy._where):
        shared_policy.cancel(ticket)
    shared_policy.weights_changed()
    return shared_policy
