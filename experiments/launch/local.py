"""Several processes of one run on this machine, as if they were hosts.

  python -m experiments.launch.local --num_processes=4 -- \
    --config=experiments/configs/digits.py --workdir=runs/four

What stands behind `--` goes to `python -m resist_jax`, in every process. It
ends when all have ended: with 0; with 2 where the input is wrong; with 75 where
a process was lost, and the same command goes on. A loop that tries again:

  until python -m experiments.launch.local ...; do
    [ $? = 75 ] || break
  done
"""

import argparse
from collections.abc import Sequence
import signal
import socket
import subprocess
import sys

from resist_jax.run.processes import TRY_AGAIN


def free_port() -> int:
  """Returns a port that nobody listens on, for the coordinator."""
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


def commands(num_processes: int, args: Sequence[str]) -> list[list[str]]:
  """Returns the command of each process.

  Args:
    num_processes: How many.
    args: Of `python -m resist_jax`, the same for all.

  Returns:
    Words, for each process.
  """
  together = [
    f'--coordinator=127.0.0.1:{free_port()}',
    f'--num_processes={num_processes}',
  ]
  return [
    [sys.executable, '-m', 'resist_jax', *args, *together, f'--process_id={i}']
    for i in range(num_processes)
  ]


def exit_code(codes: Sequence[int]) -> int:
  """Returns what the processes' own exit codes come to.

  >>> exit_code([0, 0]), exit_code([75, -9]), exit_code([2, 75])
  (0, 75, 2)
  """
  for code in (2, TRY_AGAIN):
    if code in codes:
      return code
  failed = [code for code in codes if code]
  if not failed:
    return 0
  return failed[0] if failed[0] > 0 else 128 - failed[0]


def main() -> None:
  """Starts the processes, hands signals on, and waits for all of them."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--num_processes', type=int, required=True)
  parser.add_argument('args', nargs='+', metavar='-- ARG')
  options = parser.parse_args()
  if options.num_processes < 1:
    parser.error('--num_processes must be at least 1.')
  started: list[subprocess.Popen] = []

  def hand_on(signum, frame):
    del frame
    for process in started:
      process.send_signal(signum)

  for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, hand_on)
  for command in commands(options.num_processes, options.args):
    started.append(subprocess.Popen(command, start_new_session=True))
  sys.exit(exit_code([process.wait() for process in started]))


if __name__ == '__main__':
  main()
