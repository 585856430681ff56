"""Find the freeze ratio to release with: `ray job submit --working-dir . -- python jobs/search.py --config FILE`."""

import sys

from raygard.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "search")
    main()
