"""Reports of finished and unfinished runs: records, tables, plots, a page."""

import importlib
from typing import TYPE_CHECKING, Any

from resist_jax.report.records import Run, each_row, load_runs, read_rows
from resist_jax.report.tables import html_table, markdown_table, text_table
from resist_jax.report.units import byte_text

if TYPE_CHECKING:
  from resist_jax.report.page import main, summary_table, write_report

__all__ = [
  'Run',
  'byte_text',
  'each_row',
  'html_table',
  'load_runs',
  'main',
  'markdown_table',
  'read_rows',
  'summary_table',
  'text_table',
  'write_report',
]

_PAGE = ('main', 'summary_table', 'write_report')


def __getattr__(name: str) -> Any:
  if name in _PAGE:  # Imported when it is used: a run starts without pictures.
    return getattr(importlib.import_module(f'{__name__}.page'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
