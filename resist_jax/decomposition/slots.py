"""Slots say which blocks a worker runs; cutting and averaging follow them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resist_jax.errors import is_whole

PyTree = Any


class Division(NamedTuple):
  """How a chain is divided among workers.

  Attributes:
    num_blocks: L, the length of the chain.
    num_workers: S.
    min_depth: See `slots_per_worker`.
    depths: See `slots_per_worker`.
  """

  num_blocks: int
  num_workers: int
  min_depth: int | None = 0
  depths: tuple[int, ...] = ()


def slots_per_worker(
  num_blocks: int,
  num_workers: int,
  min_depth: int | None = 0,
  depths: Sequence[int] = (),
) -> int:
  """Returns K, the static number of slots that every worker gets.

  Args:
    num_blocks: L, the length of the chain.
    num_workers: S.
    min_depth: The least number of blocks that a worker runs. 0 means what an
      even division gives it, at least one; None allows a worker to run none.
    depths: The number of blocks of each worker, where workers are unequal;
      empty for an even division.

  Returns:
    `max(ceil(L / S), min_depth)`, or the largest of the depths.

  Raises:
    ValueError: If a worker would run no block although it must, or more blocks
      than exist, if a block would have no worker, or if a number is no whole
      one.

  >>> slots_per_worker(22, 4), slots_per_worker(22, 8, min_depth=4)
  (6, 4)
  """
  given = ('num_blocks', num_blocks), ('num_workers', num_workers)
  least = () if min_depth is None else (('min_depth', min_depth),)
  each = [('each of depths', depth) for depth in depths]
  for name, value in (*given, *least, *each):
    if not is_whole(value):
      raise ValueError(f'{name} is {value!r}; it must be a whole number.')
  if num_blocks < 0:
    raise ValueError(f'num_blocks is {num_blocks}; it must be at least 0.')
  if num_workers < 1:
    raise ValueError(f'num_workers is {num_workers}; it must be at least 1.')
  if len(depths):
    _check_depths(num_blocks, num_workers, min_depth, depths)
    return int(max(depths))
  if min_depth is None:
    return -(-num_blocks // num_workers)
  if not 0 <= min_depth <= num_blocks:
    allowed = f'a chain of {num_blocks} blocks allows 0 to {num_blocks}'
    raise ValueError(f'min_depth is {min_depth}; {allowed}.')
  if num_workers > num_blocks and min_depth == 0:
    remedy = (
      f'Use at most {num_blocks} workers, or min_depth >= 1 with the '
      'exchange masked_psum, so that workers share blocks.'
    )
    raise ValueError(
      f'{num_workers} workers cannot share {num_blocks} blocks: some would run '
      f'none. {remedy if num_blocks else "Cut a longer chain."}'
    )
  return max(-(-num_blocks // num_workers), min_depth)


def _check_depths(num_blocks, num_workers, min_depth, depths) -> None:
  L, total = num_blocks, sum(depths)
  problems = {
    'which replaces min_depth: set that to 0': min_depth != 0,
    f'not one number for each of {num_workers} workers': (
      len(depths) != num_workers
    ),
    f'but a chain of {L} blocks allows 1 to {L}': (
      min(depths) < 1 or max(depths) > L
    ),
    f'{total} blocks in all, but the chain has {L}: raise some': total < L,
  }
  for problem, found in problems.items():
    if found:
      raise ValueError(f'depths is {tuple(depths)}, {problem}.')


def blocks_owned(
  num_blocks: int, num_workers: int, depths: Sequence[int] = ()
) -> tuple[int, ...]:
  """Gives each block one owner, in proportion to the workers' depths.

  Each block goes to the worker whose share of its depth is smallest so far
  (Adams's method), so every worker gets a block before any gets a second one.

  Args:
    num_blocks: L, the length of the chain.
    num_workers: S.
    depths: See `slots_per_worker`.

  Returns:
    How many blocks each worker owns: L together, none more than its depth.

  Raises:
    ValueError: See `slots_per_worker`.

  >>> blocks_owned(22, 4), blocks_owned(22, 4, (16, 10, 5, 4))
  ((6, 6, 5, 5), (10, 6, 3, 3))
  """
  least = 0 if len(depths) else None  # Without depths, some may own none.
  slots_per_worker(num_blocks, num_workers, least, depths)  # Validates.
  parts = [*depths] or [1] * num_workers
  owned = [0] * num_workers
  for _ in range(num_blocks):
    owned[min(range(num_workers), key=lambda s: owned[s] / parts[s])] += 1
  return tuple(owned)


def blocks_per_worker(
  num_blocks: int,
  num_workers: int,
  min_depth: int | None = 0,
  depths: Sequence[int] = (),
) -> tuple[int, ...]:
  """Returns how many blocks each worker runs (section 3.2).

  Args:
    num_blocks: L, the length of the chain.
    num_workers: S.
    min_depth: See `slots_per_worker`.
    depths: See `slots_per_worker`.

  Returns:
    A number for each worker.

  Raises:
    ValueError: See `slots_per_worker`.

  >>> blocks_per_worker(22, 4)
  (6, 6, 5, 5)
  """
  slots_per_worker(num_blocks, num_workers, min_depth, depths)  # validates
  if len(depths):
    return tuple(map(int, depths))
  owned = blocks_owned(num_blocks, num_workers)
  return tuple(max(count, min_depth or 0) for count in owned)


def num_copies(
  num_blocks: int,
  num_workers: int,
  min_depth: int | None = 0,
  depths: Sequence[int] = (),
) -> int:
  """Returns how many blocks all workers hold together.

  Args:
    num_blocks: L, the length of the chain.
    num_workers: S.
    min_depth: See `slots_per_worker`.
    depths: See `slots_per_worker`.

  Returns:
    L without a minimum depth; the paper's Table 1 fits 22, 24 and 32.

  >>> [num_copies(22, s, d) for s, d in ((2, 11), (4, 6), (8, 4))]
  [22, 24, 32]
  """
  return sum(blocks_per_worker(num_blocks, num_workers, min_depth, depths))


def round_robin(owned: Sequence[int]) -> tuple[tuple[int, ...], ...]:
  """Returns the order in which blocks are dealt to workers in turn.

  Args:
    owned: How many blocks each worker gets.

  Returns:
    For each worker, positions in the pack of blocks; the size of the pack
    fills the places that stay empty.

  >>> round_robin((3, 1, 2))
  ((0, 3, 5), (1, 6, 6), (2, 4, 6))
  """
  hands: list[list[int]] = [[] for _ in owned]
  turns = (s for j in range(max(owned)) for s, n in enumerate(owned) if j < n)
  for card, worker in enumerate(turns):
    hands[worker].append(card)
  short = [max(owned) - n for n in owned]
  return tuple(
    (*hand, *[sum(owned)] * n) for hand, n in zip(hands, short, strict=True)
  )


def sample_slots(
  key: jax.Array,
  num_blocks: int,
  num_workers: int,
  min_depth: int | None = 0,
  depths: Sequence[int] = (),
) -> jax.Array:
  """Assigns the blocks of a chain to workers at random (Algorithm 1, line 3).

  A random permutation is dealt round-robin, so exactly one worker holds each
  block, and the workers' counts are equal or one apart, or in proportion to
  `depths`. A worker that is still below `min_depth`, or below its depth, gets
  replicas of blocks that it does not hold yet.

  Args:
    key: A PRNG key.
    num_blocks: L, the length of the chain; static.
    num_workers: S; static.
    min_depth: See `slots_per_worker`; static.
    depths: See `slots_per_worker`; static.

  Returns:
    Slots, `int32[S, K]` with `K = slots_per_worker(...)`: block indices in
    ascending order, then L in every empty slot.

  Raises:
    ValueError: See `slots_per_worker`; or if `key` is not a PRNG key.

  >>> slots = sample_slots(jax.random.key(0), num_blocks=5, num_workers=2)
  >>> slots.shape, sorted(slots.ravel().tolist())
  ((2, 3), [0, 1, 2, 3, 4, 5])
  """
  L, S = num_blocks, num_workers
  counts = blocks_per_worker(L, S, min_depth, depths)
  owned = blocks_owned(L, S, depths)
  try:
    deal_key, copy_key = jax.random.split(key)
  except TypeError as error:
    raise ValueError(
      f'key is {key!r}; it must be a PRNG key, such as jax.random.key(0).'
    ) from error

  order = jax.random.permutation(deal_key, L).astype(jnp.int32)
  pack = jnp.pad(order, (0, 1), constant_values=L)
  dealt = jnp.sort(pack[jnp.array(round_robin(owned), jnp.int32)], axis=1)
  if min_depth is None:  # Without this the last workers would never hold one.
    return jax.random.permutation(copy_key, dealt)
  if counts == owned:
    return dealt

  # Each worker ranks all blocks: first those it owns, then the others in an
  # order drawn for it. The first `depth` of the ranking are therefore distinct.
  own = presence(dealt, L)
  rank = jnp.where(own, -1.0, jax.random.uniform(copy_key, (S, L)))
  K = max(counts)
  ranked = jnp.argsort(rank, axis=1)[:, :K].astype(jnp.int32)
  depth = jnp.array(counts, jnp.int32)[:, None]
  empty = jnp.arange(K, dtype=jnp.int32)[None, :] >= depth
  return jnp.sort(jnp.where(empty, L, ranked), axis=1)


def presence(slots: jax.Array, num_blocks: int) -> jax.Array:
  """Returns which worker holds which block.

  Args:
    slots: `int32[S, K]`.
    num_blocks: L, the length of the chain.

  Returns:
    `bool[S, L]`.

  >>> presence(jnp.array([[0, 2], [1, 3]]), 3).astype(int).tolist()
  [[1, 0, 1], [0, 1, 0]]
  """
  blocks = jnp.arange(num_blocks, dtype=slots.dtype)
  return (slots[:, :, None] == blocks[None, None, :]).any(axis=1)


def take(chain: PyTree, slots_s: jax.Array) -> PyTree:
  """Slices one worker's sub-chain out of the whole chain.

  Args:
    chain: Pytree of arrays `[L, ...]`.
    slots_s: `int32[K]`, the blocks of one worker. L or more marks an empty
      slot; a negative index counts from the end.

  Returns:
    Pytree of arrays `[K, ...]`, zeros in empty slots.

  Raises:
    ValueError: If the arrays do not stack the same number of blocks, or if
      slots are no whole numbers.

  >>> chain = {'w': jnp.array([1.0, 2.0, 3.0])}
  >>> take(chain, jnp.array([0, 2, 3]))['w'].tolist()
  [1.0, 3.0, 0.0]
  """
  _check_stacked(chain)
  slots_s = _whole(slots_s, 'slots_s')
  return jax.tree.map(
    lambda x: jnp.take(x, slots_s, axis=0, mode='fill', fill_value=0), chain
  )


def aggregate(chains: PyTree, slots: jax.Array, chain: PyTree) -> PyTree:
  """Averages each block over the workers that held it (Algorithm 1, line 5).

  Args:
    chains: Pytree of arrays `[S, K, ...]`, the blocks of all workers.
    slots: `int32[S, K]`, which blocks these are, see `take`.
    chain: Pytree of arrays `[L, ...]`; a block without a holder stays as it is
      here.

  Returns:
    Pytree of arrays `[L, ...]`.

  Raises:
    ValueError: If their structures or sizes do not fit.

  >>> old = {'w': jnp.array([1.0, 2.0, 3.0])}
  >>> new = {'w': jnp.array([[5.0, 9.0], [7.0, 0.0]])}
  >>> aggregate(new, jnp.array([[0, 1], [0, 3]]), old)['w'].tolist()
  [6.0, 9.0, 3.0]
  """
  if not jax.tree.leaves(chain):  # An optimiser may keep nothing of a chain.
    return chain
  slots = _whole(slots, 'slots')
  _check_stacked(chain)
  _check_held(chains, slots, chain)
  num_blocks = jax.tree.leaves(chain)[0].shape[0]
  slots = jnp.where(slots < 0, slots + num_blocks, slots)  # As `take` reads it.
  # A worker may hold a block more than once.
  holders = block_sum(jnp.ones(slots.shape, jnp.int32), slots, num_blocks)

  def mean(blocks, old):
    old = jnp.asarray(old)  # In the widest numbers that JAX has here.
    whole = jnp.issubdtype(old.dtype, jnp.integer)
    # As the exchanges do: sums of fewer bits lose what many holders add.
    at_least = jnp.int32 if whole else jnp.float32
    wide = old.dtype if old.dtype.itemsize >= 4 else at_least
    shape = (num_blocks,) + (1,) * (old.ndim - 1)
    count = holders.reshape(shape).astype(wide)
    least, blocks = jnp.maximum(count, 1), blocks.astype(wide)
    if whole:  # Divided first, because a sum of large ones would overflow.
      each = jnp.take(least, slots, axis=0, mode='clip')
      rest = block_sum(blocks % each, slots, num_blocks) // least
      mean = block_sum(blocks // each, slots, num_blocks) + rest
    else:
      mean = block_sum(blocks, slots, num_blocks) / least
    return jnp.where(count > 0, mean.astype(old.dtype), old)

  return jax.tree.map(mean, chains, chain)


def _whole(slots: Any, name: str) -> jax.Array:
  slots = jnp.asarray(slots)
  if not slots.size:  # A worker without blocks; the dtype of [] says nothing.
    return slots.astype(jnp.int32)
  if not jnp.issubdtype(slots.dtype, jnp.integer):
    raise ValueError(
      f'{name} is {slots.dtype}{list(slots.shape)}; it must hold numbers of '
      'blocks: take jnp.flatnonzero of a mask.'
    )
  return slots


def _check_stacked(chain: PyTree) -> None:
  sizes = {np.shape(x)[:1] for x in jax.tree.leaves(chain)}
  if len(sizes) > 1 or () in sizes:
    found = ', '.join(str(*size) or 'none' for size in sorted(sizes))
    raise ValueError(
      f'chain has leaves of the leading sizes {found}; each must stack the '
      'same number of blocks on its first axis.'
    )


def _check_held(chains: PyTree, slots: jax.Array, chain: PyTree) -> None:
  if jax.tree.structure(chains) != jax.tree.structure(chain):
    raise ValueError(
      f'chains is {jax.tree.structure(chains)}, and chain is '
      f'{jax.tree.structure(chain)}; both must be the same pytree.'
    )
  for ours, old in zip(*map(jax.tree.leaves, (chains, chain)), strict=True):
    if ours.shape != (*slots.shape, *old.shape[1:]) or slots.ndim != 2:
      raise ValueError(
        f'chains has a leaf {ours.shape} where chain has {old.shape} and slots '
        f'is {slots.shape}; they must be [S, K, ...], [L, ...] and [S, K].'
      )


def block_sum(
  blocks: jax.Array, slots: jax.Array, num_blocks: int
) -> jax.Array:
  """Adds up each block over its holders.

  Args:
    blocks: `[S, K, ...]`, the blocks of all workers.
    slots: `int32[S, K]`, which blocks these are.
    num_blocks: L, the length of the chain.

  Returns:
    `[L, ...]`, zeros for a block without a holder.
  """
  flat = blocks.reshape((-1, *blocks.shape[2:]))
  # An empty slot holds L, one past the end, which `drop` ignores.
  zeros = jnp.zeros((num_blocks, *blocks.shape[2:]), blocks.dtype)
  return zeros.at[slots.reshape(-1)].add(flat, mode='drop')


def block_count(slots: jax.Array, num_blocks: int) -> jax.Array:
  """Counts the holders of each block.

  Args:
    slots: `int32[S, K]`.
    num_blocks: L, the length of the chain.

  Returns:
    `int32[L]`.
  """
  return presence(slots, num_blocks).sum(axis=0, dtype=jnp.int32)


def split(
  params: Mapping[str, PyTree], chains: Collection[str]
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """Separates the partitioned chains from everything else.

  Args:
    params: Parameters, a dictionary; dictionaries inside it may hold chains.
    chains: The names of the partitioned chains. `decoder/blocks` names a chain
      inside the dictionary `decoder`. A key on the way may be a whole number,
      as in `stages/0/blocks`; the last one is text.

  Returns:
    `(shared, chain)`: the parameters without these chains, and each chain by
    its name. `join` puts them together again.

  Raises:
    KeyError: If the parameters hold no chain of that name.
    ValueError: If `chains` is a single name.

  >>> split({'stem': 1, 'stage3_chain': 2}, ['stage3_chain'])
  ({'stem': 1}, {'stage3_chain': 2})
  >>> split({'decoder': {'blocks': 1, 'head': 2}}, ['decoder/blocks'])
  ({'decoder': {'head': 2}}, {'decoder/blocks': 1})
  """
  if isinstance(chains, str):
    raise ValueError(f'chains is {chains!r}; it must hold names: [{chains!r}].')
  shared, chain = dict(params), {}
  for name in chains:
    *path, last = name.split('/')
    parent = shared
    for text in path:
      key = _key_in(parent, text)
      if not isinstance(parent[key], Mapping):
        raise KeyError(name)
      parent[key] = dict(parent[key])  # Leaves the caller's own as it is.
      parent = parent[key]
    chain[name] = parent.pop(last)
  return shared, chain


def join(
  shared: Mapping[str, PyTree], chain: Mapping[str, PyTree]
) -> dict[str, PyTree]:
  """Undoes `split`.

  Args:
    shared: Parameters without the chains.
    chain: Chains by name; see `split`.

  Returns:
    All parameters.

  >>> join({'stem': 1}, {'stage3_chain': 2})
  {'stem': 1, 'stage3_chain': 2}
  >>> join({'decoder': {'head': 2}}, {'decoder/blocks': 1})
  {'decoder': {'head': 2, 'blocks': 1}}
  """
  params = dict(shared)
  for name, blocks in chain.items():
    *path, last = name.split('/')
    parent = params
    for text in path:
      key = _key_in(parent, text)
      parent[key] = dict(parent.get(key, {}))
      parent = parent[key]
    parent[last] = blocks
  return params


def _key_in(parent: Mapping[Any, PyTree], text: str) -> Any:
  """Returns the key that a part of a name means: text, or a whole number."""
  if text not in parent and text.isdecimal() and int(text) in parent:
    return int(text)
  return text
