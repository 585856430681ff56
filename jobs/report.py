"""Write a run's report anew: `ray job submit --working-dir . -- python jobs/report.py /shared/runs/search`."""

from __future__ import annotations

import sys

from raygard.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "report")
    main()
