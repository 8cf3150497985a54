"""Question-answering data, corpora and procedural worlds."""

from at2po_env.data.cache import At2poSampleWarning, cache_dir, resolve_corpus, resolve_dataset
from at2po_env.data.corpus import Corpus
from at2po_env.data.passages import Passage
from at2po_env.data.qa import QaFile, load_qa
from at2po_env.data.tasks import Task, TaskList, TaskSource

__all__ = [
    "At2poSampleWarning",
    "Corpus",
    "Passage",
    "QaFile",
    "Task",
    "TaskList",
    "TaskSource",
    "cache_dir",
    "load_qa",
    "resolve_corpus",
    "resolve_dataset",
]
