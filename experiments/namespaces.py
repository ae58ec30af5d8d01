"""Virtual hosts with slow links on one Linux machine, by network namespaces.

Each host is a namespace with one interface. All interfaces are connected to a
bridge in a namespace of its own, so the network of the machine is not changed.
`tc` limits what a host sends and what the bridge sends to it. This needs root.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess

# `ip netns exec` replaces files in /etc by those in a namespace's folder here.
_ETC = pathlib.Path('/etc/netns')
_INTERFACE = 'eth0'


class NotPossibleError(RuntimeError):
  """The machine lacks what virtual hosts need; the message names it."""


@dataclasses.dataclass(frozen=True)
class Link:
  """The link between a host and all others.

  Attributes:
    name: Name for readers.
    rate: Rate in both directions, as `tc` writes it; empty for no limit.
    delay: Delay of what a host sends, as `tc` writes it; empty for none.
  """

  name: str
  rate: str = ''
  delay: str = ''


LINKS = (
  Link('no limit'),
  Link('1 Gbit/s', '1gbit'),
  Link('100 Mbit/s', '100mbit'),
  Link('100 Mbit/s, 20 ms', '100mbit', '20ms'),
)


@dataclasses.dataclass(frozen=True)
class Host:
  """A network namespace.

  Attributes:
    namespace: Name of the namespace.
    address: IP address of its interface.
  """

  namespace: str
  address: str

  def command(self, words: list[str]) -> list[str]:
    """Returns the command that runs `words` on this host."""
    return ['ip', 'netns', 'exec', self.namespace, *words]

  def sent(self) -> tuple[int, int]:
    """Returns the bytes and packets that this host has sent so far."""
    command = ['ip', '-n', self.namespace, '-s', '-j', 'link', 'show']
    (link,) = json.loads(_run(*command, _INTERFACE))
    return link['stats64']['tx']['bytes'], link['stats64']['tx']['packets']


@contextlib.contextmanager
def hosts(count: int, link: Link) -> Iterator[list[Host]]:
  """Creates hosts, and removes them at the end, also after an exception.

  Args:
    count: Number of hosts.
    link: The link of each host.

  Yields:
    The hosts.

  Raises:
    NotPossibleError: Without root, `ip` or `tc`, or if the kernel lacks what
      the link needs.
  """
  if os.geteuid() != 0 or not (shutil.which('ip') and shutil.which('tc')):
    raise NotPossibleError(
      'network namespaces need Linux, root, and the commands ip and tc.'
    )
  names = [f'resist{os.getpid()}-{i}' for i in range(count)]
  bridge = f'resist{os.getpid()}-bridge'
  try:
    _run('ip', 'netns', 'add', bridge)
    _run('ip', '-n', bridge, 'link', 'add', 'br0', 'type', 'bridge')
    _run('ip', '-n', bridge, 'link', 'set', 'br0', 'up')
    created = [Host(name, f'10.77.0.{i + 1}') for i, name in enumerate(names)]
    for i, host in enumerate(created):
      _join(host, bridge, f'port{i}', link)
    yield created
  finally:
    for name in (*names, bridge):
      with contextlib.suppress(subprocess.CalledProcessError):
        _run('ip', 'netns', 'delete', name)
      shutil.rmtree(_ETC / name, ignore_errors=True)
    with contextlib.suppress(OSError):
      _ETC.rmdir()  # Fails if other namespaces have folders there.


def _join(host: Host, bridge: str, port: str, link: Link) -> None:
  """Connects a new host to the bridge."""
  _run('ip', 'netns', 'add', host.namespace)
  # The host's own name must resolve to the address that others can reach.
  folder = _ETC / host.namespace
  folder.mkdir(parents=True)
  names = f'127.0.0.1 localhost\n{host.address} {socket.gethostname()}\n'
  (folder / 'hosts').write_text(names)
  ends = ('type', 'veth', 'peer', 'name', port, 'netns', bridge)
  inside = ('ip', '-n', host.namespace)
  _run(*inside, 'link', 'add', _INTERFACE, *ends)
  _run(*inside, 'address', 'add', f'{host.address}/24', 'dev', _INTERFACE)
  _run(*inside, 'link', 'set', _INTERFACE, 'up')
  _run(*inside, 'link', 'set', 'lo', 'up')
  _run('ip', '-n', bridge, 'link', 'set', port, 'master', 'br0', 'up')
  if link.rate:
    _limit(host.namespace, _INTERFACE, link.rate, link.delay)
    _limit(bridge, port, link.rate, '')


def _limit(namespace: str, interface: str, rate: str, delay: str) -> None:
  add = ('tc', '-n', namespace, 'qdisc', 'add', 'dev', interface, 'root')
  # A burst of a few milliseconds, and a queue as long as that of a switch.
  shaper = ('tbf', 'rate', rate, 'burst', '128kb', 'latency', '200ms')
  if delay:
    shaper = ('netem', 'delay', delay, 'rate', rate, 'limit', '10000')
  try:
    _run(*add, *shaper)
  except subprocess.CalledProcessError as error:
    raise NotPossibleError(
      f'this kernel lacks {shaper[0]}, which the link needs '
      f'({error.stderr.strip()}).'
    ) from error


def _run(*words: str) -> str:
  try:
    return subprocess.run(
      words, check=True, capture_output=True, text=True
    ).stdout
  except subprocess.CalledProcessError as error:
    if words[:3] != ('ip', 'netns', 'add'):
      raise
    reason = ' '.join(error.stderr.split())  # Such as in a container.
    raise NotPossibleError(
      f'this machine allows no network namespaces ({reason}).'
    ) from error
