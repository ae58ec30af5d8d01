"""A Trainer of somebody's network is Algorithm 1, with any optax optimiser."""

import dataclasses
import errno
import hashlib
import json
import operator
from unittest import mock

from covering import checkerboard
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import resist_jax as resist
from resist_jax.decomposition import Assignment
from resist_jax.rounds.manifest import manifest
from resist_jax.rounds.state import assignments_on_host
from resist_jax.trainer import files

L, T, B, WIDTH = 5, 3, 4, 6
RATE = 0.05


@pytest.fixture(autouse=True)
def _promotion():
  """Adam in optax mixes dtypes; the package does not."""
  with jax.numpy_dtype_promotion('standard'):
    yield


def network():
  """A residual perceptron: blocks in a chain, and what all workers share."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return (0.5 * rng.normal(size=shape)).astype(np.float32)

  return {
    'inner': {'blocks': {'w': draw(L, WIDTH, WIDTH), 'b': draw(L, WIDTH)}},
    'out': draw(WIDTH),
  }


CHAIN = 'inner/blocks'


def loss_fn(params, present, batch, key):
  """Tanh has no kink, so float32 stays near a plain loop."""
  del key
  x, y = batch['x'], batch['y']
  blocks = params['inner']['blocks']
  here = present.get(CHAIN, jnp.ones(len(blocks['b'])))
  for k in range(len(blocks['b'])):
    x = x + here[k] * jnp.tanh(x @ blocks['w'][k] + blocks['b'][k][None])
  error = x @ params['out'] - y
  return jnp.square(error).mean(), {'largest': jnp.abs(error).max()}


def batches(round_index, S):
  rng = np.random.default_rng([3, round_index])
  return {
    'x': rng.normal(size=(S, T, B, WIDTH)).astype(np.float32),
    'y': rng.normal(size=(S, T, B)).astype(np.float32),
  }


def make(optimizer=None, S=4, devices=2, **fields):
  optimizer = optimizer or optax.sgd(RATE, momentum=0.9)
  fields = {'chains': (CHAIN,), 'mesh': resist.make_mesh(devices), **fields}
  return resist.Trainer(
    loss_fn, optimizer, num_workers=S, local_steps=T, **fields
  )


def run(trainer, rounds=3, params=None):
  state = trainer.init(params or network())
  held = []
  for r in range(rounds):
    held.append(assignments_on_host(state))
    state, metrics = trainer.round(state, batches(r, trainer.num_workers))
  return trainer.params(state), held, state, metrics


def predicted_and_read(trainer, state, **moments):
  """The bytes of the first round: predicted, and read from its programs."""
  protocol = trainer.protocol(network())
  programs = trainer.compile(state, batches(0, trainer.num_workers)).programs
  before = assignments_on_host(state)
  after = protocol.assign(0, 1, before)
  moves = {name: (before[name], after[name]) for name in before}
  sizes = resist.accounting.measure(network(), list(state.num_blocks))
  predicted = resist.accounting.wire_bytes(
    sizes, protocol, trainer.devices.size, moves, **moments
  )
  branches = resist.accounting.branches(protocol, moves)
  return predicted, resist.accounting.compiled_wire_bytes(programs, branches)


def cut(params, mine):
  """A sub-network: the shared part, and the blocks `mine`."""
  blocks = jax.tree.map(lambda x: x[np.array(mine)], params['inner']['blocks'])
  return {**params, 'inner': {'blocks': blocks}}


def merge(parts, hands):
  """Means over holders, block by block."""
  blocks = []
  for block in range(L):
    held = [
      jax.tree.map(
        operator.itemgetter(mine.index(block)), part['inner']['blocks']
      )
      for part, mine in zip(parts, hands, strict=True)
      if block in mine
    ]
    blocks.append(jax.tree.map(lambda *x: sum(x) / len(x), *held))
  out = sum(part['out'] for part in parts) / len(parts)
  stacked = jax.tree.map(lambda *x: np.stack(x), *blocks)
  return {'inner': {'blocks': stacked}, 'out': out}


def hands_of(assignments, S):
  if not assignments:
    return [list(range(L))] * S
  table = assignments[CHAIN].slots.tolist()
  return [[block for block in row if block < L] for row in table]


@jax.jit
def gradient(sub, batch):
  ones = jnp.ones(len(sub['inner']['blocks']['b']))
  return jax.grad(lambda p: loss_fn(p, {CHAIN: ones}, batch, None)[0])(sub)


def local_steps(optimizer, sub, state, data, s, gradient=gradient):
  """The local steps of worker s, with parameters and moments to begin from."""
  for t in range(data['y'].shape[1]):
    batch = jax.tree.map(lambda x, t=t: x[s, t], data)
    updates, state = optimizer.update(gradient(sub, batch), state, sub)
    sub = optax.apply_updates(sub, updates)
  return sub, state


def train_locally(optimizer, sub, data, s, gradient=gradient):
  """The local steps of worker s, whose moments begin anew."""
  state = optimizer.init(sub)
  return local_steps(optimizer, sub, state, data, s, gradient)[0]


def plain_loop(optimizer_at, held, S, params=None):
  """Algorithm 1, one worker after another; moments restart in each round.

  `optimizer_at(steps)` is the optimiser whose schedules begin after so many.
  """
  params = params or network()
  for r, assignments in enumerate(held):
    optimizer, parts = optimizer_at(r * T), []
    hands = hands_of(assignments, S)
    data = batches(r, S)
    for s, mine in enumerate(hands):
      parts.append(train_locally(optimizer, cut(params, mine), data, s))
    params = merge(parts, hands)
  return params


def assert_close(got, want, tolerance=2e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=tolerance, atol=tolerance
    ),
    got,
    want,
  )


def falling(start):
  """A rate that falls with the steps of the whole training."""
  return lambda count: RATE / (1 + 0.2 * jnp.float32(count + start))


def decays(params):
  """A mask: norms and biases do not decay."""
  return jax.tree.map(lambda x: x.ndim > 2, params)


OPTIMISERS = {
  'sgd': lambda start: optax.sgd(falling(start), momentum=0.9),
  'nesterov': lambda start: optax.sgd(falling(start), 0.9, nesterov=True),
  'adam': lambda start: optax.adam(falling(start)),
  'adamw': lambda start: optax.adamw(
    falling(start), weight_decay=0.1, mask=decays
  ),
  'injected': lambda start: optax.inject_hyperparams(optax.sgd)(
    learning_rate=falling(start), momentum=0.8
  ),
  'clipped': lambda start: optax.chain(
    optax.clip_by_global_norm(0.5), optax.sgd(falling(start))
  ),
}


@pytest.mark.parametrize('name', OPTIMISERS)
def test_rounds_equal_algorithm_1_with_any_optimiser(name):
  """Moments restart in every round, the counts of schedules go on."""
  got, held, *_ = run(make(OPTIMISERS[name](0), min_depth=2))
  assert_close(got, plain_loop(OPTIMISERS[name], held, 4))


def test_blocks_that_are_spread_are_exchanged_as_others():
  exchange = resist.exchange.hand_over(spread=True)
  optimizer = OPTIMISERS['sgd']
  got, held, *_ = run(make(optimizer(0), min_depth=2, exchange=exchange))
  assert_close(got, plain_loop(optimizer, held, 4))
  with pytest.raises(ValueError, match='over equal workers'):
    make(exchange=exchange, depths=(2, 1, 1, 1)).init(network())


def test_an_optimiser_goes_downhill():
  """`optax.sgd(0.1)` has its sign inside."""
  trainer = make(optax.sgd(RATE))
  state, losses = trainer.init(network()), []
  for _ in range(8):
    state, metrics = trainer.round(state, batches(0, 4))
    losses.append(float(metrics['loss'].mean()))
  assert losses[-1] < losses[0]


def test_local_sgd_and_data_parallel_are_trainers_too():
  optimizer = OPTIMISERS['sgd']
  got, held, *_ = run(make(optimizer(0), chains=()))
  assert_close(got, plain_loop(optimizer, held, 4))

  parallel = make(optimizer(0), chains=(), average_gradients=True, carry=True)
  got, *_ = run(parallel, rounds=2)
  params, sgd = network(), optimizer(0)
  state = sgd.init(params)
  for r in range(2):
    data = batches(r, 4)
    for t in range(T):
      grads = [
        gradient(params, jax.tree.map(lambda x, s=s, t=t: x[s, t], data))
        for s in range(4)
      ]
      mean = jax.tree.map(lambda *x: sum(x) / 4, *grads)
      updates, state = sgd.update(mean, state, params)
      params = optax.apply_updates(params, updates)
  assert_close(got, params)


def test_carried_moments_go_where_their_blocks_go():
  """Adam's two moments, against the plain loop, by both exchanges."""
  adam = optax.adam(RATE)
  finals = []
  for exchange in (resist.exchange.hand_over(), resist.exchange.masked_psum()):
    trainer = make(adam, min_depth=2, carry=True, exchange=exchange)
    got, held, *_ = run(trainer)
    params, moments = network(), {}
    for name in ('mu', 'nu'):
      moments[name] = jax.tree.map(jnp.zeros_like, params)
    for r, assignments in enumerate(held):
      hands, data, ends = hands_of(assignments, 4), batches(r, 4), []
      for s, mine in enumerate(hands):
        sub = cut(params, mine)
        state = optax.tree.set(
          adam.init(sub),
          count=jnp.int32(r * T),
          **{name: cut(moment, mine) for name, moment in moments.items()},
        )
        for t in range(T):
          batch = jax.tree.map(lambda x, s=s, t=t: x[s, t], data)
          updates, state = adam.update(gradient(sub, batch), state, sub)
          sub = optax.apply_updates(sub, updates)
        ends.append((sub, state))
      params = merge([sub for sub, _ in ends], hands)
      for name in moments:
        parts = [optax.tree.get(state, name) for _, state in ends]
        moments[name] = merge(parts, hands)
    assert_close(got, params)
    finals.append(got)
  restarted, *_ = run(make(adam, min_depth=2))
  assert np.abs(restarted['out'] - finals[0]['out']).max() > 1e-3


def labels(params):
  """One optimiser for the blocks, another one for what is shared."""
  return jax.tree.map_with_path(
    lambda path, _: 'a' if path[0].key == 'inner' else 'b', params
  )


@pytest.mark.parametrize(
  ('exchange', 'first'),
  [
    (resist.exchange.hand_over(), optax.sgd(RATE, momentum=0.9)),
    (resist.exchange.masked_psum(), optax.sgd(RATE)),
  ],
  ids=['hand_over', 'masked_psum'],
)
def test_carried_moments_of_several_optimisers_stay_apart(
  exchange, first, tmp_path
):
  """The shared part alone has Adam's; blocks have momentum, or nothing."""
  adam, fields = optax.adam(RATE), {'carry': True, 'exchange': exchange}
  parts = {'a': first, 'b': adam}
  both = make(optax.multi_transform(parts, labels), **fields)
  got, *_, state, _ = run(both)
  masked = optax.masked(adam, lambda p: jax.tree.map(lambda x: x.ndim < 2, p))
  blocks = optax.masked(first, lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
  chained = make(optax.chain(masked, blocks), **fields)
  want, *_ = run(chained)
  assert_close(got, want)
  both.save(tmp_path, state)  # Files have no place for what is masked.
  for S in (4, 2):  # As it is, and for other workers.
    other = make(optax.multi_transform(parts, labels), S=S, **fields)
    restored = other.restore(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, other.params(restored), got)
    moments = zip(
      *(jax.tree.leaves(t.whole(x).carried.moments)
        for t, x in ((both, state), (other, restored))), strict=True
    )  # fmt: skip
    for x, y in moments:
      np.testing.assert_array_equal(x, y)
    other.round(restored, batches(3, S))
    both.save(tmp_path, state)
  sizes = [sum(x.size for x in jax.tree.leaves(moment)) // 4
           for moment in state.carried.moments]  # fmt: skip
  assert sorted(sizes)[:2] == [WIDTH, WIDTH]  # Adam's, of `out`.
  sent = both.bytes_per_round(both.init(network()))
  alone = make(adam, exchange=exchange).bytes_per_round(both.init(network()))
  assert sent > alone


def test_a_moment_without_a_place_for_the_chain_is_refused():
  by_name = {'inner': 'a', 'out': 'b'}
  parts = {'a': optax.sgd(RATE), 'b': optax.adam(RATE)}
  with pytest.raises(ValueError, match='labels or a mask for each array'):
    make(optax.multi_transform(parts, by_name), carry=True).init(network())


@pytest.mark.parametrize(
  ('theirs', 'ours', 'field'),
  [
    ({'optimizer': optax.adam(RATE)}, {}, 'optimizer'),
    ({}, {'optimizer': optax.sgd(falling(0), momentum=0.9)}, 'optimizer'),
    ({'outer': optax.sgd(0.7)}, {'outer': optax.sgd(0.7, 0.9)}, 'outer'),
    ({'outer': optax.adam(0.7)}, {'outer': optax.sgd(0.7, 0.9)}, 'outer'),
  ],
)
def test_the_state_of_another_optimiser_is_refused(
  theirs, ours, field, tmp_path
):
  other, trainer = make(carry=True, **theirs), make(carry=True, **ours)
  state = other.init(network())
  says = f'a trainer with another {field}, whose state differs'
  with pytest.raises(ValueError, match=says):
    trainer.round(state, batches(0, 4))
  other.save(tmp_path, state)
  with pytest.raises(ValueError, match=says):
    trainer.restore(tmp_path)
  other.restore(tmp_path)


def test_an_optimiser_draws_other_numbers_on_each_worker_and_in_each_round():
  """Noise that all workers add alike would not average out."""
  noise = optax.chain(optax.set_to_zero(), optax.add_noise(1.0, 0.0, key=0))
  trainer = make(noise, chains=(), S=8, devices=2)
  one = make(noise, chains=(), S=1, devices=1)
  begun = network()

  def moved(trainer, rounds):
    state = trainer.init(network())
    for r in range(rounds):
      state, _ = trainer.round(state, batches(r, trainer.num_workers))
    after = trainer.params(state)
    return np.concatenate([
      np.ravel(x - y)
      for x, y in zip(*map(jax.tree.leaves, (after, begun)), strict=True)
    ])  # fmt: skip

  alone = moved(one, 1)
  assert alone.std() == pytest.approx(np.sqrt(T), rel=0.2)
  assert moved(trainer, 1).std() == pytest.approx(np.sqrt(T / 8), rel=0.2)
  second = moved(one, 2) - alone
  assert abs(np.corrcoef(alone, second)[0, 1]) < 0.3
  with pytest.raises(ValueError, match='draws random numbers'):
    make(noise, carry=True).init(network())


HAND_OVER, PSUM = resist.exchange.hand_over, resist.exchange.masked_psum
WHOLE = {'chains': ()}
DIVISIONS = {
  'wire_format ': (WHOLE, {**WHOLE, 'exchange': HAND_OVER('int8')}),
  'update_factor ': ({**WHOLE, 'update_factor': 0.0}, WHOLE),
  'depths': ({'depths': (2, 1, 1, 1)}, {'depths': (1, 1, 1, 2)}),
  'wire_format': ({}, {'exchange': HAND_OVER('int8')}),
  'update_factor': ({'update_factor': 0.0}, {}),
  'exchange': ({'exchange': PSUM()}, {}),
  'min_depth': ({}, {'min_depth': 2}),
}


@pytest.mark.parametrize('field', DIVISIONS)
def test_a_state_of_another_division_is_refused(field, tmp_path):
  """Else blocks would vanish without a word."""
  theirs, ours = (make(**fields) for fields in DIVISIONS[field])
  state, _ = theirs.round(theirs.init(network()), batches(0, 4))
  theirs.save(tmp_path, state)
  want = theirs.params(state)
  with pytest.raises(
    ValueError, match=f'a trainer with another {field.strip()}: use'
  ):
    ours.round(state, batches(1, 4))
  restored = ours.restore(tmp_path)
  assert_close(ours.params(restored), want)
  ours.round(restored, batches(1, 4))


@pytest.mark.parametrize(
  ('slots', 'says'),
  [
    ([[0, 0, 1], [2, 3, 4]], 'does not ascend, or holds a block twice'),
    ([[0, 1, -1], [2, 3, 4]], 'holds another number'),
    ([[0, 1, 6], [2, 3, 4]], 'holds another number'),
    ([[0, 1, 2], [5, 3, 4]], 'does not ascend'),
    ([[0.0, 1, 2], [3, 4, 5]], r'slots are float64\[2, 3\]'),
    ([[0, 1, 2], [2, 3, 5]], 'no worker holds block 4'),
  ],
)
def test_chosen_slots_that_mean_nothing_are_refused(slots, says):
  trainer = make(S=2, min_depth=3, exchange=PSUM())
  state = trainer.init(network())
  chosen = np.array(slots)
  if chosen.dtype == np.int64:
    chosen = chosen.astype(np.int32)
  with pytest.raises(ValueError, match=says):
    trainer.round(state, batches(0, 2), {CHAIN: Assignment(chosen)})
  with pytest.raises(ValueError, match='slots are a list'):
    trainer.round(state, batches(0, 2), {CHAIN: Assignment(slots)})


@pytest.mark.parametrize('wire_format', ['bfloat16', 'int8'])
def test_formats_with_fewer_bits_need_nothing_to_send(wire_format):
  """Plain SGD has no moments, and a network may have no shared part."""
  exchange = HAND_OVER(wire_format)
  trainer = make(optax.sgd(RATE), carry=True, exchange=exchange)
  trainer.round(trainer.init(network()), batches(0, 4))

  def loss(params, present, batch, key):
    return loss_fn({**params, 'out': jnp.ones(WIDTH)}, present, batch, key)

  alone = {'inner': network()['inner']}
  cut = dataclasses.replace(make(exchange=exchange), loss_fn=loss)
  _, metrics = cut.round(cut.init(alone), batches(0, 4))
  assert np.isfinite(metrics['loss']).all()
  assert np.asarray(metrics['healthy']).all()


def test_the_devices_of_a_worker_divide_its_batch():
  trainer = make(S=2, mesh=resist.make_mesh(4, devices_per_worker=2))
  state = trainer.init(network())
  odd = jax.tree.map(lambda x: x[:, :, :3], batches(0, 2))
  for wrong in (odd, {**batches(0, 2), 'weight': np.ones((2, T), np.float32)}):
    with pytest.raises(ValueError, match='must be a multiple of 2, the'):
      trainer.round(state, wrong)


def test_compiled_programs_refuse_the_other_kind_of_batches():
  trainer = make()
  state = trainer.init(network())
  compiled = trainer.compile(state, batches(0, 4))
  steps = (jax.tree.map(lambda x, t=t: x[:, t], batches(0, 4))
           for t in range(T))  # fmt: skip
  with pytest.raises(ValueError, match='compiled for arrays'):
    compiled.round(state, steps)


def test_a_state_that_others_could_not_share_restores_where_nothing_is_cut(
  tmp_path,
):
  psum = resist.exchange.masked_psum()
  few = make(exchange=psum, min_depth=1, S=8)  # For five blocks.
  state = few.init(network())
  few.save(tmp_path, state)
  whole = make(chains=(), S=8)
  restored = whole.restore(tmp_path)
  assert_close(whole.params(restored), network())


def test_a_moment_that_mixes_blocks_is_refused():
  factored = optax.adafactor(RATE, min_dim_size_to_factor=2)
  with pytest.raises(ValueError, match='carry is set, but its optimiser keeps'):
    make(factored, carry=True).init(network())
  run(make(factored), rounds=1)  # Restarted moments may have any shape.
  flat = make(optax.flatten(optax.adam(RATE)))
  with pytest.raises(ValueError, match='does not find the moments'):
    flat.round(flat.init(network()), batches(0, 4))


@pytest.mark.parametrize(
  ('make_exchange', 'wire_format'),
  checkerboard(['hand_over', 'masked_psum'], ['float32', 'bfloat16', 'int8']),
)
def test_parameters_in_bfloat16_work_with_every_format(
  make_exchange, wire_format
):
  kind = getattr(resist.exchange, make_exchange)
  small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), network())
  optimizer = optax.sgd(RATE)
  trainer = make(optimizer, exchange=kind(wire_format))
  got, *_, state, metrics = run(trainer, 2, small)
  want, *_ = run(make(optimizer, exchange=kind()), 2)
  for tree in (got, state.shared):
    assert {x.dtype.name for x in jax.tree.leaves(tree)} == {'bfloat16'}
  assert_close(jax.tree.map(np.float32, got), want, 0.1)
  assert metrics['loss'].dtype == jnp.float32


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'carry': True, 'min_depth': 2},
    {'exchange': resist.exchange.hand_over('int8'), 'min_depth': 2},
    pytest.param(
      {'exchange': resist.exchange.masked_psum('bfloat16'), 'carry': True},
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_restored_training_repeats_to_the_bit(fields, tmp_path):
  optimizer = optax.adam(falling(0))
  trainer = make(optimizer, **fields)
  want, *_ = run(trainer, rounds=4)
  state = trainer.init(network())
  for r in range(4):
    trainer.save(tmp_path, state)
    state = make(optimizer, **fields).restore(tmp_path)
    state, _ = trainer.round(state, batches(r, 4))
  jax.tree.map(np.testing.assert_array_equal, trainer.params(state), want)
  assert len(list(tmp_path.iterdir())) == 2  # The newest, and what names it.


@pytest.mark.parametrize('seed', [0, 1])
def test_slots_that_a_person_chose_are_restored(seed, tmp_path):
  """With what each worker keeps for them, such as rounding errors."""
  fields = {'S': 2, 'exchange': PSUM('int8'), 'seed': seed}
  trainer = make(optax.sgd(RATE), **fields)
  chosen = {CHAIN: Assignment(np.int32([[0, 1, 3, 4], [1, 2, 3, 5]]))}
  state, _ = trainer.round(trainer.init(network()), batches(0, 2), chosen)
  trainer.save(tmp_path, state)
  restored = trainer.restore(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  ends = [trainer.round(x, batches(1, 2))[0] for x in (restored, state)]
  jax.tree.map(np.testing.assert_array_equal, *ends)
  with pytest.raises(ValueError, match=r'assigns .2, 3.: run one round before'):
    trainer.compile(trainer.restore(tmp_path), batches(2, 2))
  more = make(optax.sgd(RATE), **{**fields, 'S': 4}).restore(tmp_path)
  other = make(optax.sgd(RATE), S=2, exchange=HAND_OVER('int8'))
  for state in (more, other.restore(tmp_path)):
    slots = assignments_on_host(state)[CHAIN].slots
    assert slots.shape != (2, 4)


def test_slots_that_nobody_chose_are_assigned_anew_for_another_seed(tmp_path):
  trainers = [make(S=2, exchange=PSUM(), seed=seed) for seed in (0, 3)]
  first, wanted = (
    assignments_on_host(x.init(network()))[CHAIN].slots for x in trainers
  )
  assert (first != wanted).any()
  trainers[0].save(tmp_path, trainers[0].init(network()))
  restored = trainers[1].restore(tmp_path)
  np.testing.assert_array_equal(
    assignments_on_host(restored)[CHAIN].slots, wanted
  )


def test_the_state_of_an_older_version_is_restored(tmp_path):
  """It knows no average, and its rounds number its assignments."""
  trainer = make(optax.sgd(RATE))
  state, _ = trainer.round(trainer.init(network()), batches(0, 4))
  trainer.save(tmp_path, state)
  folder = tmp_path / 'round_1'
  (path,) = [
    path
    for path in folder.rglob('*')
    if path.is_file() and b'"draw"' in path.read_bytes()
  ]
  metadata = json.loads(path.read_text())
  for name in ('draw', 'average', 'digest'):
    del metadata['custom_metadata'][name]
  path.write_text(json.dumps(metadata))
  listed = ''.join(f'{k} {v}\n' for k, v in manifest(folder).items())
  digest = hashlib.sha256(listed.encode()).hexdigest()
  (tmp_path / 'state.txt').write_text(f'round_1 {digest}\n')  # No list.
  restored = trainer.restore(tmp_path)
  assert restored.draw == 1
  ends = [trainer.round(x, batches(1, 4))[0] for x in (restored, state)]
  jax.tree.map(np.testing.assert_array_equal, *map(trainer.params, ends))
  path.write_text(json.dumps(metadata, indent=1))
  with pytest.raises(ValueError, match='files are not those that were saved'):
    trainer.restore(tmp_path)


def test_other_workers_and_exchanges_continue_from_the_same_network(tmp_path):
  trainer = make(carry=True, min_depth=2)
  params, *_, state, _ = run(trainer, rounds=2)
  moments = trainer.whole(state).carried.moments
  trainer.save(tmp_path, state)
  other = make(
    S=2, devices=1, carry=True, exchange=resist.exchange.masked_psum('int8')
  )
  state = other.restore(tmp_path)
  assert int(state.round) == 2
  jax.tree.map(np.testing.assert_array_equal, other.params(state), params)
  again = other.whole(state).carried.moments
  jax.tree.map(np.testing.assert_array_equal, again, moments)
  state, metrics = other.round(state, batches(2, 2))
  assert np.isfinite(metrics['loss']).all()


def test_a_state_of_another_depth_is_refused(tmp_path):
  trainer, params = make(), network()
  trainer.save(tmp_path, trainer.init(params))
  twice = jax.tree.map(lambda x: np.concatenate([x, x]), params['inner'])
  deeper = {**params, 'inner': twice}
  with pytest.raises(ValueError, match=rf'as \({2 * L}, '):
    trainer.restore(tmp_path, deeper)


def test_files_of_tools_do_not_damage_a_state(tmp_path):
  trainer = make()
  trainer.save(tmp_path, trainer.init(network()))
  (tmp_path / 'round_0' / '.DS_Store').write_text('of Finder')
  (tmp_path / 'round_0' / '.Spotlight').mkdir()
  (tmp_path / 'round_0' / '.Spotlight' / 'index').write_text('of Spotlight')
  (tmp_path / 'round_0' / 'Thumbs.db').write_text('of Explorer')
  assert int(trainer.restore(tmp_path).round) == 0


def test_a_damaged_state_is_refused(tmp_path):
  trainer = make(optax.sgd(RATE))
  trainer.save(tmp_path, trainer.init(network()))
  inside = (tmp_path / 'round_0').rglob('*')
  saved = [p for p in inside if p.is_file() and p.stat().st_size]
  data = max(saved, key=lambda p: p.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 1
  data.write_bytes(content)
  with pytest.raises(
    ValueError, match=r'damaged: \S+ is not as it was written'
  ):
    trainer.restore(tmp_path)
  data.unlink()
  with pytest.raises(ValueError, match=r'damaged: \S+ is missing'):
    trainer.restore(tmp_path)
  with pytest.raises(ValueError, match='holds no state'):
    trainer.restore(tmp_path / 'empty')


def test_a_state_that_may_not_be_read_is_not_called_damaged(
  tmp_path, monkeypatch
):
  """Tests run as root, which may read everything."""
  trainer = make(optax.sgd(RATE))
  trainer.save(tmp_path, trainer.init(network()))

  def forbidden(folder, files):
    raise PermissionError(errno.EACCES, 'Permission denied', str(folder))

  monkeypatch.setattr(files, 'check', forbidden)
  with pytest.raises(ValueError, match=r'Permission denied.*let this user'):
    trainer.restore(tmp_path)


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'\xff\n',
    bytes(78),
    b'../run 1\n',
    b'round_0 %b\na 1\n' % (b'0' * 64),
  ],
)
def test_a_damaged_pointer_is_refused_and_written_again(content, tmp_path):
  trainer = make(optax.sgd(RATE))
  trainer.save(tmp_path, trainer.init(network()))
  (tmp_path / 'state.txt').write_bytes(content)
  with pytest.raises(ValueError, match=r'state\.txt is damaged'):
    trainer.restore(tmp_path)
  trainer.save(tmp_path, trainer.init(network()))
  assert int(trainer.restore(tmp_path).round) == 0


def test_an_iterator_of_steps_equals_arrays():
  trainer = make(optax.sgd(RATE))
  want, *_ = run(trainer, rounds=2)
  state, given = trainer.init(network()), []
  for r in range(2):
    data = batches(r, 4)
    steps = [jax.tree.map(lambda x, t=t: x[:, t], data) for t in range(T)]
    given = iter([*steps, 'left'])
    state, _ = trainer.round(state, given)
    assert next(given) == 'left'  # What it does not need stays.
  jax.tree.map(np.testing.assert_array_equal, trainer.params(state), want)
  steps = (jax.tree.map(lambda x: x[:, 0], batches(0, 4)) for _ in range(1))
  with pytest.raises(ValueError, match='ended after 1 of 3 local steps'):
    trainer.round(state, steps)


def test_constants_come_as_a_fifth_argument():
  numbers = np.arange(S_ := 4 * T * B, dtype=np.int32).reshape(4, T, B)
  data = jax.tree.map(lambda x: x.reshape(S_, *x.shape[3:]), batches(0, 4))

  def indexed(params, present, batch, key, constants):
    chosen = jax.tree.map(lambda x: x[batch], constants)
    return loss_fn(params, present, chosen, key)

  trainer = dataclasses.replace(make(), loss_fn=indexed, constants=data)
  state, _ = trainer.round(trainer.init(network()), numbers)
  want, *_ = run(make(), rounds=1)
  assert_close(trainer.params(state), want, 1e-6)


def test_a_faulty_worker_is_excluded():
  trainer = make(chains=())
  data = batches(0, 4)
  data['y'][2] = np.nan
  state, metrics = trainer.round(trainer.init(network()), data)
  assert np.asarray(metrics['healthy']).tolist() == [True, True, False, True]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.shared))
  others = jax.tree.map(lambda x: x[np.array([0, 1, 3])], batches(0, 4))
  three = make(S=3, devices=1, chains=())
  want, _ = three.round(three.init(network()), others)
  assert_close(trainer.params(state), three.params(want))


def test_an_infinite_second_moment_is_no_part_of_the_mean():
  """Its square is not finite, and then Adam moves no parameter."""

  def linear(params, present, batch, key):
    return (batch['x'] @ params['out']).mean(), {}

  trainer = make(optax.adam(RATE), chains=(), carry=True)
  trainer = dataclasses.replace(trainer, loss_fn=linear)
  data = batches(0, 4)
  data['x'][2] *= 1e20
  state, metrics = trainer.round(trainer.init(network()), data)
  assert np.isfinite(np.asarray(metrics['loss'])).all()
  assert np.asarray(metrics['healthy']).tolist() == [True, True, False, True]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.carried))


def test_numbers_of_64_bits_need_an_exact_wire_format():
  params = jax.tree.map(np.float64, network())
  with jax.enable_x64(True):
    for wire_format in ('int8', 'bfloat16'):
      trainer = make(exchange=resist.exchange.hand_over(wire_format))
      with pytest.raises(ValueError, match='is float64, which a wire format'):
        trainer.init(params)
    make().init(params)


def test_a_minimum_depth_for_some_chains_is_refused_in_restore(tmp_path):
  trainer = make(optax.sgd(RATE))
  trainer.save(tmp_path, trainer.init(network()))
  other = make(optax.sgd(RATE), min_depth={'another': 2})
  for begin in (lambda: other.init(network()), lambda: other.restore(tmp_path)):
    with pytest.raises(ValueError, match='min_depth'):
      begin()


def test_labels_by_the_names_of_parameters_get_a_remedy():
  def labels(params):
    return dict.fromkeys(params.keys(), 'a')

  both = optax.partition({'a': optax.adam(RATE)}, labels)
  trainer = make(both, carry=True)
  with pytest.raises(ValueError, match='the labels themselves'):
    trainer.init(network())


def test_schedules_of_ademamix_go_on():
  alpha = optax.linear_schedule(0.0, 5.0, 100)
  adam = optax.contrib.ademamix(RATE, alpha=alpha)
  trainer = make(adam, chains=())
  state, _ = trainer.round(trainer.init(network()), batches(0, 4))
  begun = trainer._round(state, batches(0, 4), False).programs['begin']
  local = begun(state.shared, state.chain, state.carried, np.int32(1))
  (inner, *_) = local.opt_state
  assert np.asarray(inner.count_m2).tolist() == 4 * [T]
  assert np.asarray(inner.count).tolist() == 4 * [0]


def test_bytes_are_those_of_the_compiled_program():
  for fields, devices in (({'chains': ()}, 2), ({'carry': True}, 4)):
    trainer = make(
      exchange=resist.exchange.masked_psum(), devices=devices, **fields
    )
    state = trainer.init(network())
    compiled = trainer.compile(state, batches(0, 4))
    read = resist.accounting.compiled_wire_bytes(compiled.programs, {})
    assert trainer.bytes_per_round(state) == read > 0
    state, _ = compiled.round(state, batches(0, 4))


def test_a_copy_of_a_compiled_trainer_has_its_own_programs():
  trainer, data = make(optax.sgd(RATE)), batches(0, 4)
  compiled = trainer.compile(trainer.init(network()), data)
  still = dataclasses.replace(compiled, optimizer=optax.sgd(0.0))
  state, _ = still.round(still.init(network()), data)
  assert_close(still.params(state), network(), 1e-6)


def test_a_compiled_trainer_checks_what_it_is_given():
  trainer, data = make(), batches(0, 4)
  compiled = trainer.compile(trainer.init(network()), data)
  carrying = make(carry=True)
  with pytest.raises(ValueError, match='of a trainer with carry=True'):
    compiled.round(carrying.init(network()), data)
  state = compiled.init(network())
  with pytest.raises(ValueError, match=r'it must be \[S=4, T=3, '):
    compiled.round(state, jax.tree.map(lambda x: x[:, :2], data))
  compiled.round(state, data)
  with pytest.raises(ValueError, match='which consumed it'):
    compiled.round(state, data)


def test_the_state_is_a_pytree_and_the_trainer_frozen():
  trainer = make(carry=True)
  state = trainer.init(network())
  leaves, structure = jax.tree.flatten(state)
  again = structure.unflatten(leaves)
  state, _ = trainer.round(again, batches(0, 4))
  assert int(state.round) == 1
  with pytest.raises(dataclasses.FrozenInstanceError):
    trainer.seed = 3  # pyrefly: ignore


MISTAKES = {
  'chain missing': ({'chains': ('inner/block',)}, r"mean 'inner/blocks'"),
  'chain a string': ({'chains': CHAIN}, r"chains=\('inner/blocks',\)"),
  'chain twice': ({'chains': (CHAIN, CHAIN)}, 'name each chain once'),
  'exchange a string': ({'exchange': 'hand_over'}, 'must be a value such as'),
  'too many workers': ({'S': 6}, '6 workers cannot share 5 blocks'),
  'devices': ({'S': 3}, 'num_workers is 3, not a multiple of the 2 devices'),
  'no worker': ({'S': 0}, 'num_workers is 0; it must be'),
  'depth': ({'min_depth': 9}, 'min_depth is 9'),
  'depths': ({'depths': (1, 1, 1, 1)}, r'depths is \(1, 1, 1, 1\), 4 blocks'),
  'optimiser': ({'optimizer': 0.1}, 'must be an optax optimiser'),
  'factor': ({'loss_factor': 0.5}, 'loss_factor is 0.5; it must be greater'),
  'averaged': ({'average_gradients': True}, r'use chains=\(\)'),
  'seed too large': ({'seed': 2**32}, r'seed is 4294967296; .* than 2\*\*32'),
  'seed negative': ({'seed': -1}, 'seed is -1'),
  'seed a fraction': ({'seed': 0.5}, 'seed is 0.5; it must be an integer'),
  'mesh a string': ({'mesh': 'cpu'}, "mesh is 'cpu'; it must be a value such"),
  'chains a number': ({'chains': 3}, 'chains is 3; it must hold names'),
  'depths a number': ({'depths': 2}, 'depths is 2; it must hold a whole numb'),
  'depths words': ({'depths': ('a', 'b')}, 'depths is .*; it must hold a whol'),
  'min_depth a word': ({'min_depth': 'all'}, "min_depth is 'all'; it must be"),
  'factor a word': ({'loss_factor': 'no'}, "loss_factor is 'no'; it must be"),
  'S is true': ({'S': True}, 'num_workers is True; it must be an integer'),
  'a flag a word': ({'carry': 'yes'}, "carry is 'yes'; it must be True or F"),
  'a flag a number': ({'on_device': 1}, 'on_device is 1; .*False, or None'),
  'chain in a chain': (
    {'chains': (CHAIN, f'{CHAIN}/w')}, "'inner/blocks/w', which lies in the",
  ),
  'a depth of another chain': (
    {'min_depth': {'blocks': 2}}, "min_depth names 'blocks', and chains names",
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_compiled(case):
  fields, says = MISTAKES[case]
  with pytest.raises(ValueError, match=says) as caught:
    make(**fields).init(network())
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('args', 'says'),
  [
    (('2',), "num_devices is '2'; it must be a whole number"),
    ((2.0,), 'num_devices is 2.0; it must be a whole number'),
    ((2, True), 'devices_per_worker is True; it must be a whole number'),
    ((99,), 'num_devices is 99; use a multiple of 1'),
  ],
)
def test_a_mesh_of_no_number_of_devices_is_refused(args, says):
  with pytest.raises(ValueError, match=says):
    resist.make_mesh(*args)


def test_an_unknown_format_names_the_others():
  with pytest.raises(ValueError, match="spread is 'yes'; it must be True or F"):
    resist.exchange.hand_over(spread='yes')
  with pytest.raises(ValueError, match="is 'int4'; use one of float32, bfl"):
    resist.exchange.hand_over('int4')


def test_chains_whose_leaves_differ_are_refused():
  params = network()
  params['inner']['blocks']['b'] = params['inner']['blocks']['b'][:3]
  with pytest.raises(ValueError, match=r"leading sizes \['b'\]: 3, \['w'\]: 5"):
    make().init(params)
  with pytest.raises(ValueError, match='params are of the type NoneType'):
    make().init(None)
  integers = {**network(), 'count': np.zeros(3, np.int32)}
  with pytest.raises(ValueError, match=r"params\['count'\] is int32"):
    make().init(integers)


LOSSES = {
  'no metrics': (lambda p, *_: p['out'].sum(), r'must return the pair \(loss'),
  'no scalar': (lambda p, *_: (p['out'], {}), 'take the mean over the batch'),
  'a list': (lambda p, *_: (p['out'].sum(), [1.0]), 'metrics that loss_fn'),
  'a vector': (lambda p, *_: (p['out'].sum(), {'m': p['out']}), "metric 'm'"),
  'a name': (lambda p, *_: (p['out'].sum(), {'loss': 1.0}), 'rename it'),
  'a norm': (lambda p, *_: (p['out'].sum(), {'update_norm': 1.0}), 'rename it'),
  'a word': (lambda p, *_: (p['out'].sum(), {'m': 'x'}), 'is of the type str;'),
  'a number as name': (
    lambda p, *_: (p['out'].sum(), {3: 1.0}), 'named 3; names must be strings',
  ),
  'whole numbers': (lambda *_: (jnp.int32(1), {}), r'int32\[\]; .* the mean'),
  'too few arguments': (
    lambda p, batch: (p['out'].sum(), {}),
    r'loss_fn\(p, batch\) cannot be called with \(params, present, batch, ',
  ),
  'another chain': (
    lambda p, present, *_: (p['out'].sum() + present['out'], {}),
    "looks up 'out', which is not in chains .'inner/blocks'.: add it",
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', LOSSES)
def test_a_loss_of_another_form_is_refused(case):
  function, says = LOSSES[case]
  trainer = dataclasses.replace(make(), loss_fn=function)
  with pytest.raises(ValueError, match=says) as caught:
    trainer.round(trainer.init(network()), batches(0, 4))
  assert '\n' not in str(caught.value)


def test_batches_and_states_that_do_not_fit_are_refused():
  trainer, state = make(), make().init(network())
  with pytest.raises(ValueError, match=r"batches\['x'\] has the shape \(2, 3"):
    trainer.round(state, batches(0, 2))
  with pytest.raises(ValueError, match='batches hold no array'):
    trainer.round(state, {})
  with pytest.raises(ValueError, match=r'must be \[S=4, ...\]'):
    trainer.round(state, iter([batches(0, 2)] * T))
  for fields, says in (
    ({'chains': ()}, 'chains'), ({'S': 2}, 'num_workers'),
    ({'carry': True}, 'carry'),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=f'of a trainer with {says}='):
      make(**fields).round(state, batches(0, fields.get('S', 4)))
  for value, says in (({}, 'names nothing'), ({CHAIN: 3}, 'is a int; it must')):
    with pytest.raises(ValueError, match=f'assignments.*{says}'):
      trainer.round(state, batches(0, 4), value)
  words = {**batches(0, 4), 'name': np.full((4, T), 'cat')}
  with pytest.raises(ValueError, match=r"batches\['name'\] holds <U3; it must"):
    trainer.round(state, words)
  named = dataclasses.replace(
    trainer, constants='cat', loss_fn=lambda *_: (1.0, {})
  )
  with pytest.raises(ValueError, match='constants is str; constants must be'):
    named.round(state, batches(0, 4))
  uses = trainer.round, trainer.whole, trainer.params, trainer.averaged
  uses = (*uses, trainer.bytes_per_round, lambda x: trainer.save('state', x))
  for use in uses:
    args = (batches(0, 4),) if use == trainer.round else ()
    with pytest.raises(ValueError, match='it must come from init'):
      use(network(), *args)
  trainer.round(state, batches(0, 4))
  for use in uses:
    if use != trainer.bytes_per_round:  # It looks at shapes alone.
      args = (batches(0, 4),) if use == trainer.round else ()
      with pytest.raises(ValueError, match='which consumed it'):
        use(state, *args)


def test_all_batches_of_an_iterator_are_alike():
  trainer = make()
  first, second = (
    {k: v[:, t] for k, v in batches(0, 4).items()} for t in (0, 1)
  )
  for bad, says in (
    ({'x': second['x']}, r"step 1 is PyTreeDef\({'x'.*the first is PyTreeDef"),
    ({k: v[:3] for k, v in second.items()}, r'must be \[S=4, ...\]'),
  ):
    with pytest.raises(ValueError, match=says):
      trainer.round(trainer.init(network()), iter([first, bad, second]))


def steps_of(data):
  return [jax.tree.map(lambda x, t=t: x[:, t], data) for t in range(T)]


@pytest.mark.parametrize('exclude_faulty', [True, False])
def test_a_round_that_fails_tells_what_is_left(exclude_faulty, tmp_path):
  """The parameters, where they are kept for blocks that nobody has trained."""
  trainer = make(carry=True, exclude_faulty=exclude_faulty, update_factor=0.0)
  state = trainer.init(network())
  with pytest.raises(ValueError, match='batches ended after 2 of 3 local'):
    trainer.round(state, iter(steps_of(batches(0, 4))[:2]))
  uses = {
    'round': lambda: trainer.round(state, batches(0, 4)),
    'save': lambda: trainer.save(tmp_path / 'state', state),
    'whole': lambda: trainer.whole(state),
    'params': lambda: trainer.params(state),
  }
  if exclude_faulty:
    jax.tree.map(np.testing.assert_array_equal, uses.pop('params')(), network())
  for use in uses.values():
    with pytest.raises(ValueError, match='which consumed it'):
      use()


def test_compiled_programs_check_every_batch_and_all_slots():
  trainer = make(S=2, exchange=PSUM())
  state = trainer.init(network())
  given = steps_of(batches(0, 2))
  streaming = trainer.compile(state, given)
  smaller = jax.tree.map(lambda x: x[:, :2], given[-1])
  with pytest.raises(ValueError, match=r'batches give a worker .* at a'):
    streaming.round(state, iter([*given[:-1], smaller]))
  wide = {CHAIN: Assignment(np.int32([[0, 1, 3, 4], [1, 2, 3, 5]]))}
  says = r'slots of inner/blocks have the shape \(2, 4\), .* for \(2, 3\)'
  state = trainer.init(network())
  compiled = trainer.compile(state, batches(0, 2))
  with pytest.raises(ValueError, match=says):
    compiled.round(state, batches(0, 2), wide)
  state, _ = trainer.round(state, batches(0, 2), wide)
  with pytest.raises(ValueError, match=says):
    compiled.round(state, batches(0, 2))
  trainer.round(state, batches(0, 2))


def test_batches_may_hold_keys():
  def noisy(params, present, batch, key):
    loss, measured = loss_fn(params, present, batch, key)
    return loss + jax.random.normal(batch['key']), measured

  trainer = dataclasses.replace(make(), loss_fn=noisy)
  keys = jax.random.split(jax.random.key(0), (4, T))
  given = {**batches(0, 4), 'key': keys}
  _, metrics = trainer.round(trainer.init(network()), given)
  _, plain = make().round(make().init(network()), batches(0, 4))
  noise = jax.vmap(jax.vmap(jax.random.normal))(keys).mean(axis=1)
  np.testing.assert_allclose(
    metrics['loss'][:1] - plain['loss'][:1], noise[:1], atol=3e-5
  )


def test_a_loss_that_loops_over_all_blocks_is_refused():
  """JAX would give it a worker's last block again for those it lacks."""

  def fixed(params, present, batch, key):
    del present, key
    blocks, x = params['inner']['blocks'], batch['x']
    for k in range(L):
      x = x + jnp.tanh(x @ blocks['w'][k] + blocks['b'][k][None])
    return jnp.square(x @ params['out'] - batch['y']).mean(), {}

  trainer = dataclasses.replace(make(), loss_fn=fixed)
  with pytest.raises(ValueError, match='such as a block that a worker'):
    trainer.round(trainer.init(network()), batches(0, 4))
  whole = dataclasses.replace(trainer, chains=())
  whole.round(whole.init(network()), batches(0, 4))


def test_depths_of_no_chain_are_refused():
  with pytest.raises(ValueError, match=r'depths is .*, but chains is empty'):
    make(S=2, chains=(), depths=(2, 1))


def test_devices_must_divide_the_workers():
  trainer, state = make(), make().init(network())
  assert trainer.bytes_per_round(state, 4) > trainer.bytes_per_round(state, 2)
  for count in (3, 8, 0, 2.0):
    with pytest.raises(ValueError, match=f'{count}; it must be a divisor of'):
      trainer.bytes_per_round(state, count)


def test_metrics_may_be_numbers_of_python():
  trainer = dataclasses.replace(
    make(), loss_fn=lambda p, *_: (p['out'].sum(), {'half': 0.5, 'yes': True})
  )
  _, metrics = trainer.round(trainer.init(network()), batches(0, 4))
  np.testing.assert_allclose(metrics['half'], 0.5, rtol=1e-6)
  np.testing.assert_allclose(metrics['yes'], 1.0, rtol=1e-6)


def test_a_save_that_stops_leaves_the_state_before(tmp_path, monkeypatch):
  """After the files of the new one, and before the pointer leads to them."""
  trainer = make(optax.sgd(RATE))
  state = trainer.init(network())
  trainer.save(tmp_path, state)
  state, _ = trainer.round(state, batches(0, 4))
  for step in ('_point_to', 'manifest'):
    with monkeypatch.context() as patch:
      stopped = mock.Mock(side_effect=KeyboardInterrupt)
      patch.setattr(files, step, stopped)
      with pytest.raises(KeyboardInterrupt):
        trainer.save(tmp_path, state)
      stopped.assert_called_once()
    restored = trainer.restore(tmp_path)
    assert int(restored.round) == 0
    before = trainer.params(restored)
    jax.tree.map(np.testing.assert_array_equal, before, network())
  (tmp_path / 'round_7').mkdir()  # Not written by `save`.
  (tmp_path / 'round_9.orbax-checkpoint-tmp').mkdir()  # Of a save, killed.
  state, _ = trainer.round(state, batches(1, 4))
  trainer.save(tmp_path, state)
  assert int(trainer.restore(tmp_path).round) == 2
  left = {'state.txt', 'round_2', 'round_7'}
  assert {p.name for p in tmp_path.iterdir()} == left


def test_a_state_is_not_saved_onto_a_file(tmp_path):
  path = tmp_path / 'file'
  path.write_text('kept')
  trainer = make(optax.sgd(RATE))
  state = trainer.init(network())
  for folder in (path, path / 'inside'):
    with pytest.raises(ValueError, match='is not a folder'):
      trainer.save(folder, state)
  assert path.read_text() == 'kept'


def test_a_folder_of_somebody_else_is_not_replaced_by_a_state(tmp_path):
  (tmp_path / 'round_0').mkdir()
  (tmp_path / 'round_0' / 'picture').write_text('kept')
  trainer = make(optax.sgd(RATE))
  state = trainer.init(network())
  with pytest.raises(ValueError, match='holds round_0, which is no state'):
    trainer.save(tmp_path, state)
  assert (tmp_path / 'round_0' / 'picture').read_text() == 'kept'


@pytest.mark.parametrize(
  ('path', 'says'),
  [('depth=[2,3]', 'as patterns'), ('a?', 'patterns'), ('/s3/run', 'a cloud')],
)
def test_where_orbax_would_lose_a_state_none_is_saved(path, says, tmp_path):
  trainer = make(optax.sgd(RATE))
  with pytest.raises(ValueError, match=says):
    trainer.save(tmp_path / path, trainer.init(network()))
  assert not (tmp_path / path).exists()


def test_a_state_lies_where_a_shell_would_look(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setenv('THERE', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  trainer = make(optax.sgd(RATE))
  trainer.save('~/state', trainer.init(network()))
  assert (tmp_path / 'state' / 'state.txt').exists()
  assert int(trainer.restore('$THERE/state').round) == 0
  assert [path.name for path in tmp_path.iterdir()] == ['state']
  for folder, says in (
    ('$UNSET/state', r'folder is .*UNSET is not set'),
    ('gs://bucket/state', 'folder is .*a URL'),
    (3, 'folder is 3, which is no path'),
  ):
    for call in (
      lambda f=folder: trainer.save(f, trainer.init(network())),
      lambda f=folder: trainer.restore(f),
    ):
      with pytest.raises(ValueError, match=says):
        call()


def test_other_local_steps_move_no_schedule(tmp_path):
  trainer, again = make(optax.sgd(falling(0))), make(optax.sgd(RATE))
  for one in (trainer, again):
    one.save(tmp_path, one.init(network()))
    other = dataclasses.replace(one, local_steps=T + 1)
    if one is trainer:
      with pytest.raises(ValueError, match=f'local_steps is {T + 1}, but the'):
        other.restore(tmp_path)
    else:  # A constant rate counts nothing.
      other.restore(tmp_path)
    one.restore(tmp_path)


def test_a_state_of_other_devices_is_refused():
  state = make(devices=2).init(network())
  with pytest.raises(ValueError, match='on the devices of another mesh'):
    make(devices=1).round(state, batches(0, 4))


def test_moments_of_another_dtype_are_refused(tmp_path):
  """In a compiled loop, they would change their dtype."""
  theirs = make(optax.adam(RATE), carry=True)
  ours = make(optax.adam(RATE, mu_dtype=jnp.bfloat16), carry=True)
  theirs.save(tmp_path, theirs.init(network()))
  with pytest.raises(ValueError, match='another optimizer, whose state'):
    ours.restore(tmp_path)


def test_weights_that_an_optimiser_keeps_are_not_rounded():
  optimizer = optax.contrib.schedule_free_adamw(RATE)
  exact = make(optimizer, carry=True, exchange=HAND_OVER('float32'))
  exact.init(network())
  for wire_format in ('bfloat16', 'int8'):
    trainer = make(optimizer, carry=True, exchange=HAND_OVER(wire_format))
    with pytest.raises(ValueError, match='keeps weights, whose small changes'):
      trainer.init(network())
  # Moments that begin at zero are no weights, and neither are weights at zero.
  zeros = jax.tree.map(np.zeros_like, network())
  make(carry=True, exchange=HAND_OVER('int8')).init(zeros)


def test_an_optimiser_with_a_raw_key_is_refused():
  """All workers would draw the same noise."""
  noise = optax.GradientTransformation(
    lambda _: jax.random.PRNGKey(0), lambda grads, key, _: (grads, key)
  )
  trainer = make(noise)
  with pytest.raises(ValueError, match=r'raw key, .* jax\.random\.key'):
    trainer.round(trainer.init(network()), batches(0, 4))


def test_an_own_exchange_may_lose_no_block():
  """Nobody else would say that a block has no holder."""

  def forgets(division, seed, round_index, before):
    found = PSUM().assign(division, seed, 0, None)
    if round_index:
      slots = np.where(found.slots == 3, L, found.slots)
      found = Assignment(np.sort(slots, axis=1))
    return found

  trainer = make(exchange=PSUM()._replace(assign=forgets))
  state = trainer.init(network())
  with pytest.raises(ValueError, match='no worker holds block 3 of 5'):
    trainer.round(state, batches(0, 4))


def test_an_own_exchange_names_the_one_of_its_moments():
  own = HAND_OVER('int8')._replace(moments=None)
  make(exchange=own)
  with pytest.raises(
    ValueError, match=r'as bfloat16, but exchange\.moments is None'
  ):
    make(exchange=own, carry=True)


def test_a_format_that_rounds_blocks_alone_is_not_exact(monkeypatch):
  mixed = resist.exchange.Format('float32', 'bfloat16')
  assert not mixed.exact
  monkeypatch.setitem(resist.exchange.FORMATS, 'mixed', mixed)
  with pytest.raises(ValueError, match='outer takes small changes'):
    make(exchange=HAND_OVER('mixed'), outer=optax.sgd(0.7))
