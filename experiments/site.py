"""Writes a static page of all committed results: tables and figures.

  python -m experiments.site --out=site/index.html

The page contains its pictures and its style, so it needs no other file.
"""

import argparse
import base64
from html import escape
import pathlib

from matplotlib.figure import Figure

from experiments.sections import INTRODUCTION, Section, sections
from resist_jax.report import plots

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 68rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1rem 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
nav ul { columns: 16rem; padding-left: 1.2rem; }
a { color: #005a8c; }
figure { margin: 1rem 0; }
figcaption { max-width: 46rem; color: #444; font-size: .9rem; }
code { font-size: .85em; background: #f3f3f3; padding: .1em .3em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0;
  overflow-wrap: normal; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; vertical-align: top;
  border-bottom: 1px solid #e4e4e4; }
th { border-bottom: 2px solid #999; font-weight: 600; }
td { white-space: nowrap; }
img { display: block; max-width: 100%; height: auto; }
.picture { overflow-x: auto; }
@media (max-width: 40rem) {
  .picture img { max-width: none; width: auto; height: 15rem; }
}
"""


def main() -> None:
  """Writes the page."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    default=pathlib.Path('site/index.html'),
    help='file to write',
  )
  args = parser.parse_args()
  try:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(list(sections(with_figures=True))), 'utf-8')
  except OSError as error:
    parser.error(f'--out={args.out} cannot be written: {error.strerror}.')
  print(args.out)


def page(parts: list[Section]) -> str:
  """Returns the page.

  Args:
    parts: Its sections, in order.

  Returns:
    HTML that needs no other file.
  """
  links = '\n'.join(
    f'<li><a href="#part{i}">{escape(part.title)}</a></li>'
    for i, part in enumerate(parts)
  )
  body = '\n'.join(_section(i, part) for i, part in enumerate(parts))
  introduction = '\n'.join(f'<p>{escape(text)}</p>' for text in INTRODUCTION)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>ResIST in JAX: results</title><style>{STYLE}</style></head>\n'
    f'<body><h1>ResIST in JAX: results</h1>\n{introduction}\n'
    f'<nav><ul>\n{links}\n</ul></nav>\n{body}\n</body></html>\n'
  )


def _section(number: int, part: Section) -> str:
  tables = ''.join(table.html() for table in part.tables)
  return (
    f'<section id="part{number}"><h2>{escape(part.title)}</h2>\n{tables}'
    f'{"".join(_picture(*item) for item in part.figures.items())}</section>'
  )


def _picture(name: str, figure: Figure) -> str:
  data = base64.b64encode(plots.render_png(figure)).decode()
  width = round(96 * figure.get_figwidth())  # CSS pixels in an inch.
  return (
    f'<figure class="picture"><img alt="{escape(name)}" width="{width}" '
    f'src="data:image/png;base64,{data}"></figure>\n'
  )


if __name__ == '__main__':
  main()
