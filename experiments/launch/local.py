"""Starts several processes of one run on this machine, as if on several hosts.

  python -m experiments.launch.local --num_processes=4 -- \
    --config=digits --workdir=runs/four

The arguments after `--` are those of `python -m resist_jax` in each process.
The exit code is 0 if all processes succeed, 2 if the input is wrong, 1 if a
person must mend something else, such as a full disk, and 75 if a process was
lost, after which the same command resumes the run. This loop resumes it until
it is done:

  until python -m experiments.launch.local ...; do
    [ $? = 75 ] || break
  done
"""

from collections.abc import Sequence
import os
import socket
import subprocess
import sys

from experiments.launch.forwarding import forward
from resist_jax.errors import Parser
from resist_jax.run.processes import TRY_AGAIN


def free_port() -> int:
  """Returns a free port for the coordinator."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def commands(num_processes: int, args: Sequence[str]) -> list[list[str]]:
  """Returns the command of each process.

  Args:
    num_processes: Number of processes.
    args: Arguments of `python -m resist_jax`, the same for all processes.

  Returns:
    For each process, the words of its command.
  """
  common = [
    f'--coordinator=127.0.0.1:{free_port()}',
    f'--num_processes={num_processes}',
  ]
  return [
    [sys.executable, '-m', 'resist_jax', *args, *common, f'--process_id={i}']
    for i in range(num_processes)
  ]


def exit_code(codes: Sequence[int]) -> int:
  """Returns one exit code for those of all processes.

  Args:
    codes: Exit codes, negative for a process that a signal ended.

  Returns:
    2 if the input is wrong; else 1 if a person must mend something; else
    `TRY_AGAIN` if a process was lost; else the first failure, or 0.

  >>> exit_code([0, 0]), exit_code([75, -9]), exit_code([1, 75])
  (0, 75, 1)
  """
  for code in (2, 1, TRY_AGAIN):
    if code in codes:
      return code
  failed = [code for code in codes if code]
  if not failed:
    return 0
  return failed[0] if failed[0] > 0 else 128 - failed[0]


def main() -> None:
  """Starts the processes, forwards signals to them, and waits for them."""
  parser = Parser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument(
    '--num_processes', type=int, required=True, help='number of processes'
  )
  parser.add_argument(
    'args', nargs='+', metavar='-- ARG', help='arguments of resist_jax'
  )
  options = parser.parse_args()
  if options.num_processes < 1:
    parser.error('--num_processes must be at least 1.')
  started: list[subprocess.Popen] = []

  forward(started)
  for i, command in enumerate(commands(options.num_processes, options.args)):
    # On a host with GPUs, a GPU for each process.
    env = {'JAX_LOCAL_DEVICE_IDS': str(i), **os.environ}
    started.append(subprocess.Popen(command, start_new_session=True, env=env))
  sys.exit(exit_code([process.wait() for process in started]))


if __name__ == '__main__':
  main()
