"""Reads configurations (a YAML file with `key=value` on top) and reports all problems at once.

A file may name another one as its `base`, and then holds only what differs. A preset that it chooses replaces
parts of the base as one of the command line replaces parts of the file.

The order of precedence does not depend on the order of the command line: defaults, the parts of the chosen
preset, the file, single keys of the command line. A preset of the command line replaces the file's
`algorithm` section and its expansion rule; the file's shape of the trees stays, so that algorithms are
compared at equal leaves, unless the command line gives a shape: what it says holds. Options of a part in a
file replace the preset's. On the command line `loss_options.NAME=VALUE` changes one of them, and
`loss_options={}` replaces them all, as any mapping of free keys (`env.kwargs={}`) does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from at2po_agent.config.composition import Problem, composition_problems, did_you_mean, section
from at2po_agent.config.presets import PRESETS, Preset
from at2po_agent.config.sections import Config, RunConfig
from at2po_env.errors import ConfigError

CONFIG_FILE = "config.yaml"
SHAPE = ("chains", "rounds", "forks")
_SHIPPED = Path(__file__).parent / "shipped"


def shipped_configs() -> list[str]:
    """List the names that `load_config` knows without a path."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_config(
    name_or_path: str | Path,
    overrides: Iterable[str] = (),
    *,
    note: Callable[[str], None] | None = None,
) -> Config:
    """Read, compose and check a configuration.

    Args:
        name_or_path: A shipped name, a YAML file, or the folder of a run, which then is `run.dir`.
        overrides: `key=value` texts; `algorithm=NAME` chooses a preset.
        note: Told what a preset of the command line makes of the file's shape of the trees, where it differs.

    Raises:
        ConfigError: The file cannot be read, or anything in it is wrong; all problems in one message.
    """
    path = find_config(name_or_path)
    problems: list[Problem] = []
    typed, replaced = _parse_overrides(overrides, problems)
    file = _read_file(path)
    if path.name == CONFIG_FILE and Path(name_or_path).is_dir():
        _check_whole(path, file)
        file = _merge(file, {"run": {"dir": str(name_or_path)}})
    file, typed = _sections_only(file, problems), _sections_only(typed, problems)
    merged = _compose(file, typed, replaced, problems)
    config = _validate(merged, problems)
    problems += composition_problems(merged)
    if config is not None and not problems:
        if note is not None and (said := _shape_note(file, typed, config)):
            note(said)
        return config
    from_command = {key for key, _ in flatten(typed)}
    lines = [f"{path}: 1 problem" if len(problems) == 1 else f"{path}: {len(problems)} problems"]
    for problem in dict.fromkeys(problems):
        origin = " (command line)" if problem.key in from_command else ""
        lines.append(f"  {problem.key}{origin}: {problem.text}")
    raise ConfigError("\n".join(lines))


def config_text(config: Config) -> str:
    """Write a run's configuration as YAML, without its folder (the file lies there) and `served`."""
    values = config.model_dump(mode="json", exclude={"served"})
    values["run"]["dir"] = None
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _check_whole(path: Path, file: Mapping[str, Any]) -> None:
    """Refuse a run's configuration that lacks a section: its defaults would make it another run."""
    optional = ("served", "cluster")  # it is never written; an older release had none
    lacking = [name for name in Config.model_fields if name not in optional and name not in file]
    last = section(file, "run")  # the section that `config_text` writes last
    lacking += [f"run.{name}" for name in RunConfig.model_fields if "run" in file and name not in last]
    if lacking:
        raise ConfigError(
            f"{path}: the file of a run holds every setting, but this one lacks {', '.join(lacking)}; it was "
            "cut short or edited. Fix: restore it, or resume with the configuration that the run was started "
            f"with: at2po train CONFIG run.dir={path.parent} --resume"
        )


def find_config(name_or_path: str | Path) -> Path:
    """Find the file that a name, a path or a run's folder stands for.

    Raises:
        ConfigError: There is no such file.
    """
    path = Path(name_or_path)
    if path.is_dir() and (path / CONFIG_FILE).is_file():
        return path / CONFIG_FILE
    if path.is_file():
        return path
    shipped = _SHIPPED / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    raise ConfigError(
        f"no configuration {str(name_or_path)!r}: neither a file, nor a run's folder, nor a shipped "
        f"name{did_you_mean(str(name_or_path), shipped_configs())}"
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested mappings; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_file(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file, merged over its `base`: a path beside it, or what `find_config` finds."""
    file = _read_yaml(path)
    if isinstance(file.get("algorithm"), str):
        file = {**file, "algorithm": {"preset": file["algorithm"]}}
    if "base" not in file:
        return file
    name, chain = file.pop("base"), (*above, path.resolve())
    beside = path.parent / str(name)
    try:
        found = (beside if beside.is_file() else find_config(str(name))).resolve()
    except ConfigError as error:
        raise ConfigError(f"{path}: base: {error}") from error
    if found in chain:
        loop = " -> ".join(one.name for one in (*chain, found))
        raise ConfigError(f"{path}: base: {loop} leads back to itself; take one base out")
    base, own = _read_file(found, chain), section(file, "algorithm")
    algorithm, rollout = dict(section(base, "algorithm")), dict(section(base, "rollout"))
    if "preset" in own:
        given = section(file, "rollout")
        algorithm, rollout = {}, _foreign_rollout(rollout, PRESETS.get(str(own["preset"])), given)
    for part in ("loss", "credit"):  # options of a part that the file replaces
        if part in own and own[part] != algorithm.get(part):
            algorithm.pop(f"{part}_options", None)
    if section(file, "rollout").get("expansion", rollout.get("expansion")) != rollout.get("expansion"):
        rollout.pop("expansion_options", None)
    return _merge({**base, "algorithm": algorithm, "rollout": rollout}, file)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot read it as YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected sections with keys, got {type(loaded).__name__}")
    return {str(key): value for key, value in loaded.items()}


def _parse_overrides(
    overrides: Iterable[str], problems: list[Problem]
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Nest the values of `key=value` texts; `algorithm=NAME` becomes `algorithm.preset=NAME`.

    Returns:
        The nested values; and the keys that were given a whole mapping of free keys, which replaces the
        file's.
    """
    typed = OmegaConf.create({})
    replaced: list[tuple[str, ...]] = []
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key:
            problems.append(Problem(text, "expected key=value, such as train.steps=20"))
            continue
        try:
            one = OmegaConf.from_dotlist(
                [text.replace("algorithm=", "algorithm.preset=", 1) if key == "algorithm" else text]
            )
            if OmegaConf.is_dict(OmegaConf.select(one, key)) and not _is_section(tuple(key.split("."))):
                replaced.append(tuple(key.split(".")))
                OmegaConf.update(typed, key, OmegaConf.select(one, key), merge=False, force_add=True)
                continue
            typed.merge_with(one)
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
            problems.append(Problem(key, f"cannot read {text!r}: {str(error).splitlines()[0]}"))
    try:
        container = OmegaConf.to_container(typed, resolve=True)
    except OmegaConfBaseException as error:
        problems.append(Problem("command line", str(error).splitlines()[0]))
        return {}, []
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}, replaced


def _is_section(path: tuple[str, ...]) -> bool:
    """Tell whether a key names a group of settings, and not a mapping of free keys."""
    model: Any = Config
    for part in path:
        field = model.model_fields.get(part)
        model = field.annotation if field is not None else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return False
    return True


def _sections_only(values: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Report sections that hold no keys, such as `rollout: 5`, and leave them out, empty ones too."""
    kept = dict(values)
    for name, value in values.items():
        named = name == "algorithm" and isinstance(value, str)
        if not _is_section((name,)) or isinstance(value, Mapping) or named:
            continue
        del kept[name]
        if value is not None:
            problems.append(Problem(name, f"got {value!r}, expected keys with values, such as {name}.KEY"))
    return kept


def _compose(
    file: dict[str, Any], typed: dict[str, Any], replaced: list[tuple[str, ...]], problems: list[Problem]
) -> dict[str, Any]:
    chosen = section(typed, "algorithm").get("preset")
    if chosen is not None:
        given = section(typed, "rollout")
        rollout = _foreign_rollout(section(file, "rollout"), PRESETS.get(str(chosen)), given)
        file = {**file, "algorithm": {"preset": chosen}, "rollout": rollout}
    name = chosen if chosen is not None else section(file, "algorithm").get("preset", "at2po")
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        problems.append(Problem("algorithm.preset", f"no preset {name!r}{did_you_mean(str(name), PRESETS)}"))
        return _merge(_without(file, replaced), typed)
    base: dict[str, Any] = {"rollout": dict(preset.rollout), "algorithm": preset.algorithm()}
    written = [key for key in ("loss_options", "credit_options") if key in section(file, "algorithm")]
    base["algorithm"] |= {key: {} for key in written}
    base = _merge(_without_stale_options(base, file), file)
    return _merge(_without(_without_stale_options(base, typed), replaced), typed)


def _foreign_rollout(
    rollout: Mapping[str, Any], preset: Preset | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Keep from a file's rollout, under a preset of the command line, its limits and number of leaves.

    The command line's own shape (`given`) decides alone where the preset grows chains, of which there are as
    many as leaves: the file's forks would be added to them.
    """
    kept = {key: value for key, value in rollout.items() if not key.startswith(("expansion", "overlong"))}
    for part in ("thinking", "resampling"):
        kept |= {part: {k: v for k, v in section(kept, part).items() if k != "enabled"}}
    shape = [number for key in SHAPE if isinstance(number := kept.get(key), int)]
    rule = None if preset is None else given.get("expansion", preset.rollout["expansion"])
    if rule == "chains" and any(key in given for key in SHAPE):
        kept |= {"forks": 0, "rounds": 0}
    elif preset is not None and len(shape) == 3:
        kept |= preset.shape(shape[0] + shape[1] * shape[2])
    return kept


def _shape_note(file: Mapping[str, Any], typed: Mapping[str, Any], config: Config) -> str:
    """Say what a preset of the command line makes of the shape that a file gives; "" where it is the same."""
    preset, rollout = section(typed, "algorithm").get("preset"), config.rollout
    given, before = section(typed, "rollout"), section(file, "rollout")
    if preset is None or not all(isinstance(before.get(key), int) for key in SHAPE):
        return ""
    chains, rounds, forks = (before[key] for key in SHAPE)
    changed = ", ".join(
        f"rollout.{key} {before[key]} -> {getattr(rollout, key)}"
        for key in SHAPE
        if key not in given and getattr(rollout, key) != before[key]
    )
    if rollout.expansion == "chains":
        if changed:
            return f"{preset} grows chains and never forks, so that there are {rollout.leaves}: {changed}"
        if rounds * forks and not any(key in given for key in SHAPE):
            return (
                f"{preset} grows chains and never forks: the {chains} + {rounds} x {forks} leaves of the "
                f"file become {rollout.leaves} chains; rollout.chains=N gives another number"
            )
    elif changed:
        return (
            f"{preset} starts another share of the {chains + rounds * forks} leaves at the root, so that "
            f"there are {rollout.leaves}: {changed}"
        )
    elif not rollout.rounds * rollout.forks:
        return f"{preset} has nothing to fork: rollout.rounds x rollout.forks is 0; set both"
    return ""


def _without(values: Mapping[str, Any], paths: Iterable[tuple[str, ...]]) -> dict[str, Any]:
    """Leave out what stands at some keys."""
    kept = dict(values)
    for first, *rest in paths:
        if not rest:
            kept.pop(first, None)
        elif isinstance(inner := kept.get(first), Mapping):
            kept[first] = _without(inner, [tuple(rest)])
    return kept


def _without_stale_options(base: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the options of every part that a layer replaces."""
    algorithm = dict(section(base, "algorithm"))
    for part in ("loss", "credit"):
        replaced = section(layer, "algorithm").get(part)
        if replaced is not None and replaced != algorithm.get(part):
            algorithm[f"{part}_options"] = {}
    rollout = dict(section(base, "rollout"))
    rule = section(layer, "rollout").get("expansion")
    if rule is not None and rule != rollout.get("expansion"):
        rollout["expansion_options"] = {}
    return {**base, "algorithm": algorithm, "rollout": rollout}


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _validate(merged: Mapping[str, Any], problems: list[Problem]) -> Config | None:
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        for entry in error.errors():
            location = [str(part) for part in entry["loc"]]
            key, message, got = ".".join(location), entry["msg"], entry["input"]
            if entry["type"] == "extra_forbidden":
                model: Any = Config  # the section that has no such key
                for part in location[:-1]:
                    field = model.model_fields.get(part) if model is not None else None
                    known = field.annotation if field is not None else None
                    model = known if isinstance(known, type) and issubclass(known, BaseModel) else None
                near = did_you_mean(location[-1], () if model is None else model.model_fields)
                problems.append(Problem(key, f"unknown key (got {got!r}){near}"))
            elif entry["type"] == "value_error":
                problems.append(Problem(key or "configuration", message.removeprefix("Value error, ")))
            else:
                text = f"got {got!r}, expected: {message[:1].lower()}{message[1:]}"
                problems.append(Problem(key, text))
        return None
