"""Two processes of unequal speed: equal depths beside depths by speed.

  python -m experiments.unequal

Process 1 is stopped for two thirds of the time, in short turns, so it has a
third of the speed. What is compared is the seconds of a round. The result file
is experiments/results/unequal/digits.json. It takes Linux and two cores.
"""

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
from experiments.provenance import provenance
from experiments.runs import RESULTS, write_record
from resist_jax import report

TARGET = RESULTS / 'unequal' / 'digits.json'
FLAGS = (
  '--config=experiments/configs/digits.py',
  '--config.num_workers=2',
  '--config.num_rounds=12',
  '--config.eval_every=1000',
  '--config.checkpoint_every=1000',
)
DEPTHS = {'equal': (), 'by speed': ('--config.depths=by_speed',)}
RUNS, STOPS = 0.01, 0.02  # Seconds of a turn of the slow process.
REPEATS = 3


class Throttle(threading.Thread):
  """Stops a process again and again, until it ends."""

  def __init__(self, process: subprocess.Popen):
    super().__init__(daemon=True)
    self._process = process

  def run(self) -> None:
    """Takes turns."""
    while self._process.poll() is None:
      time.sleep(RUNS)
      self._process.send_signal(signal.SIGSTOP)
      time.sleep(STOPS)
      self._process.send_signal(signal.SIGCONT)


def measure(flags: tuple[str, ...]) -> dict[str, Any]:
  """Trains once, process 1 throttled, each process on a core of its own."""
  with tempfile.TemporaryDirectory() as folder:
    args = [*FLAGS, *flags, f'--workdir={folder}/run']
    started = []
    for core, command in enumerate(local.commands(2, args)):
      quiet = subprocess.DEVNULL
      process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
      os.sched_setaffinity(process.pid, {core})
      started.append(process)
    Throttle(started[1]).start()
    codes = [process.wait() for process in started]
    if any(codes):
      raise RuntimeError(f'the processes ended with {codes}.')
    run = pathlib.Path(folder) / 'run'
    rows = report.read_rows(run / 'metrics.jsonl')
    seconds = [row['seconds_training'] for row in rows]
    blocks = [len(worker) for worker in rows[-1]['slots']['stage3_chain']]
    return {
      # All rows but the last are read when the next round has trained.
      'seconds_round': (seconds[-2] - seconds[0]) / (len(rows) - 2),
      'blocks': blocks,
      'config': json.loads((run / 'config.json').read_text()),
    }


def main() -> None:
  """Measures both in turn, and writes the result."""
  found: dict[str, list[dict[str, Any]]] = {name: [] for name in DEPTHS}
  for _ in range(REPEATS):
    for name, flags in DEPTHS.items():
      found[name].append(measure(flags))
      last = found[name][-1]
      print(name, last['blocks'], f'{last["seconds_round"]:.3f} s', flush=True)
  medians = {
    name: statistics.median(r['seconds_round'] for r in runs)
    for name, runs in found.items()
  }
  print(f'times as fast: {medians["equal"] / medians["by speed"]:.2f}')
  TARGET.parent.mkdir(parents=True, exist_ok=True)
  record = {
    'command': 'python -m experiments.unequal',
    'speed_of_process_1': RUNS / (RUNS + STOPS),
    'seconds_round': medians,
    'runs': found,
    'provenance': provenance('2 x cpu'),
  }
  write_record(TARGET, record)


if __name__ == '__main__':
  sys.exit(main())
