"""Attacks runs in five ways, and counts what comes of it.

  python -m experiments.attack [--only=damages,pairs] [--seed=0]

`inputs` gives bad input, `damages` changes files that a run leaves, `pairs`
starts processes that differ, `kills` kills processes while they save, and
`order` starts processes in any order. Each writes a result file; the exit code
is 1 if anything was wrong, hung, or ended in more than one line.
"""

from collections.abc import Sequence
import os
import pathlib
import sys
import tempfile

from absl import logging
import jax

from experiments.attack import damages, inputs, judged, kills, order, pairs
from experiments.runs import RESULTS, check_results, write_record
from resist_jax import folders
from resist_jax.errors import Parser

FOLDER = RESULTS / 'attack'
KINDS = {
  'inputs': inputs.attack,
  'damages': damages.attack,
  'pairs': pairs.attack,
  'kills': kills.attack,
  'order': order.attack,
}


def main(args: Sequence[str] | None = None) -> int:
  """Attacks, and writes a result file for each kind.

  Args:
    args: The command line; that of this process if None.

  Returns:
    The exit code: 1 if an outcome is bad.
  """
  parser = Parser(
    'python -m experiments.attack',
    description=(__doc__ or '').split('\n')[0],
  )
  parser.add_argument(
    '--only', default=','.join(KINDS), help='kinds, separated by commas'
  )
  parser.add_argument('--seed', type=int, default=0, help='of the attacks')
  parser.add_argument(
    '--share', type=float, default=1.0, help='share of the attacks to make'
  )
  parser.add_argument(
    '--results', type=folders.argument, default=FOLDER, help='folder of results'
  )
  options = parser.parse_args(args)
  kinds = options.only.split(',')
  if not set(kinds) <= KINDS.keys():
    parser.error(f'--only is {options.only!r}; use {", ".join(KINDS)}.')
  if not 0 < options.share <= 1:
    parser.error(f'--share is {options.share}; it must be above 0, at most 1.')
  if options.share < 1 and options.results.resolve() == FOLDER.resolve():
    parser.error(
      '--share makes only a part of the result that is kept with the code: '
      'name a folder with --results.'
    )
  check_results(parser, options.results)
  logging.set_verbosity(logging.WARNING)  # orbax reports every step it takes.
  bad = 0
  with tempfile.TemporaryDirectory(prefix='attack') as name:
    _compile_once(f'{name}/compiled')
    for kind in kinds:
      folder = pathlib.Path(name) / kind
      folder.mkdir()
      record = KINDS[kind](options.seed, options.share, folder)
      record['share'] = options.share
      if options.share < 1:
        record['command'] += f' --share={options.share:g}'
      write_record(options.results / f'{kind}.json', record)
      outcomes = record['outcomes']
      bad += sum(outcomes.get(outcome, 0) for outcome in judged.BAD)
      print(kind, record['count'], outcomes, flush=True)
  return 1 if bad else 0


def _compile_once(folder: str) -> None:
  """Lets this process, and those that it starts, share compiled programs."""
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  options = {
    'jax_compilation_cache_dir': folder,
    'jax_persistent_cache_min_compile_time_secs': 0.0,
  }
  for name, value in options.items():
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


if __name__ == '__main__':
  sys.exit(main())
