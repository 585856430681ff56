"""One self-contained HTML page about a run: what the mask blocks, what it costs, and what that rests on."""

from raygard.report.page import build_report

__all__ = ["build_report"]
