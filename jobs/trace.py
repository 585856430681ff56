"""Record what fine-tuning leaves: `ray job submit --working-dir . -- python jobs/trace.py --config ... --out ...`."""

from __future__ import annotations

import sys

from raygard.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "trace")
    main()
