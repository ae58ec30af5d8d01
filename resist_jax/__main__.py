"""Command line: python -m resist_jax --config=FILE --workdir=DIR."""

import errno
import math
import re
import signal
import sys
import traceback
from typing import NoReturn

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from resist_jax import report
from resist_jax.errors import ConfigError
from resist_jax.run import processes, train
from resist_jax.run.checkpoint import SaveError
from resist_jax.run.interrupt import Interrupted

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Experiment card; --config.FIELD=VALUE overrides a field.'
)
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'HOST:PORT of process 0, where a run has several processes.',
)
NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes',
  None,
  'Processes of the run. Without: what the cluster says, if there is one.',
  lower_bound=1,
)
PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is, from 0.', lower_bound=0
)
# What JAX says of a collective or a barrier that broke.
_MET_NO_MORE = re.compile(
  r'gloo|nccl|^(CANCELLED|DEADLINE_EXCEEDED|UNAVAILABLE)\b', re.IGNORECASE
)


def parse(argv: list[str]) -> list[str]:
  """Parses flags; a wrong one is one line on stderr and exit code 2."""
  try:
    rest = flags.FLAGS(argv)
    for flag in (CONFIG, WORKDIR):
      if flag.value is None:
        raise flags.Error(f'--{flag.name} is missing.')
    if len(rest) > 1:
      raise flags.Error(f'unexpected argument {rest[1]!r}.')
    _check_processes()
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


def _check_processes() -> None:
  coordinator, count = COORDINATOR.value, NUM_PROCESSES.value
  process = PROCESS_ID.value
  if count == 1 or (coordinator, count, process) == (None, None, None):
    return
  if coordinator is None or count is None or process is None:
    raise flags.Error(
      '--coordinator, --num_processes and --process_id go together; under '
      'SLURM, Open MPI, Kubernetes or on a TPU pod leave all of them out.'
    )
  if process >= count:
    raise flags.Error(
      f'--process_id is {process}; with --num_processes={count} it is '
      f'0 to {count - 1}.'
    )
  if not re.fullmatch(r'.+:\d+', coordinator):
    raise flags.Error(
      f'--coordinator is {coordinator!r}; it must be HOST:PORT, of a '
      'port that is free on the host of process 0.'
    )


def main(argv: list[str]) -> None:
  """Trains, and prints the table of the run."""
  del argv
  logging.set_verbosity(logging.WARNING)  # orbax reports every step it takes.
  config = CONFIG.value
  try:
    _start(config)
    summary = train.train(config, str(WORKDIR.value))
  except (ConfigError, processes.StartError) as error:
    _fail(error)
  except train.NonFiniteError as error:
    _fail(error, code=1)
  except SaveError as error:
    processes.explain_failure()  # The reason may be another one that is lost.
    _fail(error, code=processes.TRY_AGAIN if error.again else 1)
  except OSError as error:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    _fail(
      f'{error}: {"make room in" if full else "mend that in"} {WORKDIR.value}; '
      'the same command goes on from the newest checkpoint.',
      code=1,
    )
  except Interrupted as stop:
    print(stop, file=sys.stderr)
    processes.end()
    sys.exit(128 + stop.signum)
  except KeyboardInterrupt:  # Before the first round, or after the last.
    processes.fail('it was interrupted.', 128 + signal.SIGINT)
  except Exception as error:
    processes.explain_failure()
    if jax.process_count() == 1:
      raise
    if _MET_NO_MORE.search(str(error)):
      _fail(
        f'the processes do not meet any more ({str(error)[:200]}), as where a '
        'link breaks or the clock jumps; the same command goes on from the '
        'newest checkpoint.',
        code=processes.TRY_AGAIN,
      )
    traceback.print_exc()
    processes.fail(f'{type(error).__name__}: {error}', 1)
  if jax.process_index() == 0:
    print(report.summary_table([summary]))
    print(f'report: {WORKDIR.value}/report.html')
  processes.end()


def _start(config) -> None:
  """Meets the other processes, and gives CPUs virtual devices."""
  timeout = config.get('faults', {}).get('timeout')
  if not isinstance(timeout, int | float) or not timeout > 0:
    timeout = 60  # `validate` will say what is wrong.
  count = processes.start(
    COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, timeout
  )
  counts = [config.get(n, 1) for n in ('num_workers', 'devices_per_worker')]
  if config.get('num_devices'):
    counts = [config.num_devices]
  if all(isinstance(n, int) and n > 0 for n in counts):
    # Virtual CPU devices for each worker; GPUs and TPUs stay as they are. More
    # would only copy the data more often: workers can take turns.
    here = -(-math.prod(counts) // count)
    jax.config.update('jax_num_cpu_devices', min(here, 64))


def _fail(error: object, code: int = 2) -> NoReturn:
  line = ' '.join(str(error).split())
  print('error:', line, file=sys.stderr, flush=True)
  processes.fail(line, code)


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
