"""Every shipped world has a golden playthrough beside its tests, which replay it."""

from __future__ import annotations

from pathlib import Path

import pytest

from at2po_env.registry import WORLDS


@pytest.mark.parametrize("name", WORLDS)
def test_every_shipped_world_has_a_playthrough(name: str) -> None:
    folder = Path(__file__).parent / name.lower()
    assert "success" in (folder / "playthrough.txt").read_text("utf-8")
    assert any("playthrough" in path.read_text("utf-8") for path in folder.glob("test_*.py"))
