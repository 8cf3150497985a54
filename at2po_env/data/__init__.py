"""Questions to ask and passages to search: files, downloads and a procedural world.

Read `tasks` (questions with their answers), `qa` (files of questions), `corpus` (files of passages), and
`cache` (the file to use when none is given) first. `catalog` and `download` get the public data,
`convert` takes original releases, `miniwiki` generates worlds; `jsonl` and `progress` help all of them.
"""

from at2po_env.data.cache import At2poSampleWarning, cache_dir, resolve_corpus, resolve_dataset
from at2po_env.data.corpus import Corpus, Passage
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
