"""Command line: python -m resist_jax --workdir=DIR [--config=CARD]."""

import os
import sys

from absl import app, flags

from resist_jax.errors import ConfigError
from resist_jax.run import command, streams

command.define(flags.FLAGS)


def parse(argv: list[str], answers: bool = True) -> command.Options:
  """Reads the command line; a mistake is one line on stderr and exit code 2.

  Args:
    argv: The name of the program and its words.
    answers: Whether to answer --help and --version, and to exit with code 0.

  Returns:
    What the words ask for.
  """
  text = command.answer(argv) if answers else None
  if text:
    print(text, flush=True)
    sys.exit(0)
  try:
    return command.parse(argv, flags.FLAGS)
  except ConfigError as error:
    print('error:', error, file=sys.stderr)
    sys.exit(2)


def main(options: command.Options) -> None:
  """Trains; see `program.main`."""
  from resist_jax.run import program  # It imports JAX, which --help can spare.

  program.main(options)


if __name__ == '__main__':
  streams.forgive()
  # XLA warns about what we chose, in the middle of what we say. It reads this
  # when it is loaded; 1 is what JAX sets, perhaps in the process before this
  # one, and 0 shows the warnings.
  if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
  app.run(main, flags_parser=parse)
