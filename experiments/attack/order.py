"""Processes that start in any order, and some that start too late."""

from collections.abc import Sequence
import concurrent.futures
import pathlib
import random
import time
from typing import Any

from experiments.attack import judged, started
from experiments.attack.judged import Case
from experiments.attack.kills import hash_of

STARTS = 30
LATE = 4  # Starts besides, in which a process comes too late.
WAIT = 30  # Seconds that processes wait for each other, at least.
LONGEST = 20.0  # Seconds between the first process and the last one.
WORKERS = '--config.num_workers=6'  # Shared by two processes, or by three.
LONGER = '--config.model.stage_sizes=(1,7)'  # With a block for each.
AT_ONCE = 3  # Starts that go on at the same time: they mostly wait.
NOT_TRIED = (
  'more than three processes',
  'hosts other than this one',
  'starts that SLURM, Open MPI or Kubernetes make',
)


def attack(seed: int, share: float, folder: pathlib.Path) -> dict[str, Any]:
  """Starts runs of two and of three processes.

  Args:
    seed: Seed of orders and delays.
    share: Share of the starts to make.
    folder: An empty folder.

  Returns:
    The record.
  """
  rng = random.Random(seed)
  expected = {count: _undisturbed(count, folder) for count in (2, 3)}
  plans = []
  for number in range(max(2, round(STARTS * share))):
    count = 2 + number % 2
    delays = [rng.uniform(0, rng.choice((2, LONGEST))) for _ in range(count)]
    plans.append((count, [delay - min(delays) for delay in delays]))
  for number in range(max(1, round(LATE * share))):
    count = 2 + number % 2
    delays = [rng.uniform(0, 2) for _ in range(count)]
    delays[rng.randrange(count)] += WAIT + 10
    plans.append((count, delays))

  def one(number: int) -> Case:
    count, delays = plans[number]
    place = folder / f'{number}'
    place.mkdir()
    return _start(place, delays, expected[count])

  with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
    cases = list(pool.map(one, range(len(plans))))
  config = {
    'flags': [*started.TINY, WORKERS, LONGER],
    'wait_seconds': WAIT,
    'longest_delay_seconds': LONGEST,
    'limit_seconds': started.LIMIT,
  }
  return judged.record('order', config, seed, cases, folder, NOT_TRIED)


def _undisturbed(count: int, folder: pathlib.Path) -> str:
  """Trains with processes that start together; returns the result."""
  run = folder / f'undisturbed{count}'
  commands = started.several(count, run, WORKERS, LONGER, _patience())
  ends = [p.end() for p in started.start_all(commands, folder / 'together')]
  assert all(end.code == 0 for end in ends), ends
  return hash_of(run)


def _patience() -> str:
  return f'--config.faults.timeout={WAIT}.0'


def _start(
  folder: pathlib.Path, delays: Sequence[float], expected: str
) -> Case:
  """Starts processes after delays, and judges how all of them end."""
  run = folder / 'run'
  commands = started.several(len(delays), run, WORKERS, LONGER, _patience())
  processes: dict[int, started.Started] = {}
  began = time.monotonic()
  for number in sorted(range(len(delays)), key=lambda i: delays[i]):
    time.sleep(max(0, began + delays[number] - time.monotonic()))
    output = folder / str(number)
    processes[number] = started.Started(commands[number], output)
  ends = [processes[number].end() for number in range(len(delays))]
  what = ', '.join(f'{i} after {delay:.1f} s' for i, delay in enumerate(delays))
  same = all(end.code == 0 for end in ends) and hash_of(run) == expected
  # The others may have been so slow that it came in time.
  if max(delays) > WAIT and not same:
    outcome, said = judged.worst(
      judged.refusal(*end, says='.*did not (come|answer)', wanted=75)
      for end in ends
    )
    return Case(f'{len(delays)} processes, one too late', what, outcome, said)
  group = f'{len(delays)} processes'
  if any(end.code is None for end in ends):
    return Case(group, what, judged.HANG)
  if any('Traceback' in end.err for end in ends):
    return Case(group, what, judged.TRACEBACK, str([e.err for e in ends]))
  if not same:
    said = str([(end.code, end.err[-200:]) for end in ends])
    return Case(group, what, judged.WRONG, said)
  return Case(group, what, judged.SAME)
