"""The command that evaluates a finished run."""

import argparse
from collections.abc import Sequence
import pathlib
import sys
from typing import Any

import ml_collections

from resist_jax import folders
from resist_jax.errors import ConfigError, Parser, exit_code
from resist_jax.run import assess, assess_module, measured, trained
from resist_jax.run.config import differences, flat
from resist_jax.run.export import Predictor
from resist_jax.run.trained import Asked, Trained

# Fields that do not change what a network learns.
_FREE = {
  'seed', 'data.dir', 'checkpoint_every', 'keep_checkpoints', 'eval_every',
  'faults.timeout', 'faults.progress_timeout',
}  # fmt: skip


def main(args: Sequence[str] | None = None) -> int:
  """Evaluates a run, writes what was measured, and prints a table.

  Args:
    args: The command line; that of this process if None.

  Returns:
    The exit code, see `exit_code`.
  """
  options = _parser().parse_args(args)
  return exit_code(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> None:
  default = pathlib.Path(options.run) / 'evaluation'
  out = folders.resolve(options.out or default, '--out')
  folders.check_writable(out, '--out')
  asked = _asked(options)
  # All of them, before the first one is tested for minutes.
  runs = [trained.load(run) for run in trained.folders_of(options.run)]
  found = []
  for run in runs:  # What is tested is written, whatever stops the next one.
    found.append(evaluate(run, asked))
    measured.write(out / run.folder.name if runs[1:] else out, found[-1])
  if runs[1:]:
    measured.write_together(out, found)
  if said := _mixed([run.config for run in runs]):
    print(said, file=sys.stderr)
  print(measured.together(found) if found[1:] else measured.text(found[0]))
  print(f'written to {out}')


def _mixed(configs: Sequence[ml_collections.ConfigDict]) -> str:
  """Says in which settings runs differ that are shown together; '' for none."""
  first, *others = [flat(config) for config in configs]
  differ = {n for o in others for n in differences(first, o) if n in first}
  listed = sorted(n for n in differ - _FREE if not n.startswith('log.'))
  if not listed:
    return ''
  more = ', ...' if listed[4:] else ''
  return (
    f'these runs differ in more than their seed ({", ".join(listed[:4])}{more})'
    ', so a mean over them says little.'
  )


def _parser() -> Parser:
  parser = Parser(
    'python -m resist_jax.evaluate',
    description='Tests the network of a finished run: on its own tests or on '
    'another set, and shallower networks inside it.',
  )
  parser.add_argument(
    'run', metavar='RUN',
    help='workdir of a finished run, or a folder of several',
  )  # fmt: skip
  parser.add_argument(
    '--data', default='',
    help='test on this set instead, named as in --config.data.name',
  )  # fmt: skip
  parser.add_argument(
    '--data_dir', default=None, help='the folder of prepared TFDS sets'
  )
  parser.add_argument(
    '--depths', default='some',
    help='blocks to keep, such as 0,2,8, or some (the default), or none',
  )  # fmt: skip
  parser.add_argument(
    '--draws', type=int, default=3, help='random choices of blocks for a depth'
  )
  parser.add_argument(
    '--depth_images', type=int, default=2000,
    help='examples of each test that shallower networks are tested on',
  )  # fmt: skip
  parser.add_argument(
    '--out', help='folder to write to (default: RUN/evaluation)'
  )
  return parser


def _asked(options: argparse.Namespace) -> Asked:
  for name, least in (('draws', 0), ('depth_images', 1)):
    value = getattr(options, name)
    if value < least:
      raise ConfigError(f'--{name} is {value}; it must be at least {least}.')
  return Asked(
    options.data,
    options.data_dir,
    options.depths,
    options.draws,
    options.depth_images,
  )


def evaluate(run: Trained, asked: Asked) -> dict[str, Any]:
  """Measures how good a run is.

  Args:
    run: The run.
    asked: What to measure.

  Returns:
    `run`, `data`, and what `assess.assess` returns, or `assess_module.assess`.
    JSON values.

  Raises:
    ConfigError: If the data are not there, or an option does not fit.
  """
  images = isinstance(run.model, Predictor)
  found = (assess if images else assess_module).assess(run, asked)
  name = asked.data or run.config.data.name
  return {'run': str(run.folder), 'data': name, **found}
