"""One process of an elastic run, between the agent of its host and resist_jax.

  python -m experiments.launch.elastic_worker WRONG ARG ...

The agent starts again whatever fails. A mistake in the input would fail again,
and so would what a person must mend. So after exit codes 1 and 2 this process
writes the code to the file WRONG, and ends with 0. It dies with its agent, and
resist_jax with it: a process without an agent would go on as a member of a
group that has met anew without it.
"""

import ctypes
import os
import pathlib
import signal
import subprocess
import sys

from experiments.launch.forwarding import forward

_PR_SET_PDEATHSIG = 1  # Of Linux: a signal when the parent ends.


def die_with_parent(parent: int) -> None:
  """Lets the kernel kill this process when its parent ends.

  Args:
    parent: Number of the process that is the parent now.
  """
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:  # It has ended already.
    os._exit(1)


def main() -> None:
  """Runs resist_jax, forwards signals to it, and translates its exit code."""
  die_with_parent(os.getppid())
  _, wrong, *args = sys.argv
  me = os.getpid()
  process = subprocess.Popen(
    [sys.executable, '-m', 'resist_jax', *args],
    preexec_fn=lambda: die_with_parent(me),
    # The agent signals a whole group, and a second signal ends a run at once.
    start_new_session=True,
  )

  forward([process])
  code = process.wait()
  if code in (1, 2):
    pathlib.Path(wrong).write_text(str(code))
    code = 0
  sys.exit(code if code >= 0 else 128 - code)


if __name__ == '__main__':
  main()
