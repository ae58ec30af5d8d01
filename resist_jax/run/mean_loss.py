"""How good a network of somebody else's is: its mean loss on the test sets."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from resist_jax.decomposition import join, split
from resist_jax.rounds import State
from resist_jax.rounds.arrays import place, to_host
from resist_jax.rounds.mesh import (
  REPLICATED,
  SHARDED,
  compiler_options,
  spread,
)
from resist_jax.run.evaluate import gather_network
from resist_jax.run.task import Evaluation

PyTree = Any


def _as_row(number: Any) -> jax.Array:
  """Returns `[1]` in at least float32, which all processes can gather."""
  number = jnp.asarray(number)
  wide = number.dtype if number.dtype == jnp.float64 else jnp.float32
  return number.astype(wide)[None]


class MeanLoss:
  """Tests the global network by its loss function."""

  def __init__(
    self,
    loss_fn: Callable,
    read: Callable[[str, np.ndarray], PyTree],
    rows: Mapping[str, np.ndarray],
    scales: Mapping[str, Any],
    mesh: Mesh,
    batch_size: int,
  ):
    """Builds the program.

    Args:
      loss_fn: `loss_fn(params, batch, scales) -> (loss, metrics)`, means over a
        batch; see `ModuleTask.test_loss`.
      read: Reads rows of a set, see `ModuleTask.examples`.
      rows: Which examples of each set to test on, `int[n]` by its name.
      scales: Residual scale of each chain that ResIST cuts, `float32[L]`.
      mesh: Where the workers live.
      batch_size: Examples in a batch.
    """
    self._read, self._rows, self._scales = read, rows, scales
    self._mesh, self._batch_size = mesh, batch_size

    def local(shared, chain, scales, batch):
      params = join(jax.tree.map(lambda x: x[0], shared), chain)
      batch = jax.tree.map(lambda x: x[0], batch)
      loss, metrics = loss_fn(params, batch, scales)
      return jax.tree.map(_as_row, {'loss': loss, **metrics})

    rows_of_devices = spread(mesh)
    self._apply = jax.jit(
      jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(SHARDED, REPLICATED, REPLICATED, rows_of_devices),
        out_specs=rows_of_devices,
        check_vma=False,  # A loss may begin a loop with a constant.
      ),
      compiler_options=compiler_options(mesh),
    )

  def __call__(self, state: State) -> Evaluation:
    """Measures means over whole sets.

    Args:
      state: What the workers hold.

    Returns:
      For each set `NAME_loss`, `NAME_perplexity` (the exponential of the loss),
      and a mean of each metric.
    """
    gathered, sent = gather_network(self._mesh, state)
    measured = self._measured(gathered, self._scales)
    return measured._replace(wire_bytes=sent)

  def of_params(
    self,
    params: Mapping[str, PyTree],
    chains: Sequence[str],
    scales: Mapping[str, Any],
  ) -> Evaluation:
    """Measures the same of global parameters, on a mesh of one device.

    Args:
      params: Global parameters, on the host.
      chains: Names of the chains to which scales belong.
      scales: Residual scale of each block, `float32[L]` by chain.
    """
    shared, chain = split(params, chains)
    one_row = jax.tree.map(lambda x: np.asarray(x)[None], shared)
    return self._measured((one_row, chain), scales)

  def _measured(self, gathered, scales: Mapping[str, Any]) -> Evaluation:
    everywhere = NamedSharding(self._mesh, REPLICATED)
    fixed = (*gathered, place(dict(scales), everywhere))
    measures, broken = {}, {}
    for name, rows in self._rows.items():
      sums, bad = self._sums(name, rows, fixed)
      if bad:
        broken[f'{name}_loss'] = bad
      means = {key: float(value) / len(rows) for key, value in sums.items()}
      large = means['loss'] > 700  # The exponential of more overflows.
      means['perplexity'] = math.inf if large else math.exp(means['loss'])
      measures |= {f'{name}_{key}': value for key, value in means.items()}
    return Evaluation(measures, broken, 0)

  def _sums(self, name: str, chosen: np.ndarray, fixed) -> tuple[dict, int]:
    """Returns sums over a set, and how many examples have a loss of NaN."""
    by_row = NamedSharding(self._mesh, spread(self._mesh))
    sums: dict[str, np.ndarray] = {}
    bad, waiting = 0, []

    def finish(found, weights):
      nonlocal bad
      found = to_host(found)
      bad += int((weights * ~np.isfinite(found['loss'])).sum())
      for key, value in found.items():
        # A row that is filled up repeats an example, and does not count.
        counted = np.where(weights > 0, value.astype(np.float64) * weights, 0)
        sums[key] = sums.get(key, 0.0) + counted.sum()

    devices, size = self._mesh.size, self._batch_size
    for rows, weights in batches(len(chosen), devices, size):
      batch = place(self._read(name, chosen[rows]), by_row)
      waiting.append((self._apply(*fixed, batch), weights))
      if len(waiting) > 2:  # The next one is read while a device computes.
        finish(*waiting.pop(0))
    for found, weights in waiting:
      finish(found, weights)
    return sums, bad


def batches(
  size: int, devices: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Spreads a set over devices, in batches whose examples all count.

  Args:
    size: Examples in the set.
    devices: Devices that compute side by side.
    batch_size: Examples in a batch, at most.

  Yields:
    `(rows, weights)`: `int[devices, B]`, which examples, and `int[devices]`,
    how many of a row count: B, or 0 where a row is filled up.

  >>> [(rows.tolist(), weights.tolist()) for rows, weights in batches(7, 2, 2)]
  [([[0, 1], [2, 3]], [2, 2]), ([[4], [5]], [1, 1]), ([[6], [6]], [1, 0])]
  """
  first = 0
  while first < size:
    b = min(batch_size, max((size - first) // devices, 1))
    rows = first + np.arange(devices * b).reshape(devices, b)
    weights = np.where(rows[:, -1] < size, b, 0)
    yield np.minimum(rows, size - 1), weights
    first += devices * b
