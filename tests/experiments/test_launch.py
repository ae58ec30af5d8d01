"""What launchers say when the processes of a run end."""

import os
import pathlib
import signal
import stat
import subprocess
import sys

import pytest

from experiments.launch import local

ROOT = pathlib.Path(__file__).parents[2]
# Runs its command as tasks 0 and 1, and ends with the highest code.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=0 ] || exit 99
shift
for task in 0 1; do TASK=$task "$@" & tasks[task]=$!; done
highest=0
for task in 0 1; do
  wait "${tasks[task]}"
  code=$?
  [ $code -le $highest ] || highest=$code
done
exit $highest
"""
PYTHON = """#!/bin/bash
[ "$*" = '-m resist_jax --workdir=a b' ] || exit 98
read -ra codes <<<"$CODES"
[ "${SIGNAL-}" = '' ] || kill -TERM $PPID
exit "${codes[TASK]}"
"""
SCONTROL = """#!/bin/bash
echo "$@"
"""


@pytest.mark.parametrize(
  ('codes', 'ends', 'requeued'),
  [
    ('0 0', 0, False),
    ('1 75', 1, False),
    ('75 2', 2, False),
    ('1 2', 2, False),
    ('0 1', 1, False),
    ('75 75', 75, True),
    ('0 143', 143, True),
    ('127 127', 127, False),  # There is no `python`.
    ('75 126', 126, False),
  ],
)
@pytest.mark.parametrize('sent', ['', 'TERM'])
def test_slurm_requeues_what_a_restart_may_cure(
  codes, ends, requeued, sent, tmp_path
):
  """Also when SLURM sends a signal to the shell of a task."""
  for name, text in (
    ('srun', SRUN), ('python', PYTHON), ('scontrol', SCONTROL)
  ):  # fmt: skip
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(stat.S_IRWXU)
  done = subprocess.run(
    ['bash', ROOT / 'experiments/launch/slurm.sbatch', '--workdir=a b'],
    env={
      'PATH': f'{tmp_path}:{os.environ["PATH"]}',
      'CODES': codes, 'SIGNAL': sent, 'SLURM_JOB_ID': '7',
    },
    capture_output=True, text=True,
  )  # fmt: skip
  assert (done.returncode, done.stderr) == (ends, '')
  assert done.stdout == ('requeue 7\n' if requeued else '')


@pytest.mark.parametrize(
  ('codes', 'ends'),
  [((0, 0), 0), ((75, 1), 1), ((1, 2, 75), 2), ((-9, 75), 75), ((0, -9), 137)],
)
def test_what_a_person_must_mend_hides_behind_no_lost_process(codes, ends):
  assert local.exit_code(codes) == ends


FORWARDS = """
import os, signal, subprocess, sys
from experiments.launch.forwarding import forward
child = subprocess.Popen(['sleep', '100'], start_new_session=True)
forward([child])
for name in sys.argv[1:]:
  os.kill(os.getpid(), signal.Signals[name])
sys.exit(-child.wait())
"""


@pytest.mark.parametrize(
  ('prefix', 'sent', 'received'),
  [
    ([], ['SIGINT'], signal.SIGINT),
    ([], ['SIGHUP'], signal.SIGTERM),  # It saves before it ends.
    (['nohup'], ['SIGHUP', 'SIGINT'], signal.SIGINT),
  ],
)
def test_a_closed_terminal_ends_a_run_unless_nohup_says_otherwise(
  prefix, sent, received
):
  words = [*prefix, sys.executable, '-c', FORWARDS, *sent]
  done = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=60)
  assert done.returncode == received
