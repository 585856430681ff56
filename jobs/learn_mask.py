"""Learn a freeze mask on the cluster: `ray job submit --working-dir . -- python jobs/learn_mask.py --config ...`."""

from __future__ import annotations

import sys

from raygard.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "learn")
    main()
