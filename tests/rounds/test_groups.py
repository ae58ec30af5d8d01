"""A worker of several devices trains as one of one device does."""

from functools import partial
import itertools

from covering import rest_is_slow
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rounds import L, assert_close, full, hand_over, problem, resist
from test_train import rows, tiny_config
import tiny
from wire import train_and_compare

from resist_jax import accounting, models, rounds
from resist_jax.accounting import hlo
from resist_jax.data import augmentation
from resist_jax.errors import ConfigError
from resist_jax.exchange import DATA
from resist_jax.rounds.mesh import SHARDED, batch_specs
from resist_jax.run import export, phases, train
from resist_jax.run.setup import prepare

CARRIED = {'carry': True}
DATA_PARALLEL = {'average_gradients': True, **CARRIED}
BRANCH = 'stage2_branch'
STRIDED = tiny.protocol(
  2, 2, {tiny.CHAIN: L, BRANCH: 1}, min_depth={tiny.CHAIN: 0, BRANCH: None}
)
# Protocol, norm, G, and whether programs loop; on two groups, or one of three.
CASES = {
  'psum': (resist(2), 'batch', 2, False),
  'turns': (hand_over(4, min_depth=3, **CARRIED), 'batch', 2, False),
  'turns, group norm': (hand_over(4), 'group', 2, True),
  'one group': (hand_over(2), 'batch', 3, False),
  'loop': (hand_over(4, **CARRIED), 'batch', 2, True),
  'local_sgd': (full(2), 'batch', 2, False),
  'data_parallel': (full(4, **DATA_PARALLEL), 'batch', 2, False),
  'int8': (hand_over(4, wire_format='int8'), 'batch', 2, False),
  'psum, int8': (resist(2, wire_format='int8'), 'group', 2, True),
  'heads': (STRIDED, 'batch', 2, False),
}
DEVICES = {2: 4, 3: 3}


def network(norm, protocol, axis):
  cut_heads = BRANCH in protocol.num_blocks
  return tiny.network(L, norm=norm, cut_heads=cut_heads, norm_axis=axis)


@pytest.mark.parametrize('case', rest_is_slow(CASES, ['psum']))
def test_groups_train_as_lone_devices_do(case):
  protocol, norm, G, on_device = CASES[case]
  params = tiny.init(network(norm, protocol, None))
  found = []
  for group in (G, 1):
    loss_fn = tiny.make_loss(
      network(norm, protocol, DATA if group > 1 else None)
    )
    args = (loss_fn, params, protocol, DEVICES[G] // G * group, 2)
    found.append(tiny.train_compiled(*args, on_device, group))
  (got, metrics), (want, lone) = found
  # A sum in another order may round to the next step of 8 bits.
  tolerance = 2e-3 if protocol.sends_changes else 3e-5
  assert_close(got, want, tolerance)
  assert_close(metrics, lone, tolerance)
  assert np.abs(want['stem']['kernel'] - params['stem']['kernel']).max() > 0.01


@pytest.mark.slow
def test_groups_of_the_form_for_gpus_train_as_a_lone_cpu_does():
  protocol, norm, *_ = CASES['psum']
  cpu = network(norm, protocol, None)
  found = []
  for net, group in ((cpu.clone(platform='gpu', norm_axis=DATA), 2), (cpu, 1)):
    args = (tiny.make_loss(net), tiny.init(cpu), protocol, 2 * group, 2)
    found.append(tiny.train_compiled(*args, group=group)[0])
  assert_close(*found, 3e-5)


@pytest.mark.slow
def test_a_step_of_a_group_is_that_of_a_lone_worker():
  """No gradient is summed over the group behind one's back."""
  _, params = problem('group')
  loss_fn = tiny.make_loss(tiny.network(L, norm='group'))
  protocol = full(2, 1)
  mesh, run = tiny.make_round(loss_fn, protocol, 4, group=2)
  state = tiny.distribute(params, protocol, mesh)
  batches = tiny.batches(0, 2, 1)
  batches[:] = batches[0]
  state, metrics = run(state, tiny.examples(), batches)

  want = tiny.one_step(loss_fn, params, batches[0, 0])
  assert_close(rounds.assemble(state).params, want)
  value, _ = jax.jit(loss_fn)(params, {}, batches[0, 0], None, tiny.examples())
  np.testing.assert_allclose(metrics['loss'], [value, value], rtol=1e-5)


@pytest.mark.slow
def test_each_device_trains_on_its_part_however_batches_come():
  loss_fn = tiny.make_loss(tiny.network(L, norm_axis=DATA))
  _, params = problem()
  seen, found = set(), []

  def watched(params, present, batch, key, constants):
    seen.add(batch.shape)
    return loss_fn(params, present, batch, key, constants)

  for on_device, streamed in ((False, False), (False, True), (True, False)):
    mesh, run = tiny.make_round(
      watched, full(2), 4, on_device, group=2, streamed=streamed
    )
    state = tiny.distribute(params, full(2), mesh)
    batches = tiny.batches(0, 2, 2)
    if streamed:
      batches = list(batches.swapaxes(0, 1))
    run = run.compile(state, tiny.examples(), batches)
    state, _ = run(state, tiny.examples(), batches)
    found.append(rounds.assemble(state).params)
  assert seen == {(3,)}  # Of six examples.
  for other in found[1:]:
    assert_close(other, found[0])


def test_what_happens_to_images_does_not_depend_on_the_group():
  mesh = rounds.make_mesh(4, 2)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 6, 8, 8, 1)).astype(np.uint8)
  keys = jax.random.split(jax.random.key(3), 2)
  _, batch = batch_specs(mesh)
  kind = augmentation.Augmentation(pad=2, flip=True)
  augment = partial(augmentation.augment, augmentation=kind)

  def local(keys, images):
    one = partial(augment, axis_name=DATA)
    return jax.vmap(one)(keys, images)

  specs = (SHARDED, batch)
  run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=batch)
  want = jax.jit(jax.vmap(augment))(keys, images)
  np.testing.assert_array_equal(jax.jit(run)(keys, images), want)
  assert (want != images).any()


@pytest.mark.parametrize('case', rest_is_slow(CASES, ['psum, int8']))
def test_predicted_bytes_between_and_inside_workers_are_the_programs(case):
  protocol, norm, G, on_device = CASES[case]
  net = network(norm, protocol, DATA)
  params = tiny.init(network(norm, protocol, None))
  devices = DEVICES[G]
  mesh, run = tiny.make_round(
    tiny.make_loss(net), protocol, devices, on_device, G
  )
  found = list(itertools.islice(tiny.assignments(protocol), 3))
  state = tiny.distribute(params, protocol, mesh, found[0])
  batches = tiny.batches(0, protocol.num_workers, 2)
  run = run.compile(state, tiny.examples(), batches)
  sizes = accounting.measure(params, list(protocol.num_blocks))
  for before, after in itertools.pairwise(found):
    pairs = {name: (before[name], after[name]) for name in before}
    taken = accounting.branches(protocol, pairs)
    predicted = accounting.wire_bytes(sizes, protocol, devices // G, pairs, G)
    assert accounting.compiled_wire_bytes(run, taken) == predicted
    assert (predicted > 0) == (devices > G)
  lengths = {k: protocol.slots_per_worker(k) for k in protocol.num_blocks}
  statistics = models.num_statistics(
    net.clone(norm_axis=None), (4, 4, 1), lengths
  )
  assert (statistics > 0) == (norm == 'batch')
  inside = accounting.predicted_group_bytes(
    sizes, protocol, G, 2 * statistics, 1
  )
  assert accounting.compiled_wire_bytes(run, {}, inside=True) == 2 * inside > 0


def test_local_steps_talk_inside_workers_only():
  loss_fn, params = problem('group')
  mesh, run = tiny.make_round(loss_fn, resist(2), 4, group=2)
  state = tiny.distribute(params, resist(2), mesh)
  run = run.compile(state, tiny.examples(), tiny.batches(0, 2, 2))
  text = run.programs['step'].as_text()
  assert hlo.wire_bytes(text, {}, 2) == 0 < hlo.wire_bytes(text, {}, 2, True)
  assert hlo.wire_bytes(text, {}) == hlo.wire_bytes(text, {}, 2, True)
  text = run.programs['finish'].as_text()
  assert hlo.wire_bytes(text, {}, 2, True) == 0 < hlo.wire_bytes(text, {}, 2)


@pytest.mark.parametrize(
  ('text', 'groups'),
  [
    ('{{0,2},{1,3}}', [[0, 2], [1, 3]]),
    ('{}', [[0, 1, 2, 3]]),
    ('[2,2]<=[4]', [[0, 1], [2, 3]]),
    ('[2,2]<=[2,2]T(1,0)', [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", [[0, 3], [1, 2]]),
  ],
)
def test_who_is_in_a_replica_group(text, groups):
  text = f'channel_id=1, replica_groups={text}, use_global_device_ids=true'
  assert hlo.replica_groups(text, 4) == groups


def test_devices_of_a_group_are_neighbours():
  mesh = rounds.make_mesh(4, 2)
  numbers = [[device.id for device in group] for group in mesh.devices]
  assert numbers == [[0, 1], [2, 3]]
  assert rounds.mesh_sizes(mesh) == (2, 2)
  assert rounds.mesh_sizes(rounds.make_mesh(4)) == (4, 1)


def config(**fields):
  """Two workers whose images are cropped and mirrored at random."""
  return tiny_config(
    **{
      'num_workers': 2,
      'num_devices': 2,
      'eval_every': 1,
      'data.augment': 'crop_flip',
      'optimizer.schedule': 'constant',
      **fields,
    }
  )


@pytest.mark.slow
def test_a_run_may_have_groups_and_change_them(tmp_path):
  """Rounds on groups, on lone devices, and on groups again, as on these."""
  groups = {'num_devices': 4, 'devices_per_worker': 2}
  train.train(config(num_rounds=3), str(tmp_path / 'lone'))
  for num_rounds, fields in ((1, groups), (2, {}), (3, groups)):
    summary = train_and_compare(
      config(num_rounds=num_rounds, **fields), tmp_path / 'groups'
    )
  want, got = rows(tmp_path / 'lone'), rows(tmp_path / 'groups')
  for name in ('train_loss', 'train_accuracy', 'test_accuracy_paper'):
    np.testing.assert_allclose(
      [row[name] for row in got], [row[name] for row in want], rtol=3e-3
    )
  want, got = (export.load(tmp_path / k).variables for k in ('lone', 'groups'))
  jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4), got, want)

  assert (summary['num_devices'], summary['devices_per_worker']) == (4, 2)
  for name in ('wire_bytes_last_round', 'group_bytes_per_step'):
    assert summary[name]['predicted'] > 0
  assert summary['flops_per_image']['compiled'] > 0
  memory = summary['memory_per_device']
  read = memory['compiled']['begin']['arguments']
  assert read == memory['predicted']['parameters'] + 4  # The round's number.


def test_tests_are_spread_over_all_devices():
  """Each device its own batches; a block goes to every one of them."""
  found, sent = [], []
  for fields in ({}, {'num_devices': 4, 'devices_per_worker': 2}):
    setup = prepare(config(**fields))
    trainer = phases.make_phase(setup, 'resist').trainer
    params = jax.jit(setup.task.network.init)(
      jax.random.key(0), jnp.zeros((1, 8, 8, 1))
    )
    evaluator = phases.make_test(setup)
    accuracies, _, wire_bytes = evaluator(trainer.init(params['params']))
    found.append(accuracies)
    sent.append(wire_bytes)
  assert found[0] == pytest.approx(found[1])
  assert sent[1] == 2 * sent[0] > 0
  split = setup.dataset.tests['test']
  batches, *_ = evaluator._batches('', split, np.arange(40), 10)
  assert batches.images().shape[:2] == (4, 10)


def test_devices_are_shared_out_among_workers():
  def devices(**fields):
    return prepare(config(num_devices=0, **fields)).mesh.devices.shape

  assert devices(devices_per_worker=2) == (2, 2)
  assert devices(devices_per_worker=2, num_workers=3) == (1, 2)
  assert devices(devices_per_worker=4) == (1, 4)


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    ({'devices_per_worker': 0}, 'devices_per_worker is 0; .* at least 1'),
    ({'devices_per_worker': 3, 'num_devices': 3}, 'batch_size is 16, not .* 3'),
    ({'devices_per_worker': 4}, 'num_devices is 2, not .* 4: it counts'),
    (
      {'num_workers': 3, 'num_devices': 4, 'devices_per_worker': 2},
      'num_workers is 3, .* 4 / devices_per_worker 2: change',
    ),
    (
      {'num_devices': 0, 'devices_per_worker': 8},
      'devices_per_worker is 8, but there are 4 on a host: .* at 1',
    ),
  ],
)
def test_a_mistake_gets_one_clear_line(fields, says, tmp_path):
  with pytest.raises(ConfigError, match=says) as caught:
    train.train(config(**fields), str(tmp_path))
  assert '\n' not in str(caught.value)
