"""What runs left behind, for people: records, tables, plots and a page."""

from resist_jax.report.page import main, summary_table, write_report
from resist_jax.report.records import Run, RunError, load_runs

__all__ = [
  'Run',
  'RunError',
  'load_runs',
  'main',
  'summary_table',
  'write_report',
]
