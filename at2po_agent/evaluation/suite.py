"""Evaluates a policy on the published question sets, as `at2po eval --suite` does.

The results are written after every set, so an evaluation of hours that is stopped keeps what it has measured.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from at2po_agent.config.sections import Config
from at2po_agent.environments import make_eval_env
from at2po_agent.evaluation import published
from at2po_agent.evaluation.evaluate import evaluate_mode
from at2po_agent.policies.base import Policy
from at2po_agent.runs.disk import disk_refusals, replace_file
from at2po_agent.runs.progress import Progress
from at2po_env.data.cache import cache_dir
from at2po_env.data.catalog import CORPORA, QA_SETS, WIKI_18
from at2po_env.errors import ConfigError

Origin = Literal["given", "cache", "sample", "missing"]
_SHARED_OPTIONS = (
    *("retriever", "retriever_options", "topk", "max_turns", "protocol", "answer_format", "on_malformed"),
    *("prompt", "tool_timeout_s", "tool_retries"),
)
"""Keywords of another environment that the sets take over; its other keywords describe its own questions."""


class Source(NamedTuple):
    """The file that holds the questions of a set; no path for the sample and for a missing set."""

    origin: Origin
    split: str
    path: Path | None


def find_questions(name: str, dataset: str | None) -> Source:
    """Find the questions of a set: the test split, else dev.

    Args:
        name: A set.
        dataset: A folder with `NAME/SPLIT.jsonl`; None looks into the cache and else takes the sample.

    Raises:
        ConfigError: `dataset` is not a folder.
    """
    if dataset is not None and not Path(dataset).is_dir():
        raise ConfigError(
            f"dataset: got {dataset}, expected for --suite a folder with NAME/test.jsonl or NAME/dev.jsonl "
            f"(NAME is one of {', '.join(published.SHORT)}); dataset=null takes what `at2po data get` got"
        )
    for split in published.SPLITS:
        if dataset is not None:
            path = Path(dataset) / name / f"{split}.jsonl"
        elif split in QA_SETS[name].splits:
            path = cache_dir() / QA_SETS[name].file(split).target
        else:
            continue
        if path.is_file():
            return Source("cache" if dataset is None else "given", split, path)
    return Source("sample" if dataset is None else "missing", published.published_split(name), None)


def suite_sources(config: Config, suite: str) -> dict[str, Source]:
    """Find the questions of every set of a suite.

    Raises:
        ConfigError: No such suite; nothing to ask; no set of the suite is in the folder.
    """
    sources = {name: find_questions(name, config.dataset) for name in published.suite_sets(suite)}
    if all(source.origin == "missing" for source in sources.values()):
        raise ConfigError(
            f"{config.dataset}: holds none of {', '.join(sources)}; "
            "expected NAME/test.jsonl or NAME/dev.jsonl"
        )
    if not config.eval.questions:
        raise ConfigError("eval.questions: got 0, expected how many questions of each set to ask")
    return sources


def evaluate_suite(
    config: Config,
    suite: str,
    progress: Progress,
    *,
    policy: Policy,
    files: Sequence[Path] = (),
    about: Callable[[], Mapping[str, Any]] = dict,
) -> dict[str, Any]:
    """Ask the policy the first `eval.questions` questions of every set, greedily, one chain each.

    Args:
        config: Limits and data.
        suite: A key of `published.SUITES`.
        progress: Listener.
        policy: The policy that answers.
        files: The results are written there after every set.
        about: Returns further members of the results; called after every set.

    Returns:
        Sets, averages, published rows and remarks, as JSON values.

    Raises:
        ConfigError: See `suite_sources`.
    """
    sources = suite_sources(config, suite)
    figures: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {}
    for name, source in sources.items():
        if source.origin != "missing":
            env, title = make_eval_env(set_config(config, name, source)), QA_SETS[name].title
            result = evaluate_mode(config, "greedy", env, policy, progress, phase=title)
            env.close()
            figures[name] = result.to_json()
        results = {**suite_results(config, suite, sources, figures), **about()}
        for file in files:
            write_results(file, {**results, "complete": name == list(sources)[-1]})
    return {**results, "complete": True}


def set_config(config: Config, name: str, source: Source) -> Config:
    """Make the configuration that evaluates one set; options that all environments share stay."""
    own = {"id": f"at2po/{QA_SETS[name].title}-v0", "kwargs": {**_options(config), "split": source.split}}
    return config.model_copy(
        update={
            "dataset": None if source.path is None else str(source.path),
            "env": config.env.model_copy(update={"kwargs": {}}),
            "eval": config.eval.model_copy(update=own),
        }
    )


def suite_results(
    config: Config, suite: str, sources: Mapping[str, Source], figures: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Collect everything that is printed and written, as JSON values."""
    averages = {group: published.group_average(group, figures) for group in published.suite_groups(suite)}
    passages = _passages(config)
    return {
        "suite": suite,
        "model": config.model.path,
        "mode": "greedy",
        "questions_per_set": config.eval.questions,
        "environment": _options(config),
        "passages": passages,
        "sets": {
            name: {
                "title": QA_SETS[name].title,
                "origin": source.origin,
                "split": source.split,
                "path": None if source.path is None else str(source.path),
                "size": published.set_size(name),
                "figures": None if name not in figures else dict(figures[name]),
            }
            for name, source in sources.items()
        },
        "averages": {group: None if mean is None else mean.to_json() for group, mean in averages.items()},
        "remarks": _remarks(sources, passages),
        "published": {
            "model": published.PUBLISHED_MODEL,
            "source": published.PUBLISHED_SOURCE,
            "remark": published.PUBLISHED_REMARK,
            "rows": [row._asdict() for row in published.PUBLISHED],
        },
    }


def _options(config: Config) -> dict[str, Any]:
    """Keywords of the sets' environments."""
    given = {**config.env.kwargs, **config.eval.kwargs}
    ids = {f"at2po/{qa.title}-v0" for qa in QA_SETS.values()}
    own = {"split", "dataset"}
    if (config.eval.id or config.env.id) not in ids:
        own = given.keys() - set(_SHARED_OPTIONS)
    return {key: value for key, value in given.items() if key not in own}


def _passages(config: Config) -> dict[str, Any]:
    """The retriever, and the origin of its passages."""
    options = _options(config)
    retriever = str(options.get("retriever", "bm25"))
    corpus = options.get("corpus", config.corpus)
    if retriever.startswith("http"):
        return {"retriever": retriever, "origin": "server", "path": None}
    if corpus is not None:
        return {"retriever": retriever, "origin": "given", "path": str(corpus)}
    cached = cache_dir() / CORPORA[WIKI_18].target
    here = cached.is_file()
    path = str(cached) if here else None
    return {"retriever": retriever, "origin": "cache" if here else "sample", "path": path}


def _remarks(sources: Mapping[str, Source], passages: Mapping[str, Any]) -> list[str]:
    """Reasons why the figures cannot be compared with the published ones."""

    def named(origin: Origin) -> str:
        return ", ".join(published.SHORT[name] for name, source in sources.items() if source.origin == origin)

    remarks = []
    if names := named("sample"):
        remarks.append(
            f"NOT COMPARABLE with the published figures: {names} asked from the shipped sample of "
            "12 questions. Fix: at2po data get NAME, or dataset=FOLDER."
        )
    if passages["origin"] == "sample":
        remarks.append(
            "NOT COMPARABLE with the published figures: the passages are the shipped sample. "
            f"Fix: at2po data get {WIKI_18}, or corpus=FILE."
        )
    elif passages["origin"] == "given":
        remarks.append(
            f"The passages are those of {passages['path']}; "
            "the published figures search wiki-18 (21 M passages)."
        )
    if names := named("missing"):
        remarks.append(f"Missing: {names}; an average marked * leaves them out.")
    other = [name for name, source in sources.items() if source.split != published.published_split(name)]
    if other:
        remarks.append(
            "Another split than the published one: "
            + ", ".join(f"{published.SHORT[name]} ({sources[name].split})" for name in other)
        )
    return remarks


def write_results(file: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON; the file is whole, or as it was.

    Raises:
        RunFolderError: The disk refuses.
    """
    with disk_refusals(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
