"""Evaluation for chains that fit on no device, block by block.

Batches wait on the devices while blocks come by, one at a time, from the
workers that hold them; each kind of block is a small program.
"""

from collections.abc import Mapping, Sequence
from functools import partial
import itertools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from resist_jax import data
from resist_jax.exchange import WORKER
from resist_jax.models import ResNet
from resist_jax.models.blocks import output_of
from resist_jax.rounds import State, mesh_sizes
from resist_jax.rounds.arrays import place, to_host
from resist_jax.rounds.mesh import REPLICATED, SHARDED, spread
from resist_jax.rounds.state import assignments_on_host
from resist_jax.run.evaluate import Batches, Results, count

PyTree = Any
_ONE = np.float32(1)


class BlockWalk:
  """Applies the network piece by piece; no device holds a chain that is cut."""

  def __init__(
    self,
    network: ResNet,
    dataset: data.Dataset,
    scales: Mapping[str, np.ndarray],
    mesh: Mesh,
    batches_at_once: int,
  ):
    """Prepares the walk.

    Args:
      network: The global network.
      dataset: Its moments normalise images.
      scales: Residual scale of each chain that ResIST cuts, `float32[L]`.
      mesh: Where the workers live.
      batches_at_once: How many batches may wait on a device for a block; for
        more, the blocks come by again.
    """
    self._network, self._mesh = network, mesh
    self._scales = jax.tree.map(np.asarray, dict(scales))
    self._batches_at_once = batches_at_once
    normalise = partial(data.normalise, mean=dataset.mean, std=dataset.std)
    self._normalise = jax.jit(jax.vmap(normalise))

  def gather(self, state: State) -> tuple[Any, int]:
    """Returns the state as it is; see `evaluate.Forward`."""
    return state, 0

  def apply(
    self, batches: Sequence[Batches], gathered: Any, statistics: PyTree
  ) -> Results:
    """Applies the network; see `evaluate.Forward`."""
    counts, measured, sent = [], [], 0
    for start in range(0, len(batches), self._batches_at_once):
      part = batches[start : start + self._batches_at_once]
      counted, own, bytes_sent = self._walk(part, gathered, statistics)
      counts += counted
      measured += [self._collection(found) for found in own]
      sent += bytes_sent
    return Results(counts, measured, sent)

  def _walk(self, batches, state, statistics):
    """Takes batches through the network, without waiting for results.

    Returns:
      For each of the batches, its `evaluate.count`, and by piece its
      statistics, `[D, C]`; none where they are fixed. Then the bytes sent.
    """
    chain, sent = state.chain, 0
    pieces = self._network.pieces()
    fixed = {piece: self._fixed(statistics, piece) for piece in pieces}
    measured: list[dict] = [{} for _ in batches]
    waiting: list[Any] = [None] * len(batches)
    # All batches pass through what every device has, one after another; a block
    # that has to be fetched is used by all of them before it is dropped.
    runs = itertools.groupby(pieces, lambda p: p if p[0] in chain else None)
    for cut, part in runs:
      run, params = list(part), state.shared  # Drops the block before.
      if cut is not None:
        params, bytes_sent = self._fetch(state, cut, waiting)
        sent += bytes_sent
      for b, batch in enumerate(batches):
        x = waiting[b]
        if x is None:
          x = self._normalise(self._put(batch.images()))
        for name, i in run:
          index = None if i is None else np.int32(0 if cut else i)
          scale = self._scales[name][i] if name in self._scales else _ONE
          stats = fixed[name, i] if batch.fixed else {}
          weights = (params[name], index, scale, stats)
          x, found = apply_piece(self._mesh, self._network, name, *weights, x)
          measured[b][name, i] = found
        waiting[b] = x
    counts = [
      _count(logits, self._put(batch.labels()))
      for batch, logits in zip(batches, waiting, strict=True)
    ]
    return counts, measured, sent

  def _collection(self, measured: Mapping[tuple[str, int | None], PyTree]):
    """Brings the statistics of all pieces to the host, chains stacked."""
    measured = to_host(dict(measured))
    collection = {}
    for name, pieces in itertools.groupby(measured, lambda piece: piece[0]):
      found = [measured[piece] for piece in pieces]
      stats = found[0]
      if (name, None) not in measured:
        stats = jax.tree.map(lambda *x: np.stack(x, axis=1), *found)
      if stats:
        collection[name] = stats
    return collection

  def _fetch(self, state, piece, waiting):
    """Brings a block to every device, `{name: [D, 1, ...]}`; counts bytes."""
    if self._mesh.devices.flat[0].platform == 'cpu':
      # XLA's CPU collectives abort the process when a device comes 40 seconds
      # late: no device may have batches to compute before this.
      jax.block_until_ready(waiting)
    (D, G), (name, i) = mesh_sizes(self._mesh), piece
    slots = assignments_on_host(state)[name].slots
    worker, slot = np.argwhere(slots == i)[0].astype(np.int32)
    block = fetch_block(self._mesh, state.chain[name], worker, slot)
    copies = sum(x.nbytes for x in jax.tree.leaves(block))  # D of them.
    return {name: block}, 2 * (D - 1) * copies // D * G

  def _fixed(self, statistics, piece):
    """Places the statistics of one piece on every device."""
    name, i = piece
    stats = statistics.get(name, {})
    if i is not None:
      stats = jax.tree.map(lambda x: x[i], stats)
    return place(stats, NamedSharding(self._mesh, REPLICATED))

  def _put(self, array):
    """Gives row d of an array to device d."""
    return place(array, NamedSharding(self._mesh, spread(self._mesh)))


@partial(jax.jit, static_argnames='mesh')
def fetch_block(
  mesh: Mesh, chain: PyTree, worker: np.int32, slot: np.int32
) -> PyTree:
  """Gives every device a copy of one block.

  Args:
    mesh: Where the workers live.
    chain: Pytree of `[S, K, ...]`.
    worker: The worker that holds the block.
    slot: Its slot there.

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
def apply_piece(
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
    network: The network that the piece belongs to.
    name: Name of the piece.
    params: Its parameters, equal in every row: `[S, ...]`, and for a chain
      `[S, L, ...]`; or `[D, ...]` and `[D, 1, ...]`.
    index: Which block of a chain; otherwise None.
    scale: Scale of the block's residual branch.
    statistics: Its collection `batch_stats`; empty for those of each batch.
    x: `[D, B, ...]`; for a `Branch`, a pair of these.

  Returns:
    `(y, measured)`: the output of the piece, shaped as `x`, and the statistics
    `[D, C]` of the batches where they are used.
  """

  def local(params, index, scale, statistics, x):
    if index is not None:
      at = partial(lax.dynamic_index_in_dim, axis=1, keepdims=False)
      params = jax.tree.map(lambda p: at(p, index), params)
    params, x = jax.tree.map(lambda row: row[0], (params, x))
    piece = network.make_piece(name)
    y, measured = piece.apply(
      {'params': params, 'batch_stats': statistics},
      x,
      scale,
      method=output_of,
      mutable=[] if statistics else ['batch_stats'],
    )
    results = (y, measured.get('batch_stats', {}))
    return jax.tree.map(lambda row: row[None], results)

  specs = (SHARDED, REPLICATED, REPLICATED, REPLICATED, spread(mesh))
  on_mesh = partial(jax.shard_map, mesh=mesh, check_vma=True)
  on_devices = on_mesh(local, in_specs=specs, out_specs=spread(mesh))
  return on_devices(params, index, scale, statistics, x)


_count = jax.jit(count)  # `[D, B, n]`, `[D, B]` to `int32[D, 2]`.
