"""One run at a time uses a workdir; some wait for the process before them."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from several import LIMIT, ROOT, Several
from test_train import least_config

from resist_jax.errors import ConfigError
from resist_jax.run import lock, processes, program, train
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


def test_a_second_run_is_refused_until_the_first_one_dies(holder, tmp_path):
  folder = tmp_path / 'run'
  with pytest.raises(ConfigError, match='is in use by') as caught:
    train.train(least_config(), folder)
  line = str(caught.value)
  assert '\n' not in line
  assert f'process {holder.pid} on {os.uname().nodename}' in line
  assert 'wait for its end, stop it, or choose another workdir' in line
  assert [path.name for path in folder.iterdir()] == ['lock']
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert (folder / 'lock').exists()  # The file says nothing without a holder.
  with lock.locked(folder):
    assert str(holder.pid) not in (folder / 'lock').read_text().split()
    with pytest.raises(ConfigError, match=f'process {os.getpid()} on'):
      lock.locked(folder).__enter__()
  assert not list(folder.iterdir())


def test_a_lock_is_released_on_an_error_and_others_do_not_meet(tmp_path):
  a, b = lock.locked(tmp_path / 'a' / 'run'), lock.locked(tmp_path / 'b')
  with pytest.raises(ZeroDivisionError), a, b:
    1 / 0  # noqa: B018
  with lock.locked(tmp_path / 'a' / 'run'):
    pass


def test_the_lock_of_a_run_that_took_the_place_is_not_removed(tmp_path):
  first, second = lock.locked(tmp_path / 'run'), lock.locked(tmp_path / 'run')
  first.__enter__()
  (tmp_path / 'run').rename(tmp_path / 'moved')
  second.__enter__()
  first.__exit__(None, None, None)
  with pytest.raises(ConfigError, match='in use'):
    lock.locked(tmp_path / 'run').__enter__()
  second.__exit__(None, None, None)


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
