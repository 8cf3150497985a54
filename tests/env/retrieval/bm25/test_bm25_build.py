import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from at2po_env.data.corpus import Passage
from at2po_env.errors import RetrievalError
from at2po_env.retrieval.bm25 import build as bm25_build
from at2po_env.retrieval.bm25.build import CountedBlock, FolderStore
from at2po_env.retrieval.bm25.retriever import FILES, Bm25Retriever
from at2po_env.retrieval.building import build_index

ROWS = 300
# Builds in small parts; says what it does, and after "stop" waits to be killed.
BUILD = """
import sys, time
from at2po_env.retrieval.bm25 import build as bm25_build
from at2po_env.retrieval.building import build_index
corpus, out, stop = sys.argv[1:]
bm25_build.BLOCK_TERMS = 200
put, array = bm25_build.FolderStore.put, bm25_build.FolderStore.array
def say(text):
    print(text, flush=True)
    if text == stop:
        time.sleep(60)
def noted_put(self, part):
    put(self, part)
    say(f"part-{self._count}")
def noted_array(self, name, dtype, length):
    say(name)
    return array(self, name, dtype, length)
bm25_build.FolderStore.put, bm25_build.FolderStore.array = noted_put, noted_array
build_index(corpus, "bm25", out=out)
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    draw = random.Random(0)
    words = [f"w{i}" for i in range(400)] + ["ångström", "日本語"]
    path = tmp_path / "corpus.jsonl"
    with path.open("w") as file:
        for row in range(ROWS):
            text = " ".join(draw.choices(words, k=10))
            file.write(f'{{"id": "{row}", "contents": "\\"T{row}\\"\\n{text}"}}\n')
    return path


def run(corpus: Path, out: Path, stop: str) -> list[str]:
    """Build until `stop`, then kill; returns what the build said."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, corpus, out, stop],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line.strip())
        if said[-1] == stop:
            os.kill(process.pid, signal.SIGKILL)
    assert process.wait(30) == (-signal.SIGKILL if stop else 0)
    process.stdout.close()
    return said


def test_a_killed_build_goes_on_after_its_last_part_and_gives_the_same_index(
    corpus: Path, tmp_path: Path
) -> None:
    whole = build_index(corpus, "bm25", out=tmp_path / "whole")
    home = tmp_path / "killed"
    assert run(corpus, home, "part-4") == ["part-1", "part-2", "part-3", "part-4"]
    assert not home.exists()
    assert run(corpus, home, "rows.u32")[0] == "part-5"  # the counted passages are not counted again
    assert run(corpus, home, "") == list(FILES)
    assert sorted(path.name for path in home.iterdir()) == sorted([*FILES, "manifest.json"])
    for name in [*FILES, "manifest.json"]:
        assert (home / name).read_bytes() == (whole / name).read_bytes()


def test_half_a_part_counts_for_nothing(corpus: Path, tmp_path: Path) -> None:
    home = tmp_path / "killed"
    run(corpus, home, "part-2")
    partial = tmp_path / "killed.partial"
    (partial / "part-1.npz").rename(partial / "part.new")
    assert run(corpus, home, "")[0] == "part-2"
    assert sorted(path.name for path in home.iterdir()) == sorted([*FILES, "manifest.json"])


def test_blocks_come_back_as_they_were_put(tmp_path: Path) -> None:
    totals = bm25_build._Totals(9)
    totals.done = 7
    passages = [Passage("", "", "")] * 7 + [Passage("7", "a", "b"), Passage("8", "b", "")]
    ((block, _, _),) = bm25_build._count(passages, frozenset(), totals)
    for terms in ([], ["a", "\ud800"]):
        FolderStore(tmp_path).put(CountedBlock(block, np.array([2, 1], "u4"), terms))
    first, second = FolderStore(tmp_path).blocks()
    assert (first.terms, second.terms) == ([], ["a", "\ud800"])
    assert second.block.tolist() == block.tolist() == [[0, 1, 1], [7, 7, 8], [1, 1, 1]]
    assert second.lengths.tolist() == [2, 1]


def test_an_index_is_built_and_opened_where_it_is_told(corpus: Path, tmp_path: Path) -> None:
    home = build_index(corpus, "bm25", out=tmp_path / "here" / "index", k1=1.2)
    assert home == tmp_path / "here" / "index"
    assert not list(tmp_path.glob("corpus.jsonl.*"))
    opened = Bm25Retriever(corpus, k1=1.2, index=home)
    assert opened.search(["w7 ångström"], 5) == Bm25Retriever(corpus, k1=1.2).search(["w7 ångström"], 5)
    assert build_index(corpus, "bm25", out=home, k1=1.2) == home
    with pytest.raises(RetrievalError, match="other settings"):
        build_index(corpus, "bm25", out=home)
