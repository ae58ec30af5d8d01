"""The command that writes a finished run's network for another library."""

import argparse
from collections.abc import Sequence
import pathlib

from resist_jax import folders
from resist_jax.errors import Parser, exit_code
from resist_jax.run import formats, trained


def main(args: Sequence[str] | None = None) -> int:
  """Writes a network, and prints where.

  Args:
    args: The command line; that of this process if None.

  Returns:
    The exit code, see `exit_code`.
  """
  parser = Parser(
    'python -m resist_jax.export',
    description='Writes the network of a finished run for another library.',
  )
  parser.add_argument('run', metavar='RUN', help='workdir of a finished run')
  parser.add_argument(
    '--to', required=True, choices=list(formats.FORMATS), help='the format'
  )
  parser.add_argument(
    '--out', help='file or folder to write (default: in RUN/exported)'
  )
  options = parser.parse_args(args)
  return exit_code(lambda: _export(options))


def _export(options: argparse.Namespace) -> None:
  name = formats.FORMATS[options.to].name
  default = pathlib.Path(options.run) / 'exported' / name
  out = folders.resolve(options.out or default, '--out')
  formats.check(options.to, out)  # Before the network is read.
  formats.write(trained.network(options.run), options.to, out)
  print(out)
