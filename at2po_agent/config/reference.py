"""Lists every setting with its type, default and meaning, as read from the sections themselves.

`docs/settings.md` and `at2po config` are made from here, so they cannot drift.
"""

import json
import math
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from at2po_agent.config.presets import replace_between
from at2po_agent.config.sections import Config

BEGIN, END = "<!-- settings: generated from at2po_agent/config -->", "<!-- end of settings -->"


class Setting(NamedTuple):
    """One setting.

    Attributes:
        key: Dotted key, as on the command line.
        type: Its type in words.
        limits: Bounds of a number in words, such as "at least 1"; empty where there are none.
        default: Default as it would be typed on the command line.
        meaning: What it does.
    """

    key: str
    type: str
    limits: str
    default: str
    meaning: str


def settings(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[Setting]:
    """Yield all settings in the order of the sections; a section that may be none is one itself."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        value = field.get_default(call_default_factory=True)
        if (group := group_of(field)) is not None:
            if value is None:
                yield Setting(key, _type(field.annotation), "", _shown(value), field.description or "")
            yield from settings(group, f"{key}.")
            continue
        yield Setting(key, _type(field.annotation), _limits(field), _shown(value), field.description or "")


def group_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, optional or not; None for a plain setting."""
    options = [field.annotation, *get_args(field.annotation)]
    return next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)


def search(words: str) -> list[Setting]:
    """Settings whose key, type, default or meaning holds every one of the words; those of the key first."""
    wanted = words.lower().split()
    found = [one for one in settings() if all(word in " ".join(one).lower() for word in wanted)]
    return sorted(found, key=lambda one: not all(word in one.key.lower() for word in wanted))


def commented_yaml(values: Mapping[str, Any], section: type[BaseModel] = Config, *, indent: int = 0) -> str:
    """Write a configuration as YAML, each setting below its meaning."""
    lines = []
    for name, field in section.model_fields.items():
        if name not in values:
            continue
        group, value, limits = group_of(field), values[name], _limits(field)
        about = f"{field.description} {_type(field.annotation)}{', ' if limits else ''}{limits}."
        nested = group is not None and isinstance(value, Mapping)
        text = field.description or "" if nested else about
        lines += ["", *(f"# {line}" for line in textwrap.wrap(text, 104 - indent))]
        if nested and group is not None:
            lines += [f"{name}:", commented_yaml(value, group, indent=indent + 2)]
        else:
            flow = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=math.inf)
            lines.append(f"{name}: {flow.strip()[1:-1]}")
    return textwrap.indent("\n".join(lines).strip("\n"), "  " if indent else "") + ("" if indent else "\n")


def schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors; an algorithm may be one word."""
    found = Config.model_json_schema()
    section = found["properties"]["algorithm"]
    preset = {"type": "string", "description": "Name of a preset."}
    found["properties"]["algorithm"] = {
        "anyOf": [preset, {"$ref": section.pop("$ref")}],
        "description": section.get("description", ""),
    }
    base = {"type": "string", "description": "File or shipped configuration, from which this one differs."}
    found["properties"] = {"base": base, **found["properties"]}
    return {
        **found,
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "at2po configuration",
    }


def settings_tables() -> str:
    """Markdown: a table for every section."""
    lines: list[str] = []
    last = None
    for one in settings():
        group = one.key.rpartition(".")[0]
        if group != last:
            lines += [
                "",
                f"## `{group}`" if group else "## Data",
                "",
                "| setting | type | default | meaning |",
            ]
            lines.append("|---|---|---|---|")
            last = group
        kind = f"{one.type}, {one.limits}" if one.limits else one.type
        cells = (f"`{one.key}`", kind, f"`{one.default}`", one.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def write_page(page: Path) -> None:
    """Replace the tables of a page."""
    replace_between(page, BEGIN, END, f"{settings_tables()}\n")


def _type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if part is type(None) else _type(part) for part in parts)
    if origin is Literal:
        return ", ".join(str(part) for part in parts)
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    if annotation in names:
        return names[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {list: "list", tuple: "list", dict: "mapping"}.get(origin or annotation, str(annotation))


def _limits(field: FieldInfo) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [
        f"{word} {getattr(part, name):g}"
        for part in field.metadata
        for name, word in words.items()
        if getattr(part, name, None) is not None
    ]
    return ", ".join(found)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    write_page(Path(sys.argv[1]))
