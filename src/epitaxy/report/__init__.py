"""Run directories to self-contained HTML pages: one run, or several side by side."""

from epitaxy.report.comparison import build_comparison
from epitaxy.report.page import build_report

__all__ = ["build_comparison", "build_report"]
