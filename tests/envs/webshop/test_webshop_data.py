"""The original's files: conversion, goals, and files that are damaged."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from at2po_envs.webshop.goals import Goals, price_of, split_range
from at2po_envs.webshop.making import make, resolve
from at2po_envs.webshop.products import Product, find_sources
from at2po_envs.webshop.shop import open_shop

from at2po_env.data.cache import SAMPLE
from at2po_env.errors import ConfigError, DataError


def item(asin: str, **changes: Any) -> dict[str, Any]:
    fields = {
        "asin": asin,
        "name": f"Thing {asin}",
        "full_description": "A thing.",
        "small_description": ["Made of tin"],
        "pricing": "$12.50",
        "customization_options": "",
        "category": "garden",
        "query": " Things ",
        "product_category": "A › B",
        "images": ["x"],
    }
    return {**fields, **changes}


def write(folder: Path, items: Any, mined: Any = None, human: Any = None) -> Path:
    (folder / "items_shuffle_3.json").write_text(json.dumps(items), "utf-8")
    (folder / "items_ins_v2_3.json").write_text(json.dumps(mined or {}), "utf-8")
    if human is not None:
        (folder / "items_human_ins.json").write_text(json.dumps(human), "utf-8")
    return folder


def wants(text: str, *attributes: str, options: Any = ()) -> dict[str, Any]:
    return {"instruction": text, "instruction_attributes": list(attributes), "instruction_options": options}


def product(folder: Path, asin: str) -> Product:
    found = open_shop(folder).find(asin)
    assert found is not None
    return found


def test_a_product_is_cleaned_as_the_original_does(tmp_path: Path) -> None:
    options = {"Color": [{"value": " Red/Blue "}, {"value": "ÉCRU"}], "Size": None}
    raw = item(
        "A1", pricing="$1,009.38$1,030.00$7", customization_options=options, small_description="One line"
    )
    write(tmp_path, [raw], {"A1": {"attributes": ["tin can"]}})
    found = product(tmp_path, "A1")
    assert found == Product(
        "A1",
        "Thing A1",
        "A thing.",
        ("One line",),
        "$1009.38 to $1030.0",
        (1009.38, 1030.0),
        (("color", ("red | blue", "écru")),),
        "garden",
        "things",
        "A › B",
        ("tin can",),
    )
    assert open_shop(tmp_path).noted == {"option without values": 1}  # "Size"
    assert 1009.38 <= price_of(found) <= 1030.0
    assert price_of(found) == price_of(found)


@pytest.mark.parametrize("pricing", [None, "", "on request", "$", "$1.2.3"])
def test_a_product_without_a_price_costs_100_dollars_and_is_noted(
    tmp_path: Path, pricing: str | None
) -> None:
    write(tmp_path, [item("A1", pricing=pricing)])
    found = product(tmp_path, "A1")
    assert (found.prices, found.price_tag) == ((100.0,), "$100.0")
    assert open_shop(tmp_path).noted == {"no price": 1}


def test_what_cannot_be_sold_or_asked_for_is_left_out_and_noted(tmp_path: Path) -> None:
    items = [item("A1"), item("A1", name="again"), item("nan"), item("TOOLONGANID"), item("A2")]
    mined = {
        "A1": {"attributes": []},
        "A2": {"attributes": ["x"], "instruction": "Find", "instruction_attributes": []},
    }
    human = {"A1": [wants("no attribute"), wants("a tin thing.", "tin")], "GONE": [wants("gone", "x")]}
    shop = open_shop(write(tmp_path, items, mined, human))
    assert len(shop) == 2
    assert shop.noted == {
        "duplicate": 1,
        "no product id": 2,
        "human instruction without attributes": 1,
        "synthetic instruction without attributes": 1,
        "human instructions of a missing product": 1,
    }
    assert shop.goal_counts == {"human": 1, "synthetic": 0}
    assert shop.goals("human", "all")[0].question.startswith("a tin thing, and price lower than ")
    assert product(tmp_path, "A1").attributes == ()
    assert shop.find("GONE") is None


def test_synthetic_goals_are_the_combinations_of_a_product_s_options(tmp_path: Path) -> None:
    sizes, colors = ["s", "m", "l"], ["red", "blue"]
    options = {"Size": [{"value": size} for size in sizes], "Color": [{"value": color} for color in colors]}
    mined = {"A2": {"attributes": [], "instruction": "Find tin", "instruction_attributes": ["tin"]}}
    write(tmp_path, [item("A1"), item("A2", customization_options=options)], mined)
    goals = open_shop(tmp_path).goals("synthetic", "all")
    # Nested loops over the sorted names, then the published shuffle of the list.
    expected = list(itertools.product(colors, sizes))
    random.Random(233).shuffle(expected)
    found = [goals.goal(goals[index].id) for index in range(len(goals))]
    assert [goal.options for goal in found] == [
        (("color", color), ("size", size)) for color, size in expected
    ]
    color, size = expected[0]
    assert found[0].text.startswith(f"Find tin with color: {color}, and size: {size}, and price lower than ")


def test_the_upper_price_is_one_of_the_next_tens(tmp_path: Path) -> None:
    human = {f"A{number}": [wants("t", "x")] * 20 for number in range(3)}
    prices = ["$12.50", "$981.00", "$975.00"]
    items = [item(f"A{number}", pricing=price) for number, price in enumerate(prices)]
    goals = open_shop(write(tmp_path, items, None, human)).goals("human", "all")
    uppers: dict[str, set[float]] = {}
    for index in range(len(goals)):
        goal = goals.goal(goals[index].id)
        uppers.setdefault(goal.product.asin, set()).add(goal.price_upper)
    # The larger of two of 20, 30, 40, 50; of 990 alone there are no two; of 980 and 990 it is 990.
    assert uppers == {"A0": {30.0, 40.0, 50.0}, "A1": {1_000_000.0}, "A2": {990.0}}


def test_published_splits() -> None:
    assert [split_range(split, 12_087) for split in ("test", "dev", "train")] == [
        range(500),
        range(500, 1500),
        range(1500, 12_087),
    ]
    assert [len(split_range(split, 60)) for split in ("test", "dev", "train", "all")] == [10, 20, 30, 60]
    with pytest.raises(ConfigError, match="one of train, dev, test, all"):
        split_range("valid", 60)


def test_a_kind_without_goals_is_one_clear_error(tmp_path: Path) -> None:
    write(tmp_path, [item("A1")])
    with pytest.raises(DataError, match="has none of the 0 synthetic goals"):
        make(dataset=tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("items_shuffle_3.json", None, r"items_shuffle_3\.json, item 2: cannot be read"),
        ("items_shuffle_3.json", '[{"asin": "A1"}]', r"items_shuffle_3\.json, item 1: name: Field required"),
        ("items_shuffle_3.json", '{"A1": {}}', r"items_shuffle_3\.json: no JSON array"),
        ("items_shuffle_3.json", "[]", r"items_shuffle_3\.json: there is no product"),
        ("items_ins_v2_3.json", None, r"items_ins_v2_3\.json, item 1: cannot be read"),
        ("items_ins_v2_3.json", '{"A1": {"attributes": 7}}', r"items_ins_v2_3\.json, item 'A1': attributes"),
        ("items_human_ins.json", None, r"items_human_ins\.json, item 1: cannot be read"),
        ("items_human_ins.json", '{"A2": [{}]}', r"items_human_ins\.json, item 'A2': 0\.instruction"),
    ],
)
def test_damage_names_the_file_and_the_item_and_leaves_nothing(
    tmp_path: Path, name: str, text: str | None, fault: str
) -> None:
    write(tmp_path, [item("A1"), item("A2")], {"A1": {"attributes": ["x"]}}, {"A2": [wants("t", "x")]})
    path = tmp_path / name
    path.write_text(path.read_text("utf-8")[:-9] if text is None else text, "utf-8")
    with pytest.raises(DataError, match=fault):
        open_shop(tmp_path)
    assert {file.name for file in tmp_path.iterdir() if file.suffix != ".lock"} == {
        "items_shuffle_3.json",
        "items_ins_v2_3.json",
        "items_human_ins.json",
    }


def test_files_that_are_missing_or_ambiguous_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder or file"):
        find_sources(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"expected one items_shuffle\*\.json, got none"):
        find_sources(tmp_path)
    write(tmp_path, [item("A1")])
    (tmp_path / "items_shuffle.json").write_text("[]", "utf-8")
    with pytest.raises(DataError, match=r"got items_shuffle\.json, items_shuffle_3\.json"):
        find_sources(tmp_path)
    assert find_sources(tmp_path / "items_shuffle_3.json").mined.name == "items_ins_v2_3.json"
    (tmp_path / "items_ins_v2_3.json").unlink()
    with pytest.raises(DataError, match=r"there is no items_ins_v2_3\.json to go with"):
        find_sources(tmp_path / "items_shuffle_3.json")


def test_the_files_are_converted_once_and_again_when_they_change(tmp_path: Path) -> None:
    write(tmp_path, [item("A1")])
    first = open_shop(tmp_path)
    assert open_shop(tmp_path) is first
    made = (tmp_path / "items_shuffle_3.json.shop" / "products.jsonl").stat().st_mtime_ns
    write(tmp_path, [item("A1"), item("A2")])
    os.utime(tmp_path / "items_shuffle_3.json", ns=(made + 10**9, made + 10**9))
    assert len(open_shop(tmp_path)) == 2
    assert len(first) == 1  # what is open stays as it was


def test_every_product_and_goal_is_found_by_its_id(tmp_path: Path) -> None:
    asins = [f"{number:06d}" for number in random.Random(0).sample(range(10**6), 300)]
    human = {asin: [wants("t", "x")] * (number % 3) for number, asin in enumerate(asins)}
    shop = open_shop(write(tmp_path, [item(asin) for asin in asins], None, human))
    assert [shop.find_row(asin) for asin in asins] == list(range(300))
    assert shop.find_row("nosuch") is None
    goals = shop.goals("human", "all")
    assert isinstance(goals, Goals)
    assert len(goals) == 300
    for index in range(0, 300, 7):
        task = goals[index]
        assert goals.by_id(task.id) == task
        assert goals.goal(task.id).product.asin == task.metadata["asin"]
    for wrong in ("nosuch-h0", f"{asins[1]}-h1", f"{asins[1]}-h00", f"{asins[1]}-s0", asins[1], "", "-h-1"):
        with pytest.raises(DataError, match="there is no goal"):
            goals.by_id(wrong)


def test_the_downloaded_sets_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match="18 products"):
        assert resolve(None) == SAMPLE / "webshop"
    small = tmp_path / "datasets/webshop/small"
    small.mkdir(parents=True)
    (small / "items_shuffle_1000.json").touch()
    assert resolve(None) == resolve("small") == small
    assert resolve("full") == tmp_path / "datasets/webshop/full"
    assert resolve(tmp_path) == tmp_path


def test_nothing_is_written_into_the_installed_package() -> None:
    open_shop(SAMPLE / "webshop")
    assert not list((SAMPLE / "webshop").glob("*.shop"))
