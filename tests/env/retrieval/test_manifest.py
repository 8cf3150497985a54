from pathlib import Path

import pytest

from at2po_env.data.corpus import Corpus
from at2po_env.errors import DataError, RetrievalError
from at2po_env.retrieval import manifest as module
from at2po_env.retrieval.building import verify_index
from at2po_env.retrieval.manifest import build_once, check, home_of, plan, verify

LINE = '{{"id": "{0}", "contents": "\\"T{0}\\"\\ntext {0}"}}\n'


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(LINE.format(i) for i in range(3)))
    return Corpus(path)


def write(work: Path) -> None:
    (work / "data").write_bytes(b"0123456789")


def test_a_finished_index_passes_its_check_and_is_not_built_again(corpus: Corpus) -> None:
    wanted = plan("demo", corpus, {"a": 1})
    home = build_once(home_of(corpus, wanted), wanted, write)
    assert home.parent == corpus.path.parent
    assert corpus.digest[:16] in home.name
    assert check(home, wanted).files["data"].bytes == 10
    assert build_once(home, wanted, lambda _: pytest.fail("built twice")) == home


def test_a_build_that_was_killed_goes_on_only_with_the_same_plan(corpus: Corpus, tmp_path: Path) -> None:
    seen: list[bool] = []

    def killed(work: Path) -> None:
        seen.append((work / "part").exists())
        (work / "part").write_text("x")
        raise KeyboardInterrupt

    home = tmp_path / "index"
    for settings in ({"a": 1}, {"a": 1}, {"a": 2}, {"a": 2}):
        with pytest.raises(KeyboardInterrupt):
            build_once(home, plan("demo", corpus, settings), killed)
        assert not home.exists()
    assert seen == [False, True, False, True]


@pytest.mark.parametrize("damage", ["short", "long", "flipped", "missing", "no manifest", "bad manifest"])
def test_a_damaged_index_is_refused_with_the_file_and_the_fix(corpus: Corpus, damage: str) -> None:
    wanted = plan("demo", corpus, {"a": 1})
    home = build_once(home_of(corpus, wanted), wanted, write)
    data, manifest = home / "data", home / "manifest.json"
    {
        "short": lambda: data.write_bytes(b"012"),
        "long": lambda: data.write_bytes(b"0123456789a"),
        "flipped": lambda: data.write_bytes(b"0123456780"),
        "missing": data.unlink,
        "no manifest": manifest.unlink,
        "bad manifest": lambda: manifest.write_text(manifest.read_text()[:-20]),
    }[damage]()
    with pytest.raises(RetrievalError, match="Fix: delete") as caught:
        check(home, wanted)
    assert ("manifest.json" if "manifest" in damage else "data") in str(caught.value)


def test_another_corpus_kind_or_setting_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    wanted = plan("demo", corpus, {"a": 1})
    home = build_once(home_of(corpus, wanted), wanted, write)
    other = tmp_path / "other.jsonl"
    other.write_text(LINE.format(7))
    for wrong, says in (
        (plan("demo", Corpus(other), {"a": 1}), "another corpus"),
        (plan("demon", corpus, {"a": 1}), "kind"),
        (plan("demo", corpus, {"a": 2}), r"a 1 \(wanted 2\)"),
    ):
        with pytest.raises(RetrievalError, match=says):
            check(home, wrong)
        with pytest.raises(RetrievalError, match=says):
            build_once(home, wrong, write)
    assert check(home, wanted)


def test_no_room_is_an_error_that_keeps_what_was_done(corpus: Corpus, tmp_path: Path) -> None:
    def full(work: Path) -> None:
        (work / "part").write_text("x")
        with Path("/dev/full").open("w") as file:  # writing there fails as on a full disk
            file.write("x")

    home = tmp_path / "index"
    with pytest.raises(RetrievalError, match="No space left"):
        build_once(home, plan("demo", corpus, {}), full)
    assert (tmp_path / "index.partial" / "part").exists()


def test_a_corpus_with_a_bad_line_leaves_nothing_to_go_on_from(corpus: Corpus, tmp_path: Path) -> None:
    def bad(work: Path) -> None:
        write(work)
        raise DataError("line 2")

    with pytest.raises(DataError):
        build_once(tmp_path / "index", plan("demo", corpus, {}), bad)
    assert not list(tmp_path.glob("index*"))


def test_damage_in_a_large_file_is_found_by_verifying(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HASHED_BYTES", 9)
    wanted = plan("demo", corpus, {})
    home = build_once(tmp_path / "index", wanted, write)
    assert verify(home) == check(home, wanted)
    (home / "data").write_bytes(b"0123456780")
    check(home, wanted)  # the size is right, and that is all that is looked at
    with pytest.raises(RetrievalError, match="checksum"):
        verify(home)


def test_verifying_needs_checksums_and_the_right_corpus(corpus: Corpus, tmp_path: Path) -> None:
    home = build_once(tmp_path / "index", plan("demo", corpus, {}), write)
    assert verify_index(home, corpus.path).passages == 3
    other = tmp_path / "other.jsonl"
    other.write_text(LINE.format(7))
    with pytest.raises(RetrievalError, match="another corpus"):
        verify_index(home, other)
    text = (home / "manifest.json").read_text()
    found = module.Manifest.model_validate_json(text)
    (home / "manifest.json").write_text(text.replace(f'"{found.files["data"].sha256}"', "null"))
    assert check(home, plan("demo", corpus, {}))
    with pytest.raises(RetrievalError, match="no checksum"):
        verify(home)
