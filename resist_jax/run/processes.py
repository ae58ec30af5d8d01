"""Several processes of one run: how they meet, and how they miss each other.

JAX's distributed runtime brings them together. Each then shows that it is
alive, every few seconds, in the key-value store of the coordinator, which is
process 0, and looks for the others there. Clocks are never compared: what
counts is how long a sign has not changed, on the looker's own monotonic clock.

A process that misses another one ends itself: a collective would wait forever.
The same command starts again from the newest checkpoint.
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

# EX_TEMPFAIL of sysexits.h: another try may succeed. Bad input exits with 2.
TRY_AGAIN = 75

# Seconds that the others have to part after they have said that they end.
_PARTING = 3
_NEVER = 10 * 365 * 24 * 3600  # Seconds.
_FOREVER = 7 * 24 * 3600 * 1000  # Milliseconds.
_SLOW = 10  # Times the time-out, for what is done together and takes long.
_FOLDER = 'resist_jax'
_END = 'end'


class StartError(RuntimeError):
  """The processes did not find each other."""


def start(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  timeout: float,
) -> int:
  """Joins the processes of a run, before JAX is used for anything else.

  Args:
    coordinator: `HOST:PORT` of process 0; None: what SLURM, Open MPI,
      Kubernetes or a TPU pod says, or no others where there is no such thing.
    num_processes: How many; 1 for this one alone, whatever the surroundings.
    process_id: Which of them this is.
    timeout: Seconds without a sign of life that mean death.

  Returns:
    How many processes there are.

  Raises:
    StartError: If the others do not come.
  """
  if num_processes == 1:
    return 1
  # Dead processes are this module's business, and SIGTERM is `interrupt`'s.
  jax.config.update('jax_enable_recoverability', True)
  jax.config.update('jax_enable_preemption_service', False)
  wait = max(int(timeout), 30)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Of clusters that it could not ask.
      jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        # Who names a coordinator does not want SLURM's.
        cluster_detection_method='deactivate' if coordinator else None,
        initialization_timeout=wait,
        # Never: this module says it in one line. JAX's beats go by the wall
        # clock: where it jumps back, the next one would end the process.
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
      f'({reason}). Start all of them, with the same --coordinator (a host and '
      'port of process 0 that all can reach) and --num_processes; for a run of '
      'one process, whatever the surroundings, --num_processes=1.'
    ) from error
  from jax._src import distributed  # Its store has no public name.

  if distributed.global_state.num_processes > 1:
    _Watch(distributed.global_state, timeout).begin()
  return distributed.global_state.num_processes


class _Watch:
  """Two threads: one gives and reads signs of life, one looks at the clock."""

  current: '_Watch | None' = None

  def __init__(self, state: Any, timeout: float):
    # Asking `jax.process_index` would start the devices, and wait for all.
    self._state = state
    self._store = state.client
    self._me = state.process_id
    self._others = [i for i in range(state.num_processes) if i != self._me]
    self._timeout = timeout
    self._signs: dict[int, str] = {}
    now = time.monotonic()
    self._seen = dict.fromkeys(self._others, now)
    self._answered = self._looked = now
    self.ended: dict[int, str] = {}
    self.task: tuple[str, float] | None = None  # A name, and since when.
    self._leaving = False
    self._meetings = 0

  def begin(self) -> None:
    """Starts both threads."""
    _Watch.current = self
    self._say_why_at_an_abort()
    for loop in (self._exchange_signs, self._look):
      threading.Thread(target=loop, daemon=True).start()

  @property
  def interval(self) -> float:
    """Seconds between two signs."""
    return min(self._timeout / 10, 5)

  def _exchange_signs(self) -> None:
    count = 0
    while not self._leaving:
      count += 1
      try:
        self._put(f'alive/{self._me}', str(count))
        self._read()
      except Exception:  # The store is gone, or does not answer.
        time.sleep(self.interval)
        continue
      time.sleep(self.interval)

  def _put(self, key: str, value: str) -> None:
    self._store.key_value_set(f'{_FOLDER}/{key}', value, allow_overwrite=True)

  def _read(self) -> None:
    signs = self._store.key_value_dir_get(f'{_FOLDER}/')
    self._answered = time.monotonic()
    for key, value in signs:
      kind, _, process = key.removeprefix(f'{_FOLDER}/').partition('/')
      process = int(process)
      if process == self._me:
        continue
      if kind == _END:
        self.ended[process] = value
      elif self._signs.get(process) != value:
        self._signs[process] = value
        self._seen[process] = self._answered

  def _look(self) -> None:
    while not self._leaving:
      time.sleep(self.interval / 2)
      self.check(self._timeout)

  def check(self, timeout: float) -> None:
    """Ends this process if it or another one was silent for too long."""
    now = time.monotonic()
    looked, self._looked = self._looked, now
    if now - looked > self._timeout:  # The others have missed this one.
      self.leave(f'it stood still itself for {now - looked:.0f} seconds')
    said = {i: why for i, why in self.ended.items() if why}
    if said:
      # Whoever fails for the same reason should have the time to say so.
      time.sleep(self.interval)
      process, why = min(said.items())
      self.leave(f'process {process} stopped: {why}')
    if now - self._answered > timeout:
      self.leave(f'{self._name(0)} has not answered for {timeout:.0f} seconds')
    for process, seen in self._seen.items():
      if process not in self.ended and now - seen > timeout:
        silent = f'{timeout:.0f} seconds'
        self.leave(f'{self._name(process)} has given no sign for {silent}')
    name, since = self.task or ('', now)
    if now - since > _SLOW * self._timeout:
      self.leave(f'{name} is not done after {now - since:.0f} seconds')

  def _name(self, process: int) -> str:
    where = f' ({self._state.coordinator_address})' if process == 0 else ''
    return f'process {process}{where}'

  def leave(self, reason: str) -> NoReturn:
    """Ends this process at once: its collectives would wait forever."""
    if self._leaving:
      threading.Event().wait()  # Another thread is at it.
    self._leaving = True
    print(
      '' if self._me else '\n',  # After the progress bar.
      f'error: process {self._me} ends, for {reason}; the same command goes on '
      'from the newest checkpoint.',
      sep='',
      file=sys.stderr,
      flush=True,
    )
    self.go(reason, TRY_AGAIN)

  def go(self, why: str, code: int) -> NoReturn:
    """Tells the others why, as far as they can be reached, and exits."""
    self._leaving = True
    told = threading.Thread(
      target=self._put, args=(f'{_END}/{self._me}', why), daemon=True
    )
    told.start()
    told.join(1)
    if self._me == 0:  # The store is here: the others may still read it.
      time.sleep(3 * self.interval)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def explain_failure(self) -> None:
    """Waits until it is known who is missing, after a collective failed."""
    silence = 4 * self.interval
    deadline = time.monotonic() + silence + 2 * self.interval
    while time.monotonic() < deadline:
      self.check(silence)
      time.sleep(self.interval / 2)

  def _say_why_at_an_abort(self) -> None:
    """Says it in a line where JAX aborts because the coordinator is gone.

    JAX's client then logs what happened at length and calls `abort`, whatever
    it is told; a handler in C is the last to be asked.
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
        self.leave(f'{self._name(0)} is gone')

    self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)  # Kept alive.
    ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

  def meet(self) -> None:
    """Waits for all, however long they take: who dies is missed by `_look`."""
    self._meetings += 1
    name = f'{_FOLDER}/meeting/{self._meetings}'
    self._store.wait_at_barrier(name, _FOREVER)

  def end(self) -> None:
    """Tells the others that this process is done, and parts from them."""
    self._put(f'{_END}/{self._me}', '')
    if self._me == 0:  # The store goes last, or the others would miss it.
      deadline = time.monotonic() + self._timeout
      while time.monotonic() < deadline and self._waits():
        self._read()
        time.sleep(0.05)
      time.sleep(_PARTING)
    self._leaving = True
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    jax.distributed.shutdown()

  def _waits(self) -> bool:
    return not self.ended.keys() >= set(self._others)


def explain_failure() -> None:
  """Ends this process, saying who is missing, if another one is.

  A collective that fails says no more than that a connection broke. This
  returns, after a while, if all others are alive.
  """
  if _Watch.current:
    _Watch.current.explain_failure()


def meet() -> None:
  """Waits until all processes have come here."""
  if _Watch.current:
    _Watch.current.meet()


@contextlib.contextmanager
def together(name: str) -> Iterator[None]:
  """Ends this process if what all do together takes ten times the time-out.

  Args:
    name: What they do, for the line that says so.
  """
  watch = _Watch.current
  if watch:
    watch.task = (name, time.monotonic())
  try:
    yield
  finally:
    if watch:
      watch.task = None


def end() -> None:
  """Parts from the other processes when all is done."""
  if _Watch.current:
    _Watch.current.end()
    _Watch.current = None


def fail(why: str, code: int) -> NoReturn:
  """Exits; the other processes end, too, and repeat why.

  Args:
    why: One line.
    code: Of the exit.
  """
  if _Watch.current:
    _Watch.current.go(why, code)
  sys.exit(code)
