"""The whole flow on the cluster: `ray job submit --working-dir . -- python jobs/run.py --config ... --out ...`."""

from __future__ import annotations

import sys

from raygard.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()
