"""Damages files: those of a finished run before a resume, and questions, corpora, indexes and caches.

A damaged file is refused with one of our errors, or what comes out is what came out before. Only a damage
that makes another valid file may change a result: a letter of a question, a line of `metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from at2po_agent.config.loading import load_config
from at2po_agent.report.run_folder import (
    check_run_folder,
    read_metrics,
    read_rollout_config,
    read_summary,
    read_trees,
)
from at2po_env.data.corpus import Corpus
from at2po_env.data.qa import load_qa
from at2po_env.errors import At2poError
from at2po_env.retrieval.bm25.retriever import Bm25Retriever, bm25_config, build_index
from at2po_env.retrieval.cache import CachedRetriever
from benchmarks.campaign.runner import Try
from benchmarks.campaign.runs import DONE, PARTS, REFUSED, differences, in_child, prepare, train, wait_for

QUERIES = ["first program", "enigma machine", "a film of 1954", "nothing of this"]


def damage(path: Path, others: list[Path], rng: random.Random) -> str:
    """Damage a file in one way, and say which."""
    content = path.read_bytes()
    kind = rng.choice(("cut", "emptied", "flipped", "swapped", "appended", "overwritten", "gone", "a folder"))
    place = rng.randrange(len(content) + 1)
    if kind == "cut":
        path.write_bytes(content[:place])
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "flipped":
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 3, 50)) if content else 0):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
    elif kind == "swapped":
        other = rng.choice([other for other in others if other.is_file()])
        path.write_bytes(other.read_bytes())
        kind = f"swapped with {other.name}"
    elif kind == "appended":
        path.write_bytes(
            content + rng.choice((b"\n", b"}", b"\0" * 100, b"[" * 20_000, content, rng.randbytes(99)))
        )
    elif kind == "overwritten":
        junk = rng.choice((b"\xff" * 40, b"null\n", b"[]\n", b"{}\n", b"NaN\n", b'{"a": {"b": [1e999]}}\n'))
        path.write_bytes(content[:place] + junk + content[place + len(junk) :])
    else:
        path.unlink()
        if kind == "a folder":
            path.mkdir()
    return f"{path.name} {kind}"


@contextlib.contextmanager
def damaged_files(folder: Path) -> Iterator[Try]:
    """By turns a file of a run, questions, a corpus, an index, and a result cache."""
    reference, _ = prepare(folder)
    data = folder / "data"
    expected = _make_data(data)

    def attempt(rng: random.Random, number: int) -> str:
        if number % 2:
            return _run_try(folder, reference, rng)
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(data, work)
        names = ("qa.jsonl", "corpus.jsonl", "index", "cache.sqlite")
        name = names[number // 2 % len(names)]
        files = [path for path in sorted(work.rglob("*")) if path.is_file()]
        own = [path for path in files if name in str(path.relative_to(work))]
        story = damage(rng.choice(own), files, rng)
        try:
            found = _read_data(work)
        except At2poError:
            return ""
        # Questions and passages that are valid may say something else; an index and a cache may not.
        same = {
            "qa.jsonl": (),
            "corpus.jsonl": ("qa",),
            "index": ("qa", "found"),
            "cache.sqlite": ("qa", "found"),
        }
        wrong = [part for part in same[name] if found[part] != expected[part]]
        return f"{story}: other results: {', '.join(wrong)}" if wrong else ""

    yield attempt


def _make_data(home: Path) -> dict[str, Any]:
    """Questions, a corpus with its index, and a cache; returns what they give when they are sound."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    rng = random.Random(0)
    words = [
        "first",
        "program",
        "enigma",
        "machine",
        "film",
        "1954",
        "city",
        "river",
        "king",
        "engine",
        "war",
        "poem",
    ]
    rows = [{"id": f"{n}", "question": f"Who {n}?", "golden_answers": [f"Ada {n}", "Äda"]} for n in range(30)]
    (home / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    passages = [
        {"id": f"{n}", "contents": f'"Title {n}"\n' + " ".join(rng.choices(words, k=12))} for n in range(60)
    ]
    (home / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages), encoding="utf-8")
    build_index(Corpus(home / "corpus.jsonl"), bm25_config(), home / "index")
    return _read_data(home)


def _read_data(home: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged cache is told and left aside
        questions = load_qa(home / "qa.jsonl")
        corpus = Corpus(home / "corpus.jsonl")
        retriever = Bm25Retriever(home / "corpus.jsonl", index=home / "index")
        cached = CachedRetriever(retriever, home / "cache.sqlite")
        return {
            "qa": [tuple(question)[:3] for question in questions],
            "corpus": list(corpus),
            "found": [cached.search(QUERIES, 3), cached.search(QUERIES, 3)],
        }


def _run_try(folder: Path, reference: Path, rng: random.Random) -> str:
    """Damage a finished run, read it as reports do, and go on with it."""
    run, said = folder / "run", folder / "said"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(reference, run)
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name != ".lock"]
    story = "; ".join(
        damage(path, files, rng) for path in rng.sample(files, rng.choice((1, 1, 1, 2))) if path.exists()
    )
    readers: list[Callable[[], object]] = [
        lambda: check_run_folder(run),
        lambda: load_config(run),
        lambda: read_metrics(run),
        lambda: read_rollout_config(run),
        lambda: read_summary(run),
        *(lambda path=path: read_trees(path) for path in (run / "trees").glob("*")),  # type: ignore[misc]
    ]
    for reader in readers:
        with contextlib.suppress(At2poError):
            reader()
    status = wait_for(in_child(lambda: train(run), said))
    if status == REFUSED:
        return ""
    if status != DONE:
        return f"{story}: the resume ended with {status}: {said.read_text()[-600:]}"
    what = differences(run, reference, PARTS[:3])
    return f"{story}: {what}" if what else ""
