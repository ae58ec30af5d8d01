"""Starts the process of one host of a run whose hosts come and go.

On every host, with the same words everywhere:

  python -m experiments.launch.elastic --hosts=1:4 --meet=HOST0:29400 -- \
    --config=cifar100:s4 --workdir=SHARED --config.workers_per_process=1

The arguments after `--` are those of `python -m resist_jax`. PyTorch's elastic
agent (`pip install '.[elastic]'` in a clone) watches over the process here.
When a host is lost, the agents of the others meet anew and start their
processes again, which go on from the newest checkpoint; a host that comes back
is taken in by the next such restart. `--config.checkpoint_every=1` is added, so
at most two rounds are lost, and `--config.faults.timeout=20`, so that a lost
host is noticed sooner; your own values win.

The agents meet at `--meet`. While the host of that address is away, all others
wait for it, so choose one that does not fail, such as a login node, and start
`python -m experiments.launch.elastic --meet=HOST0:29400 --only_meet` there.

The exit code is 0 when the run is complete, 2 if the input is wrong, 1 if a
person must mend something else, such as a full disk, 75 if this host has failed
too often, and 128 + N after signal N.
"""

import argparse
from collections.abc import Iterator, Sequence
import datetime
import hashlib
import importlib.util
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import NoReturn

from resist_jax.errors import ConfigError, Parser, one_line, refused
from resist_jax.run.processes import TRY_AGAIN

# Seconds. The defaults wait 30 for the last host and 15 for a lost one.
_MEETING = {
  'last_call_timeout': 5,
  'keep_alive_interval': 2,
  'keep_alive_max_attempt': 4,
  'join_timeout': 7 * 24 * 3600,
}
_RETRY = 5  # Seconds between two tries to reach the place to meet.
# Earlier words have less weight than those of the user.
_DEFAULTS = ('--config.checkpoint_every=1', '--config.faults.timeout=20')


def main() -> None:
  """Reads the command line, and runs the agent of this host."""
  options = _parse()
  if not options.only_meet:
    _check(options)
    if not _ask('complete', *_DEFAULTS, *options.args):
      print('this run is complete.', file=sys.stderr)
      return
  if not importlib.util.find_spec('torch'):
    raise SystemExit(
      refused(ConfigError('PyTorch is missing: pip install ".[elastic]".'))
    )
  os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'  # A port of our own.
  # Seconds until the agent kills a process that is to end, and saves first.
  os.environ.setdefault('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', '600')
  if options.only_meet:
    _only_meet(options.meet)
  with tempfile.TemporaryDirectory() as folder:
    wrong = pathlib.Path(folder) / 'wrong'
    code = _watch(options, wrong)
    sys.exit(int(wrong.read_text()) if wrong.exists() else code)


def _parse() -> argparse.Namespace:
  parser = Parser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument(
    '--meet', required=True, metavar='HOST:PORT', help='where the agents meet'
  )
  parser.add_argument(
    '--hosts',
    type=_hosts,
    default='1',
    metavar='LEAST:MOST',
    help='how many hosts the run needs, and how many it takes',
  )
  parser.add_argument(
    '--processes_per_host', type=int, default=1, help='one for each GPU, say'
  )
  parser.add_argument(
    '--restarts', type=int, default=100, help='failures of this host in all'
  )
  parser.add_argument(
    '--name', help='name of the run, if several meet at the same address'
  )
  parser.add_argument(
    '--address', help='of this host for the others; by default its name'
  )
  parser.add_argument(
    '--only_meet', action='store_true', help='hold the place to meet only'
  )
  parser.add_argument(
    'args', nargs='*', metavar='-- ARG', help='arguments of resist_jax'
  )
  options = parser.parse_args()
  found = re.fullmatch(r'\[?[\w.:-]+\]?:(\d{1,5})', options.meet)
  if not found or not 0 < int(found[1]) < 2**16:
    parser.error(
      f'--meet is {options.meet!r}; it must be HOST:PORT, with a port below '
      '65536.'
    )
  if options.processes_per_host < 1 or options.restarts < 0:
    parser.error(
      f'--processes_per_host is {options.processes_per_host} and --restarts '
      f'{options.restarts}; they must be at least 1 and 0.'
    )
  if not (options.only_meet or options.args):
    parser.error('the arguments of resist_jax are missing: give them after --.')
  return options


def _hosts(text: str) -> tuple[int, int]:
  """Reads the least and the most hosts of a run."""
  least, _, most = text.partition(':')
  try:
    found = int(least), int(most or least)
  except ValueError:
    found = 0, 0
  if not 1 <= found[0] <= found[1]:
    raise argparse.ArgumentTypeError(f'{text!r} is no range such as 1:4.')
  return found


def _ask(*words: str) -> int:
  """Returns the exit code of `elastic_check`."""
  command = [sys.executable, '-m', 'experiments.launch.elastic_check']
  return subprocess.call([*command, *words])


def _check(options: argparse.Namespace) -> None:
  """Ends this process if the config does not fit each number of hosts."""
  numbers = map(str, (*options.hosts, options.processes_per_host))
  code = _ask('fits', *numbers, *_DEFAULTS, *options.args)
  if code:
    sys.exit(code)


def _only_meet(address: str) -> NoReturn:
  """Holds the store by which the agents find each other, until it is killed."""
  from torch.distributed import TCPStore

  host, _, port = address.rpartition(':')
  try:
    store = TCPStore(
      host.strip('[]'), int(port), is_master=True, wait_for_workers=False
    )
  except RuntimeError as error:  # PyTorch's errors of the network are such.
    problem = (
      f'nobody can meet at {address} here ({one_line(error)}): stop what uses '
      'this port, or choose another one in the --meet of all hosts.'
    )
    raise SystemExit(refused(ConfigError(problem))) from error
  print(f'the agents can meet at {store.host}:{store.port}', flush=True)
  while True:
    signal.pause()


def _watch(options: argparse.Namespace, wrong: pathlib.Path) -> int:
  """Runs the agent until the run is complete; returns an exit code."""
  from torch.distributed import DistError
  from torch.distributed.elastic.multiprocessing import errors
  from torch.distributed.elastic.multiprocessing.api import SignalException
  from torch.distributed.elastic.rendezvous import api as rendezvous
  from torch.distributed.launcher.api import elastic_launch

  logging.getLogger('torch').setLevel(logging.ERROR)
  child = ('-m', 'experiments.launch.elastic_worker', str(wrong))
  # Meetings that are over. The errors keep the store of the first agent alive,
  # which tells all hosts the same.
  over: list[Exception] = []
  if options.hosts[0] > 1:
    print(
      f'{options.hosts[0]} hosts or more meet at {options.meet}; this one '
      'waits for the others.',
      file=sys.stderr,
      flush=True,
    )
  while True:
    launch = elastic_launch(_config(options, len(over)), sys.executable)
    try:
      launch(*child, *_DEFAULTS, *options.args)
    except errors.ChildFailedError:
      print(
        f'error: the process of this host has failed {options.restarts + 1} '
        'times, see above; the same command goes on from the newest '
        'checkpoint.',
        file=sys.stderr,
      )
      return TRY_AGAIN
    except SignalException as stop:
      return 128 + stop.sigval
    except rendezvous.RendezvousClosedError as error:
      # PyTorch closes a meeting when a run ends, also when that failed.
      if not _ask('complete', *_DEFAULTS, *options.args):
        print('the other hosts have completed this run.', file=sys.stderr)
        return 0
      over.append(error)
      print(
        f'this run has ended before: its hosts meet again ({len(over) + 1}).',
        file=sys.stderr,
      )
    except (rendezvous.RendezvousError, DistError) as error:
      over.clear()  # The store may be another one now.
      _say_waiting(options.meet, error)
      time.sleep(_RETRY)
    else:
      return 0


def _say_waiting(address: str, error: Exception) -> None:
  now = datetime.datetime.now().strftime('%H:%M:%S')
  reason = ' '.join(str(error.__cause__ or error).split())[:100]
  print(f'{now} waiting for {address} ({reason})', file=sys.stderr, flush=True)


def _handled() -> Iterator[str]:
  """Yields the signals that end this host's part; `nohup` ignores one."""
  for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGQUIT'):
    if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN:
      yield name


def _workdir(args: Sequence[str]) -> str:
  """Returns the workdir that arguments name last; '' if they name none."""
  found = ''
  for word, following in zip(args, [*args[1:], ''], strict=True):
    name, equals, value = word.partition('=')
    if name in ('--workdir', '-workdir'):
      found = os.path.normpath(value if equals else following)
  return found


def _config(options: argparse.Namespace, number: int):
  """Returns how to launch, for the meeting of a number from 0."""
  from torch.distributed.launcher.api import LaunchConfig

  # Hosts whose other words differ must meet: then their processes refuse them.
  digest = hashlib.sha256(_workdir(options.args).encode()).hexdigest()[:12]
  name = options.name or digest
  least, most = options.hosts
  return LaunchConfig(
    min_nodes=least,
    max_nodes=most,
    nproc_per_node=options.processes_per_host,
    run_id=f'{name}-{number}' if number else name,
    rdzv_backend='c10d',
    rdzv_endpoint=options.meet,
    rdzv_configs=dict(_MEETING),
    max_restarts=options.restarts,
    local_addr=options.address,
    signals_to_handle=','.join(_handled()),
  )


if __name__ == '__main__':
  main()
