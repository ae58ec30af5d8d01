"""Losses, parameters, states and optimisers as strangers write them."""

import dataclasses
import gc
from typing import NamedTuple
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_trainer import T, batches, make, network, predicted_and_read, run

import resist_jax as resist
from resist_jax.exchange import hand_over

WIDTH = 3


@pytest.fixture(autouse=True)
def _promotion():
  with jax.numpy_dtype_promotion('standard'):
    yield


def unrolled(params, present, batch, key):
  del key
  x = batch
  for k, here in enumerate(present.get('blocks', jnp.ones(4))):
    x = x + here * jnp.tanh(x @ params['blocks'][k])
  h = jnp.zeros((len(x), WIDTH))
  for t in range(x.shape[1]):
    h = jnp.tanh(h @ params['out'] + x[:, t])
  return jnp.square(h).mean(), {}


def scanned(params, present, batch, key):
  """The same, as a recurrent network whose first state is a constant."""
  del key

  def block(x, held):
    here, w = held
    return x + here * jnp.tanh(x @ w), None

  scales = present.get('blocks', jnp.ones(4))
  x, _ = jax.lax.scan(block, batch, (scales, params['blocks']))

  def step(t, h):
    return jnp.tanh(h @ params['out'] + x[:, t])

  h = jax.lax.fori_loop(0, x.shape[1], step, jnp.zeros((len(x), WIDTH)))
  return jax.lax.cond(
    h.sum() > 1e9, lambda: 0.0, lambda: jnp.square(h).mean()
  ), {}


@pytest.mark.parametrize(
  ('devices', 'group', 'fields'),
  [
    (2, 1, {'chains': ('blocks',)}),
    (1, 1, {'chains': ('blocks',), 'on_device': True}),
    (2, 2, {'chains': ('blocks',)}),
    (2, 1, {'average_gradients': True}),
    (2, 2, {'average_gradients': True}),
  ],
)
def test_a_loss_may_loop_from_a_constant(devices, group, fields):
  """As an LSTM does; JAX's check of collectives would refuse it."""
  draw = np.random.default_rng(0).normal
  params = {
    'blocks': 0.3 * draw(size=(4, WIDTH, WIDTH)).astype(np.float32),
    'out': 0.3 * draw(size=(WIDTH, WIDTH)).astype(np.float32),
  }
  given = draw(size=(4, T, 4, 5, WIDTH)).astype(np.float32)
  found = []
  for loss_fn in (unrolled, scanned):
    trainer = resist.Trainer(
      loss_fn,
      optax.sgd(0.1),
      num_workers=4,
      local_steps=T,
      mesh=resist.make_mesh(devices, group),
      **fields,
    )
    state, metrics = trainer.round(trainer.init(params), given)
    found.append((trainer.params(state), metrics['loss']))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), *found
  )
  assert abs(found[0][0]['out'] - params['out']).max() > 1e-4


def assert_ends_alike(trainer, given, state, restored):
  """Another round gives the same bits; returns what the restored one gives."""
  ends = [
    trainer.params(trainer.round(one, given)[0]) for one in (state, restored)
  ]
  jax.tree.map(np.testing.assert_array_equal, *ends)
  return ends[1]


class Linear(NamedTuple):
  """Its fields are not in the order of the alphabet."""

  w: jax.Array
  b: jax.Array


def of_nodes(params, present, batch, key):
  del key
  x = batch
  for k, here in enumerate(present['blocks']):
    x = x + here * jnp.tanh(
      x @ params['blocks'].w[k] + params['blocks'].b[k][None]
    )
  first, second = params['out'][0], params['out'][1]
  return jnp.square(x @ first.w + (first.b - second)[None]).mean(), {}


def test_parameters_of_any_nodes_go_on_to_the_same_bits(tmp_path):
  draw = np.random.default_rng(1).normal
  params = {
    'blocks': Linear(draw(size=(4, 3, 3)), draw(size=(4, 3))),
    'out': {0: Linear(draw(size=(3, 3)), draw(size=3)), 1: draw(size=3)},
  }
  params = jax.tree.map(np.float32, params)
  trainer = resist.Trainer(
    of_nodes,
    optax.adam(0.1),
    chains=('blocks',),
    num_workers=2,
    local_steps=2,
    carry=True,
    outer=optax.sgd(0.7, momentum=0.9),
    average=0.5,
  )
  given = draw(size=(2, 2, 4, 3)).astype(np.float32)
  state, _ = trainer.round(trainer.init(params), given)
  trainer.save(tmp_path / 'saved', state)
  with pytest.raises(ValueError, match=r'params is missing: .* NamedTuples'):
    trainer.restore(tmp_path / 'saved')
  shapes = jax.eval_shape(lambda: params)
  fewer = {**shapes, 'out': {0: shapes['out'][0]}}
  with pytest.raises(ValueError, match=r"params has 'out/1' as None"):
    trainer.restore(tmp_path / 'saved', fewer)
  restored = trainer.restore(tmp_path / 'saved', shapes)
  end = assert_ends_alike(trainer, given, state, restored)
  assert isinstance(end['blocks'], Linear)


def test_a_chain_lies_under_numbers_too(tmp_path):
  """As where `nnx.to_pure_dict` makes a dictionary of a list."""

  def loss_fn(params, present, batch, key):
    del key
    x = batch
    for stage in (0, 1):
      blocks = params['stages'][stage]['blocks']
      for k, here in enumerate(present[f'stages/{stage}/blocks']):
        x = x + here * jnp.tanh(x @ blocks[k])
    return jnp.square(x @ params['out']).mean(), {}

  draw = np.random.default_rng(2).normal
  params = {
    'stages': {
      0: {'blocks': draw(size=(2, 3, 3))},
      1: {'blocks': draw(size=(3, 3, 3)), 'head': draw(size=3)},
    },
    'out': draw(size=3),
  }
  params = jax.tree.map(np.float32, params)
  trainer = resist.Trainer(
    loss_fn,
    optax.adam(0.1),
    chains=('stages/0/blocks', 'stages/1/blocks'),
    num_workers=2,
    local_steps=1,
    carry=True,
  )
  given = draw(size=(2, 1, 4, 3)).astype(np.float32)
  state, _ = trainer.round(trainer.init(params), given)
  trainer.save(tmp_path, state)
  end = assert_ends_alike(trainer, given, state, trainer.restore(tmp_path))
  assert jax.tree.structure(end) == jax.tree.structure(params)


BLOCKS = np.ones((4, 3, 3), np.float32)
PLACES = {
  'a list': ({'stages': [{'blocks': BLOCKS}]}, 'stages/0/blocks'),
  'a tuple': ({'layer': Linear(BLOCKS, BLOCKS)}, 'layer/w'),
  'a number at the end': ({'stages': {0: BLOCKS, 1: BLOCKS}}, 'stages/0'),
  'a slash': ({'stages/0': BLOCKS}, 'stages/0'),
}


@pytest.mark.parametrize('place', PLACES)
def test_a_chain_where_no_name_leads_is_refused_in_a_line(place):
  params, name = PLACES[place]
  trainer = dataclasses.replace(make(), chains=(name,))
  says = f"chains names '{name}', but a name is made of .* keys of dictionaries"
  with pytest.raises(ValueError, match=says) as caught:
    trainer.init(params)
  assert '\n' not in str(caught.value)


class Foreign:
  """As a tensor of PyTorch: an array whose dtype NumPy does not know."""

  class Kind:
    def __repr__(self):
      return 'torch.float32'

  dtype = Kind()

  def __init__(self, shape):
    self.shape = shape


def test_arrays_of_another_library_are_refused_in_a_line():
  trainer = make()
  odd = {**network(), 'out': Foreign((6,))}
  with pytest.raises(ValueError, match=r"params\['out'\] is torch.float32; p"):
    trainer.init(odd)
  given = {**batches(0, 4), 'y': Foreign((4, T, 4))}
  with pytest.raises(ValueError, match=r"batches\['y'\] holds torch.float32"):
    trainer.round(trainer.init(network()), given)


def test_tuples_and_numbers_come_back_from_files(tmp_path):
  def loss_fn(params, present, batch, key):
    del key
    x = batch
    for k, here in enumerate(present['blocks']):
      x = x + here * jnp.tanh(x @ params['blocks'][0][k])
    first, second = params['out'][1]
    return jnp.square(x @ first - second[None]).mean(), {}

  draw = np.random.default_rng(1).normal
  params = {
    'blocks': (draw(size=(4, 3, 3)),),
    'out': {1: (draw(size=(3, 3)), draw(size=3))},
  }
  params = jax.tree.map(np.float32, params)
  kinds = {'m': optax.sgd(0.7, momentum=0.9), 's': optax.sgd(1.0)}
  outer = optax.multi_transform(
    kinds, lambda p: jax.tree.map(lambda x: 'ms'[jnp.ndim(x) < 2], p)
  )
  trainer = resist.Trainer(
    loss_fn,
    optax.adam(0.1),
    chains=('blocks',),
    num_workers=2,
    local_steps=2,
    outer=outer,
  )
  given = draw(size=(2, 2, 4, 3)).astype(np.float32)
  state = trainer.init(params)
  trainer = trainer.compile(state, given)
  state, _ = trainer.round(state, given)
  trainer.save(tmp_path, state)
  restored = trainer.restore(tmp_path)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert_ends_alike(trainer, given, state, restored)


def test_a_copied_state_is_a_state(tmp_path):
  """Whatever lies on the host, or in the order in which JAX sorts names."""

  def two(params, present, batch, key):
    del key
    x = batch
    for name in ('z', 'a'):
      for k, here in enumerate(present[name]):
        x = x + here * jnp.tanh(x @ params[name][k])
    return jnp.square(x).mean(), {}

  draw = np.random.default_rng(2).normal
  params = {n: draw(size=(4, 3, 3)).astype(np.float32) for n in ('z', 'a')}
  trainer = resist.Trainer(
    two, optax.sgd(0.1), chains=('z', 'a'), num_workers=2, local_steps=1
  )
  given = draw(size=(2, 1, 4, 3)).astype(np.float32)
  copies = {
    'itself': lambda state: state,
    'copied': lambda state: jax.tree.map(jnp.copy, state),
    'on the host': jax.device_get,
  }
  ends = []
  for name, copy in copies.items():
    state, _ = trainer.round(trainer.init(params), given)
    state = copy(state)
    trainer.save(tmp_path / name, state)
    state = trainer.restore(tmp_path / name)
    ends.append(trainer.params(trainer.round(state, given)[0]))
    state, _ = trainer.round(trainer.init(params), given)
    ends.append(trainer.params(trainer.round(copy(state), given)[0]))
  for end in ends[1:]:
    jax.tree.map(np.testing.assert_array_equal, ends[0], end)


def test_gathered_gradients_are_those_of_optax():
  """`optax.MultiSteps` counts updates, and so do schedules inside of it."""

  def rate(count):
    return 0.1 / (1 + jnp.float32(count))

  optimizer = optax.MultiSteps(optax.sgd(rate), 2).gradient_transformation()
  with pytest.raises(ValueError, match=r'optax.MultiSteps.* set carry=True'):
    run(make(optimizer))
  trainer = make(
    optimizer, S=1, devices=1, chains=(), average_gradients=True, carry=True
  )
  params, *_ = run(trainer, rounds=4)
  wanted, state = network(), optimizer.init(network())
  for r in range(4):
    data = batches(r, 1)
    for t in range(T):
      batch = jax.tree.map(lambda x, t=t: x[0, t], data)
      grads = jax.grad(lambda p, b=batch: trainer.loss_fn(p, {}, b, None)[0])(
        wanted
      )
      updates, state = optimizer.update(grads, state, wanted)
      wanted = optax.apply_updates(wanted, updates)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    params,
    wanted,
  )


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    (lambda x: x[:, :, :2], r'batches give a worker .* compile again'),
    (lambda x: x.astype(np.float16), r'batches give a worker .*float16'),
  ],
)
def test_programs_are_given_what_they_were_compiled_for(change, says):
  trainer = make()
  state = trainer.init(network())
  compiled = trainer.compile(state, batches(0, 4))
  with pytest.raises(ValueError, match=says):
    compiled.round(state, jax.tree.map(change, batches(0, 4)))
  compiled.round(state, batches(0, 4))


MISTAKES = {
  'an optimiser that wants the loss': (
    {'optimizer': optax.contrib.reduce_on_plateau()},
    'optimizer cannot be used .*value',
  ),
  'an optimiser that fails': (
    {'optimizer': optax.GradientTransformation(lambda p: p['x'], None)},
    'optimizer',
  ),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_names_the_argument(name):
  fields, says = MISTAKES[name]
  with pytest.raises(ValueError, match=says) as caught:
    run(make(**fields))
  assert '\n' not in str(caught.value)


def test_a_list_of_other_length_is_refused():
  trainer = make()
  state = trainer.init(network())
  with pytest.raises(ValueError, match='batches is a list of 0 pytrees'):
    trainer.compile(state, [])


def test_depths_may_be_an_array():
  first, *_ = run(make(depths=np.array([2, 1, 1, 1])), rounds=1)
  second, *_ = run(make(depths=(2, 1, 1, 1)), rounds=1)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  slots = resist.decomposition.sample_slots(
    jax.random.key(0), 3, 2, 0, np.array([2, 1])
  )
  assert slots.shape == (2, 2)


def test_a_network_that_is_all_cut_is_saved(tmp_path):
  def loss_fn(params, present, batch, key):
    del key
    x = batch
    for k, here in enumerate(present['blocks']):
      x = x + here * jnp.tanh(x @ params['blocks'][k])
    return jnp.square(x).mean(), {}

  draw = np.random.default_rng(0).normal
  params = {'blocks': draw(size=(4, 3, 3)).astype(np.float32)}
  given = draw(size=(2, 2, 4, 3)).astype(np.float32)
  trainer = resist.Trainer(
    loss_fn,
    optax.sgd(0.1),
    chains=('blocks',),
    num_workers=2,
    local_steps=2,
    exchange=hand_over('int8'),
  )
  state, _ = trainer.round(trainer.init(params), given)
  trainer.save(tmp_path, state)
  assert_ends_alike(trainer, given, state, trainer.restore(tmp_path))
  with pytest.raises(ValueError, match=r"params\['empty'\] has the shape"):
    trainer.init({**params, 'empty': np.zeros((0, 3), np.float32)})


def test_an_outer_optimiser_does_nothing_where_nobody_is_healthy():
  trainer = make(outer=optax.sgd(0.7, momentum=0.9))
  *_, state, _ = run(trainer, rounds=2)
  before = trainer.whole(state)
  broken = jax.tree.map(lambda x: x * np.float32(np.nan), batches(2, 4))
  state, metrics = trainer.round(state, broken)
  assert not metrics['healthy'].any()
  after = trainer.whole(state)
  jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
  jax.tree.map(np.testing.assert_array_equal, before.outer, after.outer)


def test_a_trainer_ends_with_its_last_name():
  """And with it its programs, and its constants on the devices."""
  trainer = make()
  state = trainer.init(network())
  trainer.round(state, batches(0, 4))
  trainer.at_once(2)
  seen = weakref.ref(trainer)
  del trainer, state
  gc.collect()
  assert seen() is None


def test_a_mean_of_many_small_numbers_is_not_rounded_on_the_way():
  ones = jnp.ones((300, 1, 2), jnp.bfloat16)
  slots = jnp.zeros((300, 1), jnp.int32)
  mean = resist.decomposition.aggregate(
    ones, slots, jnp.zeros((1, 2), 'bfloat16')
  )
  assert mean.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.float32(mean), 1)


@pytest.mark.parametrize('exchange', [hand_over, resist.exchange.masked_psum])
@pytest.mark.parametrize('wire_format', ['float32', 'bfloat16', 'int8'])
def test_bytes_of_two_moments_are_those_of_the_programs(exchange, wire_format):
  """The shared parts of all moments travel in one message."""
  trainer = make(
    optax.adam(0.1), S=2, carry=True, exchange=exchange(wire_format)
  )
  state = trainer.init(network())
  sizes = resist.accounting.measure_moments(state.carried, state)
  predicted, read = predicted_and_read(trainer, state, moments=sizes)
  assert predicted == read > 0


@pytest.mark.parametrize(
  'out', [{'a.b': 1, 'a': {'b': 2}}, {'a/b': 1, 'a': {'b': 2}}]
)
def test_two_parameters_with_one_name_in_files_are_refused(out):
  """Else one of them comes back as the other."""
  out = jax.tree.map(lambda n: n * np.ones(2, np.float32), out)
  with pytest.raises(ValueError, match=r'both called more.a[./]b in saved'):
    make().init(network() | {'more': out})


def test_parameters_of_another_dtype_are_not_restored(tmp_path):
  trainer = make()
  wide = network()
  narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), wide)
  trainer.save(tmp_path, trainer.init(narrow))
  says = r"'inner/blocks/b' as float32, but in the files it is bfloat16"
  with pytest.raises(ValueError, match=says):
    trainer.restore(tmp_path, wide)
  restored = trainer.restore(tmp_path, narrow)
  assert restored.shared['out'].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('value', 'says'),
  [
    (5_000_000_000, ''),
    (np.complex64(1j), "metric 'tokens' .* must be a real number"),
    (jax.random.key(0), "metric 'tokens' .* must be a real number"),
  ],
)
def test_a_metric_is_any_real_number(value, says):
  def counting(*args):
    loss, _ = unrolled(*args)
    return loss, {'tokens': value}

  params = {
    'blocks': np.ones((4, WIDTH, WIDTH), np.float32),
    'out': np.ones((WIDTH, WIDTH), np.float32),
  }
  batch = np.ones((2, 1, 4, 5, WIDTH), np.float32)
  trainer = resist.Trainer(
    counting,
    optax.sgd(0.1),
    num_workers=2,
    local_steps=1,
    chains=('blocks',),
    mesh=resist.make_mesh(1),
  )
  state = trainer.init(params)
  if says:
    with pytest.raises(ValueError, match=says):
      trainer.round(state, batch)
    return
  _, metrics = trainer.round(state, batch)
  np.testing.assert_allclose(metrics['tokens'], value)


def test_parameters_without_numbers_are_refused():
  with pytest.raises(ValueError, match=r"\['out'\] is only a shape"):
    make().init({**network(), 'out': jax.ShapeDtypeStruct((3,), jnp.float32)})
  gone = jnp.ones(3)
  gone.delete()
  with pytest.raises(ValueError, match=r"\['out'\] was donated"):
    make().init({**network(), 'out': gone})


def test_another_mesh_around_a_round_is_named():
  trainer = make()
  state = trainer.init(network())
  with jax.set_mesh(jax.make_mesh((2,), ('mine',))):
    says = r"jax\.set_mesh has set the mesh \{'mine': 2\}"
    with pytest.raises(ValueError, match=says):
      trainer.round(state, batches(0, 4))
  ready = trainer.compile(state, batches(0, 4))
  with jax.set_mesh(jax.make_mesh((2,), ('mine',))):  # Nothing is traced.
    state, _ = ready.round(state, batches(0, 4))
  trainer.round(state, batches(0, 4))
