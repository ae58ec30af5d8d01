"""Mistakes in parameters, batches and losses, each told in one line.

All of them are found from shapes, before anything is compiled.
"""

from collections.abc import Iterator, Mapping, Sequence
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from resist_jax.decomposition import join, split
from resist_jax.errors import did_you_mean
from resist_jax.rounds.local_training import LossFn

PyTree = Any

# Names of metrics that a round adds to those of the loss function.
TAKEN = ('loss', 'finite', 'healthy', 'seconds_local')


def metric_names(
  loss_fn: LossFn,
  shared: PyTree,
  chain: Mapping[str, PyTree],
  batch: PyTree,
  constants: PyTree,
  mesh: Mesh,
  give_agreed: bool = False,
) -> tuple[str, ...]:
  """Calls a loss function on shapes and checks what it returns.

  Args:
    loss_fn: See `LossFn`.
    shared: Shapes of one worker's shared part.
    chain: Shapes `[K, ...]` of one worker's blocks, by chain.
    batch: Shapes of what one worker gets in one step.
    constants: Its fifth argument; None for none.
    mesh: Where the workers live; the loss function may name its axes.
    give_agreed: See `Protocol`.

  Returns:
    Names of its metrics.

  Raises:
    ValueError: If it does not take `agreed` where it is given, or does not
      return `(loss, metrics)`.
  """
  if give_agreed:
    _check_takes_agreed(loss_fn)
  present = {
    name: jax.ShapeDtypeStruct(
      jax.tree.leaves(blocks)[0].shape[:1], jnp.float32
    )
    for name, blocks in chain.items()
  }
  extra = () if constants is None else (constants,)
  key = jax.eval_shape(lambda: jax.random.key(0))
  everywhere = PartitionSpec()

  def called(params, *args):
    named = {'agreed': params} if give_agreed else {}
    return loss_fn(params, *args, **named)

  on_mesh = jax.shard_map(
    called,
    mesh=mesh,
    in_specs=everywhere,
    out_specs=everywhere,
    check_vma=False,
  )
  return returned_metrics(
    jax.eval_shape(on_mesh, join(shared, chain), present, batch, key, *extra)
  )


def _check_takes_agreed(loss_fn: LossFn) -> None:
  try:
    taken = inspect.signature(loss_fn).parameters.values()
  except ValueError:  # Some callables do not say what they take.
    return
  if not any(x.name == 'agreed' or x.kind is x.VAR_KEYWORD for x in taken):
    raise ValueError(
      'give_agreed is set, but loss_fn takes no argument named agreed: add it, '
      'or leave give_agreed out.'
    )


def returned_metrics(found: Any) -> tuple[str, ...]:
  """Checks what a loss function has returned.

  Args:
    found: That, or its shapes.

  Returns:
    Names of its metrics.

  Raises:
    ValueError: If it is not `(loss, metrics)`.
  """
  if not (isinstance(found, tuple) and len(found) == 2):
    raise ValueError(
      f'loss_fn returns {type(found).__name__}; it must return the pair (loss, '
      'metrics), where metrics is a dictionary of scalars, {} for none.'
    )
  loss, metrics = found
  if getattr(loss, 'shape', None) != () or not jnp.issubdtype(
    loss.dtype, jnp.floating
  ):
    raise ValueError(
      f'the loss that loss_fn returns is {loss}; it must be a floating-point '
      'scalar: take the mean over the batch.'
    )
  if not isinstance(metrics, Mapping):
    raise ValueError(
      f'the metrics that loss_fn returns are a {type(metrics).__name__}; they '
      'must be a dictionary of scalars, {} for none.'
    )
  for name, value in metrics.items():
    if getattr(value, 'shape', None) != ():
      raise ValueError(
        f'the metric {name!r} that loss_fn returns is {value}; it must be a '
        'scalar: take its mean.'
      )
    if name in TAKEN:
      raise ValueError(
        f'loss_fn returns a metric {name!r}, a name that rounds use: rename it.'
      )
  return tuple(metrics)


def chain_lengths(
  params: Mapping[str, PyTree], chains: Sequence[str]
) -> dict[str, int]:
  """Returns the lengths of chains, after checking the parameters.

  Args:
    params: Global parameters by name, or their shapes.
    chains: Names of chains, see `decomposition.split`.

  Returns:
    L by name.

  Raises:
    ValueError: If parameters are no floating-point arrays, or if a chain is
      missing or does not stack its blocks.
  """
  if not isinstance(params, Mapping):
    raise ValueError(
      f'params is a {type(params).__name__}; it must be a dictionary by name.'
    )
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    dtype = getattr(leaf, 'dtype', None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
      where = jax.tree_util.keystr(path)
      raise ValueError(
        f'params{where} is {dtype or type(leaf).__name__}; parameters must be '
        'arrays of floating-point numbers. Pass other values as constants.'
      )
  lengths: dict[str, Any] = {}
  for name in chains:
    blocks = _chain_at(params, name)
    leaves = jax.tree_util.tree_leaves_with_path(blocks)
    sizes = {
      jax.tree_util.keystr(path): x.shape[0] if x.shape else None
      for path, x in leaves
    }
    if not sizes or None in sizes.values() or len(set(sizes.values())) > 1:
      found = ', '.join(f'{k or "itself"}: {n}' for k, n in sizes.items())
      raise ValueError(
        f'the leaves of chain {name!r} have the leading sizes {found or "-"}; '
        'each must stack the same number of blocks on its first axis.'
      )
    (lengths[name],) = set(sizes.values())
  return lengths


def _chain_at(params: Mapping[str, PyTree], name: str) -> PyTree:
  try:
    return split(params, [name])[1][name]
  except (KeyError, TypeError, AttributeError):
    pass
  names = list(_paths(params))
  hint = did_you_mean(name, names, "'{}'")
  raise ValueError(
    f'chains names {name!r}, which params does not hold. {hint}It holds '
    f'{", ".join(names) or "nothing"}.'
  )


def _paths(params: Mapping[str, PyTree], prefix: str = '') -> Iterator[str]:
  """Yields the names that `split` understands."""
  for key, value in params.items():
    yield f'{prefix}{key}'
    if isinstance(value, Mapping):
      yield from _paths(value, f'{prefix}{key}/')


def check_batch(
  batch: PyTree, num_workers: int, local_steps: int | None
) -> None:
  """Refuses batches of other leading sizes.

  Args:
    batch: Pytree of arrays or shapes.
    num_workers: S, or the workers of this process.
    local_steps: T; None where a batch is one step of an iterator.

  Raises:
    ValueError: If the leaves do not lead with S, and T where it is given.
  """
  S, T = num_workers, local_steps
  want = (S,) if T is None else (S, T)
  shape = f'[S={S}, ...]' if T is None else f'[S={S}, T={T}, ...]'
  leaves = jax.tree_util.tree_leaves_with_path(batch)
  if not leaves:
    raise ValueError(f'batches hold no array; they must be {shape}.')
  for path, x in leaves:
    if tuple(np.shape(x)[: len(want)]) != want:
      where = jax.tree_util.keystr(path)
      raise ValueError(
        f'batches{where} has the shape {np.shape(x)}; it must be {shape}. Give '
        'one pytree [S, T, ...] or an iterator of T pytrees [S, ...].'
      )
