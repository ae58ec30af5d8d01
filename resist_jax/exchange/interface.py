"""What an exchange is: a NamedTuple of pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

from resist_jax.decomposition import Assignment, Division
from resist_jax.exchange.collectives import Healthy
from resist_jax.exchange.compression import Format

PyTree = Any


class Load(NamedTuple):
  """What an exchange carries in a round, for one chain.

  Attributes:
    division: How the chain is divided among workers.
    block_sizes: How many numbers a block has: parameters, and each moment of
      the optimiser that is carried with them. `Exchange.bytes` adds a sum
      over these to what a round sends besides blocks; with none of them, only
      the latter remains.
    excludes: Whether faulty workers are excluded from the aggregate.
    stays: Whether each block stays where it is.
  """

  division: Division
  block_sizes: tuple[int, ...]
  excludes: bool = False
  stays: bool = False


def no_branches(before: Assignment, after: Assignment) -> dict[str, int]:
  """Returns the branches of an exchange that has none; see `Exchange`."""
  del before, after
  return {}


class Exchange(NamedTuple):
  """Aggregates a chain and assigns its blocks anew, as pure functions.

  For equal slots before and after, every exchange of exact format gives
  `take(aggregate(...), next_slots)` (Algorithm 1, lines 3 and 5).

  Attributes:
    format: How numbers are written for the wire, of the shared part too.
    check: `check(division)` raises a ValueError if the exchange cannot serve
      it; `check(division, before, after)` also if one assignment cannot follow
      the other.
    assign: `assign(division, seed, round_index, before)` returns the
      `Assignment` of a round, on the host; a pure function of the seed (a list
      of integers) and the round. `before` is the assignment of the round before
      it, or None.
    exchange: `exchange(division, blocks, before, after, healthy, agreed)` runs
      inside `shard_map` on the W workers of a device. `blocks` is a pytree
      `[W, K, ...]`; the result has the same shapes and dtypes and holds the
      next blocks.
      Both assignments are whole, `[S, ...]`. `healthy` are the workers to
      average over, None for all. `agreed` is `blocks` before local training,
      which a block without a healthy holder returns to; None for zeros.
    bytes: `bytes(load, num_devices, before, after)` predicts the bytes that all
      devices together send in a round; without assignments, their mean.
    branches: `branches(before, after)` returns, for each `jax.named_scope`
      around a `lax.switch`, the branch that is taken: what the reader of
      compiled programs needs to know.
    moments: The exchange that hands over moments that are carried, with the
      same assignments; None for this one.
  """

  format: Format
  check: Callable[..., None]
  assign: Callable[[Division, list[int], int, Assignment | None], Assignment]
  exchange: Callable[
    [
      Division,
      PyTree,
      Assignment,
      Assignment,
      Healthy | None,
      PyTree | None,
    ],
    PyTree,
  ]
  bytes: Callable[..., float]
  branches: Callable[[Assignment, Assignment], dict[str, int]] = no_branches
  moments: 'Exchange | None' = None

  @property
  def of_moments(self) -> 'Exchange':
    """The exchange that hands over carried moments."""
    return self.moments or self
