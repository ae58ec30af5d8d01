"""Tables of strings, written as text for a terminal, as Markdown or as HTML."""

from collections.abc import Sequence
from html import escape

Row = Sequence[str]


def text_table(
  rows: Sequence[Row],
  max_width: int | None = None,
  right_from: int | None = None,
) -> str:
  r"""Writes a table in columns, for a terminal.

  Args:
    rows: The cells of each line, the head first if there is one.
    max_width: Characters to which longer cells are cut, with an ellipsis.
    right_from: The first of the columns that are aligned to the right, from 0;
      None aligns all to the left.

  Returns:
    One line for each row, without trailing spaces.

  >>> text_table([['a', 'b'], ['10', '2']])
  'a   b\n10  2'
  >>> text_table([['workers', 's'], ['2', '0.25']], right_from=1)
  'workers     s\n2        0.25'
  """
  cells = [[_shorten(cell, max_width) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  left = len(widths) if right_from is None else right_from
  aligns = [str.ljust if i < left else str.rjust for i in range(len(widths))]
  return '\n'.join(
    '  '.join(
      align(cell, width)
      for align, cell, width in zip(aligns, row, widths, strict=True)
    ).rstrip()
    for row in cells
  )


def _shorten(cell: str, max_width: int | None) -> str:
  if max_width is None or len(cell) <= max_width:
    return cell
  return f'{cell[: max_width - 1]}…'


def markdown_table(head: Row, rows: Sequence[Row]) -> str:
  r"""Writes a table in Markdown.

  Args:
    head: Names of the columns.
    rows: The cells of each row.

  Returns:
    The table, which ends with a newline.

  >>> markdown_table(['a', 'b'], [['1', '2']])
  '| a | b |\n|---|---|\n| 1 | 2 |\n'
  """
  first, *lines = ['| ' + ' | '.join(row) + ' |' for row in (head, *rows)]
  return '\n'.join([first, '|---' * len(head) + '|', *lines, ''])


def html_table(head: Row, rows: Sequence[Row], row_heads: bool = False) -> str:
  """Writes a table in HTML, in a box of class `wide` for sideways scrolling.

  Each cell repeats the name of its column, for screens on which each row
  becomes a card.

  Args:
    head: Names of the columns.
    rows: The cells of each row, which are escaped.
    row_heads: Whether the first cell of each row is a heading, too.

  Returns:
    An HTML element.
  """

  def tag(cells: Row) -> str:
    return ''.join(f'<th>{escape(cell)}</th>' for cell in cells)

  heads = 1 if row_heads else 0
  names = [f' data-head="{escape(name)}"' if name else '' for name in head]

  def line(row: Row) -> str:
    cells = [
      f'<td{name}>{escape(cell)}</td>'
      for name, cell in zip(names[heads:], row[heads:], strict=True)
    ]
    return f'<tr>{tag(row[:heads])}{"".join(cells)}</tr>'

  body = '\n'.join(map(line, rows))
  return (
    '<div class="wide" tabindex="0"><table>'
    f'<thead><tr>{tag(head)}</tr></thead>\n'
    f'<tbody>\n{body}\n</tbody></table></div>'
  )


def html_pairs(rows: Sequence[Row]) -> str:
  """Writes names and values in HTML, in as many columns as a screen has.

  Args:
    rows: A name and a value each, which are escaped.

  Returns:
    An HTML element.
  """
  pairs = '\n'.join(
    f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>'
    for name, value in rows
  )
  return f'<dl class="pairs">\n{pairs}\n</dl>'
