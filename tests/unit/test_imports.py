"""Every module of the core can be the first of raygard that a process imports, as workers and jobs do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import raygard

ROOT = Path(raygard.__file__).parent
# The core, which imports itself in many orders.
ROOMS = ("bilevel", "diffusion", "mask", "values", "adaptation", "cluster/doctor")

# Each in a child of one process that has the heavy packages already.
SCRIPT = """
import importlib, os, sys, traceback
import numpy, pydantic, safetensors.torch, torch, yaml
failed = []
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print(" ".join(failed))
"""


def test_every_module_of_the_core_can_be_imported_first() -> None:
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    names = [".".join(file.relative_to(ROOT.parent).with_suffix("").parts) for file in files]
    assert len(names) > 40
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), done.stdout + done.stderr
