"""A run as a process: its devices, its exit code, its line on an error."""

import errno
import math
import pathlib
import re
import signal
import sys
import traceback
from typing import Any, NoReturn

from absl import logging
import jax
from jax._src import xla_bridge  # Nothing public says whether it has begun.

from resist_jax import report
from resist_jax.data.prepared import may_be_back
from resist_jax.errors import (
  ConfigError,
  NonFiniteError,
  WorkdirLostError,
  one_line,
  out_of_memory,
)
from resist_jax.run import places, processes, same_program, train
from resist_jax.run.checkpoint import SaveError
from resist_jax.run.command import Options
from resist_jax.run.config import for_processes, value_if_there
from resist_jax.run.interrupt import Interrupted
from resist_jax.run.meeting import MeetingError

# What the error of a broken collective or barrier contains.
_BROKEN = re.compile(
  r'gloo|nccl|^(CANCELLED|DEADLINE_EXCEEDED|UNAVAILABLE)\b', re.IGNORECASE
)
_LESS_MEMORY = (
  'go on with more devices (num_devices), or take model.dtype=bfloat16 or '
  'lower batch_size, local_steps or evaluation.batch_size in another workdir; '
  'see "When the memory does not suffice" in docs/choosing.md.'
)
# What ends a run and can be mended by a person; `SaveError` is an OSError.
MENDABLE = (
  ConfigError, MeetingError, NonFiniteError, WorkdirLostError, OSError
)  # fmt: skip


def explain(error: BaseException, workdir: str) -> tuple[str, int]:
  """Returns what to do about one of `MENDABLE`, and the exit code.

  Args:
    error: The error.
    workdir: The workdir of the run.

  Returns:
    `(line, code)`: 2 for wrong input, 1 if something else must be mended, 75 if
    the same command may succeed.
  """
  if isinstance(error, SaveError):
    return str(error), processes.TRY_AGAIN if error.retryable else 1
  if isinstance(error, OSError):
    if may_be_back(error):
      line = f'{error}: when it can be read again, the same command goes on.'
      return line, processes.TRY_AGAIN if jax.process_count() > 1 else 1
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = 'make room in' if full else 'mend that in'
    line = f'{error}: {remedy} {workdir}; the same command goes on from the '
    return line + 'newest checkpoint.', 1
  codes = {ConfigError: 2, MeetingError: processes.TRY_AGAIN}
  return str(error), next((codes[k] for k in codes if isinstance(error, k)), 1)


def main(options: Options) -> None:
  """Trains, and prints the table of the run; exits with a code on an error.

  Args:
    options: Options of the command line.
  """
  logging.set_verbosity(logging.WARNING)  # orbax reports every step it takes.
  try:
    _start(options)
    summary = train.train(options.config, options.workdir)
  except MENDABLE as error:
    if isinstance(error, SaveError):
      processes.explain_failure()  # Another process may be the cause.
    _fail(*explain(error, options.workdir))
  except Interrupted as stop:
    print(stop, file=sys.stderr)
    processes.end()
    sys.exit(128 + stop.signum)
  except KeyboardInterrupt:  # Before the first round, or after the last.
    processes.fail('it was interrupted.', 128 + signal.SIGINT)
  except Exception as error:
    processes.explain_failure()
    if line := out_of_memory(error, _LESS_MEMORY):
      _fail(line, code=1)
    if not processes.are_several():
      raise
    if _BROKEN.search(str(error)):
      _fail(
        f'the processes lost their connection ({str(error)[:200]}), perhaps '
        'because a link broke or a clock jumped; the same command goes on from '
        'the newest checkpoint.',
        code=processes.TRY_AGAIN,
      )
    traceback.print_exc()
    # The cause may be this host.
    processes.fail(f'{type(error).__name__}: {error}', processes.TRY_AGAIN)
  if jax.process_index() == 0:
    print(report.summary_table([summary]))
    if summary['stopped_early']:
      print(f'stopped early {summary["stopped_early"]}')
    page = pathlib.Path(options.workdir) / 'report.html'
    if options.config.log.report and page.exists():
      print(f'report: {page}')
  processes.end()


def _start(options: Options) -> None:
  """Meets the other processes, and gives CPUs virtual devices."""
  config: Any = options.config
  if xla_bridge.backends_are_initialized():
    raise ConfigError(
      'the card has used JAX before the run could choose its devices, such as '
      'by jax.device_count() or jax.numpy: leave that out of the card.'
    )
  place = places.find_place(
    options.coordinator, options.num_processes, options.process_id
  )
  patience = processes.Patience(
    _seconds(config, 'timeout', 60), _seconds(config, 'progress_timeout', 1800)
  )
  # A process that is alone has nothing to compare, and starts sooner.
  description = same_program.describe(config) if place else {}
  count = processes.start(place, description, patience)
  config: Any = for_processes(config, count)  # A card may lack fields.
  counts = [config.get(n, 1) for n in ('num_workers', 'devices_per_worker')]
  if config.get('num_devices'):
    counts = [config.num_devices]
  if all(isinstance(n, int) and n > 0 for n in counts):
    # A virtual CPU device for each worker; GPUs and TPUs stay as they are.
    # Beyond 64, workers take turns: each device holds a copy of the data.
    here = -(-math.prod(counts) // count)
    jax.config.update('jax_num_cpu_devices', min(here, 64))
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # No platform is usable.
    few = 'no supported devices found' in str(error)  # On this host.
    if count > 1 and not few:  # Another process may be the cause.
      raise
    # A process that is about to end may still hold them.
    kind = MeetingError if count > 1 else ConfigError
    raise kind(
      f'JAX cannot use the devices of this host ({one_line(error)[:200]}): '
      'end what else uses them, mend their driver, or set JAX_PLATFORMS=cpu.'
    ) from error


def _seconds(config: Any, name: str, default: float) -> float:
  """Returns a field of `faults`; `validate` will report a mistake in it."""
  value = value_if_there(config, f'faults.{name}')
  usable = isinstance(value, int | float) and 0 < value < 1e9
  return value if usable else default


def _fail(error: object, code: int) -> NoReturn:
  line = ' '.join(str(error).split())
  print('error:', line, file=sys.stderr, flush=True)
  processes.fail(line, code)
