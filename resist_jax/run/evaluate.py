"""How good the global network is, with fixed statistics and as the paper tests.

Training keeps no running statistics of batch norm. A deployed network needs
fixed ones, so they are measured for the global network, at its residual scale,
over a sample of training images ("recalibrated"). The paper tests with the
statistics of each test batch instead.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from resist_jax import data
from resist_jax.decomposition import join
from resist_jax.exchange import WORKER
from resist_jax.models import ResNet
from resist_jax.rounds import State, mesh_sizes
from resist_jax.rounds.arrays import place, to_host
from resist_jax.rounds.mesh import (
  REPLICATED,
  SHARDED,
  compiler_options,
  spread,
)
from resist_jax.rounds.state import assignments_on_host, holders
from resist_jax.run.task import Evaluation

PyTree = Any

_AHEAD = 2  # Batches that wait on the devices for the one before them.


@dataclasses.dataclass(frozen=True)
class Batches:
  """One batch for each device, those of a group included.

  Attributes:
    name: The measurement that these batches count for.
    split: The set that they are taken from.
    rows: `int32[D * G, B]`, which examples; -1 fills up.
    fixed: Whether to use fixed statistics instead of those of each batch.
  """

  name: str
  split: data.Split
  rows: np.ndarray
  fixed: bool

  def images(self) -> np.ndarray:
    """Reads the images, `uint8[D * G, B, H, W, C]`."""
    return self.split.images[self.rows]

  def labels(self) -> np.ndarray:
    """Returns the labels, `int32[D * G, B]`; -1 where a row is filled up."""
    return np.where(self.rows < 0, -1, self.split.labels[self.rows])


class Results(NamedTuple):
  """What a network made of batches.

  Attributes:
    counts: For each `Batches`, `int32[D * G, 2]`, see `count`.
    measured: For each `Batches`, the collection `batch_stats` of its own
      statistics, `[D * G, ...]` on the host, where these were used.
    wire_bytes: What all devices together sent.
  """

  counts: list[jax.Array]
  measured: list[PyTree]
  wire_bytes: int


class Forward(Protocol):
  """Applies the global network that workers hold."""

  def gather(self, state: Any) -> tuple[Any, int]:
    """Returns what `apply` needs of a state, and the bytes sent for it."""
    ...

  def apply(
    self, batches: Sequence[Batches], gathered: Any, statistics: PyTree
  ) -> Results:
    """Applies the network.

    Args:
      batches: What to classify.
      gathered: See `gather`.
      statistics: The collection `batch_stats`, used where batches are `fixed`.

    Returns:
      The results.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Evaluates the global network on the sets of a data set.

  Attributes:
    forward: What applies the network.
    dataset: The sets to test on, and the training images.
    num_devices: D * G.
    batch_size: Images in a test batch, whose statistics the paper uses.
    statistics_images: Training images to measure fixed statistics over.
    fixed: Fixed statistics that were measured before; None to measure them.
  """

  forward: Forward
  dataset: data.Dataset
  num_devices: int
  batch_size: int
  statistics_images: int
  fixed: PyTree = None

  def statistics(self, state: State) -> dict[str, PyTree]:
    """Measures batch norm statistics over a sample of training images.

    Args:
      state: What the workers hold.

    Returns:
      The collection `batch_stats`, on the host: means over equal batches of
      each layer's mean and mean square, so the variance is that of the whole
      sample. Empty for a network without batch norm.
    """
    gathered, _ = self.forward.gather(state)
    return self._statistics(gathered)[0]

  def _statistics(self, gathered) -> tuple[dict[str, PyTree], int]:
    if self.fixed is not None:
      return self.fixed, 0
    train = self.dataset.train
    sample = train.take(data.sample(len(train), self.statistics_images))
    # Batches of equal size, so that their mean is the mean over all images.
    size = min(self.batch_size, len(sample))
    count = len(sample) // size
    # Sets may be sorted by class, and each batch is normalised by itself.
    order = data.mixed(len(sample))[: count * size]
    batches = self._batches('', sample, order, size)
    results = self.forward.apply(list(batches), gathered, {})

    def mean(*values):  # Batches that fill up the last row come last.
      return np.concatenate(values)[:count].mean(axis=0)

    return jax.tree.map(mean, *results.measured), results.wire_bytes

  def __call__(self, state: State | None) -> Evaluation:
    """Measures accuracies over whole sets.

    Args:
      state: What the workers hold; None if `forward` has its own network.

    Returns:
      The accuracies, and what they cost.
    """
    gathered, sent = self.forward.gather(state)
    statistics, more = self._statistics(gathered)
    tests = self.dataset.tests.items()
    batches = [b for test in tests for b in self._test_batches(*test)]
    results = self.forward.apply(batches, gathered, statistics)
    right, broken = collections.Counter(), collections.Counter()
    total = collections.Counter()
    for batch, found in zip(batches, to_host(results.counts), strict=True):
      right[batch.name] += int(found[:, 0].sum())
      broken[batch.name] += int(found[:, 1].sum())
      total[batch.name] += int((batch.rows >= 0).sum())
    accuracies = {name: right[name] / total[name] for name in total}
    # `+broken` has no zeros.
    return Evaluation(accuracies, +broken, sent + more + results.wire_bytes)

  def _test_batches(self, name: str, split: data.Split) -> Iterator[Batches]:
    size, numbers = self.batch_size, np.arange(len(split))
    # Under fixed statistics images are independent, so a last batch can be
    # filled up; under its own statistics it is a batch of another size.
    yield from self._batches(f'{name}_accuracy', split, numbers, size, True)
    paper, order = f'{name}_accuracy_paper', data.mixed(len(split))
    for part in np.split(order, [len(order) - len(order) % size]):
      if len(part):
        yield from self._batches(paper, split, part, min(size, len(part)))

  def _batches(self, name, split, numbers, size, fixed=False):
    """Cuts examples into batches of `size`, one for each device in a row."""
    short = -len(numbers) % (self.num_devices * size)
    rows = np.pad(numbers, (0, short), constant_values=-1)
    for row in rows.reshape(-1, self.num_devices, size):
      yield Batches(name, split, row, fixed)


def count(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Counts what a network makes of a batch.

  Args:
    logits: `[..., B, n]`.
    labels: `[..., B]`; -1 where a row is filled up.

  Returns:
    `int32[..., 2]`: images classified right, and images whose logits are not
    all finite, the largest of which says nothing.
  """
  right = logits.argmax(axis=-1) == labels
  broken = ~jnp.isfinite(logits).all(axis=-1) & (labels >= 0)
  found = jnp.stack([right, broken], axis=-1)
  return found.sum(axis=-2, dtype=jnp.int32)


class WholeNetwork:
  """Applies the network after gathering all of it on every device.

  Attributes:
    program: Maps the shared part, whole chains, statistics, images and labels
      to results; jitted.
  """

  def __init__(
    self,
    network: ResNet,
    dataset: data.Dataset,
    scales: Mapping[str, np.ndarray],
    mesh: Mesh,
  ):
    """Builds the program.

    Args:
      network: The global network.
      dataset: Its moments normalise images.
      scales: Residual scale of each chain that ResIST cuts, `float32[L]`.
      mesh: Where the workers live.
    """
    self._mesh = mesh
    mean, std = dataset.mean, dataset.std

    def local(shared, chain, statistics, images, labels):
      params = join(jax.tree.map(lambda x: x[0], shared), chain)
      logits, measured = network.apply(
        {'params': params, 'batch_stats': statistics},
        data.normalise(images[0], mean, std),
        scales,
        mutable=[] if statistics else ['batch_stats'],
      )
      found = count(logits, labels[0])
      collection = measured.get('batch_stats', {})
      return jax.tree.map(lambda x: x[None], (found, collection))

    rows = spread(mesh)
    self.program = jax.jit(
      jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(SHARDED, REPLICATED, REPLICATED, rows, rows),
        out_specs=rows,
        check_vma=True,
      ),
      compiler_options=compiler_options(mesh),
    )

  def gather(self, state: State) -> tuple[Any, int]:
    """Gives every device all chains; see `Forward`."""
    return gather_network(self._mesh, state)

  def apply(
    self, batches: Sequence[Batches], gathered: Any, statistics: PyTree
  ) -> Results:
    """Applies the network; see `Forward`."""
    by_row = NamedSharding(self._mesh, spread(self._mesh))
    fixed = place(statistics, NamedSharding(self._mesh, REPLICATED))
    counts, measured = [], []
    for b, batch in enumerate(batches):
      images, labels = place((batch.images(), batch.labels()), by_row)
      used = fixed if batch.fixed else {}
      if b >= _AHEAD:
        counts[b - _AHEAD].block_until_ready()
      found, own = self.program(*gathered, used, images, labels)
      counts.append(found)
      measured.append(own)
    return Results(counts, [to_host(own) for own in measured], 0)


def gather_network(mesh: Mesh, state: State) -> tuple[Any, int]:
  """Gives every device all chains.

  Args:
    mesh: Where the workers live.
    state: What they hold.

  Returns:
    `((shared, chain), wire_bytes)`: the shared part of each worker, the blocks
    of each chain, and what all devices together sent.
  """
  D, G = mesh_sizes(mesh)
  assignments = assignments_on_host(state)
  chain, sent = {}, 0
  for name, blocks in state.chain.items():
    where = holders(assignments[name].slots, int(state.num_blocks[name]))
    chain[name] = gather_blocks(mesh, blocks, *where)
    size = sum(x.nbytes for x in jax.tree.leaves(chain[name]))
    sent += 2 * (D - 1) * G * size
  return (state.shared, chain), sent


@partial(jax.jit, static_argnames='mesh')
def gather_blocks(
  mesh: Mesh, blocks: PyTree, worker: np.ndarray, slot: np.ndarray
) -> PyTree:
  """Gives every device all blocks of a chain.

  Args:
    mesh: Where the workers live.
    blocks: Pytree of `[S, K, ...]`.
    worker: `int32[L]`, a holder of each block.
    slot: `int32[L]`, its slot there.

  Returns:
    Pytree of `[L, ...]`.
  """

  def local(blocks, worker, slot):
    def gather(x):
      row = worker - lax.axis_index(WORKER) * len(x)
      mine = (row >= 0) & (row < len(x))
      held = x[jnp.clip(row, 0, len(x) - 1), slot]
      shape = (-1,) + (1,) * (held.ndim - 1)
      return lax.psum(jnp.where(mine.reshape(shape), held, 0), WORKER)

    return jax.tree.map(gather, blocks)

  on_mesh = partial(jax.shard_map, mesh=mesh, check_vma=True)
  specs = (SHARDED, REPLICATED, REPLICATED)
  return on_mesh(local, in_specs=specs, out_specs=REPLICATED)(
    blocks, worker, slot
  )
