"""Writes a static page of all committed results: tables, pictures, claims.

  python -m experiments.site --out=site/index.html

The page contains its pictures, its style and its script, so it needs no other
file and no network.
"""

from collections import Counter
from collections.abc import Sequence
from html import escape
import pathlib

from matplotlib.figure import Figure

from experiments import claims, digits, table2
from experiments.claims import Claim
from experiments.experiment import Results, spread
from experiments.pictures import Picture
from experiments.sections import INTRODUCTION, Section, sections
from resist_jax import folders, report
from resist_jax.errors import ConfigError, Parser
from resist_jax.report import shell
from resist_jax.report.compare import compare

_CLASSES = {
  claims.HOLDS: 'holds',
  claims.IN_PART: 'part',
  claims.FAILS: 'fails',
  claims.UNTESTED: 'untested',
}
_PLURAL = {
  claims.HOLDS: 'hold',
  claims.IN_PART: 'hold in part',
  claims.FAILS: 'do not hold',
  claims.UNDECIDED: 'are undecided',
  claims.UNTESTED: 'are untested',
}
_SCALES = {'paper': "at the paper's scale", 'cpu': 'small, on a CPU'}


def main() -> None:
  """Writes the page."""
  parser = Parser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--out',
    type=folders.output_file,
    default=pathlib.Path('site/index.html'),
    help='file to write',
  )
  args = parser.parse_args()
  try:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    parts = list(sections(with_figures=True))
    args.out.write_text(page(parts, list(claims.every())), 'utf-8')
  except OSError as error:
    parser.error(f'--out={args.out} cannot be written: {error.strerror}.')
  except ConfigError as error:  # A result file is damaged.
    parser.error(str(error))
  print(args.out)


def page(parts: Sequence[Section], every: Sequence[Claim] = ()) -> str:
  """Returns the page.

  Args:
    parts: Its sections, in order.
    every: All claims, for a table of their verdicts.

  Returns:
    HTML that needs no other file.
  """
  links = '\n'.join(
    f'<li><a href="#part{i}">{escape(part.title)}</a></li>'
    for i, part in enumerate(parts)
  )
  body = '\n'.join(_section(i, part) for i, part in enumerate(parts))
  said = ''.join(f'<p>{escape(text)}</p>' for text in lead(every))
  introduction = '\n'.join(f'<p>{escape(text)}</p>' for text in INTRODUCTION)
  return shell.page(
    'ResIST in JAX: results',
    f'<div class="lead">{said}</div>\n{introduction}\n'
    f'<nav><ul>\n{links}\n</ul></nav>\n{_overview(every)}\n{body}',
  )


def lead(every: Sequence[Claim]) -> list[str]:
  """Returns what came out, in a few sentences.

  Args:
    every: All claims.
  """
  said = []
  for where, results, cells in (
    (
      "CIFAR-100 with the paper's network and settings",
      Results('table2', 'paper'),
      {p: table2.cell('cifar100', p, 4) for p in table2.NAMES},
    ),
    (
      'handwritten digits',
      Results('digits', 'cpu'),
      {p: digits.cell(p) for p in table2.NAMES},
    ),
  ):
    ours, theirs = (
      [100 * v for v in results.values(cells[p], 'test_accuracy')]
      for p in ('resist', 'local_sgd')
    )
    found = compare(ours, theirs)
    if found.verdict != 'untested':
      ranks = {'level': 'they are level', 'undecided': 'not ranked'}
      verdict = ranks.get(found.verdict, f'ResIST is {found.verdict}')
      said.append(
        f'On {where}, four workers reach {spread(ours)}% with ResIST and '
        f'{spread(theirs)}% with local SGD: {verdict}, {found.why}.'
      )
  gigabytes = claims.sent()
  if gigabytes:
    ours, theirs = gigabytes
    said.append(
      f"In a round of the paper's ResNet101, four workers send {ours:.2f} GB "
      f'with ResIST and {theirs:.2f} GB with local SGD, as compiled.'
    )
  counts = Counter(claim.verdict for claim in every)
  listed = [f'{counts[v]} {_PLURAL[v]}' for v in claims.VERDICTS if counts[v]]
  if listed:
    said.append(f'{len(every)} claims are judged below: {", ".join(listed)}.')
  return said


def _overview(every: Sequence[Claim]) -> str:
  """Returns all claims with their verdicts, and the rule."""
  if not every:
    return ''
  by_text: dict[str, dict[str, str]] = {}
  for claim in every:
    by_text.setdefault(claim.text, {})[claim.scale] = claim.verdict
  rows = [
    [text, *(verdicts.get(scale, '') for scale in _SCALES)]
    for text, verdicts in by_text.items()
  ]
  table = report.html_table(['claim', *_SCALES.values()], rows, row_heads=True)
  rules = ''.join(f'<p class="quiet">{escape(r)}</p>' for r in claims.RULES)
  return f'<h2>Claims</h2>\n{rules}{table}'


def _section(number: int, part: Section) -> str:
  tables = ''.join(table.html() for table in part.tables)
  pictures = ''.join(
    _picture(part.title, name, drawn) for name, drawn in part.figures.items()
  )
  return (
    f'<section id="part{number}"><h2>{escape(part.title)}</h2>\n'
    f'{_claims(part.claims)}{pictures}{tables}</section>'
  )


def _claims(judged: Sequence[Claim]) -> str:
  """Returns claims in words, each with its verdict and the numbers."""
  items = ''.join(
    f'<li class="{_CLASSES.get(c.verdict, "undecided")}">'
    f'<b>{escape(c.verdict)}</b>{escape(c.text)} '
    f'<span class="quiet">{escape(c.found)}</span></li>\n'
    for c in judged
  )
  return f'<ul class="claims">\n{items}</ul>\n' if items else ''


def _picture(title: str, name: str, drawn: Picture | Figure) -> str:
  if isinstance(drawn, Picture):
    return drawn.html()
  return shell.picture(drawn, f'{title}: {name.replace("_", " ")}')


if __name__ == '__main__':
  main()
