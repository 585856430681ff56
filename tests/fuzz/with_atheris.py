"""Coverage-guided fuzzing of one reader: `python -m tests.fuzz.with_atheris manifest -max_total_time=60`.

Not part of the test suite: needs `pip install atheris`. Options after the reader's name go to libFuzzer.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["raygard", "json", "csv"]):
    from tests.fuzz.readers import make_readers

if __name__ == "__main__":
    name, *options = sys.argv[1:]
    folder = Path(tempfile.mkdtemp(prefix="raygard-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    reader = next(reader for reader in make_readers(folder) if reader.name == name)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(reader.seeds):
        (corpus / str(number)).write_bytes(seed)

    def one_input(data: bytes) -> None:
        reader(data)

    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input)
    atheris.Fuzz()
