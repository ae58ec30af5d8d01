"""Reports of finished and unfinished runs: records, tables, plots, a page."""

from resist_jax.report.page import main, summary_table, write_report
from resist_jax.report.plots import byte_text
from resist_jax.report.records import Run, load_runs, read_rows
from resist_jax.report.tables import html_table, markdown_table, text_table

__all__ = [
  'Run',
  'byte_text',
  'html_table',
  'load_runs',
  'main',
  'markdown_table',
  'read_rows',
  'summary_table',
  'text_table',
  'write_report',
]
