"""How good every method's estimate of the policy gradient is, at policies that stay as they are.

    python -m benchmarks.gradient --json
    python -m benchmarks.gradient --out FOLDER --questions 400 --jobs 2 --report docs/results

A method grows one tree per question and gives its turns advantages; its estimate is the mean over branches of
`sum over sampled tokens of A grad log pi` (no clip: the policy is the one that sampled). The true gradient
comes from 24 further chains per question with the leave-one-out baseline, which is unbiased. The policies
are the race's cold start, trained by GRPO to a sampled exact match (`--em`), or a checkpoint (`--policy`).
Each column has its standard error (jackknife over 20 groups of questions):

- cosine: with the true gradient, of an estimate from `--tokens` sampled tokens.
- signal to noise: squared length of that estimate's mean over its variance.
- bias: 1 - cosine of the estimate from infinitely many tokens.
- token ratio: `--tokens` over the tokens at which the method reaches the cosine of GRPO's 12 chains.
- correlation: of a turn's advantage with `Q - V`, each from 64 forks (`--credit-turns`).

The first four are given in the Euclidean metric and in Adam's, `1 / (sqrt v + 1e-8)` per coordinate, v the
mean square of GRPO's gradient from 16 questions. Rows with 4, 6 and 8 chains average over three parts of the
same 12. One file per group of questions is kept: a command that was stopped goes on, with the same figures.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._runs import write_tables
from benchmarks._timing import command_line
from benchmarks.gradient_estimates import Quality, correlation, join_groups, with_errors
from benchmarks.gradient_sampling import (
    Job,
    Row,
    check_rows,
    measure_group,
    prepare_policies,
    write_adam,
)

LEAVES = (4, 6, 8, 12)
GROUPS = 20
_MEAN = {"normalization": "mean"}
_CAPPED = {"cap": 1.0}


def chains(leaves: int) -> dict[str, Any]:
    """The rollout of plain chains."""
    return {"expansion": "chains", "chains": leaves, "forks": 0, "rounds": 0}


ENTROPY = {"expansion": "entropy", "chains": 6, "forks": 3, "rounds": 2}
RANDOM = {**ENTROPY, "expansion": "random"}
TREE_GRPO = {"expansion": "tree_grpo", "chains": 4, "forks": 8, "rounds": 1}
ARPO = {"expansion": "arpo", "chains": 6, "forks": 6, "rounds": 1}

BASELINE = Row("chains 12, group", chains(12), "group")
ROWS = [
    BASELINE,
    *[Row(f"chains {n}, group", chains(n), "group") for n in LEAVES[:-1]],
    *[Row(f"chains {n}, group mean", chains(n), "group", _MEAN) for n in LEAVES],
    *[Row(f"chains {n}, surprisal", chains(n), "surprisal") for n in LEAVES],
    *[Row(f"chains {n}, surpo", chains(n), "surprisal", _CAPPED) for n in LEAVES],
    Row("chains 12, gigpo", chains(12), "gigpo"),
    *[
        Row(f"entropy tree, {mode}", ENTROPY, "tree", {"advantage_mode": mode})
        for mode in ("node_value", "diff_parent", "diff_global", "diff_localglobal", "group")
    ],
    Row("entropy tree, group mean", ENTROPY, "group", _MEAN),
    Row("random tree, node_value", RANDOM, "tree"),
    Row("random tree, group", RANDOM, "group"),
    Row("entropy tree, surprisal", ENTROPY, "surprisal"),
    Row("random tree, surprisal", RANDOM, "surprisal"),
    Row("entropy tree, surpo", ENTROPY, "surprisal", _CAPPED),
    Row("random tree, surpo", RANDOM, "surprisal", _CAPPED),
    Row("tree_grpo", TREE_GRPO, "tree_grpo"),
    Row("arpo, group", ARPO, "group"),
    Row("aepo, group", {**ARPO, "expansion": "aepo"}, "group"),
]
"""A line per method: name, rollout, credit rule, its options."""
METRICS = ("euclidean", "adam")


def rows_of(credits: Sequence[str]) -> tuple[Row, ...]:
    """The table, and chains and AT²PO's tree with each further rule, `NAME[:k=v,...]`.

    Raises:
        ConfigError: No such rule.
    """
    rows = list(ROWS)
    for text in credits:
        name, _, given = text.partition(":")
        pairs = [pair.partition("=")[::2] for pair in given.split(",") if pair]
        options = {key: _value(value) for key, value in pairs}
        rows += [Row(f"chains {leaves}, {text}", chains(leaves), name, options) for leaves in LEAVES]
        rows.append(Row(f"entropy tree, {text}", ENTROPY, name, options))
    check_rows(rows)
    return tuple(rows)


def _value(text: str) -> Any:
    """A number or true, false, null where it reads as one, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def plan(options: argparse.Namespace, policy: Path, folder: Path, rows: tuple[Row, ...]) -> list[Job]:
    """The groups of a policy's measurement.

    Raises:
        SystemExit: The folder holds groups of another measurement.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = min(GROUPS, options.questions)
    edges = np.linspace(0, options.questions, count + 1).astype(int).tolist()
    turns = np.linspace(0, min(options.credit_turns, options.questions), count + 1).astype(int).tolist()
    about = {
        "policy": str(policy),
        "task": options.task,
        "questions": options.questions,
        "credit_turns": options.credit_turns,
        "seed": options.seed,
        "rows": [list(row) for row in rows],
    }
    kept, text = folder / "settings.json", json.dumps(about, indent=1)
    if kept.exists() and kept.read_text(encoding="utf-8") != text:
        raise SystemExit(
            f"{folder} holds groups of a measurement with other settings ({kept}): choose another --out, or "
            "remove that folder"
        )
    kept.write_text(text, encoding="utf-8")
    return [
        Job(
            policy=str(policy),
            task=tuple(options.task),
            rows=rows,
            group=group,
            first=edges[group],
            questions=edges[group + 1] - edges[group],
            credit_turns=turns[group + 1] - turns[group],
            adam=str(folder / "adam.npz"),
            result=str(folder / f"group_{group:02d}.npz"),
            seed=options.seed,
            threads=options.threads,
        )
        for group in range(count)
    ]


def sample(jobs: Sequence[Job], name: str, *, questions: int, processes: int) -> None:
    """Do the groups that are missing."""
    missing = [job for job in jobs if not Path(job.result).exists()]
    if not missing:
        return
    if not Path(jobs[0].adam).exists():
        write_adam(jobs[0], BASELINE, first=questions)
        _say(f"{name}: Adam's metric is sampled")
    done = len(jobs) - len(missing)
    for number, line in enumerate(_each(missing, processes), start=done + 1):
        _say(f"[{number}/{len(jobs)}] {name}, {line}")


def _each(jobs: Sequence[Job], processes: int) -> Iterator[str]:
    if processes == 1:
        yield from map(measure_group, jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        for done in as_completed([pool.submit(measure_group, job) for job in jobs]):
            yield done.result()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def figures(jobs: Sequence[Job], name: str, *, tokens: float) -> dict[str, Any]:
    """Figures of a policy from the files of its groups; None where there are too few questions to tell."""
    files = []
    for job in jobs:
        with np.load(job.result) as file:
            files.append({key: file[key] for key in file.files})
    with np.load(jobs[0].adam) as file:
        metrics = {"euclidean": None, "adam": file["weights"]}
    questions = np.array([float(file["questions"]) for file in files])
    references = np.stack([file["reference_sum"] for file in files])

    def sums(row: int, metric: str) -> Any:
        return join_groups(
            questions,
            np.array([file["tokens"][row] for file in files]),
            np.stack([file["sums"][row] for file in files]),
            references,
            np.stack([file["products"][METRICS.index(metric), :, row] for file in files], axis=1),
            weights=metrics[metric],
        )

    rows = jobs[0].rows
    q, v, noise = (np.concatenate([file[key] for file in files]) for key in ("q", "v", "noise"))
    advantages = np.concatenate([file["advantages"] for file in files], axis=1)
    baselines = {metric: sums(rows.index(BASELINE), metric) for metric in METRICS}
    table = []
    for number, row in enumerate(rows):
        entry: dict[str, Any] = {"method": row.name}
        for metric in METRICS:
            own = sums(number, metric)
            values, errors = with_errors(own, baselines[metric], budget=tokens)
            entry["tokens_per_question"] = float(own.tokens.sum() / questions.sum())
            prefix = "" if metric == "euclidean" else "adam_"
            for key in Quality._fields:
                entry[f"{prefix}{key}"] = _known(getattr(values, key))
                entry[f"{prefix}{key}_error"] = _known(getattr(errors, key))
        found, error = correlation(q - v, advantages[number])
        entry |= {"correlation": _known(found), "correlation_error": _known(error)}
        table.append(entry)
    spread = float(np.var(q - v, ddof=1)) if len(q) > 1 else 0.0
    return {
        "policy": name,
        "exact_match": float(sum(file["exact_match"] for file in files) / questions.sum()),
        "questions": int(questions.sum()),
        "tokens": tokens,
        "credit_turns": len(q),
        "credit_reliability": 1 - float(noise.mean()) / spread if spread else None,
        "methods": table,
    }


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def write_report(results: Sequence[Mapping[str, Any]], task: str, folder: Path) -> None:
    """Write `gradient.csv` and the tables of `gradient.md`; rows of other tasks stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    about = ("policy", "exact_match", "questions", "tokens", "credit_turns", "credit_reliability")
    fresh = [
        {"task": task, **{key: result[key] for key in about}, **method}
        for result in results
        for method in result["methods"]
    ]
    path, kept = folder / "gradient.csv", []
    names = list(fresh[0])
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["task"] != task]
    shown = [{key: _cell(row[key]) for key in names} for row in fresh]
    rows: list[dict[str, str]] = [*kept, *shown]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    tables = "\n".join(_tables(rows))
    command = "benchmarks/gradient.py"
    write_tables(folder / "gradient.md", "Policy gradients", command, tables, marked="tables")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _tables(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """A table for each task and policy, standard errors in parentheses."""
    titles = ["method", "tokens", "cosine", "signal to noise", "bias", "token ratio"]
    titles += ["Adam: cosine", "Adam: bias", "Adam: token ratio", "correlation"]
    columns = ["cosine", "signal_to_noise", "bias", "token_ratio"]
    columns += ["adam_cosine", "adam_bias", "adam_token_ratio", "correlation"]
    for task, policy in dict.fromkeys((row["task"], row["policy"]) for row in rows):
        chosen = [row for row in rows if (row["task"], row["policy"]) == (task, policy)]
        first = chosen[0]
        match, reliability = float(first["exact_match"]), first["credit_reliability"] or "-"
        yield f"### {task}, {policy}\n"
        yield (
            f"Sampled exact match {match:.3f}, {first['questions']} questions, estimates from "
            f"{float(first['tokens']):,.0f} tokens; {first['credit_turns']} turns with a true advantage, of "
            f"whose variance a share of {reliability} is no noise.\n"
        )
        yield f"| {' | '.join(titles)} |"
        yield f"|{' --- |' * len(titles)}"
        for row in chosen:
            cells = [_with_error(row[name], row[f"{name}_error"]) for name in columns]
            yield f"| {row['method']} | {float(row['tokens_per_question']):.0f} | {' | '.join(cells)} |"
        yield ""


def _with_error(value: str, error: str) -> str:
    if not value:
        return "-"
    return f"{float(value):.3f}" + (f" ({float(error):.3f})" if error else "")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gradient"), help="folder of policies and sums")
    parser.add_argument("--report", type=Path, help="write gradient.md and gradient.csv there")
    parser.add_argument("--policy", type=Path, help="measure this checkpoint, and no other policy")
    parser.add_argument(
        "--em",
        nargs="+",
        type=float,
        default=[0.1, 0.4, 0.7],
        help="sampled exact match of the policies that are trained",
    )
    parser.add_argument("--hops", nargs="+", type=int, default=[2, 3], help="hops of MiniWiki's questions")
    parser.add_argument(
        "--task", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of race.yaml"
    )
    parser.add_argument(
        "--credit",
        nargs="*",
        default=[],
        metavar="NAME[:k=v,...]",
        help="further credit rules, for chains and trees",
    )
    parser.add_argument("--questions", type=int, default=400, help="of each policy, at least 2 (default 400)")
    parser.add_argument("--tokens", type=float, default=6000.0, help="of the estimates that are compared")
    parser.add_argument(
        "--credit-turns",
        type=int,
        default=150,
        help="turns whose true advantage is estimated, at most one per question; 0 leaves this out",
    )
    parser.add_argument("--seed", type=int, default=0, help="of questions and samples")
    parser.add_argument("--jobs", type=int, default=1, help="groups of questions at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each of them")
    options = parser.parse_args(arguments)
    if options.questions < 2 or options.credit_turns < 0 or options.jobs < 1 or options.tokens <= 0:
        parser.error("need --questions >= 2, --credit-turns >= 0, --jobs >= 1 and --tokens > 0")
    options.label = " ".join([f"hops {'-'.join(map(str, options.hops))}", *options.task])
    options.task = [f"env.kwargs.hops={options.hops}".replace(" ", ""), *options.task]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample what is missing, then report."""
    options = parse(arguments)
    rows = rows_of(options.credit)
    results = []
    try:
        if options.policy:
            policies = {str(options.policy): options.policy}
        else:
            policies = prepare_policies(options.out, options.task, options.em)
        for name, policy in policies.items():
            folder = options.out / "sums" / name.strip("/").replace("/", "_").replace(" ", "_")
            jobs = plan(options, policy, folder, rows)
            sample(jobs, name, questions=options.questions, processes=options.jobs)
            results.append(figures(jobs, name, tokens=options.tokens))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on with the groups that are missing") from None
    if options.report:
        write_report(results, options.label, options.report)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        _say(f"{result['policy']}: sampled EM {result['exact_match']:.3f}")
        for row in result["methods"]:
            shown = [_with_error(_cell(row[key]), _cell(row[f"{key}_error"])) for key in Quality._fields]
            print(f"{row['method']:32} {row['tokens_per_question']:5.0f}  {'  '.join(shown)}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
