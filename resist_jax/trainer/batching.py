"""Batches of a round: how many there are, and whether each has its form."""

from collections.abc import Iterable, Iterator
import itertools
from typing import TYPE_CHECKING, Any

import jax

from resist_jax.rounds import checks, mesh_sizes
from resist_jax.rounds.mesh import workers_here
from resist_jax.trainer import mistakes

if TYPE_CHECKING:
  from resist_jax.trainer.trainer import Trainer

PyTree = Any


def begun(
  trainer: 'Trainer', batches: PyTree | Iterator[PyTree]
) -> tuple[PyTree, PyTree | Iterator[PyTree]]:
  """Takes the first batch of a round, by whose form the round is compiled.

  Args:
    trainer: It trains the round.
    batches: As `Trainer.round` takes them.

  Returns:
    The first pytree `[S, ...]` of an iterator, or all arrays `[S, T, ...]`; and
    the batches. An iterator is a new one, which raises a ValueError where it
    ends too soon or where a batch has another form than the first.
  """
  if not isinstance(batches, Iterator):
    return batches, batches
  batches = _exactly(batches, trainer.steps)
  first = next(batches)
  return first, itertools.chain([first], _alike(trainer, batches, first))


def check(trainer: 'Trainer', batch: PyTree, streamed: bool) -> None:
  """Refuses batches whose leading axes are not those of the trainer.

  Args:
    trainer: It trains the round.
    batch: The first result of `begun`.
    streamed: Whether it comes from an iterator.

  Raises:
    ValueError: If a batch has other sizes.
  """
  S = trainer.num_workers
  here = len(workers_here(trainer.devices, S)) if streamed else S
  _, G = mesh_sizes(trainer.devices)
  checks.check_batch(batch, here, None if streamed else trainer.steps, G)


def _exactly(batches: Iterable[PyTree], steps: int) -> Iterator[PyTree]:
  """Yields so many batches; fewer are an error, more stay where they are."""
  count = 0
  for batch in itertools.islice(batches, steps):
    count += 1
    yield batch
  if count < steps:
    raise ValueError(
      f'batches ended after {count} of {steps} local steps: give an '
      f'iterator of {steps} pytrees [S, ...] for every round.'
    )


def _alike(
  trainer: 'Trainer', batches: Iterable[PyTree], first: PyTree
) -> Iterator[PyTree]:
  """Yields batches; one of another structure than the first is an error."""
  structure = jax.tree.structure(first)
  for t, batch in enumerate(batches, start=1):
    if jax.tree.structure(batch) != structure:
      raise ValueError(
        f'batches: that of step {t} is {jax.tree.structure(batch)}, the first '
        f'is {structure}; give all steps the same pytree.'
      )
    check(trainer, batch, streamed=True)
    if trainer.programs:
      mistakes.check_compiled(trainer.programs, batch)
    yield batch
