"""Hosts that come and go: who starts the processes, and how many workers."""

import argparse
import importlib.util
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from several import LIMIT, ROOT, TINY

from experiments import storm
from experiments.launch import elastic, elastic_check
from experiments.launch.local import free_port
from resist_jax import report
from resist_jax.errors import ConfigError
from resist_jax.run import cards, places, workdir
from resist_jax.run.command import Options
from resist_jax.run.config import for_processes, get_config

torch = pytest.mark.skipif(
  importlib.util.find_spec('torch') is None,
  reason="needs PyTorch: pip install '.[elastic]'",
)


def variables(rank, count, port, here=1, **others):
  """What torchrun gives to a process."""
  return {
    'TORCHELASTIC_RUN_ID': 'run',
    'WORLD_SIZE': str(count),
    'RANK': str(rank),
    'LOCAL_RANK': str(rank % here),
    'LOCAL_WORLD_SIZE': str(here),
    'MASTER_ADDR': '127.0.0.1',
    'MASTER_PORT': str(port),
    **others,
  }


def test_processes_of_one_host_share_its_devices():
  place = places.of_torchrun(variables(5, 8, 77, here=4))
  assert place == places.Place('127.0.0.1:77', 8, 5, (1,))


def test_one_process_is_alone():
  assert places.of_torchrun(variables(0, 1, 77)) is None


def test_a_port_that_torchrun_keeps_is_refused():
  kept = variables(0, 2, 77, TORCHELASTIC_USE_AGENT_STORE='True')
  with pytest.raises(ConfigError, match='TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1'):
    places.of_torchrun(kept)


def test_the_number_of_workers_follows_the_processes():
  config = get_config()
  assert for_processes(config, 3).num_workers == 4
  config.workers_per_process = 2
  assert for_processes(config, 3).num_workers == 6
  assert config.num_workers == 4


def start(folder, environment, *flags):
  command = [sys.executable, '-m', 'resist_jax', *TINY, f'--workdir={folder}']
  each = '--config.workers_per_process=1'
  return subprocess.Popen(
    [*command, each, *flags],
    cwd=ROOT,
    env={**os.environ, **environment},
    stderr=subprocess.PIPE,
    text=True,
  )


def workers(folder):
  """How many workers each round had."""
  rows = report.read_rows(folder / 'metrics.jsonl')
  return [len(next(iter(row['slots'].values()))) for row in rows]


@pytest.mark.faults
def test_a_run_goes_on_with_the_workers_that_are_left(tmp_path):
  """As torchrun starts it: three processes, then two, then one."""
  for rounds, count in ((1, 3), (2, 2), (3, 1)):
    port = free_port()
    started = [
      start(
        tmp_path, variables(i, count, port), f'--config.num_rounds={rounds}'
      )
      for i in range(count)
    ]
    ends = [process.communicate(timeout=LIMIT)[1] for process in started]
    assert [process.returncode for process in started] == [0] * count, ends
  assert workers(tmp_path) == [3, 2, 1]


def worker_command(wrong, *args):
  module = 'experiments.launch.elastic_worker'
  return [sys.executable, '-m', module, str(wrong), *args]


def test_a_mistake_is_not_started_again(tmp_path):
  command = worker_command(tmp_path / 'wrong', '--config.lr=-1', '--workdir=x')
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, (tmp_path / 'wrong').exists()) == (0, True)
  (line,) = [x for x in done.stderr.splitlines() if x.startswith('error: ')]
  assert 'lr is -1' in line


def launcher(*words, meet='127.0.0.1:29400'):
  command = [sys.executable, '-m', 'experiments.launch.elastic']
  return subprocess.run(
    [*command, f'--meet={meet}', *words],
    cwd=ROOT, capture_output=True, text=True, timeout=LIMIT,
  )  # fmt: skip


def assert_refused(done, says):
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ')
  assert says in line
  assert done.returncode == 2


@pytest.mark.parametrize('meet', [':29400', 'HOST:294000', 'HOST:0', 'HOST'])
def test_a_place_to_meet_that_is_none(meet):
  assert_refused(launcher('--only_meet', meet=meet), 'it must be HOST:PORT')


@torch
def test_a_place_to_meet_that_is_taken():
  with socket.create_server(('127.0.0.1', 0)) as server:
    meet = f'127.0.0.1:{server.getsockname()[1]}'
    assert_refused(launcher('--only_meet', meet=meet), 'stop what uses this')


def test_a_config_that_does_not_fit_all_numbers_of_hosts(tmp_path):
  """The launcher says so before anybody meets."""
  words = ('--hosts=1:3', '--', '--config=digits', f'--workdir={tmp_path}/run')
  says = '--hosts allows 3, but then num_workers is 4, no multiple of 3 proces'
  assert_refused(launcher(*words), says)


EACH = {'workers_per_process': 1}
UNFIT = [
  ({**EACH, 'depths': (4, 4, 4, 4)}, 4, 4, None),
  ({**EACH, 'depths': (4, 4, 4, 4)}, 3, 4, 'allows 3, but then stage 3: '),
  (EACH, 1, 12, None),
  (EACH, 1, 13, 'allows 13, but then stage 3: 13 workers cannot share 12'),
  ({**EACH, 'num_devices': 4}, 1, 4, 'allows 1, but then num_workers is 1, no'),
  ({'num_workers': 12, 'num_devices': 4}, 1, 3, 'allows 3, but then num_dev'),
  ({**EACH, 'lr': -1.0}, 1, 4, 'lr is -1.0; it must be greater than 0'),
  ({**EACH, 'model.module': 'own_network'}, 2, 2, None),
  (
    {**EACH, 'model.module': 'own_network'}, 1, 2,
    'own_network defines no function rescale',
  ),
  (
    {**EACH, 'model.module': 'own_network', 'residual_scale': 'none'}, 1, 2,
    None,
  ),
]  # fmt: skip


@pytest.mark.parametrize(('fields', 'least', 'most', 'says'), UNFIT)
def test_what_fits_only_some_numbers_of_hosts(fields, least, most, says):
  config = cards.load('digits')
  config.update_from_flattened_dict(fields)
  hosts = range(least, most + 1)
  if says is None:
    elastic_check.check(config, hosts, 1)
    return
  with pytest.raises(ConfigError) as caught:
    elastic_check.check(config, hosts, 1)
  assert says in str(caught.value)
  assert ('allows' in str(caught.value)) == ('allows' in says)


def test_a_run_that_stopped_early_goes_on_with_other_rules(tmp_path):
  config = cards.load('digits')
  config.early_stopping.patience = 5
  before = {**config.to_dict(), 'num_rounds': 9}
  workdir.write_json(tmp_path / 'config.json', before)
  summary = {'rounds': 7, 'stopped_early': 'after round 7'}
  workdir.write_json(tmp_path / 'summary.json', summary)
  for patience, complete in ((5, True), (9, False)):
    config.early_stopping.patience = patience
    options = Options(config, str(tmp_path), None, None, None)
    assert elastic_check.is_complete(options) == complete


class Started(storm.Run):
  """A run of one host, whose launcher is any command."""

  def __init__(self, folder, *command):
    self.folder, self._begun = folder, time.monotonic()
    self.hosts = [storm.Host(list(command), folder / 'host0.txt')]
    self.faults, self.logged = [], []
    self._turns = 0

  def watch(self):
    self._turns += 1
    assert self._turns < 100


def test_a_storm_ends_when_no_host_is_left(tmp_path):
  run = Started(tmp_path, 'sleep', '1000')
  assert not run.lost()
  run.hosts[0].launcher.terminate()
  storm._weather(run, argparse.Namespace(seed=0, calm=True))
  assert run.lost()
  run.hosts[0].back_at = 0.0
  assert not run.lost()


@pytest.mark.skipif(not torch.args[0], reason='PyTorch is here')
def test_a_storm_without_pytorch_is_refused(tmp_path):
  command = [sys.executable, '-m', 'experiments.storm', '--rounds=1']
  done = subprocess.run(
    [*command, f'--out={tmp_path}/x.json'],
    cwd=ROOT, capture_output=True, text=True, timeout=LIMIT,
  )  # fmt: skip
  assert_refused(done, 'PyTorch is missing: pip install')


@pytest.mark.faults
def test_a_process_dies_with_its_agent(tmp_path):
  command = worker_command(
    tmp_path / 'wrong',
    *TINY,
    f'--workdir={tmp_path / "run"}',
    '--config.num_rounds=1000000',
  )
  agent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
  log = tmp_path / 'run' / 'metrics.jsonl'
  wait_until(lambda: log.exists() and log.stat().st_size)
  agent.kill()
  agent.wait()
  wait_until(lambda: not running(str(tmp_path / 'run')))


def wait_until(condition):
  deadline = time.monotonic() + LIMIT
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.1)


def running(word):
  """Whether a process has the word in its command."""
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      if word in path.read_text():
        return True
    except OSError:  # It has ended meanwhile.
      continue
  return False


@torch
@pytest.mark.faults
def test_a_lost_host_is_done_without_and_taken_in_again(tmp_path, monkeypatch):
  monkeypatch.setattr(storm, 'HOSTS', 2)
  args = [*TINY, '--config.workers_per_process=1', '--config.num_rounds=100000']
  run = storm.Run(tmp_path, [*args, f'--workdir={tmp_path / "run"}'])

  def count():
    found = workers(tmp_path / 'run')
    return found[-1] if found else 0

  try:
    wait_until(lambda: count() == 2)
    run.hosts[1].signal(signal.SIGKILL)
    wait_until(lambda: count() == 1)
    run.hosts[1].launcher.wait()
    run.hosts[1].start()
    wait_until(lambda: count() == 2)
  finally:
    run.end()


@torch
@pytest.mark.faults
def test_a_stop_of_the_launcher_saves_the_round(tmp_path):
  """No checkpoint was due, so the one that is there is that of the stop."""
  folder = tmp_path / 'run'
  words = [
    f'--meet=127.0.0.1:{free_port()}', '--', *TINY, f'--workdir={folder}',
    '--config.num_rounds=100000', '--config.checkpoint_every=100000',
  ]  # fmt: skip
  launcher = subprocess.Popen(
    [sys.executable, '-m', 'experiments.launch.elastic', *words],
    cwd=ROOT, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  log = folder / 'metrics.jsonl'
  wait_until(lambda: log.exists() and len(report.read_rows(log)) > 3)
  launcher.send_signal(signal.SIGTERM)
  assert launcher.wait(LIMIT) == 128 + signal.SIGTERM
  (saved,) = (folder / 'digests').glob('[0-9]*.json')
  assert int(saved.stem) == report.read_rows(log)[-1]['round']


@torch
@pytest.mark.faults
def test_the_command_of_a_run_that_has_ended_runs_again(tmp_path):
  """PyTorch closes the meeting of a run for good, also when it failed."""
  meet = f'--meet=127.0.0.1:{free_port()}'
  command = [sys.executable, '-m', 'experiments.launch.elastic', meet]
  place = subprocess.Popen(
    [*command, '--only_meet'], cwd=ROOT, stdout=subprocess.PIPE
  )
  assert place.stdout.readline()
  folder = tmp_path / 'run'
  words = ['--', *TINY, f'--workdir={folder}', '--config.num_rounds=1']
  try:
    for again in range(3):
      done = subprocess.run(
        [*command, '--address=127.0.0.1', *words],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT,
      )  # fmt: skip
      assert done.returncode == 0, done.stderr
      assert (folder / 'summary.json').exists()
      if again == 1:
        shutil.rmtree(folder)
  finally:
    with place:
      place.kill()


def test_hosts_meet_by_the_workdir_whatever_their_other_words_are():
  """Hosts that differ would wait for each other for days."""
  same = [
    ['--config.lr=0.1', '--workdir=/s/run'],
    ['--workdir=/other', '--workdir', '/s/run/', '--config.lr=0.2'],
  ]
  assert {elastic._workdir(args) for args in same} == {'/s/run'}
  assert elastic._workdir(['--config=digits']) == ''
