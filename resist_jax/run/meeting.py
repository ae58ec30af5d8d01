"""How the processes of a run find each other, before JAX connects them.

JAX aborts a process whose coordinator does not answer, accepts two processes of
the same number, and lets processes with different configs train together. So
all processes first meet at the coordinator's port: each one tells process 0 its
number and how it was started, and process 0 tells all whether they belong
together. Then JAX's own service takes the port over.

Anybody who reaches the port can send such a message. It is JSON of limited
size, and what it says is printed without control characters.
"""

from collections.abc import Iterable, Mapping
import contextlib
import ipaddress
import json
import socket
import time
from typing import Any, NamedTuple

from resist_jax.errors import ConfigError, printable
from resist_jax.run.config import differences

_HELLO = 'resist_jax'
_MAX_BYTES = 2**20
_HELLO_WAIT = 5  # Seconds that a process may take to say who it is.
_PORT_WAIT = 10  # Seconds that the process before may take to leave the port.


class MeetingError(RuntimeError):
  """The processes did not all come; the same command may succeed later."""


class Place(NamedTuple):
  """Where processes meet.

  Attributes:
    coordinator: `HOST:PORT` of process 0.
    count: Number of processes.
    me: Number of this process.
    local_devices: Which devices of its host it uses; None for all.
  """

  coordinator: str
  count: int
  me: int
  local_devices: tuple[int, ...] | None = None

  @property
  def address(self) -> tuple[str, int]:
    """The host without brackets, and the port."""
    host, _, port = self.coordinator.rpartition(':')
    return host.strip('[]'), int(port)


def meet(place: Place, description: Mapping[str, Any], timeout: float) -> None:
  """Waits until all processes of the run are there and belong together.

  Args:
    place: Where they meet.
    description: Nested JSON values, which must be equal in all processes.
    timeout: Seconds that a process may be later than another one.

  Raises:
    ConfigError: In every process, if they do not belong together.
    MeetingError: If a process does not come in time.
  """
  deadline = time.monotonic() + timeout
  hello = {
    'program': _HELLO,
    'process_id': place.me,
    'num_processes': place.count,
    'description': description,
  }
  # As JSON makes it: tuples are lists. What is no JSON is named by its type,
  # and NaN by text, which equals itself: if all processes have it, `train`
  # says in each what is wrong.
  text = json.dumps(hello, skipkeys=True, default=lambda x: type(x).__name__)
  hello = json.loads(text, parse_constant=str)
  if place.me == 0:
    _host(place, hello, deadline, timeout)
  else:
    _visit(place, hello, deadline, timeout)


def difference(
  descriptions: Mapping[int, Mapping[str, Any]], remedy: str
) -> str:
  """Returns a line about the first field that differs between processes.

  Args:
    descriptions: Nested JSON values by process.
    remedy: What the user should do.

  Returns:
    The line; empty if all are equal.

  >>> difference({0: {'lr': 0.1}, 1: {'lr': 0.2}}, 'start both alike.')
  'lr is 0.2 in process 1, but 0.1 in process 0: start both alike.'
  """
  first, *others = sorted(descriptions)
  for other in others:
    found = differences(dict(descriptions[first]), dict(descriptions[other]))
    for name, (ours, theirs) in found.items():
      return (
        f'{name} is {_short(theirs)} in process {other}, but {_short(ours)} in '
        f'process {first}: {remedy}'
      )
  return ''


def bind_address(place: Place) -> str:
  """Returns where process 0 listens: the interface of its address.

  Args:
    place: Where the processes meet.

  Returns:
    `HOST:PORT`. All interfaces where no interface has the address, as behind a
    translating router, or where a host takes its own name for a loopback.
  """
  family, (host, port, *_) = _resolve(place)
  loopback = ipaddress.ip_address(host).is_loopback
  here = not loopback or place.address[0] in ('localhost', host)
  with socket.socket(family, socket.SOCK_STREAM) as probe:
    try:
      probe.bind((host, 0))
    except OSError:
      here = False
  if not here:
    host = '::' if socket.has_dualstack_ipv6() else '0.0.0.0'
  return f'[{host}]:{port}' if ':' in host else f'{host}:{port}'


def _host(place: Place, hello: dict, deadline: float, timeout: float) -> None:
  """Process 0: hears all others, and tells them what it concludes."""
  descriptions = {0: hello['description']}
  connections: list[socket.socket] = []
  newest: dict[int, socket.socket] = {}  # By process.
  problem = ''
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(_listen(place, min(timeout, _PORT_WAIT)))
    while not problem and len(descriptions) < place.count:
      try:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        connection, _ = server.accept()
      except TimeoutError:
        absent = sorted({*range(place.count)} - descriptions.keys())
        problem = (
          f'process {", ".join(map(str, absent))} did not come to '
          f'{place.coordinator} within {timeout:.0f} seconds: start it, or '
          'look at what it says.'
        )
        _answer(connections, {'absent': problem})
        raise MeetingError(problem) from None
      stack.enter_context(connection)
      message = _receive(connection, _HELLO_WAIT)
      if message is None:  # A stranger, or a process that only looks.
        connection.close()
        continue
      connections.append(connection)
      number = message['process_id']
      if number in newest and _has_gone(newest[number]):
        del descriptions[number]  # It was killed, and started again.
      problem = _conflict(place, descriptions, message)
      descriptions[number] = message['description']
      newest[number] = connection
    problem = problem or difference(
      descriptions, 'start all processes of a run alike.'
    )
    _answer(connections, {'problem': problem})
  if problem:
    raise ConfigError(problem)


def _conflict(place: Place, here: Mapping[int, Any], message: dict) -> str:
  """Returns a line about a process that does not fit in, or nothing."""
  number, count = message['process_id'], message['num_processes']
  if count != place.count:
    return (
      f'num_processes is {count} in process {number}, but {place.count} in '
      'process 0: start all processes with the same number.'
    )
  if number in here or not 0 <= number < count:
    return (
      f'process_id {number} was given to two processes: give each its own, '
      f'from 0 to {count - 1}.'
    )
  return ''


def _visit(place: Place, hello: dict, deadline: float, timeout: float) -> None:
  """Another process: tells process 0 about itself, and hears the answer."""
  while True:
    with _connect(place, deadline, timeout) as connection:
      answer = None
      with contextlib.suppress(OSError):  # Whoever answered hangs up at once.
        _send(connection, hello)
        # Process 0 may wait for others from its own start on.
        wait = 2 * timeout + _PORT_WAIT
        answer = _receive(connection, wait, any_message=True)
    if answer is not None:
      break
    # The port belongs to a process that is just ending, or to a stranger.
    if time.monotonic() > deadline:
      raise MeetingError(
        f'the program that answers at {place.coordinator} is not process 0 of '
        'this run, or it has stopped: read the output of process 0, and check '
        '--coordinator.'
      )
    time.sleep(0.5)
  if answer.get('absent'):
    raise MeetingError(printable(str(answer['absent'])))
  if answer.get('problem'):
    raise ConfigError(printable(str(answer['problem'])))


def _connect(place: Place, deadline: float, timeout: float) -> socket.socket:
  while True:
    left = deadline - time.monotonic()
    try:
      # A name may be unknown until the host of process 0 has started.
      _resolve(place)
      # It tries all addresses of the name.
      return socket.create_connection(place.address, max(min(left, 10), 0.1))
    except ConfigError:
      if left <= 0:
        raise
    except OSError as error:
      if left <= 0:
        raise MeetingError(
          f'process 0 did not answer at {place.coordinator} within '
          f'{timeout:.0f} seconds ({error.strerror or error}): start it there, '
          'or correct --coordinator.'
        ) from error
    time.sleep(0.2)


def _resolve(place: Place) -> tuple[socket.AddressFamily, tuple]:
  host, port = place.address
  try:
    family, _, _, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM
    )[0]
  except (OSError, UnicodeError, OverflowError) as error:
    raise ConfigError(
      f'the host of --coordinator={place.coordinator} is unknown here '
      f'({getattr(error, "strerror", None) or error}): give the name or '
      'address of the host of process 0.'
    ) from error
  return family, address


def _listen(place: Place, wait: float) -> socket.socket:
  """Opens the port, for which the process before may still have a use."""
  host, port = place._replace(coordinator=bind_address(place)).address
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  deadline = time.monotonic() + wait
  while True:
    try:
      return socket.create_server(
        (host, port),
        family=family,
        dualstack_ipv6=host == '::' and socket.has_dualstack_ipv6(),
      )
    except (OSError, OverflowError) as error:
      if time.monotonic() > deadline or isinstance(error, OverflowError):
        raise ConfigError(
          f'process 0 cannot listen at {place.coordinator} ('
          f'{getattr(error, "strerror", None) or error}): stop what uses this '
          'port, or choose another one for all processes.'
        ) from error
    time.sleep(0.2)


def _has_gone(connection: socket.socket) -> bool:
  """Returns whether the other end, which has nothing to say, was closed."""
  connection.setblocking(False)
  try:
    return not connection.recv(1, socket.MSG_PEEK)
  except BlockingIOError:
    return False
  except OSError:
    return True
  finally:
    connection.settimeout(_HELLO_WAIT)


def _answer(connections: Iterable[socket.socket], message: dict) -> None:
  for connection in connections:
    with contextlib.suppress(OSError):  # It has gone: JAX will miss it.
      _send(connection, message)


def _send(connection: socket.socket, message: dict) -> None:
  connection.sendall(json.dumps(message).encode() + b'\n')


def _receive(
  connection: socket.socket, timeout: float, any_message: bool = False
) -> dict | None:
  """Returns the message of a process; None if it is not one of this program."""
  connection.settimeout(timeout)
  try:
    with connection.makefile('rb') as file:
      line = file.readline(_MAX_BYTES)
    message = json.loads(line)
  except (OSError, ValueError, RecursionError):
    return None
  if not isinstance(message, dict):
    return None
  if any_message:
    return message if message.keys() <= {'absent', 'problem'} else None
  whole = all(
    type(message.get(name)) is int for name in ('process_id', 'num_processes')
  )
  if message.get('program') != _HELLO or not whole:
    return None
  return message if isinstance(message.get('description'), dict) else None


def _short(value: object) -> str:
  return printable(repr(value), 60)
