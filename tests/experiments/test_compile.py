"""Programs compiled for accelerators that are not here keep what we promise."""

import dataclasses
import json
import os
import subprocess
import sys

from covering import rest_is_slow
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest
import tiny

from experiments import shapes
from experiments.compile import cases, programs, tables, targets
from experiments.compile.faults import faults
from experiments.compile.memory import compile_for
from resist_jax import Trainer, accounting, models, rounds
from resist_jax.data.augmentation import Augmentation, augment
from resist_jax.errors import ConfigError
from resist_jax.exchange import WORKER

S, L = 4, 6
TARGETS = ['cpu', 'v5e:2x2', 'h100:4']


def skip_without_compiler(name):
  if name != 'cpu' and (why_not := targets.parse(name).why_not()):
    pytest.skip(why_not)


def mesh_of(name):
  skip_without_compiler(name)
  return rounds.make_mesh(S) if name == 'cpu' else targets.parse(name).mesh(S)


def round_of(mesh, loss_fn, **fields):
  """A round as one program, and what it is called with, as shapes."""
  protocol = tiny.protocol(
    S, 2, {tiny.CHAIN: L}, exchange='hand_over', **fields
  )
  run = rounds.make_round(
    loss_fn, tiny.make_optimizer(), protocol, mesh, seed=0, on_device=True
  )
  assigned = next(tiny.assignments(protocol))
  params = jax.eval_shape(lambda: tiny.init(NETWORK))
  state = shapes.state(params, tiny.make_optimizer(), protocol, mesh, assigned)
  examples = shapes.on_mesh(jax.eval_shape(tiny.examples), mesh)
  batches = jax.ShapeDtypeStruct((S, 2, 6), np.int32)
  scopes = accounting.branches(
    protocol, {tiny.CHAIN: (assigned[tiny.CHAIN],) * 2}
  )
  return run, run.arguments(state, examples, batches)['round'], scopes


NETWORK = tiny.network(L, platform='gpu')
plain_loss = tiny.make_loss(NETWORK)


def found_in(program, args, scopes):
  low = program.lower(*args)
  texts = low.as_text(), low.compile().as_text()
  return faults('round', args, *texts, scopes)


@pytest.mark.parametrize(
  ('target', 'carry'),
  rest_is_slow(
    [*((t, False) for t in TARGETS), ('cpu', True)],
    quick=[*((t, False) for t in TARGETS[1:]), ('cpu', True)],
  ),
)
def test_a_round_has_no_fault(target, carry):
  run, args, scopes = round_of(mesh_of(target), plain_loss, carry=carry)
  assert found_in(run.programs['round'], args, scopes) == []


@pytest.mark.parametrize('target', TARGETS)
def test_a_float64_is_found(target):
  def loss_fn(*args):
    loss, metrics = plain_loss(*args)
    wide = jnp.square(loss.astype(jnp.float64))
    return jnp.sqrt(wide).astype(jnp.float32), metrics

  mesh = mesh_of(target)
  # Wide numbers need the option, and then some integers are wide as well.
  with jax.enable_x64(True), jax.numpy_dtype_promotion('standard'):
    run, args, scopes = round_of(mesh, loss_fn)
    (fault,) = found_in(run.programs['round'], args, scopes)
  assert 'round computes in float64' in fault


@pytest.mark.parametrize('target', TARGETS)
def test_a_collective_in_a_branch_is_found(target):
  def everywhere(x):
    return lax.pcast(lax.psum(x, WORKER), WORKER, to='varying')

  def loss_fn(*args):
    loss, metrics = plain_loss(*args)
    known = lax.stop_gradient(loss)
    known = lax.cond(known > 1, everywhere, lambda x: x, known)
    return loss + known, metrics

  run, args, scopes = round_of(mesh_of(target), loss_fn)
  (fault,) = found_in(run.programs['round'], args, scopes)
  assert 'round has a all-reduce in a branch' in fault


@pytest.mark.parametrize('target', TARGETS)
def test_a_lost_donation_is_found(target):
  run, args, scopes = round_of(mesh_of(target), plain_loss)
  keeps = jax.jit(run.programs['round'].__wrapped__)
  (fault,) = found_in(keeps, args, scopes)
  arrays = len(jax.tree.leaves(args[:2]))
  assert fault == f'round takes 0 of {arrays} arrays over'


@pytest.mark.parametrize('target', ['v5e:2x2'])
def test_a_tpu_crops_all_images_at_once(target):
  mesh = mesh_of(target)
  sharding = NamedSharding(mesh, PartitionSpec())
  images = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.uint8, sharding=sharding)

  def crop(images):
    return augment(jax.random.key(0), images, Augmentation(pad=4))

  text = jax.jit(crop).lower(images).compile().as_text()
  assert 'select' in text
  assert ' while(' not in text


WIDE = 1024  # As many numbers a row, so that parameters outweigh the rest.
A_WORKER = 4 * 4 * WIDE**2  # Bytes of four blocks.


def scratch(target, num_workers, num_blocks, exchange):
  """Bytes that a round of sub-networks of four blocks needs on a device."""

  def loss_fn(params, present, x, key, constants):
    h, _ = lax.scan(lambda h, p: (jnp.tanh(h @ p), None), x, params[tiny.CHAIN])
    return jnp.mean(h), {}

  protocol = tiny.protocol(
    num_workers, 2, {tiny.CHAIN: num_blocks}, exchange=exchange, min_depth=4
  )
  optimizer = optax.sgd(0.1, momentum=0.9)
  mesh = target.mesh(target.num_devices)
  run = rounds.make_round(
    loss_fn, optimizer, protocol, mesh, seed=0, on_device=True
  )
  blocks = jax.ShapeDtypeStruct((num_blocks, WIDE, WIDE), np.float32)
  params = {tiny.CHAIN: blocks, 'rest': jax.ShapeDtypeStruct((1,), np.float32)}
  assigned = next(tiny.assignments(protocol))
  state = shapes.state(params, optimizer, protocol, mesh, assigned)
  data = shapes.on_mesh(params['rest'], mesh)
  batches = jax.ShapeDtypeStruct((num_workers, 2, 4, WIDE), np.float32)
  args = run.arguments(state, data, batches)['round']
  program = run.programs['round'].lower(*args)
  _, memory = compile_for(target, program)
  return memory['temporary']


@pytest.mark.parametrize(('name', 'each'), [('v5e:1x1', 1), ('h100:1', 2)])
def test_workers_who_take_turns_need_one_gradient(name, each):
  """Each keeps its moment, on GPUs its blocks in case it fails; no gradient."""
  skip_without_compiler(name)
  few, many = (
    scratch(targets.parse(name), S, 8, 'masked_psum') for S in (2, 8)
  )
  assert 0 < many - few < 6 * (each + 0.5) * A_WORKER


@pytest.mark.parametrize('name', TARGETS[1:])
def test_a_round_stores_no_zeros(name):
  """Only moments, gradients, and blocks in case of a failure.

  On a v5e, this bounds the rest: its compiler stores no zeros by itself.
  """
  skip_without_compiler(name)
  assert 0 < scratch(targets.parse(name), 4, 16, 'hand_over') < 3.1 * A_WORKER


@pytest.mark.parametrize('target', TARGETS[1:])
def test_the_command_reads_what_is_predicted(target, tmp_path):
  skip_without_compiler(target)
  command = [sys.executable, '-m', 'experiments.compile', f'--target={target}']
  command += ['--scale=smoke', f'--out={tmp_path}']
  command += ['--only=(exchange|host_stepped).*101_resist_s4d4(_hand_over)?$']
  environment = dict(os.environ)
  environment.pop('JAX_DISABLE_MOST_OPTIMIZATIONS', None)
  subprocess.run(command, env=environment, check=True)
  found = [json.loads(p.read_text()) for p in tmp_path.rglob('*.json')]
  assert {r['case']['form'] for r in found} == {'exchange', 'host_stepped'}
  for r in found:
    assert (
      r['provenance']['versions'].keys()
      >= targets.parse(target).compiler().keys()
    )
    for name, read in r['programs'].items():
      predicted = r['predicted'][name]
      assert read['faults'] == []
      assert read['wire'] == predicted['wire']
      assert read['flops']
      assert (read['estimated_cycles'] is None) == target.startswith('h100')
      if predicted['scratch'] and target.startswith('h100'):
        # On images of 16 pixels and 8 channels, a TPU's tiles are mostly empty.
        want = sum(predicted['scratch'].values())
        assert read['memory']['temporary'] == pytest.approx(want, rel=0.15)


def test_a_state_of_shapes_is_that_of_a_state():
  params, mesh = tiny.init(NETWORK), rounds.make_mesh(S)
  outer = optax.sgd(0.5, momentum=0.9)
  for fields in (
    {},
    {'carry': True},
    {'wire_format': 'int8', 'exclude_faulty': True, 'update_factor': 10.0},
    {'outer': outer, 'exchange': 'hand_over', 'min_depth': 3},
  ):
    protocol = tiny.protocol(S, 2, {tiny.CHAIN: L}, **fields)
    assigned = next(tiny.assignments(protocol))
    whole = rounds.state.with_carried(
      rounds.Whole(params), tiny.make_optimizer(), protocol
    )
    real = rounds.distribute(whole, protocol, mesh, assigned)
    described = shapes.state(
      params, tiny.make_optimizer(), protocol, mesh, assigned
    )
    assert jax.tree.structure(described) == jax.tree.structure(real)
    for ours, theirs in zip(
      *map(jax.tree.leaves, (described, real)), strict=True
    ):
      if isinstance(theirs, jax.Array):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, theirs.ndim)


def test_activations_are_those_counted_by_hand():
  net = models.ResNet(num_classes=3, stage_sizes=(1, 3), widths=(8, 16))
  # Norms see 8 channels of 4x4 twice, then 8 and 16 channels, then 4 times 16
  # channels of 2x2; convolutions see as much, and the image.
  norms = 2 * 8 * 16 + 8 * 16 + 16 * 4 + 4 * 16 * 4
  assert models.num_activations(net, (4, 4, 1), {}, fused=True) == norms
  convolved = 2 * norms + 16
  assert models.num_activations(net, (4, 4, 1), {}, fused=False) == convolved
  # A sub-network with one block of the chain lacks the other.
  less = models.num_activations(net, (4, 4, 1), {'stage2_chain': 1}, fused=True)
  assert less == norms - 2 * 16 * 4


def test_every_case_has_a_name_and_programs():
  for count in (1, 4, 8, 16, 22, 256):
    found = list(cases.cases(count))
    assert len({case.name for case in found}) == len(found)
    for case in found:
      assert case.form in cases.FORMS
      assert case.num_devices * case.devices_per_worker == count


@pytest.mark.parametrize('form', cases.FORMS)
def test_programs_are_described_for_devices_of_any_kind(form):
  case = next(c for c in cases.cases(4) if c.form == form)
  mesh = rounds.make_mesh(4)
  found = programs.problem(case, mesh, 'smoke')
  with jax.numpy_dtype_promotion('standard'):  # Flax's own layers need it.
    for name, (program, args) in programs.calls(case, found, mesh).items():
      assert program.eval_shape(*args), name


def test_a_plain_step_has_as_many_parameters_as_a_worker():
  case = next(c for c in cases.cases(4) if c.form == 'plain_flax')
  mesh = rounds.make_mesh(4)
  found = programs.problem(case, mesh, 'smoke')
  with jax.numpy_dtype_promotion('standard'):
    ((_, (state, *_)),) = programs.calls(case, found, mesh).values()
  params, *_ = state
  count = sum(x.size for x in jax.tree.leaves(params))
  assert count == accounting.params_per_worker(found.sizes, found.protocol)


@pytest.mark.parametrize('text', ['v5e', 'v5e:', 'p100:4', 'v5e:2y2', '*v5e:2'])
def test_a_target_that_is_none_is_told_in_one_line(text):
  with pytest.raises(ConfigError, match='write a chip and its topology'):
    targets.parse(text)


def test_targets_have_names():
  for name in ('v5e:4x4', '2*v5p:2x2x1', 'h100:8'):
    assert targets.parse(name).name == name


@pytest.mark.parametrize(
  'name',
  [
    # Of every chip; two hosts, two slices, and less than a host.
    *('v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'),
    *('v4:2x2x2', '2*v5e:2x2', 'v5e:1x1', 'v6e:1x2', 'v5p:1x1x1'),
    *('a100:8', 'h100:4', 'h200:1', 'b200:8', '2*h100:8'),
  ],
)
def test_the_compiler_has_as_many_devices(name):
  skip_without_compiler(name)
  target = targets.parse(name)
  assert len(target.devices()) == target.num_devices


def test_three_chips_of_a_v5e_are_refused(monkeypatch):
  """And six workers take two by themselves."""
  skip_without_compiler('v5e:2x2')
  chips = list(targets.parse('v5e:2x2').devices())
  monkeypatch.setattr(jax, 'devices', lambda *_: chips)
  monkeypatch.setattr(jax, 'device_count', lambda: len(chips))
  with pytest.raises(ValueError, match='form no rectangle: use a power of two'):
    rounds.make_mesh(3)
  trainer = Trainer(
    tiny.make_loss(NETWORK), optax.sgd(0.1), num_workers=6, local_steps=1
  )
  assert trainer.devices.devices.size == 2


def test_tables_say_how_far_predictions_are_off(tmp_path):
  folder = tmp_path / 'paper_v5e_2x2'
  folder.mkdir()
  made = {
    'provenance': {'versions': {'jax': '1.0', 'libtpu': '2.0'}},
    'target': 'v5e:2x2',
    'scale': 'paper',
    'case': dataclasses.asdict(cases.Case('one_program', 'resist', 8, 4, 2)),
    'programs': {
      'round': {
        'memory': {'arguments': 2 * 2**20, 'temporary': 10 * 2**20},
        'wire': {'between_workers': 3_000_000, 'inside_groups': 'Cannot'},
        'flops': 197e9,
        'hbm_bytes': 1.638e9,
        'estimated_cycles': 4.5e6,
        'seconds': {'compile': 61.4},
      }
    },
    'predicted': {
      'round': {
        'arguments': 2 * 2**20,
        'scratch': {'activations': 8 * 2**20, 'gradients': 2**20},
        'wire': {'between_workers': 3_000_000, 'inside_groups': 5e6},
      }
    },
  }
  (folder / 'a.json').write_text(json.dumps(made))
  (table,) = tables.tables(tmp_path)
  assert 'by jax 1.0, libtpu 2.0; none was run' in table.caption
  (row,) = table.rows
  assert row == [
    'ResNet101, resist, one program', 'round', '8 on 4 x 2', '2.0 (=)',
    '10.0 (-10.0%)', '3.0 (=) + unread (5.0 predicted)', '197.0', '1.64',
    '2.00', '3.00', '61',
  ]  # fmt: skip
