"""The processes of one run: how they start together and detect failures.

JAX's distributed runtime connects the processes. Each process then writes a
heartbeat, a counter, to the coordinator's key-value store every few seconds,
and reads those of the others. Process 0 is the coordinator. Clocks of different
hosts are never compared: each process measures on its own monotonic clock how
long a counter has not changed.

A process that finds another one missing exits, because its next collective
would wait forever. The same command restarts the run from the newest
checkpoint.
"""

from collections.abc import Iterator
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn
import warnings

import jax

# Exit code for failures that a restart may cure: EX_TEMPFAIL of sysexits.h. Bad
# input exits with 2.
TRY_AGAIN = 75

# Seconds that process 0 waits for the others to disconnect at the end.
_GRACE = 3
_NEVER = 10 * 365 * 24 * 3600  # A time-out in seconds that never expires.
_WEEK = 7 * 24 * 3600 * 1000  # Milliseconds.
_SLOW = 10  # Time limit of a joint task, as a multiple of the time-out.
_PREFIX = 'resist_jax'  # Prefix of this module's keys in the store.
_END = 'end'


class StartError(RuntimeError):
  """The processes did not find each other."""


def start(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  timeout: float,
) -> int:
  """Connects the processes of a run, before any other use of JAX.

  Args:
    coordinator: `HOST:PORT` of process 0. If None, JAX asks SLURM, Open MPI,
      Kubernetes or the TPU pod; outside of all these, this process is alone.
    num_processes: Number of processes; 1 for a process that runs alone even on
      a cluster.
    process_id: Number of this process, from 0.
    timeout: Seconds without a heartbeat after which a process counts as dead.

  Returns:
    The number of processes.

  Raises:
    StartError: If the others cannot be reached in time.
  """
  if num_processes == 1:
    return 1
  # This module detects dead processes, and `interrupt` handles SIGTERM.
  jax.config.update('jax_enable_recoverability', True)
  jax.config.update('jax_enable_preemption_service', False)
  wait = max(int(timeout), 30)
  try:
    with warnings.catch_warnings():
      # JAX warns about each cluster environment that it fails to query.
      warnings.simplefilter('ignore')
      jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        # A given coordinator overrides that of SLURM.
        cluster_detection_method='deactivate' if coordinator else None,
        initialization_timeout=wait,
        # Never, because this module reports dead processes in one line. JAX's
        # own heartbeats use the wall clock: when it jumps back, they would end
        # the process.
        heartbeat_timeout_seconds=_NEVER,
        shutdown_timeout_seconds=wait,
      )
  except ValueError:
    if coordinator is not None:
      raise
    return 1  # No cluster: this process is alone.
  except Exception as error:
    reason = ' '.join(str(error).split())[:200]
    raise StartError(
      f'the processes did not find each other within {wait} seconds '
      f'({reason}). Start all of them with the same --coordinator (a host and '
      'port of process 0 that all can reach) and --num_processes. For a run of '
      'one process, even on a cluster, set --num_processes=1.'
    ) from error
  from jax._src import distributed  # The key-value store has no public name.

  if distributed.global_state.num_processes > 1:
    _Monitor(distributed.global_state, timeout).begin()
  return distributed.global_state.num_processes


class _Monitor:
  """Two threads: one exchanges heartbeats, one checks how old they are.

  Attributes:
    current: The monitor of this process, if the run has several processes.
    ended: For each other process that has ended, the reason; empty if it is
      done.
    task: The task that all processes do together, if any, and its start.
  """

  current: '_Monitor | None' = None

  def __init__(self, state: Any, timeout: float):
    # Not `jax.process_index()`, which would start the devices and wait for all.
    self._state = state
    self._store = state.client
    self._me = state.process_id
    self._others = [i for i in range(state.num_processes) if i != self._me]
    self._timeout = timeout
    self._heartbeats: dict[int, str] = {}
    now = time.monotonic()
    self._last_heartbeat = dict.fromkeys(self._others, now)
    self._last_answer = self._last_check = self._last_sent = now
    self._largest_gap = 0.0  # Seconds between two of its own heartbeats.
    self.ended: dict[int, str] = {}
    self.task: tuple[str, float] | None = None
    self._exiting = False
    self._num_barriers = 0

  def begin(self) -> None:
    """Starts both threads."""
    _Monitor.current = self
    self._handle_abort()
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
        self._put(f'alive/{self._me}', str(count))
        self._last_sent = time.monotonic()
        self._read()
      time.sleep(self.interval)

  def _put(self, key: str, value: str) -> None:
    self._store.key_value_set(f'{_PREFIX}/{key}', value, allow_overwrite=True)

  def _read(self) -> None:
    entries = self._store.key_value_dir_get(f'{_PREFIX}/')
    self._last_answer = time.monotonic()
    for key, value in entries:
      kind, _, process = key.removeprefix(f'{_PREFIX}/').partition('/')
      process = int(process)
      if process == self._me:
        continue
      if kind == _END:
        self.ended[process] = value
      elif self._heartbeats.get(process) != value:
        self._heartbeats[process] = value
        self._last_heartbeat[process] = self._last_answer

  def _check_repeatedly(self) -> None:
    while not self._exiting:
      time.sleep(self.interval / 2)
      self.check(self._timeout)

  def check(self, timeout: float) -> None:
    """Ends this process if it or another one was silent for too long."""
    now = time.monotonic()
    last_check, self._last_check = self._last_check, now
    # The others count from its last heartbeat, some time before a suspension.
    suspended = now - last_check
    gap = max(self._largest_gap, now - self._last_sent)
    if suspended > self._timeout / 2:
      if max(suspended, gap) > self._timeout:
        self.give_up(f'it was suspended for {suspended:.0f} seconds')
    else:
      self._largest_gap = 0.0
    reasons = {i: reason for i, reason in self.ended.items() if reason}
    if reasons:
      # If this process fails for the same reason, let it report that itself.
      time.sleep(self.interval)
      process, reason = min(reasons.items())
      self.give_up(f'process {process} stopped: {reason}')
    silence = f'for {timeout:.0f} seconds'
    if now - self._last_answer > timeout:
      self.give_up(f'{self._name(0)} has not answered {silence}')
    for process, last in self._last_heartbeat.items():
      if process not in self.ended and now - last > timeout:
        self.give_up(f'{self._name(process)} has sent no heartbeat {silence}')
    name, since = self.task or ('', now)
    if now - since > _SLOW * self._timeout:
      self.give_up(f'{name} has not finished after {now - since:.0f} seconds')

  def _name(self, process: int) -> str:
    where = f' ({self._state.coordinator_address})' if process == 0 else ''
    return f'process {process}{where}'

  def give_up(self, reason: str) -> NoReturn:
    """Prints the reason and ends this process; a restart may succeed."""
    if self._exiting:
      threading.Event().wait()  # Another thread is about to end the process.
    self._exiting = True
    print(
      '' if self._me else '\n',  # Process 0 shows a progress bar.
      f'error: process {self._me} stops because {reason}; the same command '
      'goes on from the newest checkpoint.',
      sep='',
      file=sys.stderr,
      flush=True,
    )
    self.exit(reason, TRY_AGAIN)

  def exit(self, reason: str, code: int) -> NoReturn:
    """Tells the other processes the reason, if they can be reached, and exits.

    It does not return through Python: a collective that another thread runs
    would wait forever.
    """
    self._exiting = True
    telling = threading.Thread(
      target=self._put, args=(f'{_END}/{self._me}', reason), daemon=True
    )
    telling.start()
    telling.join(1)
    if self._me == 0:  # It holds the store: give the others time to read it.
      time.sleep(3 * self.interval)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def explain_failure(self) -> None:
    """Checks with a short time-out, while all have time for a heartbeat."""
    silence = 4 * self.interval
    deadline = time.monotonic() + silence + 2 * self.interval
    while time.monotonic() < deadline:
      self.check(silence)
      time.sleep(self.interval / 2)

  def _handle_abort(self) -> None:
    """Makes JAX's abort, when the coordinator is gone, end in one clear line.

    JAX's client then logs several lines and calls `abort`, which no option
    prevents; only a C signal handler still runs.
    """
    if self._me == 0:
      return
    host, _, port = self._state.coordinator_address.rpartition(':')

    def handler(signum):
      del signum
      self.check(self._timeout)
      try:
        socket.create_connection((host.strip('[]'), int(port)), 1).close()
      except OSError:
        self.give_up(f'{self._name(0)} is gone')

    # An attribute, so that the callback is not garbage-collected.
    self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

  def barrier(self) -> None:
    """Waits for all processes; if one dies, `check` ends this process."""
    self._num_barriers += 1
    name = f'{_PREFIX}/barrier/{self._num_barriers}'
    self._store.wait_at_barrier(name, _WEEK)

  def end(self) -> None:
    """Tells the others that this process is done, and disconnects."""
    self._put(f'{_END}/{self._me}', '')
    if self._me == 0:  # It holds the store, which the others still need.
      deadline = time.monotonic() + self._timeout
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


@contextlib.contextmanager
def time_limit(name: str) -> Iterator[None]:
  """Ends this process if a joint task takes ten times the time-out.

  Args:
    name: What the processes do together, for the error message.
  """
  monitor = _Monitor.current
  if monitor:
    monitor.task = (name, time.monotonic())
  try:
    yield
  finally:
    if monitor:
      monitor.task = None


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
