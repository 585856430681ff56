"""Fine-tune as a user does: `ray job submit --working-dir . -- python jobs/adapt.py --data ... --out ...`.

It trains in the job's own process, which must hold the device: add `--entrypoint-num-gpus 1` before `--`.
"""

from __future__ import annotations

import sys

from raygard.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "adapt")
    main()
