"""Runs that are killed while they save; the same command must go on."""

import json
import pathlib
import random
import shutil
import time
from typing import Any

from experiments.attack import judged, started
from experiments.attack.judged import Case

ROUNDS = 8
RUNS = (
  f'--config.num_rounds={ROUNDS}', '--config.eval_every=4',
  '--config.faults.timeout=15.0',
)  # fmt: skip
LONE, TWO = 30, 10  # Kills of lone processes, and of one or both of two.
LONGEST = 0.15  # Seconds from the sight of a save that begins to the kill.
NOT_TRIED = (
  'a host that loses its power, whose disk forgets what was written',
  'network file systems',
  'kills of more than two processes',
)


def hash_of(workdir: pathlib.Path) -> str:
  """Returns the hash of the parameters of a finished run, '' without one."""
  path = workdir / 'summary.json'
  if not path.is_file():
    return ''
  return json.loads(path.read_text())['params_hash']


def attack(seed: int, share: float, folder: pathlib.Path) -> dict[str, Any]:
  """Kills runs of one process and of two, and starts them again.

  Args:
    seed: Seed of the moments, and of the processes that are killed.
    share: Share of the kills to make.
    folder: An empty folder.

  Returns:
    The record.
  """
  rng = random.Random(seed)
  expected = {}
  for count in (1, 2):
    workdir = folder / f'undisturbed{count}'
    said = _go_on(count, workdir, folder)
    expected[count] = hash_of(workdir)
    assert expected[count], said
  cases = []
  counts = [1] * max(1, round(LONE * share)) + [2] * max(1, round(TWO * share))
  for count in counts:
    victims = [0]
    if count == 2:
      victims = rng.choice([[0], [1], [0, 1], [1, 0]])
    save, wait = rng.randrange(1, ROUNDS), rng.uniform(0, LONGEST)
    workdir = folder / 'run'
    cases.append(
      _kill(count, victims, save, wait, workdir, folder, expected[count])
    )
    shutil.rmtree(workdir)
  config = {
    'flags': [*started.TINY, *RUNS],
    'longest_seconds_after_the_begin_of_a_save': LONGEST,
    'limit_seconds': started.LIMIT,
  }
  return judged.record('kills', config, seed, cases, folder, NOT_TRIED)


def _kill(
  count: int,
  victims: list[int],
  save: int,
  wait: float,
  workdir: pathlib.Path,
  folder: pathlib.Path,
  expected: str,
) -> Case:
  """Kills processes in a save, goes on, and judges the end.

  Args:
    count: Number of processes.
    victims: The processes to kill, in order.
    save: How many saves to let begin.
    wait: Seconds from then on.
    workdir: Folder of the run.
    folder: Where outputs go.
    expected: Hash of the parameters of the undisturbed run.
  """
  commands = started.several(count, workdir, *RUNS)
  processes = started.start_all(commands, folder / 'killed')
  _wait_for_save(processes[0], workdir, save)
  time.sleep(wait)
  for victim in victims:
    processes[victim].kill()
  state = _state(workdir)
  others = [p.end() for i, p in enumerate(processes) if i not in victims]
  who = ' and '.join(map(str, victims))
  what = f'process {who}, save {save}, after {1000 * wait:.0f} ms: {state}'
  group = f'{count} process{"es" * (count > 1)}, {state}'
  for end in others:
    # The other one may have ended by itself.
    if end.code != 0:
      lines = [x for x in end.err.splitlines() if x.startswith('error: ')]
      if end.code is None:
        return Case(group, what, judged.HANG, 'the other process')
      if 'Traceback' in end.err:
        return Case(group, what, judged.TRACEBACK, end.err[-300:])
      if end.code != 75 or len(lines) != 1:
        said = f'exit code {end.code}: {" / ".join(lines)}'
        return Case(group, what, judged.SEVERAL, said)
  outcome, said = _go_on(count, workdir, folder)
  if outcome == judged.SAME and hash_of(workdir) != expected:
    outcome = judged.WRONG
  return Case(group, what, outcome, said)


def _wait_for_save(
  process: started.Started, workdir: pathlib.Path, number: int
) -> None:
  """Waits until a process has begun so many saves, or ended."""
  seen: set[str] = set()
  checkpoints = workdir / 'checkpoints'
  deadline = time.monotonic() + started.LIMIT
  while len(seen) < number and process.process.poll() is None:
    if time.monotonic() > deadline:
      return
    if checkpoints.is_dir():
      names = [path.name for path in checkpoints.iterdir()]
      seen |= {name.partition('.')[0] for name in names}
    time.sleep(0.002)


def _state(workdir: pathlib.Path) -> str:
  """Returns what a kill has left of a save."""
  names = {path.name for path in (workdir / 'checkpoints').iterdir()}
  if any('tmp' in name for name in names):
    return 'in the files of a checkpoint'
  listed = {path.stem for path in workdir.glob('digests/[0-9]*.json')}
  if names - listed:
    return 'before the manifest'
  return 'between two saves'


def _go_on(
  count: int, workdir: pathlib.Path, folder: pathlib.Path
) -> tuple[str, str]:
  """Runs the same command; returns an outcome and the last line."""
  commands = started.several(count, workdir, *RUNS)
  ends = [p.end() for p in started.start_all(commands, folder / 'again')]
  last = ' / '.join((end.err.splitlines() or [''])[-1] for end in ends)
  if any(end.code is None for end in ends):
    return judged.HANG, last
  if any('Traceback' in end.err for end in ends):
    return judged.TRACEBACK, ' / '.join(end.err[-300:] for end in ends)
  if any(end.code for end in ends):
    codes = [end.code for end in ends]
    return judged.WRONG, f'exit codes {codes}: {last}'
  return judged.SAME, ''
