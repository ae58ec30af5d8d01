"""Four processes that talk over a network are four devices of one process."""

import json
import subprocess
import sys

from covering import rest_is_slow
import jax
import numpy as np
import pytest
from several import LIMIT, ROOT
from train_several import RUNS, WORKERS, config_of

from experiments.launch import local
from resist_jax import report
from resist_jax.errors import ConfigError
from resist_jax.run import export, places, processes, setup, train


@pytest.fixture(scope='module')
def trained(tmp_path_factory, request):
  """The folder of the runs to test, each trained by four processes."""
  test = test_four_processes_are_four_virtual_devices.__name__
  names = [
    item.callspec.params['name']
    for item in request.session.items
    if getattr(item, 'originalname', None) == test
  ]
  folder = tmp_path_factory.mktemp('four')
  coordinator = f'127.0.0.1:{local.free_port()}'
  # Files: a process that nobody reads would wait for room in its pipe.
  outputs = [
    (folder / f'{process}.txt').open('w+') for process in range(WORKERS)
  ]
  started = [
    subprocess.Popen(
      [sys.executable, 'tests/train_several.py', folder, coordinator]
      + [str(WORKERS), str(process), *names],
      cwd=ROOT,
      stdout=output,
      stderr=output,
    )
    for process, output in enumerate(outputs)
  ]
  for process, output in zip(started, outputs, strict=True):
    code = process.wait()
    output.seek(0)
    assert code == 0, output.read()[-3000:]
    output.close()
  return folder


UNEQUAL = """
import sys
import jax
process = int(sys.argv[2])
jax.config.update('jax_num_cpu_devices', (2, 4)[process])
jax.distributed.initialize(sys.argv[1], 2, process)
from resist_jax.errors import ConfigError
from resist_jax.run import config, setup
made = config.get_config()
made.num_workers = 8
try:
  setup.prepare(made)
except ConfigError as error:
  print(error)
from resist_jax import make_mesh
try:
  make_mesh(6)
except ValueError as error:
  print(error)
jax.distributed.shutdown()
"""


SAVES = """
import sys
import jax
import jax.numpy as jnp
import optax
jax.config.update('jax_num_cpu_devices', 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from resist_jax import Trainer
def loss_fn(params, present, batch, key):
  noise = jax.random.normal(batch['key'])
  return params['out'].sum() + 0 * noise, {'noise': noise}
trainer = Trainer(
  loss_fn, optax.sgd(0.1), chains=('blocks',), num_workers=4, local_steps=1)
state = trainer.init({'blocks': {'w': jnp.ones((4, 3))}, 'out': jnp.ones(3)})
for _ in range(6):
  trainer.save(sys.argv[3], state)
keys = jax.random.split(jax.random.key(0), (4, 1))
_, metrics = trainer.round(trainer.restore(sys.argv[3]), {'key': keys})
mine = metrics['noise'].addressable_shards
wanted = jax.vmap(jax.random.normal)(keys[:, 0])
assert all(abs(x.data - wanted[x.index]).max() < 1e-6 for x in mine), wanted
print(int(trainer.restore(sys.argv[3]).round))
jax.distributed.shutdown()
"""


def in_two_processes(code, *arguments):
  """Runs a program in two processes, and returns what each has printed."""
  coordinator = f'127.0.0.1:{local.free_port()}'
  started = [
    subprocess.Popen(
      [sys.executable, '-c', code, coordinator, str(process), *arguments],
      cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )
    for process in range(2)
  ]  # fmt: skip
  said = [process.communicate(timeout=LIMIT)[0] for process in started]
  assert [process.returncode for process in started] == [0, 0]
  return said


@pytest.mark.faults
def test_a_trainer_saves_a_round_again_and_takes_keys(tmp_path):
  said = in_two_processes(SAVES, tmp_path / 'x')
  assert [text.splitlines()[-1] for text in said] == ['0', '0']


@pytest.mark.faults
def test_hosts_with_unequal_numbers_of_devices_are_told():
  assert set(in_two_processes(UNEQUAL)) == {
    'the processes have [2, 4] devices: give each equally many, such as by '
    'JAX_LOCAL_DEVICE_IDS=0,1.\n'
    'num_devices is 6, 3 of each process, but one has only 2: use at most 4.\n'
  }


@pytest.mark.faults
@pytest.mark.parametrize(
  'name',
  rest_is_slow(list(RUNS), ['hand_over', 'int8', 'data_parallel', 'streamed']),
)
def test_four_processes_are_four_virtual_devices(name, trained, tmp_path):
  alone = train.train(config_of(name), str(tmp_path))
  together = json.loads((trained / name / 'summary.json').read_text())
  for field in (
    'num_devices', 'wire_bytes_total', 'evaluation_wire_bytes_total',
    'bytes_total',
  ):  # fmt: skip
    assert together[field] == alone[field], field
  memory = [x['memory_per_device']['predicted'] for x in (together, alone)]
  assert memory[0] == memory[1]
  assert together['test_accuracy'] == pytest.approx(
    alone['test_accuracy'], abs=0.01
  )
  got, want = (
    export.load(x).variables['params'] for x in (trained / name, tmp_path)
  )
  # int8 rounds: values that differ in the last bit may round to another step.
  share = 0.02 if name == 'int8' else 1e-3
  config = config_of(name)
  first = setup.prepare(config).task.init(config.seed)
  # Beside what training has moved, which may be less than a value itself.
  leaves = (jax.tree.leaves(tree) for tree in (got, want, first))
  for one, other, begun in zip(*leaves, strict=True):
    off, moved = np.linalg.norm(one - other), np.linalg.norm(other - begun)
    assert off <= share * moved
  rows = report.read_rows(trained / name / 'metrics.jsonl')
  assert [row['round'] for row in rows] == [1, 2, 3]


def test_a_barrier_waits_for_the_last_process(tmp_path):
  code = f"""
import pathlib, sys, time
from resist_jax.run import processes
me = int(sys.argv[2])
place = processes.Place(sys.argv[1], 2, me)
processes.start(place, {{}}, processes.Patience(300))
for turn in range(2):
  there = pathlib.Path({str(tmp_path)!r}) / f'{{turn}}'
  if me == turn:
    time.sleep(1)
    there.touch()
  processes.barrier()
  assert there.exists(), (me, turn)
processes.end()
"""
  coordinator = f'127.0.0.1:{local.free_port()}'
  started = [
    subprocess.Popen([sys.executable, '-c', code, coordinator, str(process)])
    for process in range(2)
  ]
  assert [process.wait(LIMIT) for process in started] == [0, 0]


@pytest.mark.faults
def test_a_barrier_does_not_wait_forever():
  """Both processes are alive, so only a time limit ends the wait."""
  code = """
import sys, time
from resist_jax.run import processes
me = int(sys.argv[2])
place = processes.Place(sys.argv[1], 2, me)
processes.start(place, {}, processes.Patience(300, progress=5))
processes.doing('four rounds as one', times=4)
time.sleep(8)
processes.doing('round 8')
if me == 0:
  processes.doing('the checkpoint of round 8')
  processes.barrier()
processes.doing('' if me else 'round 9')
time.sleep(1000)
"""
  coordinator = f'127.0.0.1:{local.free_port()}'
  started = [
    subprocess.Popen(
      [sys.executable, '-c', code, coordinator, str(process)],
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in range(2)
  ]
  waiting, absent = (
    process.communicate(timeout=LIMIT)[1] for process in started
  )
  assert [p.returncode for p in started] == [processes.TRY_AGAIN] * 2
  says = 'stops because the checkpoint of round 8 has taken more than 5 sec'
  assert says in waiting
  assert 'process 0 stopped: the checkpoint of round 8' in absent


def test_a_process_outside_a_cluster_is_alone():
  assert places.find_place(None, None, None) is None
  assert places.find_place(None, 1, None) is None
  assert processes.start(None, {}, processes.Patience()) == 1


def test_a_cluster_says_where_its_processes_are(monkeypatch):
  """As SLURM describes the second of two tasks."""
  for name, value in {
    'SLURM_JOB_ID': '1234',
    'SLURM_STEP_NODELIST': 'node[1-2]',
    'SLURM_NTASKS': '2',
    'SLURM_PROCID': '1',
    'SLURM_LOCALID': '0',
    'SLURM_STEP_NUM_NODES': '2',
  }.items():
    monkeypatch.setenv(name, value)
  place = places.find_place(None, None, None)
  assert (place.count, place.me, place.local_devices) == (2, 1, (0,))
  assert place.coordinator.startswith('node1:')
  # A task may have several of the host's devices.
  monkeypatch.setenv('JAX_LOCAL_DEVICE_IDS', '0,1,2,3')
  assert places.find_place(None, None, None).local_devices == (0, 1, 2, 3)
  monkeypatch.setenv('JAX_LOCAL_DEVICE_IDS', 'all')
  for flags in ((None, None, None), ('node1:7', 2, 0)):
    with pytest.raises(ConfigError, match="is 'all': name devices as in 0,1"):
      places.find_place(*flags)
  for name in ('SLURM_JOB_ID', 'JAX_LOCAL_DEVICE_IDS'):
    monkeypatch.delenv(name)
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '1')
  assert places.find_place(None, None, None) is None
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '4')  # As Open MPI 5 sets it.
  with pytest.raises(ConfigError, match='one of 4 processes of Open MPI'):
    places.find_place(None, None, None)
  assert places.find_place(None, 1, None) is None
  # Flags override it.
  given = places.find_place('here:7', 3, 2)
  assert given == processes.Place('here:7', 3, 2)
