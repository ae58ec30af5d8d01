"""Writes RESULTS.md, and the README's tables, from the committed result files.

  python -m experiments.readme

A test compares both files with what this command would write.
"""

import os
import pathlib
import sys

from experiments import headline
from experiments.sections import INTRODUCTION, Section, sections
from experiments.table import Table
from resist_jax.errors import ConfigError, refused

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / 'README.md'
RESULTS = ROOT / 'RESULTS.md'
BEGIN = '<!-- headline: written by python -m experiments.readme -->\n'
END = '<!-- end of headline -->\n'


def main() -> int:
  """Writes both files; returns the exit code."""
  try:
    readme, text = with_headline(README.read_text()), results()
  except ConfigError as error:  # A result file is damaged.
    return refused(error)
  README.write_text(readme)
  RESULTS.write_text(text)
  return 0


def with_headline(text: str) -> str:
  """Returns the README with the first tables of today's result files.

  Args:
    text: The README.

  Returns:
    The README, in which they replace all text between the two markers.
  """
  before, rest = text.split(BEGIN)
  _, after = rest.split(END)
  tables = [f'{t.grid()}\n{t.caption}\n\n' for t in headline.tables()]
  return f'{before}{BEGIN}\n{"".join(tables)}{END}{after}'


def results() -> str:
  """Returns the text of RESULTS.md."""
  parts = list(sections())
  links = [f'- [{part.title}](#{anchor(part.title)})' for part in parts]
  introduction = '\n\n'.join(INTRODUCTION)
  body = '\n'.join(map(_section, parts))
  return (
    '<!-- written by python -m experiments.readme: do not edit -->\n\n'
    f'# Results\n\n{introduction}\n\n' + '\n'.join(links) + f'\n\n{body}'
  )


def anchor(title: str) -> str:
  """Returns the name that GitHub and Sphinx give to a heading.

  Args:
    title: The heading.

  Returns:
    What stands behind the # of a link to it.

  >>> anchor("The paper's count of bytes (Table 1)")
  'the-papers-count-of-bytes-table-1'
  """
  kept = [c for c in title.lower() if c.isalnum() or c in ' -']
  return ''.join(kept).replace(' ', '-')


def _section(section: Section) -> str:
  pictures = [
    f'![{section.title}: {path.stem.replace("_", " ")}]'
    f'({os.path.relpath(path, ROOT)})\n'
    for path in section.pictures
  ]
  tables = map(Table.markdown, section.tables)
  return '\n'.join([f'## {section.title}\n', *tables, *pictures])


if __name__ == '__main__':
  sys.exit(main())
