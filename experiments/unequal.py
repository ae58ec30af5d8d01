"""Compares equal depths with depths by speed on processes of unequal speed.

  python -m experiments.unequal

Process 1 of two is suspended for two thirds of the time, in short intervals, so
it has a third of the speed. The seconds of a round are compared. The result is
written to experiments/results/unequal/digits.json. This needs Linux and two
cores.
"""

from collections.abc import Iterator
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from experiments.launch import local
from experiments.runs import (
  RESULTS,
  check_results,
  load,
  machine,
  provenance,
  write_record,
)
from experiments.table import Table
from resist_jax import report
from resist_jax.errors import ConfigError, Parser, refused

TARGET = RESULTS / 'unequal' / 'digits.json'
FLAGS = (
  '--config=experiments/configs/digits.py',
  '--config.num_workers=2',
  '--config.num_rounds=12',
  '--config.eval_every=1000',
  '--config.checkpoint_every=1000',
)
DEPTHS = {'equal': (), 'by speed': ('--config.depths=by_speed',)}
# Seconds for which the slow process runs, and is suspended, in turn.
RUNNING, SUSPENDED = 0.01, 0.02
REPEATS = 3


class Throttle(threading.Thread):
  """A thread that suspends a process periodically until it ends."""

  def __init__(self, process: subprocess.Popen):
    super().__init__(daemon=True)
    self._process = process

  def run(self) -> None:
    """Suspends and continues the process in turn."""
    while self._process.poll() is None:
      time.sleep(RUNNING)
      self._process.send_signal(signal.SIGSTOP)
      time.sleep(SUSPENDED)
      self._process.send_signal(signal.SIGCONT)


def measure(flags: tuple[str, ...], cores: list[int]) -> dict[str, Any]:
  """Trains once with process 1 throttled, each process on a core of its own."""
  with tempfile.TemporaryDirectory() as folder:
    args = [*FLAGS, *flags, f'--workdir={folder}/run']
    started = []
    try:
      for core, command in zip(cores, local.commands(2, args), strict=True):
        quiet = subprocess.DEVNULL
        # The first process says for both why a run fails.
        process = subprocess.Popen(
          command,
          stdout=quiet,
          stderr=quiet if started else None,
          env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
        )
        started.append(process)
        os.sched_setaffinity(process.pid, {core})
      Throttle(started[1]).start()
      codes = [process.wait() for process in started]
    finally:  # One that is suspended would wait for ever.
      for process in started:
        process.kill()
    if any(codes):
      sys.exit(f'error: the processes ended with {codes}.')
    run = pathlib.Path(folder) / 'run'
    rows = report.read_rows(run / 'metrics.jsonl')
    seconds = [row['seconds_training'] for row in rows]
    blocks = [len(worker) for worker in rows[-1]['slots']['stage3_chain']]
    return {
      # The clock of a row is read after the next round, except for the last.
      'seconds_round': (seconds[-2] - seconds[0]) / (len(rows) - 2),
      'blocks': blocks,
      'config': json.loads((run / 'config.json').read_text()),
    }


def _cores() -> list[int]:
  """Returns two cores that this process may use."""
  try:
    found = sorted(os.sched_getaffinity(0))[:2]
  except AttributeError:  # Such as on macOS.
    found = []
  if len(found) < 2:
    sys.exit(refused(ConfigError('this needs Linux and two cores.')))
  return found


def main() -> None:
  """Measures both settings in turn, and writes the result."""
  parser = Parser(description=(__doc__ or '').split('\n')[0])
  parser.parse_args()
  check_results(parser)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  cores = _cores()
  results: dict[str, list[dict[str, Any]]] = {name: [] for name in DEPTHS}
  for _ in range(REPEATS):
    for name, flags in DEPTHS.items():
      results[name].append(measure(flags, cores))
      last = results[name][-1]
      print(name, last['blocks'], f'{last["seconds_round"]:.3f} s', flush=True)
  medians = {
    name: statistics.median(r['seconds_round'] for r in runs)
    for name, runs in results.items()
  }
  speedup = medians['equal'] / medians['by speed']
  print(f'depths by speed are {speedup:.2f} times as fast')
  record = {
    'command': 'python -m experiments.unequal',
    'speed_of_process_1': RUNNING / (RUNNING + SUSPENDED),
    'seconds_round': medians,
    'runs': results,
    'provenance': provenance('2 x cpu'),
  }
  write_record(TARGET, record)


def tables() -> Iterator[Table]:
  """Yields the seconds of a round with each kind of depths."""
  for r in load('unequal/*.json'):
    rows = [
      [name, ' and '.join(map(str, r['runs'][name][-1]['blocks']))]
      + [f'{seconds:.2f} s']
      for name, seconds in r['seconds_round'].items()
    ]
    caption = (
      'Seconds of a round of two processes with a core each, on handwritten '
      'digits. The second process is paused so often that it has '
      f'{r["speed_of_process_1"]:.0%} of the speed of the first. Medians of '
      f'{len(next(iter(r["runs"].values())))} alternating runs on '
      f'{machine(r["provenance"])}.'
    )
    yield Table(caption, r['command'], ['depths', 'blocks', 'a round'], rows)


if __name__ == '__main__':
  sys.exit(main())
