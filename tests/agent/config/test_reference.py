"""The list of settings, its page, its schema and its files follow the sections."""

import json

import pytest
from helpers.paths import ROOT
from pydantic import TypeAdapter

from at2po_agent.config.loading import flatten, load_config, shipped_configs
from at2po_agent.config.reference import commented_yaml, schema, search, settings, settings_tables, write_page
from at2po_agent.config.sections import Config, LoraConfig

PAGE = ROOT / "docs" / "settings.md"


def test_every_setting_is_listed_once_with_its_default():
    listed = {one.key: one for one in settings()}
    assert len(listed) == len(list(settings()))
    values = dict(flatten(Config().model_dump(mode="json")))
    adapters = {f"model.lora.{name}": value for name, value in LoraConfig().model_dump().items()}
    assert values["model.lora"] is None
    values |= adapters  # the settings of a section that may be none, with their defaults once it is there
    assert listed.keys() == values.keys()
    assert all(one.meaning for one in listed.values())
    assert listed["optimizer.lr"].limits == "above 0"
    assert listed["rollout.top_p"].limits == "above 0, at most 1"
    assert listed["eval.id"].type == "text or none"
    assert listed["train.packing"].type == "auto, tree, rows"
    for key, one in listed.items():
        assert one.default == values[key] or json.loads(one.default) == values[key]


def test_a_search_finds_what_has_all_words():
    found = [one.key for one in search("learning rate")]
    assert "optimizer.lr" in found
    assert "train.steps" not in found
    assert search("optimizer LR")[0].key == "optimizer.lr"
    assert search("no such words anywhere") == []


@pytest.mark.parametrize("name", shipped_configs())
def test_a_commented_file_is_the_same_configuration(name, tmp_path):
    config = load_config(name)
    path = tmp_path / "mine.yaml"
    text = commented_yaml(config.model_dump(mode="json"))
    path.write_text(text, encoding="utf-8")
    assert load_config(path) == config
    assert "# Learning rate after the warmup." in text
    assert max(map(len, text.splitlines())) < 400


def test_the_schema_allows_the_shipped_files_and_refuses_what_is_unknown():
    found = schema()
    json.dumps(found)
    assert set(found["properties"]) == {"base", *Config.model_fields}
    assert found["additionalProperties"] is False
    assert found["properties"]["algorithm"]["anyOf"][0]["type"] == "string"  # `algorithm: at2po`
    assert found["$defs"]["OptimizerConfig"]["properties"]["lr"]["exclusiveMinimum"] == 0
    assert TypeAdapter(Config).json_schema()["properties"].keys() == found["properties"].keys() - {"base"}


def test_the_page_shows_the_settings_as_they_are(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    assert settings_tables() in text, (
        "docs/settings.md is old: python -m at2po_agent.config.reference docs/settings.md"
    )
    copy = tmp_path / "settings.md"
    copy.write_text(text.replace("`optimizer.lr`", "`drifted`", 1), encoding="utf-8")
    write_page(copy)
    assert copy.read_text(encoding="utf-8") == text
