"""The two sources of a round's batches: device memory, or a stream of files.

Every random choice is a pure function of (seed, round, worker, step, position
in the batch), so a resumed run trains on the same pixels.
"""

from collections.abc import Callable, Iterator
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resist_jax.data.streaming import THREADS, StreamedImages

PyTree = Any
# Maps a round's number to the examples that it trains on, int32[S, T, B]: n, or
# ~n for image n mirrored left to right.
Indices = Callable[[int], np.ndarray]

PREFETCHED = 3  # Steps read ahead, kept in host memory (B images per worker).


def as_rows(images: np.ndarray) -> np.ndarray:
  """Flattens each image to a row of bytes, the form that `pick` indexes.

  If `pick` indexed `[N, H, W, C]`, a TPU would make a second copy of all images
  with their width padded to 128 pixels.

  Args:
    images: `uint8[N, H, W, C]`.

  Returns:
    `uint8[N, H * W * C]`.
  """
  return images.reshape(len(images), -1)


def pick(
  examples: tuple[jax.Array, jax.Array],
  numbers: jax.Array,
  image_shape: tuple[int, ...],
  mirrors: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Picks a batch of images.

  Args:
    examples: Images as `as_rows` returns them, and their labels `int32[N]`.
    numbers: `int32[B]`, which of them.
    image_shape: `(H, W, C)`.
    mirrors: Whether a number below 0, `~n`, asks for image n mirrored left to
      right.

  Returns:
    `(uint8[B, H, W, C], int32[B])`.
  """
  rows, labels = examples
  if not mirrors:
    return rows[numbers].reshape(-1, *image_shape), labels[numbers]
  which = jnp.maximum(numbers, ~numbers)
  images = rows[which].reshape(-1, *image_shape)
  mirrored = (numbers < 0)[:, None, None, None]
  return jnp.where(mirrored, images[:, :, ::-1], images), labels[which]


def of_rounds(pipeline: 'Resident | Stream', first: int, count: int) -> Any:
  """Returns the batches of some rounds that are trained as one.

  Args:
    pipeline: Where rounds get their examples from.
    first: Number of the first one.
    count: How many.

  Returns:
    As `pipeline.batches`, with the steps of all of them.
  """
  rounds: list[Any] = [pipeline.batches(r) for r in range(first, first + count)]
  if count == 1:
    return rounds[0]
  if isinstance(pipeline, Stream):
    return itertools.chain(*rounds)
  return np.concatenate(rounds, axis=1)


def shapes_of_rounds(pipeline: 'Resident | Stream', count: int) -> PyTree:
  """Returns shapes and dtypes of what `of_rounds` returns.

  Args:
    pipeline: The training set.
    count: How many rounds are trained as one.

  Returns:
    A pytree of shapes; a list of them, one for each step, of a stream.
  """
  shapes = pipeline.batch_shapes()
  if isinstance(pipeline, Stream):
    return count * shapes
  return np.concatenate(count * [shapes], axis=1)


class Resident:
  """A training set that stays in device memory; a batch is a list of indices.

  Attributes:
    constants: The examples, which all rounds share.
  """

  def __init__(self, examples: PyTree, indices: Indices):
    """Stores references to the examples.

    Args:
      examples: Pytree of `[N, ...]`; images come `as_rows`, with labels.
      indices: Maps a round's number to the examples that it trains on,
        `int32[S, T, B]`.
    """
    self.constants = examples
    self._indices = indices

  def batches(self, round_index: int) -> np.ndarray:
    """Returns what the steps of a round train on.

    Args:
      round_index: Number of the round.

    Returns:
      Indices of examples, `int32[S, T, B]`.
    """
    return self._indices(round_index)

  def batch_shapes(self) -> np.ndarray:
    """Returns an array with the shape and dtype of `batches`."""
    return self._indices(0)


class Stream:
  """A run's batches in order, decoded by threads while the workers train.

  Each example that the run visits has a number, ordered by round, step, worker
  and position in the batch. `grain` reads ahead in this order, across rounds.

  Attributes:
    constants: None, because the batches hold the images.
  """

  constants: PyTree = None

  def __init__(
    self,
    images: StreamedImages,
    indices: Indices,
    num_rounds: int,
    seed: int,
    random_crops: bool,
    workers: range | None = None,
  ):
    """Describes the stream without reading anything yet.

    Args:
      images: Training images.
      indices: Maps a round's number to the examples that it trains on,
        `int32[S, T, B]`.
      num_rounds: Number of rounds in the run.
      seed: Seed of the run.
      random_crops: Whether to crop images at random instead of at the centre.
      workers: The workers whose examples are read; all S if None.
    """
    self._images = images
    self._indices = functools.lru_cache(maxsize=4)(indices)
    self._num_rounds = num_rounds
    self._seed = seed
    self._random_crops = random_crops
    self._iterator: Iterator[Any] = iter(())
    self._next = -1  # The step that the iterator yields next.
    self._shape = self._indices(0).shape
    self._workers = workers or range(self._shape[0])

  def __len__(self) -> int:
    """Returns how many examples these workers visit in the whole run."""
    _, T, B = self._shape
    return self._num_rounds * T * len(self._workers) * B

  def __getitem__(self, number: int) -> tuple[np.ndarray, np.int32]:
    """Reads one example of the run: its image, `uint8[H, W, C]`, and label."""
    _, T, B = self._shape
    order = (self._num_rounds, T, len(self._workers), B)
    round_index, t, s, b = map(int, np.unravel_index(number, order))
    s = self._workers[s]
    rng = None
    if self._random_crops:
      position = (round_index, s, t, b)
      sequence = np.random.SeedSequence(self._seed, spawn_key=position)
      rng = np.random.default_rng(sequence)
    i = self._indices(round_index)[s, t, b]
    image, label = self._images.example(max(i, ~i), rng)
    return image[:, ::-1] if i < 0 else image, label

  def batches(
    self, round_index: int
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the batches of a round, while threads read the next ones.

    Args:
      round_index: Number of the round. Rounds asked for in order are read
        ahead; any other order restarts the reading.

    Yields:
      For each of T steps, images `uint8[S, B, H, W, C]` and labels
      `int32[S, B]`, where S counts the workers that this process reads for.
    """
    _, T, B = self._shape
    S = len(self._workers)
    if self._next != round_index * T:
      self._iterator, self._next = self._from(round_index * T), round_index * T
    for _ in range(T):
      images, labels = next(self._iterator)
      self._next += 1
      yield images.reshape(S, B, *images.shape[1:]), labels.reshape(S, B)

  def batch_shapes(self) -> PyTree:
    """Returns the shapes and dtypes of what `batches` yields.

    Returns:
      For each of T steps a pair: `uint8[S, B, H, W, C]` and `int32[S, B]`, of
      the S workers of this process.
    """
    _, T, B = self._shape
    S = len(self._workers)
    images = jax.ShapeDtypeStruct((S, B, *self._images.image_shape), jnp.uint8)
    return T * [(images, jax.ShapeDtypeStruct((S, B), jnp.int32))]

  def _from(self, step: int) -> Iterator[Any]:
    # Imported here because it is slow, and data sets in memory do not need it.
    import grain

    _, _, B = self._shape
    S = len(self._workers)
    options = grain.ReadOptions(THREADS, PREFETCHED * S * B)
    source: Any = self
    examples = grain.MapDataset.source(source)[step * S * B :]
    return iter(examples.to_iter_dataset(options).batch(S * B))
