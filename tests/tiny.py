"""A network that compiles in a second, and Algorithm 1 as a plain loop."""

from functools import partial
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resist_jax import decomposition, exchange, models, rounds
from resist_jax.decomposition import Assigner, Assignment
from resist_jax.rounds.state import with_carried
from resist_jax.run import optimizer

CHAIN = 'stage2_chain'
CLASSES = 3
MOMENTUM, WEIGHT_DECAY, RATE = 0.9, 5e-4, 0.1


def network(num_blocks=5, **kwargs):
  """Two stages of 8 channels; the second has the chain."""
  return models.ResNet(
    num_classes=CLASSES,
    stage_sizes=(1, 1 + num_blocks),
    widths=(8, 8),
    **kwargs,
  )


def init(net):
  """Draws parameters by NumPy, which compiles nothing."""
  image = jnp.zeros((1, 4, 4, 1))
  shapes = jax.eval_shape(net.init, jax.random.key(0), image)['params']
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key != 'kernel':
      return jnp.full(leaf.shape, path[-1].key == 'scale', leaf.dtype)
    fan_in = np.prod(leaf.shape[-4:-1] or leaf.shape[:1])
    values = rng.normal(0, np.sqrt(2 / fan_in), leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  return jax.tree.map_with_path(draw, shapes)


def examples(count=24):
  rng = np.random.default_rng(0)
  images = rng.normal(size=(count, 4, 4, 1)).astype(np.float32)
  return jnp.array(images), jnp.array(
    rng.integers(0, CLASSES, count), jnp.int32
  )


def make_loss(net):
  """A rounds.LossFn; constants are `examples`, a batch is their numbers."""

  def loss_fn(params, present, batch, key, constants):
    del key
    images, labels = constants
    lengths = {k: len(jax.tree.leaves(params[k])[0]) for k in present}
    sub = net.with_chain_lengths(lengths)
    logits = sub.apply({'params': params}, images[batch], present)
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, labels[batch]
    )
    return loss.mean(), {}

  return loss_fn


def rate(step):
  return RATE / (1 + jnp.float32(step))


def make_optimizer():
  return optimizer.make_optimizer(rate, MOMENTUM, WEIGHT_DECAY)


def protocol(
  num_workers, local_steps=2, num_blocks=None, wire_format='float32', **fields
):
  """A protocol; its exchange is named, or masked_psum."""
  make = getattr(exchange, fields.pop('exchange', 'masked_psum'))
  num_blocks = num_blocks or {}
  return rounds.Protocol(
    num_workers, local_steps, num_blocks, make(wire_format), **fields
  )


def hands_over(protocol):
  """Whether its exchange is hand_over, which chooses among routes."""
  return protocol.exchange.branches is not exchange.masked_psum().branches


def make_round(
  loss_fn, protocol, num_devices, on_device=False, group=1, **kwargs
):
  """A mesh and a round on it; a worker has `group` of the devices."""
  mesh = rounds.make_mesh(num_devices, group)
  run = rounds.make_round(
    loss_fn,
    make_optimizer(),
    protocol,
    mesh,
    seed=0,
    on_device=on_device,
    **kwargs,
  )
  return mesh, run


def assign(round_index, num_blocks, num_workers, min_depth=0, depths=()):
  """Fresh round-robin slots."""
  key = jax.random.fold_in(jax.random.key(7), round_index)
  slots = decomposition.sample_slots(
    key, num_blocks, num_workers, min_depth, depths
  )
  return Assignment(np.asarray(slots))


def assigner(protocol, chain=CHAIN):
  return Assigner(*protocol.division(chain))


def in_turn(assigner, seed, count):
  """The first assignments of a chain."""
  found = [assigner.first(seed)]
  for r in range(1, count):
    found.append(assigner.following(found[-1].owned, seed, r))
  return found


def assignments(protocol, start=0):
  """What an exchange can carry: assignments of rounds, by chain."""
  before = None
  for r in itertools.count():
    if hands_over(protocol):
      before = {
        name: (
          assigner(protocol, name).following(before[name].owned, [7, i], r)
          if before
          else assigner(protocol, name).first([7, i])
        )
        for i, name in enumerate(protocol.num_blocks)
      }
    else:
      before = {
        name: assign(r, *division)
        for name, division in protocol.divisions.items()
      }
    if r >= start:
      yield before


def distribute(params, protocol, mesh, assigned=None):
  """A state before round 0, with the optimiser's state if it is carried."""
  whole = with_carried(rounds.Whole(params), make_optimizer(), protocol)
  assigned = assigned or next(assignments(protocol))
  return rounds.distribute(whole, protocol, mesh, assigned)


def batches(round_index, num_workers, local_steps, batch_size=6):
  rng = np.random.default_rng([1, round_index])
  shape = (num_workers, local_steps, batch_size)
  return rng.integers(0, 24, shape).astype(np.int32)


def run_rounds(
  loss_fn,
  params,
  protocol,
  num_devices,
  batches_of_rounds,
  on_device=False,
  group=1,
):
  """Runs compiled rounds and returns the last state, and metrics of each."""
  mesh, run = make_round(loss_fn, protocol, num_devices, on_device, group)
  assigned = assignments(protocol)
  state = distribute(params, protocol, mesh, next(assigned))
  measured = []
  for numbers in batches_of_rounds:
    state, metrics = run(state, examples(), numbers, next(assigned))
    metrics.pop('seconds_local', None)  # Every run takes other seconds.
    measured.append(metrics)
  return state, measured


def train_compiled(
  loss_fn, params, protocol, num_devices, num_rounds, on_device=False, group=1
):
  """Runs compiled rounds and returns the global parameters."""
  numbers = [
    batches(r, protocol.num_workers, protocol.local_steps)
    for r in range(num_rounds)
  ]
  state, measured = run_rounds(
    loss_fn, params, protocol, num_devices, numbers, on_device, group
  )
  return rounds.assemble(state).params, measured[-1]


@partial(jax.jit, static_argnums=0)
def apply(net, params, images, scales=None):
  """Logits; one program, where a line after another would compile each."""
  return net.apply({'params': params}, images, scales)


@partial(jax.jit, static_argnums=0)
def gradient(loss_fn, params, present, batch):
  """The gradient of the loss on the examples numbered `batch`."""

  def loss(p):
    return loss_fn(p, present, batch, None, examples())[0]

  return jax.grad(loss)(params)


def one_step(loss_fn, params, batch):
  """Parameters after the first local step, without momentum by then."""
  params = jax.tree.map(np.asarray, params)
  grads = jax.tree.map(np.asarray, gradient(loss_fn, params, {}, batch))
  return jax.tree.map(
    lambda p, g: p - RATE * (g + WEIGHT_DECAY * p), params, grads
  )


def algorithm_1(loss_fn, params, protocol, num_rounds, left_out=()):
  """The paper's Algorithm 1, one worker after another, nothing stacked.

  A sub-ResNet here is a list of blocks, and SGD is written out: this shares
  no line with `rounds`, `exchange` or `aggregate`. Where it is carried,
  momentum is cut and averaged as the parameters are. Of each round, `left_out`
  may name workers whose updates are lost: what nobody else holds stays, and
  without momentum.
  """
  num_blocks, steps = protocol.num_blocks, protocol.local_steps
  S = protocol.num_workers
  # NumPy computes it: JAX would compile each line for every shape.
  params = jax.tree.map(np.asarray, params)
  velocity = jax.tree.map(np.zeros_like, params)
  at_rest = velocity
  for r, assigned in zip(
    range(num_rounds), assignments(protocol), strict=False
  ):
    lost = left_out[r] if left_out else ()
    hands = [
      {
        chain: [b for b in assigned[chain].slots[s].tolist() if b < length]
        for chain, length in num_blocks.items()
      }
      for s in range(S)
    ]
    subs, momenta = [], []
    hands = [mine for s, mine in enumerate(hands) if s not in lost]
    for s, mine in zip(sorted({*range(S)} - {*lost}), hands, strict=True):
      sub, momentum = cut(params, mine), cut(velocity, mine)
      if not protocol.carry:
        momentum = jax.tree.map(np.zeros_like, momentum)
      present = {
        chain: np.ones(len(blocks), np.float32)
        for chain, blocks in mine.items()
      }
      for t in range(steps):
        batch = batches(r, S, steps)[s, t]
        grads = jax.tree.map(np.asarray, gradient(loss_fn, sub, present, batch))
        momentum = jax.tree.map(
          lambda v, g, p: MOMENTUM * v + g + WEIGHT_DECAY * p,
          momentum, grads, sub,
        )  # fmt: skip
        rate = RATE / (1 + r * steps + t)
        sub = jax.tree.map(lambda p, v, a=rate: p - a * v, sub, momentum)
      subs.append(sub)
      momenta.append(momentum)
    params = merge(subs, hands, num_blocks, params)
    velocity = merge(momenta, hands, num_blocks, at_rest)
  return params


def cut(tree, mine):
  """The part of a worker that holds the blocks `mine`, by chain."""
  return tree | {
    chain: jax.tree.map(lambda x, b=blocks: x[np.array(b, int)], tree[chain])
    for chain, blocks in mine.items()
  }


def merge(parts, hands, num_blocks, old):
  """Means over the workers that held a parameter; without any, it is old."""
  chains = {}
  for chain, length in num_blocks.items():
    blocks = []
    for block in range(length):
      held = [
        jax.tree.map(operator.itemgetter(mine[chain].index(block)), part[chain])
        for part, mine in zip(parts, hands, strict=True)
        if block in mine[chain]
      ]
      kept = jax.tree.map(operator.itemgetter(block), old[chain])
      blocks.append(mean(held) if held else kept)
    chains[chain] = jax.tree.map(lambda *xs: np.stack(xs), *blocks)
  shared = [
    {k: v for k, v in part.items() if k not in chains} for part in parts
  ]
  return mean(shared) | chains


def mean(trees):
  """The plain mean of pytrees."""
  return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)
