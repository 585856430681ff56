"""Reading a configuration: YAML files, dotted overrides, one line for what is wrong, and the reference of all keys."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raygard.config import RunConfig, flatten
from raygard.config_section import Section
from raygard.errors import RaygardError, nearest
from raygard.redaction import redact


def reference_markdown() -> str:
    """All keys with type, default and meaning, as Markdown (`docs/configuration.md`)."""
    lines = [
        "# Configuration reference",
        "",
        "Written by `raygard config --reference`. Any key can be given in YAML or as a dotted override.",
    ]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, Section)):
            lines += ["", f"`{name}` (default `{field.default}`): decides every random draw of the run."]
            continue
        lines += ["", f"## {name}", "", inspect.cleandoc(section.__doc__ or ""), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, item in section.model_fields.items():
            kind = item.annotation.__name__ if isinstance(item.annotation, type) else str(item.annotation)
            kind = kind.replace("typing.", "").replace("|", "\\|")
            default = json.dumps(item.default)
            lines.append(f"| `{name}.{key}` | {kind} | `{default}` | {item.description or ''} |")
    return "\n".join(lines) + "\n"


# Besides YAMLError, PyYAML lets through what dates, very long integers and deep nesting raise.
UNREADABLE = (OSError, ValueError, yaml.YAMLError, RecursionError)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply dotted overrides such as `mask.freeze_ratio=0.5` (values are YAML).

    Raises RaygardError (one line, nearest valid key) for an unreadable file, an unknown key, a value of the
    wrong type or out of range, a malformed override, or a value that holds a secret.
    """
    data: Any = {}
    source = "configuration"
    if path is not None:
        source = str(path)
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except UNREADABLE as error:
            raise RaygardError(f"cannot read configuration {path}: {_yaml_problem(error)}") from None
        data = {} if data is None else data
        if not isinstance(data, dict):
            raise RaygardError(f"{path}: expected a mapping of sections, found {type(data).__name__}")
    for override in overrides:
        _apply_override(data, override)
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise RaygardError(f"{source}: {describe_error(error)}") from None
    for key, value in flatten(config).items():
        # The store's address may have credentials: they are used, and left out of all that is written.
        if key != "tracking.tracking_uri" and redact(value) != str(value):
            raise RaygardError(
                f"{source}: {key} holds a password or token, which would be written into every record of the run; take "
                "it out (secrets belong into environment variables)"
            )
    return config


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RaygardError(f"{_short(override)} is not of the form key=value, e.g. mask.freeze_ratio=0.5")
    try:
        value = yaml.safe_load(text)
    except UNREADABLE as error:
        raise RaygardError(
            f"override {_short(override)}: the value is not valid YAML ({_yaml_problem(error)})"
        ) from None
    *parents, last = key.strip().split(".")
    node = data
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RaygardError(f"override {_short(override)}: {_short(parent)} is not a section")
        node = child
    node[last] = value


def describe_error(error: ValidationError) -> str:
    """The first problem pydantic found, as one line with the nearest valid key."""
    first = error.errors()[0]
    names = [str(part) for part in first["loc"]]
    dotted = " ".join(".".join(names).split())[:100]
    kind = first["type"]
    if kind == "extra_forbidden":
        section: Any = RunConfig
        for name in names[:-1]:
            section = section.model_fields[name].annotation
        known = {".".join([*names[:-1], field]) for field in section.model_fields}
        elsewhere = {key for key in flatten(RunConfig()) if key.rpartition(".")[2] == names[-1]}
        return f"unknown key '{dotted}'{nearest(dotted, elsewhere or known)}"
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    if kind == "value_error":
        return f"{dotted}: {message}" if len(names) > 1 else message
    if kind == "tuple_type":
        message = "needs a list such as [a, b]"
    return f"{dotted}: {message[0].lower()}{message[1:]}, got {_short(first['input'])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error) or type(error).__name__
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return where + " ".join(str(problem).split())[:200]
