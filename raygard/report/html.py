"""What every page of the report is made with: templates, embedded pictures, flat settings, an atomic write."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raygard.redaction import redact
from raygard.report.plots import THEMES


def write_page(template: str, content: Mapping[str, Any], target: Path) -> Path:
    """Render a template of this package into `target`, which readers see whole or not at all; return its path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("raygard.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(content)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".report")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(page)
    os.chmod(temporary, 0o644)
    os.replace(temporary, target)
    return target


def data_uri(data: bytes) -> str:
    """A PNG file as an address that needs no request."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def both_themes(draw: Callable[[int], bytes]) -> dict[str, str]:
    """A plot in each theme, as addresses. draw: from the number of a theme to a PNG file."""
    return {name: data_uri(draw(theme)) for name, theme in THEMES.items()}


def percent_bracket(interval: Sequence[float] | None) -> str:
    """`[12.3%, 45.6%]`, or an empty string for None."""
    return f"[{interval[0]:.1%}, {interval[1]:.1%}]" if interval else ""


def settings_list(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every setting by its dotted key, credentials removed."""
    return [(key, redact(value)) for key, value in _flatten(config)]


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        pairs = ((f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items())
        return [entry for key, item in pairs for entry in _flatten(item, key)]
    if isinstance(value, list):
        return [(prefix, ", ".join(map(str, value)))]
    return [(prefix, "-" if value is None else str(value))] if prefix else []


def run_facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Versions and times of stages out of run.json."""
    facts = [(f"version of {name}", str(v)) for name, v in (run.get("versions") or {}).items()]
    return facts + [(f"time of {stage}", f"{float(s):.1f} s") for stage, s in (run.get("seconds") or {}).items()]
