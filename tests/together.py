"""Which files `pytest -n N --dist loadfile` keeps on one process, because they share what takes minutes to make.

Under pytest 9.2 the mark that pytest-xdist 3.8 has for it (`xdist_group`, `--dist loadgroup`) has no effect.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from xdist.scheduler import LoadFileScheduling

# The longest first: they are begun first.
TOGETHER = (
    ("test_learn_on_ray", "test_cluster_faults", "test_disk_full", "test_worker_killed"),
    ("test_search", "test_jobs", "test_search_killed"),
)
GROUPS = {name: number for number, names in enumerate(TOGETHER) for name in names}


class TogetherScheduling(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        name = PurePosixPath(file).stem
        return f"together {GROUPS[name]}" if name in GROUPS else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> TogetherScheduling | None:
    return TogetherScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: GROUPS.get(item.path.stem, len(TOGETHER)))
