"""Command line: python -m resist_jax --config=FILE --workdir=DIR."""

import sys

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
  except (
    flags.Error,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
  ) as error:
    _fail(error)
  except OSError as error:
    _fail(f'--config: {error}')
  return rest


def main(argv: list[str]) -> None:
  """Trains, and prints the table of the run."""
  del argv
  logging.set_verbosity(logging.WARNING)
  _make_virtual_devices()
  try:
    summary = train.train(CONFIG.value, WORKDIR.value)
  except ConfigError as error:
    _fail(error)
  except train.NonFiniteError as error:
    _fail(error, code=1)
  except Interrupted as stop:
    print(stop, file=sys.stderr)
    sys.exit(128 + stop.signum)
  print(report.summary_table([summary]))
  print(f'report: {WORKDIR.value}/report.html')


def _make_virtual_devices() -> None:
  """Gives a CPU one virtual device per worker; GPUs and TPUs stay."""
  wanted = CONFIG.value.num_devices or CONFIG.value.num_workers
  if wanted > 0:
    jax.config.update('jax_num_cpu_devices', wanted)


def _fail(error: object, code: int = 2) -> None:
  print('error:', ' '.join(str(error).split()), file=sys.stderr)
  sys.exit(code)


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
