"""The first hour on a rented device goes on where it was stopped."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tfds_sets

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / 'experiments' / 'launch' / 'first_hour.sh'


def environment(out, **values):
  return {
    **os.environ,
    'PYTHON': sys.executable,
    'SCALE': 'smoke',
    'OUT': str(out),
    'JAX_COMPILATION_CACHE_DIR': os.environ['JAX_COMPILATION_CACHE_DIR'],
    **values,
  }


def run(out, *names, **values):
  return subprocess.run(
    [SCRIPT, *names],
    env=environment(out, **values), capture_output=True, text=True,
    timeout=1000,
  )  # fmt: skip


def test_slices_have_names():
  result = run('unused', '--list')
  assert result.returncode == 0
  names = [line.split()[0] for line in result.stdout.splitlines()]
  assert names[0] == 'tests'
  assert names[-2:] == ['resist', 'local_sgd']
  page = (ROOT / 'docs' / 'first_hour.md').read_text()
  assert all(f'`{name}`' in page for name in names)


@pytest.mark.parametrize(
  ('names', 'values', 'says'),
  [
    (['train'], {}, "there is no slice 'train'; the slices are tests"),
    ([], {'SCALE': 'cpu'}, "SCALE is 'cpu'; use paper or smoke"),
    ([], {'SECONDS_OF_A_SLICE': '1m'}, "SECONDS_OF_A_SLICE is '1m'"),
    ([], {'PYTHON': '/none'}, '/none cannot import JAX'),
    # Without an accelerator there is nothing to wait an hour for.
    ([], {'SCALE': 'paper'}, 'JAX sees no accelerator here (1 cpu'),
  ],
)
def test_wrong_input_is_refused_in_one_line(tmp_path, names, values, says):
  result = run(tmp_path / 'out', *names, **values)
  assert result.returncode == 2
  assert result.stderr.splitlines()[-1].startswith(f'error: {says}')
  assert not (tmp_path / 'out').exists()


@pytest.mark.experiments
def test_slices_that_fail_are_named_and_the_others_run(tmp_path):
  # CIFAR-100 is not there, and this Python has no PyTorch.
  result = run(tmp_path, 'resist', 'torch_float32', DATA=str(tmp_path / 'none'))
  assert result.returncode == 1
  said = result.stdout
  assert 'resist: FAILED with exit code 2' in said
  assert 'error: ' in said
  assert 'torch_float32: skipped, because' in said
  assert not (tmp_path / 'resist.done').exists()
  assert 'FAILED' in (tmp_path / 'summary.txt').read_text()


def stop_when_it_trains(tmp_path, data):
  log = tmp_path / 'resist.log'
  before = log.read_text().count('cifar100_resist_s4')
  with subprocess.Popen(
    [SCRIPT, 'resist'],
    env=environment(tmp_path, DATA=str(data)),
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout is not None
    for line in process.stdout:
      if line.startswith('resist:'):
        break
    while log.read_text().count('cifar100_resist_s4') == before:
      assert process.poll() is None
      time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.stdout.read()
  assert process.returncode == 143
  assert 'resist: stopped after' in said


@pytest.mark.experiments
def test_a_training_that_is_cut_off_and_stopped_goes_on(tmp_path):
  data = tmp_path / 'data'
  tfds_sets.write(data, 'cifar100', classes=100, counts=(400, 100))
  values = {'DATA': str(data)}
  # Too short to end on any machine: programs are imported and compiled first.
  first = run(tmp_path, 'resist', SECONDS_OF_A_SLICE='3', **values)
  assert 'resist: cut off after' in first.stdout
  stop_when_it_trains(tmp_path, data)
  after = run(tmp_path, 'resist', 'profile', **values)
  assert after.returncode == 0, after.stdout
  assert 'resist: done in' in after.stdout
  results = tmp_path / 'results' / 'table2' / 'smoke'
  assert list(results.glob('cifar100_resist_s4_seed0.json'))
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
  assert (tmp_path / 'profile.json').exists()  # Else it lies among our results.
  # What is done stays done.
  again = run(tmp_path, 'resist', 'profile', **values)
  assert again.returncode == 0
  assert 'resist: done before' in again.stdout
  assert 'profile: done before' in again.stdout
