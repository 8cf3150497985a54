"""The examples in the docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import at2po_envs
import pytest

import at2po_agent
import at2po_env
from at2po_env.errors import MissingExtraError

MODULES = sorted(
    module.name
    for package in (at2po_env, at2po_envs, at2po_agent)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        pytest.skip(f"needs {missing.name}")
    except MissingExtraError as missing:
        pytest.skip(str(missing))
    assert doctest.testmod(module).failed == 0


def test_examples_are_found() -> None:
    assert len(MODULES) > 150
    assert doctest.testmod(importlib.import_module("at2po_env.episodes.infos")).attempted == 7
