"""A table of results with its caption and the command that makes it."""

from collections.abc import Sequence
import dataclasses
import html

from resist_jax import report


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of results.

  Attributes:
    caption: What it shows, from which runs, on which machine; plain text.
    command: The command that makes its results again.
    head: Names of the columns.
    rows: The cells of each row, as many as the head has.
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
    return report.markdown_table(self.head, self.rows)

  def html(self) -> str:
    """Returns an HTML figure with the caption, the command and the table."""
    return (
      f'<figure><figcaption>{html.escape(self.caption)} '
      f'<code>{html.escape(self.command)}</code></figcaption>\n'
      f'{report.html_table(self.head, self.rows)}</figure>\n'
    )

  def text(self) -> str:
    """Returns the table in columns, for a terminal."""
    return report.text_table([self.head, *self.rows])
