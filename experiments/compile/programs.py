"""Lowers the programs of a case, with shapes in place of arrays."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from experiments import language, protocols, shapes
from experiments.compile import plain
from experiments.compile.cases import CARD, SCALES, Case
from experiments.runs import load_card
from resist_jax import accounting, data
from resist_jax.rounds import LossFn, Protocol, make_round
from resist_jax.rounds.mesh import SHARDED, spread
from resist_jax.run import (
  block_walk,
  evaluate,
  optimizer,
  phases,
  resnet_task,
)
from resist_jax.run.cards import cifar10
from resist_jax.run.config import EXCHANGES
from resist_jax.run.resnet_task import ResNetTask
from resist_jax.run.setup import Setup

PyTree = Any
# A jitted function, and the shapes that it is called with.
Call = tuple[Any, tuple]


class Problem(NamedTuple):
  """A network and how it is trained.

  Attributes:
    loss_fn: See `rounds.LossFn`.
    metrics: Names of the metrics that it returns.
    optimizer: The optimiser of local training.
    protocol: Who holds what.
    params: Shapes of the global parameters.
    sizes: Their counts, as the protocol cuts the network.
    constants: Shapes of what the loss gets in every step.
    batches: Shapes of a round's batches, `[S, T, ...]`; streamed, a list of
      those of a step, `[S, ...]`.
    batch_size: B.
  """

  loss_fn: LossFn
  metrics: tuple[str, ...]
  optimizer: optax.GradientTransformation
  protocol: Protocol
  params: dict[str, PyTree]
  sizes: accounting.Sizes
  constants: PyTree
  batches: PyTree
  batch_size: int
  setup: Setup | None
  task: ResNetTask | None


def problem(case: Case, mesh: Mesh, scale: str) -> Problem:
  """Describes what a case trains.

  Args:
    case: What to compile.
    mesh: Where its workers live.
    scale: A key of `SCALES`.

  Returns:
    The problem.
  """
  make = _language if case.network == 'gpt' else _images
  return make(case, mesh, scale)


def _images(case: Case, mesh: Mesh, scale: str) -> Problem:
  setup = make_setup(case, mesh, scale)
  config, task = setup.config, setup.task
  assert isinstance(task, ResNetTask)
  axis = mesh.axis_names[1] if case.devices_per_worker > 1 else None
  scales = phases.training_scale(setup, case.protocol)
  traffic = phases.describe(setup, case.protocol)
  S, T, B = case.num_workers, config.local_steps, config.batch_size
  constants = shapes.on_mesh(setup.pipeline.constants, mesh)
  batches: Any = jax.ShapeDtypeStruct((S, T, B), jnp.int32)
  if case.form == 'streamed':
    images = jax.ShapeDtypeStruct((S, B, *task.image_shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct((S, B), jnp.int32)
    constants, batches = None, T * [(images, labels)]
  return Problem(
    task.make_loss(scales, axis),
    task.metrics,
    task.make_optimizer(optimizer.schedule(config)),
    traffic.protocol,
    task.shapes(),
    traffic.sizes,
    constants,
    batches,
    B,
    setup,
    task,
  )


def make_setup(case: Case, mesh: Mesh, scale: str) -> Setup:
  """Builds what a run is made of, on devices that need not exist.

  Args:
    case: What to compile.
    mesh: Where its workers live.
    scale: A key of `SCALES`.

  Returns:
    The setup; its images are black.
  """
  found = SCALES[scale]
  changes = {
    'protocol': case.protocol,
    'num_workers': case.num_workers,
    'exchange': case.exchange,
    'wire_format': case.wire_format,
    'model.dtype': case.dtype,
    **found.changes,
    **({'min_depth': case.min_depth} if case.min_depth != CARD else {}),
  }
  if scale == 'paper':
    changes['model.name'] = case.network
  words = f's{case.num_workers}' if case.num_workers in cifar10.PAPER else ''
  config = load_card(found.card, words, changes)
  images = np.zeros((found.images, 32, 32, 3), np.uint8)
  labels = np.zeros(found.images, np.int32)
  half = np.full(3, 0.5, np.float32)
  split = data.Split(images, labels)
  names = tuple(map(str, range(100)))
  dataset = data.Dataset(
    config.data.name, split, {'test': split}, names, half, half
  )
  task = resnet_task.make(config, dataset, mesh.devices.flat[0].platform)
  chains = list(task.cuts) if case.protocol == 'resist' else []
  sizes = accounting.measure(task.shapes(), chains)
  return Setup(config, task, sizes.num_blocks, sizes, mesh)


def _language(case: Case, mesh: Mesh, scale: str) -> Problem:
  nothing = np.zeros(1000, np.uint8)  # Only the shapes of batches count.
  task = language.task('bytes', SCALES[scale].gpt, (nothing, nothing))
  S = case.num_workers
  trainer, _ = protocols.make_trainer(task, case.protocol, S, 0)
  exchange = EXCHANGES[case.exchange](case.wire_format)
  trainer = dataclasses.replace(trainer, exchange=exchange)
  params = jax.eval_shape(lambda: task.init(0))
  batches = task.batches(S, 0, 0)
  return Problem(
    trainer.loss_fn,
    (),
    trainer.optimizer,
    trainer.protocol(params),
    params,
    accounting.measure(params, list(trainer.chains)),
    None,
    jax.ShapeDtypeStruct(batches.shape, batches.dtype),
    task.budget.batch,
    None,
    None,
  )


def calls(case: Case, found: Problem, mesh: Mesh) -> dict[str, Call]:
  """Returns the programs of a case, by name.

  Args:
    case: What to compile.
    found: What it trains.
    mesh: Where its workers live.

  Returns:
    What to lower.
  """
  assigned = found.protocol.assign(0, 0)
  held = shapes.state(
    found.params, found.optimizer, found.protocol, mesh, assigned
  )
  if case.form == 'evaluation':
    return _evaluation(found, held, mesh)
  if case.form == 'evaluation_by_blocks':
    return _by_blocks(found, held, mesh)
  if case.form == 'plain_flax':
    return _plain(found, mesh)
  run = make_round(
    found.loss_fn,
    found.optimizer,
    found.protocol,
    mesh,
    seed=0,
    metrics=found.metrics,
    on_device=case.form in ('one_program', 'streamed'),
    streamed=case.form == 'streamed',
  )
  arguments = run.arguments(held, found.constants, found.batches)
  wanted = ['finish'] if case.form == 'exchange' else list(arguments)
  return {name: (run.programs[name], arguments[name]) for name in wanted}


def _tests(found: Problem, mesh: Mesh):
  """Returns a task, scales, and shapes of a batch and of statistics."""
  setup, task = found.setup, found.task
  assert setup is not None
  assert task is not None
  B, n = setup.config.evaluation.batch_size, mesh.size
  images = jax.ShapeDtypeStruct((n, B, *task.image_shape), jnp.uint8)
  labels = jax.ShapeDtypeStruct((n, B), jnp.int32)
  batch = shapes.on_mesh((images, labels), mesh, spread(mesh))

  def measured(params, images):
    return task.network.apply(
      {'params': params}, images, mutable=['batch_stats']
    )[1]['batch_stats']

  one = jax.ShapeDtypeStruct((1, *task.image_shape), jnp.float32)
  statistics = jax.eval_shape(measured, found.params, one)
  scales = phases.global_scales(setup)
  return task, scales, batch, shapes.on_mesh(statistics, mesh)


def _evaluation(found: Problem, held, mesh: Mesh) -> dict[str, Call]:
  task, scales, batch, statistics = _tests(found, mesh)
  whole = evaluate.WholeNetwork(task.network, task.dataset, scales, mesh)
  chains, programs = {}, {}
  for name, blocks in held.chain.items():
    where = jax.ShapeDtypeStruct((held.num_blocks[name],), jnp.int32)
    where = shapes.on_mesh(where, mesh)
    call = evaluate.gather_blocks, (mesh, blocks, where, where)
    programs[f'gather {name}'] = call
    chains[name] = shapes.on_mesh(found.params[name], mesh)
  for kind, used in (('fixed', statistics), ('own', {})):
    args = held.shared, chains, used, *batch
    programs[f'apply, {kind} statistics'] = whole.program, args
  return programs


def _by_blocks(found: Problem, held, mesh: Mesh) -> dict[str, Call]:
  task, _, (images, _), statistics = _tests(found, mesh)
  number = shapes.on_mesh(jax.ShapeDtypeStruct((), jnp.int32), mesh)
  one = jax.ShapeDtypeStruct((), jnp.float32)
  walk: Callable = block_walk.apply_piece
  programs: dict[str, Call] = {}
  x: Any = jax.ShapeDtypeStruct(images.shape, jnp.float32)
  x = shapes.on_mesh(x, mesh, spread(mesh))
  for name, i in dict(task.network.pieces()).items():
    params, index = held.shared.get(name), None if i is None else number
    if name in held.chain:
      call = block_walk.fetch_block, (mesh, held.chain[name], number, number)
      programs[f'fetch {name}'] = call
      params = _rows(found.params[name], mesh, (mesh.shape['worker'], 1))
    stats = statistics.get(name, {})
    if i is not None:
      stats = jax.tree.map(lambda leaf: _without_first(leaf, mesh), stats)
    args = (
      mesh,
      task.network,
      name,
      params,
      index,
      one,
      stats,
      x,
    )
    programs[f'apply {name}'] = walk, args
    piece = functools.partial(walk, *args[:3])
    x = shapes.on_mesh(jax.eval_shape(piece, *args[3:])[0], mesh, spread(mesh))
  return programs


def _plain(found: Problem, mesh: Mesh) -> dict[str, Call]:
  """Returns the step of a worker's sub-network without any worker."""
  task, protocol = found.task, found.protocol
  assert task is not None
  lengths = {k: protocol.slots_per_worker(k) for k in protocol.num_blocks}
  like = task.network.with_chain_lengths(lengths)
  init, update = plain.step(like, found.optimizer)
  B = found.batch_size
  images = jax.ShapeDtypeStruct((B, *task.image_shape), jnp.uint8)
  labels = jax.ShapeDtypeStruct((B,), jnp.int32)
  wide = jax.ShapeDtypeStruct(images.shape, jnp.float32)
  args = jax.eval_shape(init, wide), images, labels
  # Each device does the same: a TPU program takes all of them.
  return {'plain step': (update, shapes.on_mesh(args, mesh))}


def _rows(tree: Mapping[str, PyTree], mesh: Mesh, leading: tuple[int, ...]):
  """Describes one block of a chain, given to every device."""
  found = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((*leading, *x.shape[1:]), x.dtype), tree
  )
  return shapes.on_mesh(found, mesh, SHARDED)


def _without_first(leaf, mesh: Mesh):
  return shapes.on_mesh(jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), mesh)
