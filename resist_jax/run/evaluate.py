"""How good the global model is: with fixed statistics, and as the paper tests.

Training keeps no running statistics of batch norm. A deployed model needs fixed
ones, so they are measured for the global model, at its residual scale, over a
sample of training images ("recalibrated"). The paper tests with the statistics
of each test batch instead.

No device ever holds the chains that are cut. Batches wait on the devices while
blocks come by, one at a time, from their workers; each kind is a small program.
"""

import collections
from collections.abc import Mapping
import dataclasses
from functools import partial
import itertools
import operator
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from resist_jax import data
from resist_jax.exchange.collectives import WORKER
from resist_jax.models.blocks import Block, Branch
from resist_jax.models.resnet import ResNet
from resist_jax.rounds.arrays import place, to_host
from resist_jax.rounds.state import REPLICATED, SHARDED, mesh_sizes, spread
from resist_jax.run.export import Predictor

PyTree = Any
_ONE = np.float32(1)


@dataclasses.dataclass(frozen=True)
class _Group:
  """Batches side by side: device d computes row d, in groups too.

  Attributes:
    name: What the hits in them count for.
    split: What they are taken from.
    rows: `int32[D * G, B]`, which examples; -1 fills up.
    fixed: With fixed statistics instead of those of each batch.
  """

  name: str
  split: data.Split
  rows: np.ndarray
  fixed: bool


class Evaluator:
  """Evaluates the global model on the sets of a data set.

  Attributes:
    network: The global network.
    scales: Residual scale of each chain that ResIST cuts, `float32[L]`.
    wire_bytes: What blocks cost on their way to all devices, so far.
  """

  def __init__(
    self,
    network: ResNet,
    dataset: data.Dataset,
    scales: Mapping[str, jax.Array],
    batch_size: int,
    statistics_images: int,
    mesh: Mesh,
    batches_at_once: int = 32,
  ):
    """Prepares the measurement.

    Args:
      network: The global network.
      dataset: What to measure on.
      scales: Residual scale of each chain that ResIST cuts, `float32[L]`.
      batch_size: Images a test batch; the paper's statistics are of these.
      statistics_images: Training images to measure fixed statistics over.
      mesh: Where the workers live.
      batches_at_once: How many batches may wait on a device for a block; for
        more, the blocks come by again.
    """
    self.network = network
    self.scales = dict(scales)
    self.wire_bytes = 0
    self._scales = jax.tree.map(np.asarray, self.scales)
    self._dataset = dataset
    self._batch_size = batch_size
    order = np.random.default_rng(0).permutation(len(dataset.train))
    self._sample = dataset.train.take(np.sort(order[:statistics_images]))
    self._mesh = mesh
    self._batches_at_once = batches_at_once
    normalise = partial(data.normalise, mean=dataset.mean, std=dataset.std)
    self._normalise = jax.jit(jax.vmap(normalise))

  def statistics(
    self,
    shared: Mapping[str, PyTree],
    chain: Mapping[str, PyTree],
    slots: Mapping[str, np.ndarray],
  ) -> dict[str, PyTree]:
    """Measures batch norm statistics over a sample of training images.

    Args:
      shared: Parameters outside the partitioned chains, `[S, ...]`.
      chain: For each partitioned chain, its blocks `[S, K, ...]`.
      slots: For each partitioned chain, `int32[S, K]`: which blocks these are.

    Returns:
      The collection `batch_stats`, on the host: means over equal batches of
      each layer's mean and mean square, so the variance is that of the whole
      sample. Empty for a network without batch norm.
    """
    # Equal batches only: a mean over batches then is the mean over images.
    size = min(self._batch_size, len(self._sample))
    count = len(self._sample) // size
    groups = self._groups('', self._sample, np.arange(count * size), size)
    found = collections.defaultdict(list)
    for _, measured in self._walks(groups, shared, chain, slots, {}):
      for step, values in to_host(measured).items():
        found[step] += values

    def mean(*values):  # Batches that fill up the last group come last.
      return np.concatenate(values)[:count].mean(axis=0)

    collection = {}
    pieces = itertools.groupby(self.network.pieces(), operator.itemgetter(0))
    for name, steps in pieces:
      means = {i: jax.tree.map(mean, *found[name, i]) for _, i in steps}
      stacked = jax.tree.map(lambda *x: np.stack(x), *means.values())
      collection[name] = means.get(None, stacked)
    return {name: stats for name, stats in collection.items() if stats}

  def __call__(
    self,
    shared: Mapping[str, PyTree],
    chain: Mapping[str, PyTree],
    slots: Mapping[str, np.ndarray],
  ) -> dict[str, float]:
    """Measures accuracies, as shares of 1, over whole sets.

    Args:
      shared: See `statistics`.
      chain: Likewise.
      slots: Likewise.

    Returns:
      For each set, `NAME_accuracy` with recalibrated fixed statistics and
      `NAME_accuracy_paper` with the statistics of each batch.
    """
    statistics = self.statistics(shared, chain, slots)
    size, groups = self._batch_size, []
    for name, split in self._dataset.tests.items():
      rows = np.arange(len(split))
      # Images are independent under fixed statistics, so a last batch can be
      # filled up; under its own statistics it is a batch of another size.
      groups += self._groups(f'{name}_accuracy', split, rows, size, fixed=True)
      for part in np.split(rows, [len(rows) - len(rows) % size]):
        paper = f'{name}_accuracy_paper'
        groups += self._groups(paper, split, part, min(size, len(part)))
    hits = []
    for found, _ in self._walks(groups, shared, chain, slots, statistics):
      hits += to_host(found)
    right, total = collections.Counter(), collections.Counter()
    for group, found in zip(groups, hits, strict=True):
      right[group.name] += int(found.sum())
      total[group.name] += int((group.rows >= 0).sum())
    return {name: right[name] / total[name] for name in total}

  def predictor(self, params: PyTree, statistics: PyTree) -> Predictor:
    """Returns the model to deploy.

    Args:
      params: Canonical global parameters, on the host.
      statistics: What `statistics` returned for them.

    Returns:
      Both together, ready to use.
    """
    variables = {'params': params, 'batch_stats': statistics}
    mean, std = self._dataset.mean, self._dataset.std
    return Predictor(self.network, variables, self.scales, mean, std)

  def _groups(self, name, split, rows, size, fixed=False):
    """Cuts examples into batches of `size`, as many a group as devices."""
    if not len(rows):
      return []
    filled = np.pad(
      rows, (0, -len(rows) % (self._mesh.size * size)), constant_values=-1
    )
    parts = filled.reshape(-1, self._mesh.size, size)
    return [_Group(name, split, part, fixed) for part in parts]

  def _walks(self, groups, *model):
    """Yields `_walk` of as many groups as may wait at once."""
    for start in range(0, len(groups), self._batches_at_once):
      yield self._walk(groups[start : start + self._batches_at_once], *model)

  def _walk(self, groups, shared, chain, slots, statistics):
    """Takes batches through the network, without waiting for results.

    Returns:
      `(hits, measured)`: of each group, `int32[D]`, how many images of each
      batch are classified right; at each step, of each group, the statistics
      `[D, C]` of its batches (nothing of a `fixed` one).
    """
    steps = self.network.pieces()
    fixed = {step: self._fixed(statistics, step) for step in steps}
    measured = {step: [] for step in steps}
    waiting: list[Any] = [None] * len(groups)
    # Through what every device has, batches go one after another; a block that
    # has to be fetched is used by all of them before it is dropped.
    runs = itertools.groupby(steps, lambda s: s if s[0] in chain else None)
    for cut, part in runs:
      run, params = list(part), shared  # The block before is dropped here.
      if cut is not None:
        params = self._fetch(chain, slots, cut, waiting)
      for g, group in enumerate(groups):
        x = waiting[g]
        if x is None:
          x = self._images(group)
        for name, i in run:
          index = None if i is None else np.int32(0 if cut else i)
          scale = self._scales[name][i] if name in self._scales else _ONE
          stats = fixed[name, i] if group.fixed else {}
          weights = (params[name], index, scale, stats)
          x, found = _apply(self._mesh, self.network, name, *weights, x)
          measured[name, i].append(found)
        waiting[g] = x
    hits = []
    for group, logits in zip(groups, waiting, strict=True):
      labels = np.where(group.rows < 0, -1, group.split.labels[group.rows])
      hits.append(_hits(logits, self._put(labels)))
    return hits, measured

  def _fetch(self, chain, slots, step, waiting):
    """Brings a block to every device: `{name: [D, 1, ...]}`."""
    if self._mesh.devices.flat[0].platform == 'cpu':
      # XLA's CPU collectives abort the process when a device comes 40 seconds
      # late: no device may have batches to compute before this.
      jax.block_until_ready(waiting)
    (D, G), (name, i) = mesh_sizes(self._mesh), step
    worker, slot = np.argwhere(slots[name] == i)[0].astype(np.int32)
    block = _fetch(self._mesh, chain[name], worker, slot)
    copies = sum(x.nbytes for x in jax.tree.leaves(block))  # D of them.
    self.wire_bytes += 2 * (D - 1) * copies // D * G
    return {name: block}

  def _fixed(self, statistics, step):
    """Places the statistics of one step on every device."""
    name, i = step
    stats = statistics.get(name, {})
    if i is not None:
      stats = jax.tree.map(lambda x: x[i], stats)
    return place(stats, NamedSharding(self._mesh, REPLICATED))

  def _images(self, group):
    return self._normalise(self._put(group.split.images[group.rows]))

  def _put(self, array):
    """Gives row d of an array to device d."""
    return place(array, NamedSharding(self._mesh, spread(self._mesh)))


@partial(jax.jit, static_argnames='mesh')
def _fetch(
  mesh: Mesh, chain: PyTree, worker: np.int32, slot: np.int32
) -> PyTree:
  """Gives every device a copy of one block.

  Args:
    mesh: Where the workers live.
    chain: Pytree of `[S, K, ...]`.
    worker: Who holds the block.
    slot: In which slot.

  Returns:
    Pytree of `[D, 1, ...]`.
  """

  def local(chain, worker, slot):
    def take(x):
      row = worker - lax.axis_index(WORKER) * len(x)
      mine = (row >= 0) & (row < len(x))
      block = jnp.where(mine, x[jnp.clip(row, 0, len(x) - 1), slot], 0)
      return lax.psum(block, WORKER)[None, None]

    return jax.tree.map(take, chain)

  specs = (SHARDED, REPLICATED, REPLICATED)
  on_mesh = partial(jax.shard_map, mesh=mesh, check_vma=True)
  return on_mesh(local, in_specs=specs, out_specs=SHARDED)(chain, worker, slot)


@partial(jax.jit, static_argnames=('mesh', 'network', 'name'))
def _apply(
  mesh: Mesh,
  network: ResNet,
  name: str,
  params: PyTree,
  index: np.int32 | None,
  scale: np.float32,
  statistics: PyTree,
  x: PyTree,
) -> tuple[PyTree, PyTree]:
  """Applies one piece of the network to a batch on every device.

  Args:
    mesh: Where the workers live.
    network: Whose piece it is.
    name: Of the piece.
    params: Its parameters, equal in every row: `[S, ...]`, and for a chain
      `[S, L, ...]`; or `[D, ...]` and `[D, 1, ...]`.
    index: Which block of a chain; otherwise None.
    scale: Of the block's residual branch.
    statistics: Its collection `batch_stats`; empty: those of each batch.
    x: `[D, B, ...]`; for a `Branch`, a pair of these.

  Returns:
    `(y, measured)`: likewise, and batches' statistics `[D, C]` where used.
  """

  def local(params, index, scale, statistics, x):
    if index is not None:
      at = partial(lax.dynamic_index_in_dim, axis=1, keepdims=False)
      params = jax.tree.map(lambda p: at(p, index), params)
    params, x = jax.tree.map(lambda row: row[0], (params, x))
    piece = network.make_piece(name)
    is_block = isinstance(piece, Block | Branch)
    y, measured = piece.apply(
      {'params': params, 'batch_stats': statistics},
      *((x, scale) if is_block else (x,)),
      mutable=[] if statistics else ['batch_stats'],
    )
    results = (y[0] if is_block else y, measured.get('batch_stats', {}))
    return jax.tree.map(lambda row: row[None], results)

  specs = (SHARDED, REPLICATED, REPLICATED, REPLICATED, spread(mesh))
  on_mesh = partial(jax.shard_map, mesh=mesh, check_vma=True)
  on_devices = on_mesh(local, in_specs=specs, out_specs=spread(mesh))
  return on_devices(params, index, scale, statistics, x)


@jax.jit
def _hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Counts right classifications: `[D, B, n]`, `[D, B]` to `int32[D]`."""
  return (logits.argmax(axis=-1) == labels).sum(axis=-1)
