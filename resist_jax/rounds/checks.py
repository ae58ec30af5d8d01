"""Mistakes in parameters, batches and losses, each told in one line.

All of them are found from shapes, before anything is compiled.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import inspect
import threading
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from resist_jax.decomposition import Assignment, join, split
from resist_jax.errors import did_you_mean, message
from resist_jax.rounds.arrays import kind_of
from resist_jax.rounds.local_training import LossFn
from resist_jax.rounds.mesh import shapes_on
from resist_jax.rounds.nodes import names_of_leaves

PyTree = Any

_CHECKING = threading.RLock()  # An option of JAX is that of all threads.

# Names of metrics that a round adds to those of the loss function.
TAKEN = ('loss', 'finite', 'healthy', 'update_norm', 'seconds_local')


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
    ValueError: If it does not take what it is called with, asks for a chain
      that is not cut, or does not return `(loss, metrics)`.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(constants):
    if not _is_numeric(leaf):
      where = jax.tree_util.keystr(path)
      raise ValueError(
        f'constants{where} is {type(leaf).__name__}; constants must be arrays '
        'of numbers. Let loss_fn close over other values.'
      )
  _check_signature(loss_fn, constants is not None, give_agreed)
  names: list[str] = []
  present = {
    name: jax.ShapeDtypeStruct(
      jax.tree.leaves(blocks)[0].shape[:1], jnp.float32
    )
    for name, blocks in chain.items()
  }
  extra = () if constants is None else (constants,)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def called(params, *args):
    named = {'agreed': params} if give_agreed else {}
    try:
      found = loss_fn(params, *args, **named)
    except KeyError as error:
      _explain_key(error, params, chain)
      raise
    names.extend(returned_metrics(found))
    loss, metrics = found
    return loss, {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

  params = join(shared, chain)
  with blocks_in_bounds() if chain else contextlib.nullcontext():
    shapes_on(mesh, called, params, present, batch, key, *extra)
  return tuple(names)


@contextlib.contextmanager
def blocks_in_bounds() -> Iterator[None]:
  """Refuses a loss that takes block 7 of a worker with two of them.

  JAX would give it the last one, and so train another network.

  Raises:
    ValueError: If the loss, traced in here, takes what is not there.
  """
  name = 'jax_check_static_indices'
  with _CHECKING:
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
      yield
    except IndexError as error:
      if 'out of bounds for axis' not in str(error):  # Another mistake.
        raise
      raise ValueError(
        'the loss takes what is not there, such as a block that a worker does '
        f'not hold ({message(error)}): loop over the len(present[NAME]) blocks '
        'that it gets, not over all.'
      ) from error
    finally:
      jax.config.update(name, before)


def _check_signature(
  loss_fn: LossFn, constants: bool, give_agreed: bool
) -> None:
  """Refuses a loss that cannot be called as it will be."""
  given = ['params', 'present', 'batch', 'key', *['constants'] * constants]
  try:
    signature = inspect.signature(loss_fn)
  except ValueError:  # Some callables do not say what they take.
    return
  try:
    signature.bind(*given, **{'agreed': ''} if give_agreed else {})
  except TypeError as error:
    advice = 'let it take these.'
    if constants:
      advice = 'let it take these, or leave constants out.'
    if give_agreed:
      given.append('agreed=')
      advice = 'let it take these, or leave give_agreed out.'
    raise ValueError(
      f'loss_fn{signature} cannot be called with ({", ".join(given)}), '
      f'{error}: {advice}'
    ) from error


def _explain_key(error: KeyError, params: PyTree, chain: PyTree) -> None:
  """Raises a ValueError if a loss looks for a chain that is not cut."""
  key = error.args[0] if error.args else None
  if key in set(_paths(params)) and key not in chain:
    raise ValueError(
      f'loss_fn looks up {key!r}, which is not in chains '
      f'({", ".join(map(repr, chain)) or "empty"}): add it to chains, or write '
      f'present.get({key!r}, 1) in loss_fn.'
    ) from error


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
  if not _is_scalar(loss) or not jnp.issubdtype(
    jnp.result_type(loss), jnp.floating
  ):
    raise ValueError(
      f'the loss that loss_fn returns is {kind_of(loss)}; it must be a '
      'floating scalar: take the mean over the batch.'
    )
  if not isinstance(metrics, Mapping):
    raise ValueError(
      f'the metrics that loss_fn returns are a {type(metrics).__name__}; they '
      'must be a dictionary of scalars, {} for none.'
    )
  for name, value in metrics.items():
    if not isinstance(name, str):
      raise ValueError(
        f'loss_fn returns a metric named {name!r}; names must be strings.'
      )
    if not _is_scalar(value):
      raise ValueError(
        f'the metric {name!r} that loss_fn returns is {kind_of(value)}; it '
        'must be a scalar: take its mean.'
      )
    if not _is_kind(jnp.result_type(value), *_REAL):
      raise ValueError(
        f'the metric {name!r} that loss_fn returns is {kind_of(value)}; it '
        'must be a real number, such as an absolute value.'
      )
    if name in TAKEN:
      raise ValueError(
        f'loss_fn returns a metric {name!r}, a name that rounds use: rename it.'
      )
  return tuple(metrics)


_WIDEST = {'f': 8, 'c': 16}  # Bytes of a number; NumPy has wider ones.
_REAL = jnp.floating, jnp.integer, jnp.bool_


def _is_scalar(value: Any) -> bool:
  return _is_numeric(value) and getattr(value, 'shape', ()) == ()


def _is_numeric(value: Any) -> bool:
  if isinstance(value, bool | int | float):
    return True
  dtype = getattr(value, 'dtype', None)
  if dtype is None:
    return False
  return _is_kind(dtype, jnp.number, jnp.bool_, jax.dtypes.extended)


def _is_kind(dtype: Any, *kinds: Any) -> bool:
  if isinstance(dtype, np.dtype):  # JAX has not all of NumPy's.
    widest = _WIDEST.get(dtype.kind, dtype.itemsize)
    if not dtype.isnative or dtype.itemsize > widest:
      return False
  try:
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)
  except TypeError:  # That of another library.
    return False


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
    if dtype is None or not _is_kind(dtype, jnp.floating):
      where = jax.tree_util.keystr(path)
      raise ValueError(
        f'params{where} is {dtype or type(leaf).__name__}; parameters must be '
        'arrays of floating-point numbers, of NumPy or JAX, with a dtype that '
        'JAX has, such as float32. Pass other values as constants.'
      )
    if 0 in leaf.shape:
      where = jax.tree_util.keystr(path)
      raise ValueError(
        f'params{where} has the shape {leaf.shape}, and so no numbers: leave '
        'it out.'
      )
  _check_names(params)
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


def _check_names(params: PyTree) -> None:
  """Refuses leaves that would have one name in files."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  for separator in './':  # orbax joins keys by dots, and we by slashes.
    known: dict[str, Any] = {}
    for path in paths:
      name = jax.tree_util.keystr(path, simple=True, separator=separator)
      other = known.setdefault(name, path)
      if other != path:
        one, two = map(jax.tree_util.keystr, (other, path))
        raise ValueError(
          f'params{one} and params{two} are both called {name} in saved files: '
          'rename one.'
        )


def _chain_at(params: Mapping[str, PyTree], name: str) -> PyTree:
  try:
    return split(params, [name])[1][name]
  except KeyError:
    pass
  if any(f'{path}/'.startswith(f'{name}/') for path in names_of_leaves(params)):
    raise ValueError(
      f'chains names {name!r}, but a name is made of the keys of dictionaries: '
      'no places in lists or fields of tuples, no key that holds a /, and the '
      'last key is text. Rearrange params.'
    )
  names = list(_paths(params))
  hint = did_you_mean(name, names, "'{}'")
  raise ValueError(
    f'chains names {name!r}, which params does not hold. {hint}It holds '
    f'{", ".join(names) or "nothing"}.'
  )


def _paths(params: Mapping[str, PyTree], prefix: str = '') -> Iterator[str]:
  """Yields the names that `split` understands."""
  for key, value in params.items():
    if isinstance(key, str):
      yield f'{prefix}{key}'
    if isinstance(value, Mapping):
      yield from _paths(value, f'{prefix}{key}/')


def check_batch(
  batch: PyTree, num_workers: int, local_steps: int | None, group_size: int = 1
) -> None:
  """Refuses batches of other leading sizes.

  Args:
    batch: Pytree of arrays or shapes.
    num_workers: S, or the workers of this process.
    local_steps: T; None where a batch is one step of an iterator.
    group_size: G, the devices of a worker, which divide B between them.

  Raises:
    ValueError: If the leaves hold no numbers, or do not lead with S, and T
      where it is given, or if the devices of a worker cannot divide B.
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
    after = np.shape(x)[len(want) :]
    if group_size > 1 and (not after or after[0] % group_size):
      where = jax.tree_util.keystr(path)
      raise ValueError(
        f'batches{where} has the shape {np.shape(x)}; axis {len(want)}, the '
        f'batch B, must be a multiple of {group_size}, the devices of each '
        'worker.'
      )
    if not _is_numeric(x):
      where = jax.tree_util.keystr(path)
      raise ValueError(
        f'batches{where} holds {getattr(x, "dtype", type(x).__name__)}; it '
        'must be an array of numbers, of NumPy or JAX, with a dtype that JAX '
        'has, such as float32.'
      )


def check_min_depth(min_depth: Any, chains: Sequence[str]) -> None:
  """Refuses depths by chain that leave a chain out.

  Args:
    min_depth: A number for all chains, or by name.
    chains: The names of the chains.

  Raises:
    ValueError: If a name is missing.
  """
  if isinstance(min_depth, Mapping) and not set(min_depth) >= set(chains):
    raise ValueError(
      f'min_depth names {", ".join(map(repr, min_depth)) or "nothing"}, and '
      f'chains names {", ".join(map(repr, chains)) or "nothing"}: give each '
      'chain a number, or one number for all.'
    )


def check_assignments(assignments: Any, chains: Sequence[str]) -> None:
  """Refuses what does not assign the blocks of each chain.

  Args:
    assignments: The assignment of each chain, or None.
    chains: The names of the chains.

  Raises:
    ValueError: If it is something else.
  """
  if assignments is None:
    return
  if not isinstance(assignments, Mapping) or set(assignments) != set(chains):
    given = assignments
    if isinstance(assignments, Mapping):
      given = ', '.join(map(repr, assignments)) or 'nothing'
    raise ValueError(
      f'assignments names {given}; it must have an Assignment for each of the '
      f'chains {", ".join(map(repr, chains)) or "(none)"}, or be None.'
    )
  for name, assignment in assignments.items():
    if not isinstance(assignment, Assignment):
      raise ValueError(
        f'assignments[{name!r}] is a {type(assignment).__name__}; it must be a '
        'decomposition.Assignment.'
      )
