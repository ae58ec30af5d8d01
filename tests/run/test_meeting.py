"""Processes that do not belong together, do not come, or are not ours."""

from concurrent import futures
import contextlib
import json
import math
import socket
import struct
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from several import LIMIT, ROOT, TINY, Several

from experiments.launch import local
from resist_jax.errors import ConfigError
from resist_jax.run import config as config_lib
from resist_jax.run import meeting, same_program
from resist_jax.run.meeting import MeetingError, Place


def together(*calls):
  """Calls functions in threads, as processes; returns what each raises."""
  found = {}

  def catch(number, call):
    try:
      call()
    except Exception as error:
      found[number] = error

  threads = [
    threading.Thread(target=catch, args=pair) for pair in enumerate(calls)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(LIMIT)
    assert not thread.is_alive()
  return [found.get(number) for number in range(len(calls))]


def coming(
  me, port, *, count=2, late=0.0, timeout=30, host='127.0.0.1', **said
):
  """A process that comes to the meeting."""

  def come():
    time.sleep(late)
    meeting.meet(Place(f'{host}:{port}', count, me), said, timeout)

  return come


@pytest.mark.parametrize(
  ('late', 'host'), [(0, '127.0.0.1'), (1, '127.0.0.1'), (2, 'localhost')]
)
def test_the_order_of_the_start_does_not_matter(late, host):
  port = local.free_port()
  calls = [
    coming(i, port, count=3, late=0.3 * (i == late), host=host, lr=(1, 2))
    for i in range(3)
  ]
  assert together(*calls) == [None] * 3
  # The port is free again: JAX's service takes it over.
  socket.create_server(('127.0.0.1', port)).close()


def assert_all_say(errors, kind, says):
  for error in errors:
    assert type(error) is kind, error
    assert says in str(error)
    assert '\n' not in str(error)


def test_another_value_is_named_by_every_process():
  port = local.free_port()
  said = [{'lr': 0.1}, {'lr': 0.1}, {'lr': 0.2}]
  errors = together(
    *(coming(i, port, count=3, config=said[i]) for i in range(3))
  )
  says = 'config.lr is 0.2 in process 2, but 0.1 in process 0'
  assert_all_say(errors, ConfigError, says)


def test_a_field_that_one_process_lacks_is_a_difference():
  port = local.free_port()
  errors = together(coming(0, port, a=1), coming(1, port, a=1, b=2))
  assert_all_say(errors, ConfigError, 'b is 2 in process 1, but None')


def test_another_number_of_processes():
  port = local.free_port()
  errors = together(coming(0, port), coming(2, port, count=3))
  says = 'num_processes is 3 in process 2, but 2 in process 0'
  assert_all_say(errors, ConfigError, says)


def test_a_number_that_two_processes_have():
  port = local.free_port()
  errors = together(*(coming(i, port, count=3) for i in (0, 1, 1)))
  assert_all_say(errors, ConfigError, 'process_id 1 was given to two')


def connected(port):
  """A connection to process 0, as soon as it listens."""
  for _ in range(100):
    with contextlib.suppress(OSError):
      return socket.create_connection(('127.0.0.1', port))
    time.sleep(0.05)
  raise AssertionError('process 0 does not listen')


def said_to(port, me, count):
  """The connection of a process that has said who it is, and waits."""
  hello = {
    'program': 'resist_jax', 'process_id': me, 'num_processes': count,
    'description': {},
  }  # fmt: skip
  connection = connected(port)
  connection.sendall(json.dumps(hello).encode() + b'\n')
  return connection


@pytest.mark.parametrize('reset', [False, True])
def test_a_process_that_was_killed_and_started_again_is_one(reset, monkeypatch):
  port = local.free_port()
  heard, closed = threading.Semaphore(0), threading.Event()
  receive = meeting._receive

  def receive_and_tell(*args, **kwargs):
    message = receive(*args, **kwargs)
    if message and 'process_id' in message:  # It is no answer of process 0.
      heard.release()
    return message

  monkeypatch.setattr(meeting, '_receive', receive_and_tell)

  def killed():
    connection = said_to(port, 1, 3)
    assert heard.acquire(timeout=LIMIT)
    if reset:
      now = struct.pack('ii', 1, 0)
      connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
    connection.close()
    closed.set()

  def again():
    assert closed.wait(LIMIT)
    coming(1, port, count=3)()

  def last():  # Earlier, it would complete a meeting with the killed one.
    assert closed.wait(LIMIT)
    assert heard.acquire(timeout=LIMIT)
    coming(2, port, count=3)()

  calls = [coming(0, port, count=3), killed, again, last]
  assert together(*calls) == [None] * 4


def test_only_one_process_can_be_process_0():
  port = local.free_port()

  def another():
    connected(port).close()  # Only looks: the first one listens.
    coming(0, port, timeout=1)()

  first, second = together(coming(0, port, timeout=4), another)
  assert_all_say([first], MeetingError, 'process 1 did not come')
  assert_all_say([second], ConfigError, 'cannot listen at')


def test_a_process_that_does_not_come_is_named():
  port = local.free_port()
  errors = together(
    coming(0, port, count=4, timeout=5), coming(2, port, count=4, timeout=5)
  )
  assert_all_say(errors, MeetingError, 'process 1, 3 did not come to 127')


def test_process_0_that_does_not_come():
  port = local.free_port()
  (error,) = together(coming(1, port, timeout=1))
  assert_all_say([error], MeetingError, 'process 0 did not answer at 127')


def test_a_host_that_nobody_knows():
  errors = together(
    *(coming(i, 7777, timeout=1, host='no.such.host.example') for i in (0, 1))
  )
  assert_all_say(errors, ConfigError, 'no.such.host.example:7777 is unknown')


def test_a_port_that_is_taken():
  with socket.create_server(('127.0.0.1', 0)) as server:
    (error,) = together(coming(0, server.getsockname()[1], timeout=1))
  assert_all_say([error], ConfigError, 'stop what uses this port')


@pytest.mark.parametrize(
  'answer', [b'', b'HTTP/1.1 400 Bad Request\r\n\r\n', b'[]\n', b'{"x":1}\n']
)
def test_somebody_else_at_the_port(answer):
  with socket.create_server(('127.0.0.1', 0)) as server:

    def serve():
      with contextlib.suppress(OSError):
        while True:
          connection, _ = server.accept()
          with connection:
            connection.recv(1000)
            connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    (error,) = together(coming(1, server.getsockname()[1], timeout=1))
    server.shutdown(socket.SHUT_RDWR)
  assert_all_say([error], MeetingError, 'is not process 0 of this run')


def test_a_connection_that_is_reset_is_no_answer():
  """Whoever uses the port hangs up before a long description is sent."""
  with socket.create_server(('127.0.0.1', 0)) as server:

    def serve():
      with contextlib.suppress(OSError):
        while True:
          connection, _ = server.accept()
          connection.recv(1)
          now = struct.pack('ii', 1, 0)
          connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
          connection.close()

    threading.Thread(target=serve, daemon=True).start()
    port = server.getsockname()[1]
    (error,) = together(coming(1, port, timeout=1, long='x' * 10**7))
    server.shutdown(socket.SHUT_RDWR)
  assert_all_say([error], MeetingError, 'is not process 0 of this run')


def test_all_addresses_of_a_name_are_tried(monkeypatch):
  """As of a host with IPv6 whose process 0 listens on IPv4."""
  port, resolve = local.free_port(), socket.getaddrinfo

  def two(host, *args, **kwargs):
    if host != 'two.example':
      return resolve(host, *args, **kwargs)
    return [
      found
      for address in ('127.0.0.2', '127.0.0.1')
      for found in resolve(address, *args, **kwargs)
    ]

  monkeypatch.setattr(socket, 'getaddrinfo', two)
  calls = [coming(0, port), coming(1, port, timeout=5, host='two.example')]
  assert together(*calls) == [None, None]


def test_what_is_no_json_and_nan_are_equal_in_all_processes():
  """`train` then says in each what is wrong."""
  port = local.free_port()
  said = {'lr': math.nan, 'a': np.int64(3), 'b': {'x'}, 'c': {(1, 2): np.ones}}
  calls = [coming(i, port, count=2, config=dict(said)) for i in range(2)]
  assert together(*calls) == [None, None]
  errors = together(coming(0, port, lr=0.1), coming(1, port, lr=math.nan))
  assert_all_say(errors, ConfigError, "lr is 'NaN' in process 1, but 0.1 in")


STRANGERS = [
  b'',
  b'GET / HTTP/1.1\r\n\r\n',
  b'\x00\xff\n',
  b'[' * 100_000 + b'\n',
  b'{"program": "resist_jax"}\n',
  b'{"program": "resist_jax", "process_id": "1", "num_processes": 2}\n',
]


def test_strangers_are_not_taken_for_processes():
  port = local.free_port()

  def disturb():
    for message in STRANGERS:
      for _ in range(100):
        with contextlib.suppress(OSError):
          connection = socket.create_connection(('127.0.0.1', port))
          break
        time.sleep(0.05)
      with connection, contextlib.suppress(OSError):
        connection.sendall(message)

  calls = [coming(0, port), disturb, coming(1, port, late=1.0)]
  assert together(*calls) == [None] * 3


def test_what_others_send_is_printed_without_control_characters():
  port = local.free_port()
  errors = together(
    coming(0, port, name='plain'), coming(1, port, name='\x1b[2J\n\x07' * 500)
  )
  for error in errors:
    assert str(error).isprintable()
    assert len(str(error)) < 400


def test_the_coordinator_listens_at_its_own_address_only():
  assert meeting.bind_address(Place('127.0.0.1:7', 2, 0)) == '127.0.0.1:7'
  # An address of documentation, which no interface has.
  assert meeting.bind_address(Place('192.0.2.1:7', 2, 0)) in (
    '[::]:7',
    '0.0.0.0:7',
  )


# A flag of process 1 alone, for fields that a run would notice late or never.
DIFFERENT = [
  ('--config.lr=0.5', 'config.lr is 0.5 in process 1'),
  ('--config.seed=1', 'config.seed is 1 in process 1'),
  ('--config.data.augment=none', "config.data.augment is 'none' in process 1"),
  ('--config.protocol=local_sgd', "config.protocol is 'local_sgd' in proce"),
  ('--config.model.widths=8,16', 'config.model.widths is [8, 16] in process 1'),
]


@pytest.mark.parametrize(
  ('flag', 'says'),
  [
    DIFFERENT[0],
    *(pytest.param(*case, marks=pytest.mark.faults) for case in DIFFERENT[1:]),
  ],
)
def test_processes_that_were_started_differently_end_with_2(
  flag, says, tmp_path
):
  folder = tmp_path / 'run'
  with Several(folder, only_last=(flag,)) as run:
    assert [run.wait(i) for i in (0, 1)] == [2, 2], run.output(0)
    for number in (0, 1):
      (line,) = run.errors(number)
      assert says in line
      assert run.output(number).strip() == line
  assert not folder.exists()


BAD_CARDS = [
  ("config.lr = float('nan')", 'lr is nan; it must be finite'),
  (
    "config.model.module = 'own_network'\n"
    "  config.model.options = {'width': np.int64(8)}",
    'the config cannot be written as JSON',
  ),
]


@pytest.mark.faults
@pytest.mark.parametrize(('line', 'says'), BAD_CARDS)
def test_a_card_that_is_bad_in_all_processes_is_refused_as_alone(
  line, says, tmp_path
):
  card = tmp_path / 'card.py'
  card.write_text(
    'import numpy as np\n'
    'from resist_jax.run.cards.digits import get_config as digits\n'
    f'def get_config():\n  config = digits()\n  {line}\n  return config\n'
  )
  env = {'PYTHONPATH': str(ROOT / 'tests/run')}
  with Several(tmp_path / 'run', f'--config={card}', env=env) as run:
    assert [run.wait(i) for i in (0, 1)] == [2, 2], run.output(0)
    for number in (0, 1):
      (error,) = run.errors(number)
      assert says in error
      assert run.output(number).strip() == error
  assert not (tmp_path / 'run').exists()


@pytest.mark.faults
def test_other_data_in_a_folder_of_the_same_name(tmp_path):
  """A host may keep its data elsewhere, but they must be the same."""
  import tfds_sets

  for name in ('here', 'there'):
    tfds_sets.write(tmp_path / name, 'my_set', seed=len(name))
  common = ('--config.data.name=my_set', f'--config.data.dir={tmp_path}/here')
  with Several(
    tmp_path / 'run',
    *common,
    only_last=(f'--config.data.dir={tmp_path}/there',),
  ) as run:
    assert [run.wait(i) for i in (0, 1)] == [2, 2], run.output(0)
    for number in (0, 1):
      (line,) = run.errors(number)
      assert 'data set my_set.' in line
      assert 'in process 1, but' in line
      assert run.output(number).strip() == line


@pytest.mark.faults
def test_a_workdir_of_another_path_is_refused(tmp_path):
  """Orbax would notice when it saves the first checkpoint."""
  (tmp_path / 'here').mkdir()
  (tmp_path / 'there').symlink_to(tmp_path / 'here')
  other = f'--workdir={tmp_path}/there/run'
  with Several(tmp_path / 'here/run', only_last=(other,)) as run:
    assert [run.wait(i) for i in (0, 1)] == [2, 2], run.output(0)
    for number in (0, 1):
      (line,) = run.errors(number)
      assert 'workdir.path is' in line
      assert 'give all processes the same folder' in line


@pytest.mark.faults
def test_a_proxy_for_the_web_does_not_matter(tmp_path):
  env = dict.fromkeys(
    ('http_proxy', 'https_proxy', 'grpc_proxy'), 'http://127.0.0.1:9'
  )
  with Several(tmp_path / 'run', '--config.num_rounds=1', env=env) as run:
    assert [run.wait(i) for i in (0, 1)] == [0, 0], run.output(0)


@pytest.mark.faults
def test_a_process_alone_ends_with_one_line(tmp_path):
  """Each waits for half a minute, so both wait at once."""
  cases = [
    ('no.such.host.example:7777', 2, 'is unknown here'),
    ('127.0.0.1:9', 75, 'process 0 did not answer at 127.0.0.1:9 within 30'),
  ]

  def alone(coordinator):
    return subprocess.run(
      [sys.executable, '-m', 'resist_jax', *TINY]
      + [f'--workdir={tmp_path / "run"}', f'--coordinator={coordinator}']
      + ['--num_processes=2', '--process_id=1', '--config.faults.timeout=5'],
      capture_output=True,
      text=True,
      timeout=LIMIT,
      check=False,
    )

  with futures.ThreadPoolExecutor() as pool:
    ends = list(pool.map(alone, [coordinator for coordinator, _, _ in cases]))
  for result, (_, code, says) in zip(ends, cases, strict=True):
    assert result.returncode == code
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith('error: ')
    assert says in line
  assert not (tmp_path / 'run').exists()


def test_a_message_is_json_of_limited_size():
  """No pickle, and no end of memory."""
  ours, theirs = socket.socketpair()
  with ours, theirs:
    flood = json.dumps({'program': 'x' * 2**21}).encode()

    def send():
      with contextlib.suppress(OSError):
        theirs.sendall(flood)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    assert meeting._receive(ours, 10) is None


def test_code_of_ones_own_is_compared(tmp_path, monkeypatch):
  """Two hosts whose losses differ would train together."""
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'ours').mkdir()
  (tmp_path / 'ours/net.py').touch()
  found = []
  for loss, rate in ((1, 1), (2, 1), (1, 2), (1, 1)):
    (tmp_path / 'ours/losses.py').write_text(f'SCALE = {loss}')
    (tmp_path / 'rates.py').write_text(f'def rate(): return {rate}')
    made = config_lib.get_config()
    made.model.module = 'ours.net'
    made.optimizer.schedule = f'{tmp_path}/rates.py:rate'
    found.append(same_program.describe(made))
  assert found[0] == found[3]
  said = meeting.difference({0: found[0], 1: found[1]}, '')
  assert 'code of ours.net' in said
  assert 'rates.py' in meeting.difference({0: found[0], 1: found[2]}, '')


def test_what_jax_draws_and_where_it_runs_is_compared():
  made = config_lib.get_config()
  here = same_program.describe(made)
  with jax.debug_nans(True):
    there = same_program.describe(made)
  assert 'jax_debug_nans' in meeting.difference({0: here, 1: there}, '')
  assert 'jax_random_seed_offset' in here['jax.config']
  assert here['kinds of device'] == {}  # On CPUs, nobody asks.
  jax.config.update('jax_platforms', None)
  try:
    there = same_program.describe(made)
  finally:
    jax.config.update('jax_platforms', 'cpu')
  assert {*there['kinds of device']} == {
    'an NVIDIA GPU',
    'packages for accelerators',
  }


def test_files_that_a_module_imports_are_its_code(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'ours.py').write_text(
    'import os, jax, inner.layers, plain\nfrom plain.more import *\n'
  )
  (tmp_path / 'inner').mkdir()
  (tmp_path / 'plain').mkdir()  # A package without `__init__.py`.
  for name in ('inner/layers', 'inner/others', 'inner/deep', 'plain/more'):
    (tmp_path / f'{name}.py').touch()
  (tmp_path / 'inner/__init__.py').write_text('from .deep import *')
  made = config_lib.get_config()
  made.model.module = 'ours'
  made.optimizer.schedule = f'{tmp_path}/ours.py:rate'
  found = [same_program.describe(made)]
  for name in ('inner/others', 'inner/layers', 'inner/deep', 'plain/more'):
    (tmp_path / f'{name}.py').write_text('WIDTH = 2')
    found.append(same_program.describe(made))
  assert found[0] == found[1]  # It imports no others.
  for name in ('ours', f'{tmp_path}/ours.py'):
    digests = [one[f'code of {name}'] for one in found[1:]]
    assert len(set(digests)) == 4
    assert all(digests)
