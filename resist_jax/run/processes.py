"""The processes of one run: how they start together and detect failures.

They meet (`meeting`), and JAX's distributed runtime connects them. Each process
then writes a heartbeat, a counter and what it does, to the coordinator's
key-value store every few seconds, and reads those of the others. Process 0 is
the coordinator. Clocks of different hosts are never compared: each process
measures on its own monotonic clock how long a counter has not changed.

A process that finds another one missing exits, because its next collective
would wait forever. The same command restarts the run from the newest
checkpoint.
"""

from collections.abc import Mapping
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn

import jax

from resist_jax.errors import ConfigError, printable
from resist_jax.run import meeting
from resist_jax.run.meeting import Place

# Exit code for failures that a restart may cure: EX_TEMPFAIL of sysexits.h. Bad
# input exits with 2.
TRY_AGAIN = 75
_BAD_INPUT, _TO_MEND = 2, 1

# Seconds that process 0 waits for the others to disconnect at the end.
_GRACE = 3
_NEVER = 10 * 365 * 24 * 3600  # A time-out in seconds that never expires.
_WEEK = 7 * 24 * 3600 * 1000  # Milliseconds.
_LEAST_WAIT = 30  # Seconds that a process may start later than another one.
_PREFIX = 'resist_jax'  # Prefix of this module's keys in the store.
_END = 'end'


class Patience(NamedTuple):
  """How long a process waits for others, in seconds.

  Attributes:
    silence: Without a heartbeat of another process.
    progress: In one round, test, save or export.
  """

  silence: float = 60.0
  progress: float = 1800.0


def start(
  place: Place | None,
  description: Mapping[str, Any],
  patience: Patience,
) -> int:
  """Connects the processes of a run, before any other use of JAX.

  Args:
    place: Where they meet; None if this process is alone.
    description: How this process was started; see `meeting.meet`.
    patience: How long it waits for others.

  Returns:
    The number of processes.

  Raises:
    ConfigError: In every process, if they do not belong together.
    MeetingError: If they do not find each other.
  """
  if place is None or place.count == 1:
    return 1
  wait = max(int(patience.silence), _LEAST_WAIT)
  meeting.meet(place, description, wait)
  # This module detects dead processes, and `interrupt` handles SIGTERM.
  jax.config.update('jax_enable_recoverability', True)
  jax.config.update('jax_enable_preemption_service', False)
  # A program ends before the next one starts: processes that have two
  # collectives under way may enter them in different orders, and wait forever.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  # gRPC would look for the other hosts behind a proxy of the web.
  jax.config.update('jax_check_proxy_envs', False)
  os.environ['no_grpc_proxy'] = place.address[0]  # noqa: SIM112 - its name.
  monitor = _Monitor(place, patience)
  monitor.handle_abort()
  host, port = place.address
  jax.distributed.initialize(
    f'[{host}]:{port}' if ':' in host else f'{host}:{port}',
    place.count,
    place.me,
    place.local_devices,
    cluster_detection_method='deactivate',
    initialization_timeout=wait,
    # Never, because this module reports dead processes in one line. JAX's own
    # heartbeats use the wall clock: when it jumps back, they would end the
    # process.
    heartbeat_timeout_seconds=_NEVER,
    shutdown_timeout_seconds=wait,
    coordinator_bind_address=meeting.bind_address(place),
  )
  monitor.begin()
  return place.count


class _Monitor:
  """Two threads: one exchanges heartbeats, one checks how old they are.

  Attributes:
    current: The monitor of this process, if the run has several processes.
    ended: For each other process that has ended, its exit code and the reason.
    task: What this process does now, since when, and how long it may.
  """

  current: '_Monitor | None' = None

  def __init__(self, place: Place, patience: Patience):
    self._place = place
    self._me = place.me
    self._others = [i for i in range(place.count) if i != self._me]
    self._timeout, self._longest = patience
    self._store: Any = None  # JAX's key-value store, once it is connected.
    self._heartbeats: dict[int, str] = {}
    now = time.monotonic()
    self._last_heartbeat = dict.fromkeys(self._others, now)
    self._last_answer = self._last_check = self._last_sent = now
    self._largest_gap = 0.0  # Seconds between two of its own heartbeats.
    self._tasks: dict[int, str] = {}
    self.ended: dict[int, tuple[int, str]] = {}
    self.task = ('', now, self._longest)
    self._exiting = False
    self._num_barriers = self._num_told = 0

  def begin(self) -> None:
    """Starts both threads, when JAX has connected the processes."""
    from jax._src import distributed  # The store has no public name.

    _Monitor.current = self
    self._store = distributed.global_state.client
    now = time.monotonic()
    self._last_heartbeat = dict.fromkeys(self._others, now)
    self._last_answer = self._last_check = self._last_sent = now
    for loop in (self._exchange_heartbeats, self._check_repeatedly):
      threading.Thread(target=loop, daemon=True).start()

  @property
  def interval(self) -> float:
    """Seconds between two heartbeats."""
    return min(self._timeout / 10, 5)

  def _exchange_heartbeats(self) -> None:
    count = 0
    while not self._exiting:
      count += 1
      gap = time.monotonic() - self._last_sent
      self._largest_gap = max(self._largest_gap, gap)
      # An exception means that the store is gone or does not answer, which
      # `check` notices.
      with contextlib.suppress(Exception):
        self._put(f'alive/{self._me}', f'{count} {self.task[0]}')
        self._last_sent = time.monotonic()
        self._read()
      time.sleep(self.interval)

  def _put(self, key: str, value: str) -> None:
    self._store.key_value_set(f'{_PREFIX}/{key}', value, allow_overwrite=True)

  def _read(self) -> None:
    entries = self._store.key_value_dir_get(f'{_PREFIX}/')
    self._last_answer = time.monotonic()
    for key, value in entries:
      kind, _, number = key.removeprefix(f'{_PREFIX}/').partition('/')
      process = int(number) if number.isdecimal() else self._me
      if process not in self._others:
        continue
      first, _, rest = value.partition(' ')
      if kind == _END and first.isdecimal():
        self.ended[process] = int(first), printable(rest)
      elif kind == 'alive' and self._heartbeats.get(process) != first:
        self._heartbeats[process] = first
        self._tasks[process] = printable(rest, 80)
        self._last_heartbeat[process] = self._last_answer

  def _check_repeatedly(self) -> None:
    while not self._exiting:
      time.sleep(self.interval / 2)
      self.check(self._timeout)

  def check(self, timeout: float) -> None:
    """Ends this process if it or another one was silent for too long."""
    now = time.monotonic()
    last_check, self._last_check = self._last_check, now
    # Others measure its silence from its last heartbeat, which it sent some
    # time before it was suspended.
    suspended = now - last_check
    gap = max(self._largest_gap, now - self._last_sent)
    if suspended > self._timeout / 2:
      if max(suspended, gap) > self._timeout:
        self.give_up(f'it was suspended for {suspended:.0f} seconds')
    else:
      self._largest_gap = 0.0
    failed = {i: end for i, end in self.ended.items() if end[0]}
    if failed:
      # If this process fails for the same reason, let it report that itself.
      time.sleep(self.interval)
      process, (code, reason) = min(failed.items())
      self.give_up(f'process {process} stopped: {reason}', code)
    silence = f'for {timeout:.0f} seconds'
    if now - self._last_answer > timeout:
      self.give_up(f'{self._name(0)} has not answered {silence}')
    for process, last in self._last_heartbeat.items():
      if process not in self.ended and now - last > timeout:
        self.give_up(f'{self._name(process)} has sent no heartbeat {silence}')
    name, since, limit = self.task
    if name and now - since > limit:
      self.give_up(
        f'{name} has taken more than {limit:.0f} seconds '
        f'({self._elsewhere(name)}; if it only is slow, raise '
        'faults.progress_timeout)'
      )

  def begin_task(self, name: str, times: int) -> None:
    """Says what this process does from now on; see `doing`."""
    self.task = (name, time.monotonic(), times * self._longest)

  def _elsewhere(self, name: str) -> str:
    """Returns what the other processes do."""
    elsewhere = [
      f'process {i} is in {task}'
      for i, task in sorted(self._tasks.items())
      if task and task != name and i not in self.ended
    ]
    return ', '.join(elsewhere) or 'the other processes are in it, too'

  def _name(self, process: int) -> str:
    where = f' ({self._place.coordinator})' if process == 0 else ''
    return f'process {process}{where}'

  def give_up(self, reason: str, code: int = TRY_AGAIN) -> NoReturn:
    """Prints the reason and ends this process.

    Args:
      reason: Why it ends.
      code: Exit code of the process that failed. After a mistake in the input,
        and after what a person must mend, a restart cannot succeed.
    """
    if self._exiting:
      threading.Event().wait()  # Another thread is about to end the process.
    self._exiting = True
    code = code if code in (_BAD_INPUT, _TO_MEND) else TRY_AGAIN
    remedy = '; the same command goes on from the newest checkpoint.'
    print(
      '' if self._me else '\n',  # Process 0 shows a progress bar.
      f'error: process {self._me} stops because {reason}',
      remedy if code == TRY_AGAIN else '',
      sep='',
      file=sys.stderr,
      flush=True,
    )
    self.exit(reason, code)

  def exit(self, reason: str, code: int) -> NoReturn:
    """Tells the other processes the reason, if they can be reached, and exits.

    It does not return through Python: a collective that another thread runs
    would wait forever.
    """
    self._exiting = True
    if self._store is not None:
      telling = threading.Thread(
        target=self._put,
        args=(f'{_END}/{self._me}', f'{code} {reason}'),
        daemon=True,
      )
      telling.start()
      telling.join(1)
    if self._me == 0:  # It holds the store: give the others time to read it.
      time.sleep(3 * self.interval)
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(Exception):
        stream.flush()
    os._exit(code)

  def explain_failure(self) -> None:
    """Checks with a short time-out, while all have time for a heartbeat."""
    silence = 4 * self.interval
    deadline = time.monotonic() + silence + 2 * self.interval
    while time.monotonic() < deadline:
      self.check(silence)
      time.sleep(self.interval / 2)

  def handle_abort(self) -> None:
    """Makes JAX's abort, when the coordinator is gone, end in one clear line.

    JAX's client then logs several lines and calls `abort`, which no option
    prevents; only a C signal handler still runs.
    """

    def handler(signum):
      del signum
      if self._store is None or self._me == 0:
        self.give_up("JAX's runtime has failed, see above")
      self.check(self._timeout)
      try:
        socket.create_connection(self._place.address, 1).close()
      except OSError:
        self.give_up(f'{self._name(0)} is gone')

    # An attribute, so that the callback is not garbage-collected.
    self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

  def tell_all(self, text: str) -> dict[int, str]:
    """Returns the text of every process; if one dies, `check` ends this one."""
    self._num_told += 1
    key = f'{_PREFIX}_told_{self._num_told}'
    self._store.key_value_set(f'{key}/{self._me}', text)
    return {
      i: self._store.blocking_key_value_get(f'{key}/{i}', _WEEK)
      for i in range(self._place.count)
    }

  def barrier(self) -> None:
    """Waits for all processes; if one dies, `check` ends this process."""
    self._num_barriers += 1
    name = f'{_PREFIX}/barrier/{self._num_barriers}'
    self._store.wait_at_barrier(name, _WEEK)

  def end(self) -> None:
    """Tells the others that this process is done, and disconnects."""
    self._put(f'{_END}/{self._me}', '0')
    if self._me == 0:  # It holds the store, which the others still need.
      # Their callbacks may take long to end; `check` knows whether they live.
      self.begin_task('', 1)
      deadline = time.monotonic() + self._longest
      while time.monotonic() < deadline and not self._others_ended():
        self._read()
        time.sleep(0.05)
      time.sleep(_GRACE)
    self._exiting = True
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    jax.distributed.shutdown()

  def _others_ended(self) -> bool:
    return self.ended.keys() >= set(self._others)


def explain_failure() -> None:
  """Ends this process with a clear line if another process is missing.

  A collective that fails only says that a connection broke. If all others are
  alive, this function returns after some heartbeats.
  """
  if _Monitor.current:
    _Monitor.current.explain_failure()


def barrier() -> None:
  """Waits until all processes have reached this call."""
  if _Monitor.current:
    _Monitor.current.barrier()


def doing(name: str, times: int = 1) -> None:
  """Says what this process does from now on, and limits how long it takes.

  A process that is alive may still wait for ever, such as for one that entered
  another collective. Past the limit each process ends, with a line that says
  what it and the others were doing.

  Args:
    name: What all processes do now, such as `round 7`; empty for nothing that
      has a limit.
    times: How many limits long it may take.
  """
  if _Monitor.current:
    _Monitor.current.begin_task(name, times)


def are_several() -> bool:
  """Returns whether this process has met the others of its run."""
  return _Monitor.current is not None


def told_by_first(text: str) -> str:
  """Returns what process 0 says, after all processes have reached this call.

  Args:
    text: What this process says, which counts in process 0 alone.
  """
  if not _Monitor.current:
    return text
  return _Monitor.current.tell_all(text)[0]


def agree(description: Mapping[str, Any], remedy: str) -> None:
  """Checks that something is equal in all processes.

  Args:
    description: Nested JSON values.
    remedy: What the user should do if they differ.

  Raises:
    ConfigError: In every process, if a value differs.
  """
  if not _Monitor.current:
    return
  every = _Monitor.current.tell_all(json.dumps(description))
  problem = meeting.difference(
    {i: json.loads(text) for i, text in every.items()}, remedy
  )
  if problem:
    raise ConfigError(problem)


def end() -> None:
  """Disconnects from the other processes after the run is done."""
  if _Monitor.current:
    _Monitor.current.end()
    _Monitor.current = None


def fail(reason: str, code: int) -> NoReturn:
  """Exits; the other processes then exit too, and repeat the reason.

  Args:
    reason: One line for their error messages.
    code: The exit code of this process.
  """
  if _Monitor.current:
    _Monitor.current.exit(reason, code)
  sys.exit(code)
