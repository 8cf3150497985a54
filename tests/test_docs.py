"""Every Python block of README.md and docs/*.md runs, from top to bottom of its page, in a folder of its own.

A block that cannot run in a test is marked by the line before it: `<!-- not executed: why -->`.
"""

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

from at2po_env.data import At2poSampleWarning

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<mark><!-- not executed: [^\n]+ -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")


class Block(NamedTuple):
    """A Python block: where it starts, its code, and whether it runs."""

    line: int
    code: str
    runs: bool


def blocks(text: str) -> list[Block]:
    return [
        Block(text.count("\n", 0, match.start("code")), match["code"], match["mark"] is None)
        for match in FENCE.finditer(text)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path / "cache"))
    namespace: dict[str, object] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", At2poSampleWarning)  # pages use the shipped sample on purpose
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.runs:
                code = "\n" * block.line + block.code  # so that a traceback names the line of the page
                exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_fence_of_a_page_is_found(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(blocks(text)) == len(re.findall(r"^\s*`{3,}\s*(?:python|py)\b", text, re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    missing = [
        link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()
    ]
    assert missing == []


def test_a_mark_keeps_a_block_from_running_and_nothing_else_does() -> None:
    marked, other = (
        "<!-- not executed: needs a GPU -->\n```python\na\n```\n",
        "<!-- other -->\n```python\nc\n```\n",
    )
    text = marked + "\n```python\nb\n```\n" + other
    assert blocks(text) == [Block(2, "a\n", False), Block(6, "b\n", True), Block(10, "c\n", True)]
