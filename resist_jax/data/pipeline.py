"""What rounds train on: images on the devices, or streamed from their files.

Everything random here is a pure function of (seed, round, worker, step, place
in the batch), so a resumed run sees the same pixels.
"""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resist_jax.data.streaming import THREADS, StreamedImages

PyTree = Any
Indices = Callable[[int], np.ndarray]  # Of a round: int32[S, T, B].

PREFETCHED = 3  # Batches of all workers that wait in host memory.


class Resident:
  """Examples that fit in memory; batches are their numbers.

  Attributes:
    constants: `(uint8[N, H, W, C], int32[N])`, what all rounds share.
  """

  def __init__(self, images: np.ndarray, labels: Any, indices: Indices):
    """Keeps the examples.

    Args:
      images: `uint8[N, H, W, C]`, to train on.
      labels: `int32[N]`.
      indices: Returns which of them a round is made of, `int32[S, T, B]`.
    """
    self.constants: PyTree = (images, labels)
    self._indices = indices

  def batches(self, round_index: int) -> np.ndarray:
    """Returns the examples of a round, `int32[S, T, B]`."""
    return self._indices(round_index)

  def batch_shapes(self) -> np.ndarray:
    """Returns something of the shape of `batches`."""
    return self._indices(0)


class Stream:
  """The batches of a run in order, made by threads while workers train.

  Every example of the run has a number, by round, step, worker and place in the
  batch; `grain` reads ahead along these numbers, across the ends of rounds.

  Attributes:
    constants: None: batches hold the images.
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
    """Describes the stream; nothing is read yet.

    Args:
      images: To train on.
      indices: Which of them a round is made of, `int32[S, T, B]`.
      num_rounds: Of the run.
      seed: Of the run.
      random_crops: Crop images at random instead of showing their centre.
      workers: Whose examples to read; all, if None.
    """
    self._images = images
    self._indices = functools.lru_cache(maxsize=4)(indices)
    self._num_rounds = num_rounds
    self._seed = seed
    self._random_crops = random_crops
    self._iterator: Iterator[Any] = iter(())
    self._next = -1  # The step that the iterator stands at.
    self._shape = self._indices(0).shape
    self._workers = workers or range(self._shape[0])

  def __len__(self) -> int:
    """Returns how many examples these workers see, repetitions included."""
    _, T, B = self._shape
    return self._num_rounds * T * len(self._workers) * B

  def __getitem__(self, number: int) -> tuple[np.ndarray, np.int32]:
    """Reads an example of the run: `uint8[H, W, C]` and its label."""
    _, T, B = self._shape
    order = (self._num_rounds, T, len(self._workers), B)
    round_index, t, s, b = map(int, np.unravel_index(number, order))
    s = self._workers[s]
    rng = None
    if self._random_crops:
      place = (round_index, s, t, b)
      draws = np.random.SeedSequence(self._seed, spawn_key=place)
      rng = np.random.default_rng(draws)
    return self._images.example(self._indices(round_index)[s, t, b], rng)

  def batches(
    self, round_index: int
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the batches of a round; those of the next are read meanwhile.

    Args:
      round_index: Any; to go on in order costs no waiting.

    Yields:
      For each of T steps, images `uint8[S, B, H, W, C]` and labels
      `int32[S, B]`, of the S workers that this process looks after.
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
    """Returns shapes and dtypes of the batches of all workers together."""
    S, T, B = self._shape
    images = jax.ShapeDtypeStruct((S, B, *self._images.image_shape), jnp.uint8)
    return T * [(images, jax.ShapeDtypeStruct((S, B), jnp.int32))]

  def _from(self, step: int) -> Iterator[Any]:
    import grain  # Slow to import, and sets in memory need it not.

    _, _, B = self._shape
    S = len(self._workers)
    options = grain.ReadOptions(THREADS, PREFETCHED * S * B)
    source: Any = self
    examples = grain.MapDataset.source(source)[step * S * B :]
    return iter(examples.to_iter_dataset(options).batch(S * B))
