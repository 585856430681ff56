"""Measure a mask that exists: `ray job submit --working-dir . -- python jobs/evaluate.py --config ... --mask ...`."""

from __future__ import annotations

import sys

from raygard.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
