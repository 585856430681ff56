"""Documents against the code: every raygard command in them parses, and the reference is current."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from benchmarks.user_savings import markdown, summarize
from raygard.cli import app
from raygard.config_file import load_config, reference_markdown
from raygard.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "clusters" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split("#")[0].strip()
                words = re.sub(r"^accelerate launch .*?-m raygard\.cli", "raygard", words)
                if words.startswith("raygard "):
                    found.append(words)
    return found


@pytest.mark.parametrize("command", commands())
def test_documented_commands_parse(command: str) -> None:
    group = typer.main.get_command(app)
    name, *arguments = shlex.split(command)[1:]
    assert name in group.commands, f"no command {name}"
    group.commands[name].make_context(name, arguments, resilient_parsing=False)
    overrides = [a for a in arguments if re.match(r"^[a-z_]+\.[a-z_0-9]+=", a)]
    load_config(None, overrides)


def test_documents_name_commands() -> None:
    assert len(commands()) >= 6


def test_configuration_reference_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference_markdown()


def test_the_table_of_exit_codes_is_complete() -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", (ROOT / "docs" / "cluster-jobs.md").read_text(), re.MULTILINE)
    assert [(int(code), name) for code, name in rows] == [(code.value, code.name) for code in ExitCode]


def test_every_job_is_documented() -> None:
    text = (ROOT / "docs" / "cluster-jobs.md").read_text()
    for job in (ROOT / "jobs").glob("*.py"):
        assert f"`jobs/{job.name}`" in text, job.name


def test_links_between_documents_exist() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_files_named_in_the_readme_exist() -> None:
    for path in re.findall(
        r"`((?:raygard|jobs|clusters|benchmarks|docs|tests)/[\w./-]+\.\w+)`", (ROOT / "README.md").read_text()
    ):
        assert (ROOT / path).exists(), path


def test_the_tables_of_users_savings_are_those_that_were_measured() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "user_savings.json").read_text())
    text = (ROOT / "docs" / "performance.md").read_text()
    for part in (found, found["options"]):
        for table in markdown(summarize(part["rows"]), part["sd21"], part["device"]).split("\n\n"):
            assert table in text
