"""Hosts in network namespaces: they reach each other, are counted, and go."""

import pathlib
import subprocess
import sys

from absl import flags
import pytest

from experiments import namespaces, slow_network, slow_report
from experiments.namespaces import Link, NotPossibleError
from resist_jax.run import checks, command

SERVER = """
import socket
server = socket.create_server(('', 7000))
print('ready', flush=True)
connection, _ = server.accept()
total = 0
while part := connection.recv(1 << 16):
  total += len(part)
print(total, flush=True)
"""
CLIENT = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 7000))
connection.sendall(bytes(int(sys.argv[2])))
connection.close()
"""


def there_are():
  return subprocess.run(
    ['ip', 'netns', 'list'], capture_output=True, text=True, check=True
  ).stdout


@pytest.fixture
def two_hosts():
  try:
    with namespaces.hosts(2, Link('a link', '200mbit')) as found:
      yield found
  except NotPossibleError as error:
    pytest.skip(str(error))
  for host in found:
    assert host.namespace not in there_are()
    assert not pathlib.Path('/etc/netns', host.namespace).exists()


def test_hosts_reach_each_other_and_the_kernel_counts(two_hosts):
  first, second = two_hosts
  assert first.sent()[0] < 10_000
  size = 2_000_000
  with subprocess.Popen(
    second.command([sys.executable, '-c', SERVER]),
    stdout=subprocess.PIPE,
    text=True,
  ) as server:
    assert server.stdout is not None
    assert server.stdout.readline() == 'ready\n'
    client = [sys.executable, '-c', CLIENT, second.address, str(size)]
    subprocess.run(first.command(client), check=True)
    assert server.stdout.readline() == f'{size}\n'
  sent, packets = first.sent()
  payload = sent - slow_network.HEADERS * packets
  assert payload == pytest.approx(size, rel=0.02)
  assert second.sent()[0] < size / 10


def test_a_host_knows_its_own_name_and_the_limits_are_set(two_hosts):
  for host in two_hosts:
    lookup = 'import socket; print(socket.gethostbyname(socket.gethostname()))'
    found = subprocess.run(
      host.command([sys.executable, '-c', lookup]),
      capture_output=True,
      text=True,
      check=True,
    )
    assert found.stdout == f'{host.address}\n'
    shown = subprocess.run(
      ['tc', '-n', host.namespace, 'qdisc', 'show', 'dev', 'eth0'],
      capture_output=True,
      text=True,
      check=True,
    )
    assert 'tbf' in shown.stdout
    assert '200Mbit' in shown.stdout


def test_hosts_go_when_something_breaks():
  names = []

  def break_inside():
    with namespaces.hosts(2, Link('')) as two:
      names.extend(host.namespace for host in two)
      raise KeyboardInterrupt

  try:
    with pytest.raises(KeyboardInterrupt):
      break_inside()
  except NotPossibleError as error:
    pytest.skip(str(error))
  assert len(names) == 2
  assert not any(name in there_are() for name in names)


def test_what_a_machine_lacks_is_said(monkeypatch):
  monkeypatch.setattr(namespaces.os, 'geteuid', lambda: 1000)
  with (
    pytest.raises(NotPossibleError, match='need Linux, root'),
    namespaces.hosts(2, Link('')),
  ):
    pass


def row(seconds, **fields):
  return {'seconds_training': seconds, **fields}


def test_seconds_of_a_round_are_between_rows_that_say_the_same():
  rows = [row(t) for t in (3.0, 9.0, 10.0, 11.0, 12.0)]  # The second is new.
  rows.append(row(12.1, test_accuracy=0.9))
  assert slow_network._seconds_of_a_round(rows) == 1.0
  rows = [row(1.0), row(2.0, test_accuracy=0.5), row(3.9)]
  rows.append(row(4.0, test_accuracy=0.96))
  assert slow_network._seconds_of_a_round(rows) == 1.0


def test_every_method_has_a_name_and_a_file():
  assert slow_report.NAMES.keys() == slow_network.METHODS.keys()
  names = [target.stem for *_, target in slow_network.settings()]
  assert len(set(names)) == len(names)


@pytest.mark.parametrize('method', slow_network.METHODS)
@pytest.mark.parametrize('network', slow_network.NETWORKS)
def test_the_flags_of_a_run_are_valid(network, method):
  parts = slow_network.NETWORKS[network], slow_network.METHODS[method]
  words = [word for part in parts for word in part]
  values = flags.FlagValues()
  command.define(values)
  words = ['p', '--workdir=run', slow_network.CARD, *words]
  checks.validate(command.parse(words, values).config)


def test_data_parallel_trains_as_long_as_local_sgd():
  where = {'device': '1 x cpu', 'cores': 2, 'processor': 'A'}
  where['versions'] = {'jax': '0.10.2'}
  local, parallel = (
    {'seconds_local': 2.0, 'seconds_exchange': 1.0, 'provenance': where},
    {'seconds_round': 9.0, 'seconds_exchange': 0.1, 'provenance': where},
  )
  records = {('l', 'local_sgd'): local, ('l', 'data_parallel'): parallel}
  assert slow_report.exchange_seconds(records, 'l', 'data_parallel') == 7.0
  assert slow_report.beside(records, 'l', 'data_parallel') == local
  assert slow_report.exchange_seconds(records, 'l', 'local_sgd') == 1.0
  assert slow_report.exchange_seconds(records, 'k', 'local_sgd') is None
  parallel['provenance'] = {**where, 'processor': 'B'}
  assert slow_report.exchange_seconds(records, 'l', 'data_parallel') is None
