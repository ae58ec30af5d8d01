"""Makes the README's results from the committed result files.

python -m experiments.readme
"""

import pathlib

from experiments.sections import sections
from experiments.table import Table

README = pathlib.Path(__file__).parent.parent / 'README.md'
BEGIN = '<!-- results: made by python -m experiments.readme -->\n'
END = '<!-- end of results -->\n'


def main() -> None:
  """Rewrites the results section of the README."""
  README.write_text(with_results(README.read_text()))


def with_results(text: str) -> str:
  """Returns a README with the results of today's files.

  Args:
    text: The README.

  Returns:
    It, with all between the two markers replaced.
  """
  before, rest = text.split(BEGIN)
  _, after = rest.split(END)
  parts = [
    part
    for section in sections()
    for part in (f'### {section.title}\n', *map(Table.markdown, section.tables))
  ]
  return before + BEGIN + '\n' + '\n'.join(parts) + '\n' + END + after


if __name__ == '__main__':
  main()
