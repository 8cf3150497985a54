"""Lists the public data sets: names, splits, sizes, and their repositories on the Hugging Face hub."""

from collections.abc import Mapping
from typing import NamedTuple

from at2po_env.errors import DataError

GB = 10**9
FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"


class RemoteFile(NamedTuple):
    """One file to get: the parts of one data set repository on the hub, put together in order.

    Attributes:
        repo: The repository.
        parts: Paths in it.
        target: The file to make, relative to the cache folder.
        limit: The most bytes that it may have, packed or not; about twice what was published.
        packed: The parts are a gzip (of one file, or of a tar archive with one file).
    """

    repo: str
    parts: tuple[str, ...]
    target: str
    limit: int
    packed: bool = False


class RemoteFolder(NamedTuple):
    """One folder to get, without folders in it; its files have at most `limit` bytes."""

    repo: str
    folder: str
    target: str
    limit: int


class RemoteUrl(NamedTuple):
    """One JSON file to get from an address that is no hub's; it has at most `limit` bytes."""

    url: str
    target: str
    limit: int


class RemoteArchive(NamedTuple):
    """A zip file to get from an address that is no hub's, and to unpack into a folder.

    Attributes:
        url: The address.
        target: The folder to make, relative to the cache folder.
        limit: The most bytes that the zip file may have.
        unpacked: The most bytes that what it holds may have.
        kept: Only files of this name are unpacked.
    """

    url: str
    target: str
    limit: int
    unpacked: int
    kept: str


class QaSet(NamedTuple):
    """One of the seven question sets: number of questions per split (`None`: not counted here)."""

    name: str
    title: str
    splits: Mapping[str, int | None]

    def file(self, split: str) -> RemoteFile:
        """Return the file of a split; `target` is relative to the cache folder."""
        path = f"{self.name}/{split}.jsonl"
        return RemoteFile(FLASHRAG, (path,), f"datasets/{path}", 4 * GB)


_QA_SETS = (
    QaSet("hotpotqa", "HotpotQA", {"train": 90_447, "dev": 7_405}),
    QaSet("2wikimultihopqa", "2WikiMultihopQA", {"train": None, "dev": 12_576}),
    QaSet("musique", "MuSiQue", {"train": None, "dev": 2_417}),
    QaSet("bamboogle", "Bamboogle", {"test": 125}),
    QaSet("nq", "NaturalQuestions", {"train": 79_168, "dev": None, "test": 3_610}),
    QaSet("triviaqa", "TriviaQA", {"train": None, "dev": None, "test": 11_313}),
    QaSet("popqa", "PopQA", {"test": 14_267}),
)
QA_SETS: Mapping[str, QaSet] = {qa.name: qa for qa in _QA_SETS}

WIKI_18 = "wiki-18"
CORPORA: Mapping[str, RemoteFile] = {
    WIKI_18: RemoteFile(
        "PeterJinGo/wiki-18-corpus",
        ("wiki-18.jsonl.gz",),
        "corpora/wiki-18/wiki-18.jsonl",
        30 * GB,
        packed=True,
    )
}
INDEXES: Mapping[str, RemoteFile | RemoteFolder] = {
    "wiki-18-e5": RemoteFile(
        "PeterJinGo/wiki-18-e5-index", ("part_aa", "part_ab"), "corpora/wiki-18/e5_Flat.index", 130 * GB
    ),
    "wiki-18-bm25": RemoteFolder("PeterJinGo/wiki-18-bm25-index", "bm25", "corpora/wiki-18/bm25", 6 * GB),
}

WEBSHOP = {"small": "datasets/webshop/small", "full": "datasets/webshop/full"}
"""Folders of the products of WebShop, relative to the cache folder."""

_DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="


def _webshop(
    size: str, suffix: str, mined: str, items: str, limits: tuple[int, int]
) -> tuple[RemoteUrl, ...]:
    """List the files of one size by the ids that the original's setup gives; the products come last."""
    folder = WEBSHOP[size]
    human = "14Kb5SPBk_jfdLZ_CDBNitW98QLDlKR5O"
    return (
        RemoteUrl(_DRIVE + human, f"{folder}/items_human_ins.json", GB // 20),
        RemoteUrl(_DRIVE + mined, f"{folder}/items_ins_v2{suffix}.json", limits[0]),
        RemoteUrl(_DRIVE + items, f"{folder}/items_shuffle{suffix}.json", limits[1]),
    )


_ALFWORLD = "https://github.com/alfworld/alfworld/releases/download/0.4.0/json_2.1.2_tw-pddl.zip"

WORLDS: Mapping[str, tuple[RemoteUrl | RemoteArchive, ...]] = {
    "webshop": _webshop(
        "small",
        "_1000",
        "1IduG0xl544V_A_jv3tHXC0kyFi7PnyBu",
        "1EgHdxQ_YxqIQlvvq5iKlCrkEKR6-j0Ib",
        (GB // 100, GB // 20),
    ),
    "webshop-full": _webshop(
        "full",
        "",
        "1s2j6NgHljiZzQNL3veZaAiyW_qDEgBNi",
        "1A2whVgOO0euk5O13n2iYDM0bQRkkRduB",
        (GB, 12 * GB),
    ),
    "alfworld": (RemoteArchive(_ALFWORLD, "datasets/alfworld", GB, 4 * GB, "game.tw-pddl"),),
}
"""Files of worlds that are played by commands."""


def qa_set(name: str) -> QaSet:
    """Return a question set by its FlashRAG name or its environment's: "nq" or "NaturalQuestions".

    Raises:
        DataError: there is none of that name.
    """
    for qa in QA_SETS.values():
        if name.lower() in (qa.name, qa.title.lower()):
            return qa
    raise DataError(f"There is no data set {name!r}. Fix: use one of {', '.join(QA_SETS)}.")


def files_of(name: str) -> list[RemoteFile | RemoteFolder | RemoteUrl | RemoteArchive]:
    """Return the files behind a name: a question set, a corpus, an index, a world, or "all" of them.

    Raises:
        DataError: there is nothing of that name.
    """
    if name == "all":
        return [file for one in (*QA_SETS, *CORPORA, *INDEXES, *WORLDS) for file in files_of(one)]
    if name in CORPORA:
        return [CORPORA[name]]
    if name in INDEXES:
        return [INDEXES[name]]
    if name in WORLDS:
        return [*WORLDS[name]]
    try:
        qa = qa_set(name)
    except DataError as error:
        known = ", ".join((*QA_SETS, *CORPORA, *INDEXES, *WORLDS))
        raise DataError(f"There is no data set {name!r}. Fix: use one of {known}, all.") from error
    return [qa.file(split) for split in qa.splits]
