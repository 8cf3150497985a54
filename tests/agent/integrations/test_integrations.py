"""What holds of the integrations where the other trainers are missing."""

import importlib
import sys

import pytest

from at2po_env.errors import MissingExtraError


@pytest.mark.parametrize(("name", "package"), [("trl", "trl"), ("trl", "datasets")])
def test_a_missing_trainer_is_an_error_that_names_the_extra(monkeypatch, name, package):
    module = f"at2po_agent.integrations.{name}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    if package == "datasets":
        pytest.importorskip("trl", reason="needs TRL (extra trl): make test-trl")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}', which is not installed.*at2po\[{name}\]"):
        importlib.import_module(module)
