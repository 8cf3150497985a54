"""A bar appears on standard error for long work only."""

import pytest

from at2po_env.data import progress
from at2po_env.data.progress import ProgressBar


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("Reading", 100) as advance:
        advance(100)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("unit", "shown"), [("bytes", "50/100 bytes"), ("passages", "50/100")])
def test_long_work_shows_what_is_done_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unit: str, shown: str
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    with ProgressBar("Reading", None, unit=unit) as bar:
        bar.show(20, 100)
        bar(30)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Reading" in err
    assert shown in err
