"""From files to a validated config: YAML and JSON are read and merged as Snakemake does, and every error is named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lungddpm.core.errors import ConfigError
from lungddpm.core.values import merge_values

if TYPE_CHECKING:
    from lungddpm.config.models import Config

_PRESETS = {path.stem: path for path in Path(__file__).with_name("presets").glob("*.yaml")}

_MOVED = {
    "diffusion": "generators.lung_ddpm",
    "lung_ddpm_plus": "generators.lung_ddpm_plus",
    "workflow.denoiser_gpus": "workflow.training_gpus",
    "workflow.denoiser_nodes": "workflow.training_nodes",
}
"""Keys of earlier versions and what they are now."""


def parse_config(values: dict[str, Any], origin: str | Path = "config") -> Config:
    """Validate a merged config; a preset that it names provides the values of keys that it does not set.

    Args:
        values: the nested mapping, as YAML or Snakemake gives it.
        origin: the file that it came from, for messages.

    Raises:
        ConfigError: naming every wrong key and what it should be.
    """
    # Imported here because it loads all generator modules: one that fails to load is a config error as well.
    from lungddpm.config.models import Config

    try:
        return Config.model_validate(_over_preset(values))
    except ValidationError as error:
        raise ConfigError(
            origin,
            "; ".join(_explain(problem) for problem in error.errors()),
            "See config/README.md for every key, or run 'lungddpm config schema'.",
        ) from None


def load_config(*sources: Path | str, needs_source: bool = True) -> Config:
    """Read, merge and validate configuration files (see `read_values`).

    Args:
        sources: files of the config, or JSON texts, later ones over earlier ones.
        needs_source: whether `source.path` must exist; if not, it may also be wrong.

    Raises:
        ConfigError: a file is missing, is not YAML, or the merged values are wrong.
    """
    values = read_values(*sources)
    if not needs_source and isinstance(source := values.get("source", {}), dict):
        values["source"] = {**source, "path": source.get("path") or "."}
    if not needs_source and isinstance(tests := values.get("external_tests"), dict):
        values["external_tests"] = {
            name: {"path": ".", **each} if isinstance(each, dict) else each for name, each in tests.items()
        }
    return parse_config(values, " + ".join(map(_name_of, sources)))


def read_values(*sources: Path | str) -> dict[str, Any]:
    """Read and deep-merge YAML (or JSON) files from left to right; lists are replaced, as Snakemake does.

    Args:
        sources: paths of files, or mappings as JSON text.

    Raises:
        ConfigError: a file is missing, or is not YAML.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        name = _name_of(source)
        values = parse_yaml(str(source) if _is_text(source) else _read_text(Path(source)), name)
        if not isinstance(values or {}, dict):
            raise ConfigError(name, "is not a mapping of keys to values", "Start from config.yaml.")
        merged = merge_values(merged, values or {})
    return merged


def _over_preset(values: dict[str, Any]) -> dict[str, Any]:
    """The values merged over those of their preset; `published` means the defaults of the models and has no file."""
    file = _PRESETS.get(str(values.get("preset")))
    return merge_values(read_values(file), values) if file else values


def _is_text(source: Path | str) -> bool:
    return isinstance(source, str) and source.startswith("{")


def _name_of(source: Path | str) -> str:
    return "--configfile" if _is_text(source) else str(source)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(path, "does not exist", "Pass the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(path, f"cannot be read as YAML ({error})", "Fix the file.") from None


def parse_yaml(text: str, origin: str | Path) -> Any:
    """The value of a YAML or JSON document; duplicate keys are an error, because YAML would drop the first one.

    Keys are duplicates if they are equal once parsed, like `yes` and `true`, or differ only in type, like `1` and
    `"1"`. The keys of a merge key (`<<`) may be overridden, as that is its purpose.

    Args:
        text: the document.
        origin: the file that it came from, for messages.

    Raises:
        ConfigError: it is not YAML, or has a key twice; the message has both lines.
    """
    try:
        value = json.loads(text)
        text = text.replace("\t", " ")  # YAML does not allow tabs, and JSON never has them inside strings
    except (ValueError, RecursionError):
        value = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        for key, first, second in _repeated_keys(root, loader):
            raise ConfigError(
                origin, f"has the key {key} twice, in line {first} and in line {second}", "Keep one of them."
            )
        return value if value is not None or root is None else loader.construct_document(root)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(origin, f"cannot be read as YAML ({error})", "Fix the file.") from None


def _repeated_keys(root: yaml.Node | None, loader: yaml.SafeLoader) -> Iterator[tuple[str, int, int]]:
    """Duplicate keys by dotted path, each with the line numbers (from 1) of its first two occurrences."""
    waiting, seen = [(root, "")], set()
    while waiting:
        node, path = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, path) for item in node.value]
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[Any, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = f"{path}.{key.value}" if path else str(key.value)
            waiting.append((value, name))
            if not isinstance(key, yaml.ScalarNode):
                continue
            # A merge key has no value of its own.
            is_merge = key.tag == "tag:yaml.org,2002:merge"
            meaning = key.value if is_merge else loader.construct_object(key)
            for spelling in {meaning, str(meaning)}:
                if spelling in lines:
                    yield name, lines[spelling], line
            lines |= dict.fromkeys((meaning, str(meaning)), line)


def _explain(problem: ErrorDetails) -> str:
    # Pydantic puts union branches into the location ("roles.test.list[str]"), but users know only keys.
    from lungddpm.config.models import Generators

    location = problem["loc"]
    if location[:1] == ("generators",) and len(location) > 2 and location[1] not in Generators.model_fields:
        # The same for the kinds of variants.
        location = (*location[:2], *location[3:])
    path = ".".join(str(part) for part in location if re.fullmatch(r"[A-Za-z0-9_]+", str(part)))
    if problem["type"] == "extra_forbidden" and path in _MOVED:
        return f"{path}: is now {_MOVED[path]}"
    if problem["type"] == "extra_forbidden":
        given = " (this generator's input from the reference is fixed)"
        of_ladder = location[:1] == ("generators",) and location[-1] in ("hint", "background")
        return f"{path}: there is no such key{given if of_ladder else ''}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = problem.get("input")
    return (
        f"{path}: {message}" + (f", got {shown!r}" if isinstance(shown, str | int | float) else "") if path else message
    )
