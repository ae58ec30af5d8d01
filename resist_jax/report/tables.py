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

  Args:
    head: Names of the columns; empty for a table without a head.
    rows: The cells of each row, which are escaped.
    row_heads: Whether the first cell of each row is a heading, too.

  Returns:
    An HTML element.
  """

  def tag(name: str, cells: Row) -> str:
    return ''.join(f'<{name}>{escape(cell)}</{name}>' for cell in cells)

  first = f'<thead><tr>{tag("th", head)}</tr></thead>\n' if head else ''
  heads = 1 if row_heads else 0
  body = '\n'.join(
    f'<tr>{tag("th", row[:heads])}{tag("td", row[heads:])}</tr>' for row in rows
  )
  return (
    f'<div class="wide"><table>{first}<tbody>\n{body}\n</tbody></table></div>'
  )
