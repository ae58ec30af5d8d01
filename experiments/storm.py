"""A run of four hosts that are lost, return, stand still and are sent away.

  python -m experiments.storm --calm     # The same run without a storm.
  python -m experiments.storm

Each host is an elastic launcher (`experiments.launch.elastic`) with its own
process, all on this machine. At random moments a host is killed with all its
processes and returns later, its process alone is killed, the whole host is
suspended for a while, or it is told to leave by SIGTERM. The log of the run is
watched meanwhile. The result says what the storm cost: seconds from each fault
to the next finished round, rounds that were repeated, the share of time that
trained rounds which count, and the accuracy at the end.
"""

import argparse
from collections.abc import Iterator
import contextlib
import itertools
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import psutil

from experiments.launch.local import free_port
from experiments.runs import (
  RESULTS,
  command,
  count,
  load,
  machine,
  parsed,
  provenance,
  write_record,
)
from experiments.table import Table
from resist_jax import folders
from resist_jax.errors import Parser

FOLDER = RESULTS / 'storm'
HOSTS = 4
# Faults, and the seconds until a host returns or goes on.
KINDS = {
  'host killed': (15, 60),
  'process killed': (0, 0),
  'host suspended': (5, 40),
  'host told to leave': (15, 60),
}
_GRACE = 1  # Seconds in which a round that ended before a fault is logged.
_LIMIT = 2 * 3600  # Seconds after which a run has failed.


class Fault(NamedTuple):
  """Something that happened to a host.

  Attributes:
    at: Seconds since the start of the run.
    kind: One of `KINDS`, or `host returns`.
    host: Number of the host.
  """

  at: float
  kind: str
  host: int


class Logged(NamedTuple):
  """A round in the log.

  Attributes:
    at: Seconds since the start of the run.
    round: Its number.
    start: How often the processes had been started.
  """

  at: float
  round: int
  start: int


class Host:
  """A launcher and what it has started."""

  def __init__(self, command: list[str], output: pathlib.Path):
    """Starts the launcher; its output is added to a file."""
    self._command, self._output = command, output
    self.back_at: float | None = None  # When it returns or goes on.
    self.suspended = False
    self.start()

  def start(self) -> None:
    """Starts the launcher, when the one before has ended."""
    with self._output.open('a') as output:
      self.launcher = subprocess.Popen(
        self._command,
        stdout=output,
        stderr=output,
        start_new_session=True,
      )

  def tree(self) -> list[psutil.Process]:
    """Returns all its processes, the launcher first."""
    with contextlib.suppress(psutil.NoSuchProcess):
      launcher = psutil.Process(self.launcher.pid)
      return [launcher, *launcher.children(recursive=True)]
    return []

  def signal(self, signum: int) -> None:
    """Sends a signal to all its processes."""
    for process in self.tree():
      with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signum)

  def kill_process(self) -> bool:
    """Kills resist_jax alone; returns whether it was there."""
    for process in self.tree():
      with contextlib.suppress(psutil.NoSuchProcess):
        words = process.cmdline()
        if words[1:3] == ['-m', 'resist_jax']:
          process.kill()
          return True
    return False


class Run:
  """The hosts of a run, and what its log has shown."""

  def __init__(self, folder: pathlib.Path, args: list[str]):
    """Starts the place to meet and all hosts."""
    self.folder = folder
    launcher = [sys.executable, '-m', 'experiments.launch.elastic']
    meet = f'--meet=127.0.0.1:{free_port()}'
    self._place = subprocess.Popen(
      [*launcher, meet, '--only_meet'], stdout=subprocess.PIPE
    )
    assert self._place.stdout
    try:  # Otherwise a host would take the place.
      met = self._place.stdout.readline()
    except BaseException:
      self._place.kill()
      raise
    if not met:
      sys.exit(self._place.wait())  # It has said why.
    words = [f'--hosts=1:{HOSTS}', meet, '--address=127.0.0.1', '--']
    self._begun = time.monotonic()
    self.hosts = [
      Host([*launcher, *words, *args], folder / f'host{i}.txt')
      for i in range(HOSTS)
    ]
    self.faults: list[Fault] = []
    self.logged: list[Logged] = []
    self._starts, self._config, self._read = 0, 0.0, 0

  def now(self) -> float:
    """Returns the seconds since the start."""
    return time.monotonic() - self._begun

  def watch(self) -> None:
    """Reads what is new in the log."""
    work = self.folder / 'run'
    with contextlib.suppress(OSError):  # It is written at every start.
      changed = (work / 'config.json').stat().st_mtime
      if changed != self._config:
        self._starts, self._config = self._starts + 1, changed
    newest = _newest_round(work / 'metrics.jsonl')
    if newest > self._read:  # A start may cut rounds off the log.
      self.logged.append(Logged(self.now(), newest, self._starts))
    self._read = newest

  def end(self) -> None:
    """Kills what is left."""
    for host in self.hosts:
      host.signal(signal.SIGKILL)
      host.launcher.wait()
    with self._place:  # This waits for it, too.
      self._place.kill()

  def ended(self) -> bool:
    """Whether the run is complete."""
    return (self.folder / 'run' / 'summary.json').exists()

  def lost(self) -> bool:
    """Whether all launchers have ended, and none is to come back."""
    return all(
      host.back_at is None and host.launcher.poll() is not None
      for host in self.hosts
    )

  def strike(self, random_numbers: random.Random) -> None:
    """Lets something happen to a host."""
    here = [i for i, h in enumerate(self.hosts) if h.back_at is None]
    if len(here) < 2:  # One host goes on.
      return
    number = random_numbers.choice(here)
    kind = random_numbers.choice(list(KINDS))
    host, away = self.hosts[number], random_numbers.uniform(*KINDS[kind])
    if kind == 'process killed':
      if not host.kill_process():
        return
    elif kind == 'host killed':
      host.signal(signal.SIGKILL)
    elif kind == 'host told to leave':
      host.launcher.terminate()
    else:
      host.suspended = True
      host.signal(signal.SIGSTOP)
    if away:
      host.back_at = self.now() + away
    self.faults.append(Fault(self.now(), kind, number))

  def bring_back(self) -> None:
    """Starts hosts again, or lets them go on, whose time has come."""
    for number, host in enumerate(self.hosts):
      if host.back_at is None or self.now() < host.back_at:
        continue
      if host.suspended:
        host.signal(signal.SIGCONT)
      elif host.launcher.poll() is None:  # It has not left yet.
        continue
      else:
        host.start()
      host.back_at, host.suspended = None, False
      self.faults.append(Fault(self.now(), 'host returns', number))


def _newest_round(path: pathlib.Path) -> int:
  try:
    return json.loads(path.read_text().splitlines()[-1])['round']
  except (OSError, ValueError, IndexError):
    return 0


def recovery(fault: Fault, logged: list[Logged]) -> float | None:
  """Returns the seconds from a fault to the next round that counts.

  Args:
    fault: The fault.
    logged: All rounds as they were logged.

  Returns:
    Seconds to the first round that was logged by processes started since; if
    the same processes went on, to their next round; None if none followed.

  >>> logged = [Logged(1, 1, 1), Logged(9.5, 2, 1), Logged(40, 2, 2)]
  >>> recovery(Fault(9, 'host killed', 0), logged)
  31
  """
  later = [x for x in logged if x.at > fault.at + _GRACE]
  if not later:
    return None
  before = max((x.start for x in logged if x.at <= fault.at), default=0)
  others = [x for x in later if x.start > before]
  same = [x for x in later if x.start == before]
  # A new start that comes much later has another reason.
  if others and not (len(same) > 3 and same[3].at < others[0].at):
    return others[0].at - fault.at
  return later[0].at - fault.at


def repeated(logged: list[Logged]) -> list[int]:
  """Returns how many logged rounds each new start trained again.

  >>> repeated([Logged(1, 7, 1), Logged(2, 8, 1), Logged(9, 8, 2)])
  [1]
  """
  pairs = itertools.pairwise(logged)
  return [
    max(0, before.round + 1 - after.round)
    for before, after in pairs
    if after.start != before.start
  ]


def tables() -> Iterator[Table]:
  """Yields what storms cost, beside the run without one, if there are any."""
  records = load('storm/*.json')
  if not records:
    return
  rows = [
    [
      'without faults' if '--calm' in r['command'].split() else 'storm',
      str(sum(r['faults'][kind] for kind in KINDS)),
      str(r['faults']['host returns']),
      f'{r["faults_per_hour"]:.0f}',
      f'{r["seconds"]:.0f}',
      f'{r["useful_share"]:.0%}',
      *_recoveries(r),
      f'{100 * r["test_accuracy"]:.1f}',
    ]
    for r in records
  ]
  caption = (
    f'{records[0]["rounds"]} rounds on four hosts, each an elastic launcher '
    'with a process, all on one machine '
    f'({machine(records[0]["provenance"])}). Hosts and processes are killed, '
    'suspended or told to leave at random, and return. "Useful" is the share '
    'of the time that trained rounds which count; "recovery" is the seconds '
    'from a fault to the next finished round, median and worst; "repeated" is '
    'the most rounds that one fault cost. The test accuracy is in %. The run '
    'without faults takes --calm. Seconds of runs that shared their machine '
    'with other work are not to be compared: docs/faults.md says which did.'
  )
  head = [
    '',
    'faults',
    'returns',
    'faults an hour',
    'seconds',
    'useful',
    'recovery',
  ]
  head += ['worst', 'repeated', 'accuracy']
  command = f'python -m experiments.storm --rounds={records[0]["rounds"]}'
  yield Table(caption, command, head, rows)


def _recoveries(record: dict[str, Any]) -> list[str]:
  if record['recovery_median'] is None:
    return ['', '', '']
  return [
    f'{record["recovery_median"]:.0f} s',
    f'{record["recovery_worst"]:.0f} s',
    str(record['rounds_repeated_most']),
  ]


def main() -> int:
  """Runs the experiment; returns 1 if the run has not ended, or not in time."""
  parser = Parser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--seed', type=int, default=0, help='of the storm')
  parser.add_argument('--gap', type=float, default=40, help='mean seconds')
  parser.add_argument('--rounds', type=count, default=110, help='of the run')
  parser.add_argument('--calm', action='store_true', help='without a storm')
  parser.add_argument(
    '--folder',
    type=folders.output_folder,
    help='where outputs stay; else they do not',
  )
  options = parsed(parser, free=['seed', 'calm', 'folder'])
  # So that the hosts, which have sessions of their own, end as well.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  args = [
    '--config=digits:smoke', '--config.model.name=PreActResNet18',
    '--config.model.stage_sizes=1,6', '--config.model.widths=8,8',
    '--config.partition=2', '--config.batch_size=16',
    '--config.local_steps=600', '--config.optimizer.schedule=cosine',
    '--config.evaluation.statistics_images=200', '--config.eval_every=40',
    '--config.workers_per_process=1', '--config.faults.timeout=10',
    f'--config.num_rounds={options.rounds}',
  ]  # fmt: skip
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(
      options.folder or stack.enter_context(tempfile.TemporaryDirectory())
    ).absolute()
    if (folder / 'run').exists():
      parser.error(f'{folder} holds a run already: name another folder.')
    folder.mkdir(parents=True, exist_ok=True)
    os.environ['JAX_PLATFORMS'] = 'cpu'  # Of all hosts.
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder / 'cache'))
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
    run = Run(folder, [*args, f'--workdir={folder / "run"}'])
    try:
      _weather(run, options)
      if not run.ended():
        why = 'its hosts have all ended' if run.lost() else 'time is over'
        print(f'the run is not complete, but {why}; host 0 said last:')
        print(*(folder / 'host0.txt').read_text().splitlines()[-5:], sep='\n')
        return 1
      run.watch()
      record = _record(run, options, args)
    finally:
      run.end()
  kind = 'calm' if options.calm else f'storm_seed{options.seed}'
  write_record(options.out or FOLDER / f'{kind}.json', record)
  shown = {k: record[k] for k in record if k not in ('events', 'summary')}
  print(json.dumps(shown, indent=2))
  return 0


def _weather(run: Run, options: argparse.Namespace) -> None:
  """Watches the run to its end, and lets the storm rage."""
  random_numbers, strike = random.Random(options.seed), 0.0
  while not (run.ended() or run.lost()) and run.now() < _LIMIT:
    time.sleep(0.2)
    run.watch()
    run.bring_back()
    if options.calm or not run.logged:
      continue
    if run.now() > strike:
      if strike:
        run.strike(random_numbers)
      strike = run.now() + random_numbers.expovariate(1 / options.gap)


def _record(
  run: Run, options: argparse.Namespace, args: list[str]
) -> dict[str, Any]:
  summary = json.loads((run.folder / 'run' / 'summary.json').read_text())
  rows = (run.folder / 'run' / 'metrics.jsonl').read_text().splitlines()
  workers = [len(next(iter(json.loads(row)['slots'].values()))) for row in rows]
  wall = run.logged[-1].at
  struck = [f for f in run.faults if f.kind in KINDS]
  times = {
    kind: [
      seconds
      for fault in run.faults
      if fault.kind == kind
      and (seconds := recovery(fault, run.logged)) is not None
    ]
    for kind in (*KINDS, 'host returns')
  }
  every = [s for kind in KINDS for s in times[kind]]
  return {
    'provenance': provenance('4 x cpu'),
    'command': command('experiments.storm'),
    'arguments': args,
    'seed': options.seed,
    'mean_gap': options.gap,
    'rounds': summary['rounds'],
    'seconds': wall,
    'faults': {k: sum(f.kind == k for f in run.faults) for k in times},
    'faults_per_hour': 3600 * len(struck) / wall,
    'starts': run.logged[-1].start,
    'useful_share': summary['seconds_training'] / wall,
    'mean_workers': statistics.mean(workers),
    'rounds_repeated_most': max(repeated(run.logged), default=0),
    'rounds_repeated': sum(repeated(run.logged)),
    'recovery_median': statistics.median(every) if every else None,
    'recovery_worst': max(every, default=None),
    'recovery': {k: sorted(round(s, 1) for s in v) for k, v in times.items()},
    'test_accuracy': summary['test_accuracy'],
    'events': [[round(f.at, 1), f.kind, f.host] for f in run.faults],
    'summary': summary,
  }


if __name__ == '__main__':
  sys.exit(main())
