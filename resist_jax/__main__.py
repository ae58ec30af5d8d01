"""Command line: python -m resist_jax --config=FILE --workdir=DIR."""

import math
import re
import signal
import sys
import traceback
from typing import NoReturn

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from resist_jax import report, train
from resist_jax.config import ConfigError
from resist_jax.interrupt import Interrupted

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Experiment card; --config.FIELD=VALUE overrides a field.'
)
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')


def parse(argv: list[str]) -> list[str]:
  """Parses flags; a wrong one is one line on stderr and exit code 2."""
  try:
    rest = flags.FLAGS(argv)
    for flag in (CONFIG, WORKDIR):
      if flag.value is None:
        raise flags.Error(f'--{flag.name} is missing.')
    if len(rest) > 1:
      raise flags.Error(f'unexpected argument {rest[1]!r}.')
    CONFIG.value.to_dict()  # A card that failed to load fails here.
  except flags.Error as error:
    # An error inside a card comes with its traceback: the last line says it.
    lines = str(error).strip().splitlines()
    _fail(lines[-1] if 'Traceback' in str(error) else error)
  except Exception as error:  # A card is a program: it can raise anything.
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    if isinstance(error, AttributeError | KeyError) and (
      'ml_collections' in where
    ):
      # It names the nearest field, in quotes within quotes.
      text = str(error).replace('\\n', '. ')
      _fail('unknown config field ' + re.sub(r'[\\\'"]', '', text))
    _fail(f'--config cannot be loaded: {type(error).__name__}: {error}')
  return rest


def main(argv: list[str]) -> None:
  """Trains, and prints the table of the run."""
  del argv
  logging.set_verbosity(logging.WARNING)  # orbax reports every step it takes.
  config = CONFIG.value
  counts = [config.get(n, 1) for n in ('num_workers', 'devices_per_worker')]
  if config.get('num_devices'):
    counts = [config.num_devices]
  if all(isinstance(n, int) and n > 0 for n in counts):
    # Virtual CPU devices for each worker; GPUs and TPUs stay as they are. More
    # would only copy the data more often: workers can take turns.
    jax.config.update('jax_num_cpu_devices', min(math.prod(counts), 64))
  try:
    summary = train.train(config, str(WORKDIR.value))
  except ConfigError as error:
    _fail(error)
  except train.NonFiniteError as error:
    _fail(error, code=1)
  except Interrupted as stop:
    print(stop, file=sys.stderr)
    sys.exit(128 + stop.signum)
  except KeyboardInterrupt:  # Before the first round, or after the last.
    sys.exit(128 + signal.SIGINT)
  print(report.summary_table([summary]))
  print(f'report: {WORKDIR.value}/report.html')


def _fail(error: object, code: int = 2) -> NoReturn:
  print('error:', ' '.join(str(error).split()), file=sys.stderr)
  sys.exit(code)


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
