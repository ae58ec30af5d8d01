"""A table of results, and how it is written."""

from collections.abc import Sequence
import dataclasses
import html


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of text under a head.

  Attributes:
    caption: What it shows, of which runs, on which machine; plain text.
    command: What makes it again.
    head: Names of the columns.
    rows: As many cells each as the head has.
  """

  caption: str
  command: str
  head: Sequence[str]
  rows: Sequence[Sequence[str]]

  def markdown(self) -> str:
    """Returns the caption, the command and a Markdown table.

    >>> print(Table('Ours.', 'make', ['a', 'b'], [['1', '2']]).markdown())
    Ours. `make`
    <BLANKLINE>
    | a | b |
    |---|---|
    | 1 | 2 |
    <BLANKLINE>
    """
    return f'{self.caption} `{self.command}`\n\n{self.grid()}'

  def grid(self) -> str:
    """Returns the Markdown table alone."""
    head, *rows = [
      '| ' + ' | '.join(row) + ' |' for row in (self.head, *self.rows)
    ]
    return '\n'.join([head, '|---' * len(self.head) + '|', *rows, ''])

  def html(self) -> str:
    """Returns the same as a figure of HTML."""

    def line(cells: Sequence[str], kind: str) -> str:
      marked = [f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells]
      return f'<tr>{"".join(marked)}</tr>'

    rows = '\n'.join(line(row, 'td') for row in self.rows)
    return (
      f'<figure><figcaption>{html.escape(self.caption)} '
      f'<code>{html.escape(self.command)}</code></figcaption>\n'
      f'<div class="wide"><table><thead>{line(self.head, "th")}</thead>\n'
      f'<tbody>\n{rows}\n</tbody></table></div></figure>\n'
    )

  def text(self) -> str:
    r"""Returns the rows in columns, for a terminal.

    >>> Table('', '', ['a', 'b'], [['10', '2']]).text()
    'a   b\n10  2'
    """
    rows = [list(self.head), *map(list, self.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join(
      '  '.join(map(str.ljust, row, widths)).rstrip() for row in rows
    )
