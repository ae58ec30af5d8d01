"""A run that is started again while the process before still has the lock."""

import signal
import subprocess
import sys
import threading

import pytest
from several import LIMIT, ROOT, Several

from resist_jax.errors import ConfigError
from resist_jax.run import lock, processes, program
from resist_jax.run.meeting import MeetingError

HOLD = """
import pathlib, sys, time
from resist_jax.run.lock import locked
with locked(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(1000)
"""


@pytest.fixture
def holder(tmp_path):
  """A process that holds the lock of `run`."""
  command = [sys.executable, '-c', HOLD, str(tmp_path / 'run')]
  process = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.communicate()


def test_a_lock_is_waited_for_and_taken_when_its_holder_dies(holder, tmp_path):
  threading.Timer(0.5, holder.kill).start()
  with lock.locked(tmp_path / 'run', patience=LIMIT):
    assert holder.wait(LIMIT) == -signal.SIGKILL


def test_a_holder_that_stands_still_is_named_and_can_be_done_without(
  holder, tmp_path
):
  holder.send_signal(signal.SIGSTOP)
  folder = tmp_path / 'run'
  with pytest.raises(MeetingError, match='has not ended within') as caught:
    lock.locked(folder, patience=0.1).__enter__()
  line, code = program.explain(caught.value, str(folder))
  assert code == processes.TRY_AGAIN
  assert '\n' not in line
  assert f'is in use by process {holder.pid} on' in line
  assert f'delete {folder / "lock"} if that process is gone for good' in line
  (folder / 'lock').unlink()
  with lock.locked(folder):
    pass


def test_a_run_that_torchrun_starts_again_waits(holder, tmp_path, monkeypatch):
  """It may be the only process that is left."""
  monkeypatch.setattr(lock, '_PATIENCE', 0.1)
  with pytest.raises(ConfigError, match='wait for its end, stop it, or choose'):
    lock.locked(tmp_path / 'run').__enter__()
  monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'run')
  with pytest.raises(MeetingError, match='has not ended within'):
    lock.locked(tmp_path / 'run').__enter__()
  assert holder.poll() is None


@pytest.mark.faults
def test_several_processes_wait_for_the_process_0_before(holder, tmp_path):
  with Several(tmp_path / 'run', '--config.num_rounds=1') as run:
    run.wait_for_output(0, f'is in use by process {holder.pid}')
    holder.kill()
    assert [run.wait(i) for i in (0, 1)] == [0, 0], run.output(0)
