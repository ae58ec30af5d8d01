"""How good the global model is: with fixed statistics, and as the paper tests.

Training keeps no running statistics of batch norm. A deployed model needs fixed
ones, so they are measured for the global model, at its residual scale, over a
sample of training images ("recalibrated"). The paper tests with the statistics
of each test batch instead.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resist_jax import data
from resist_jax.export import Predictor
from resist_jax.model import ResNet

PyTree = Any


class Evaluator:
  """Evaluates global parameters on the sets of a data set.

  Attributes:
    network: The global network.
    scales: Residual scale of each chain that ResIST cuts, `float32[L]`.
  """

  def __init__(
    self,
    network: ResNet,
    dataset: data.Dataset,
    scales: Mapping[str, jax.Array],
    batch_size: int,
    statistics_images: int,
  ):
    """Prepares the measurement.

    Args:
      network: The global network.
      dataset: What to measure on.
      scales: Residual scale of each chain that ResIST cuts, `float32[L]`.
      batch_size: Images a test batch; the paper's statistics are of these.
      statistics_images: Training images to measure fixed statistics over.
    """
    self.network = network
    self.scales = dict(scales)
    self._dataset = dataset
    self._batch_size = batch_size
    order = np.random.default_rng(0).permutation(len(dataset.train))
    self._sample = dataset.train.take(np.sort(order[:statistics_images]))
    self._device = jax.devices()[0]

  def statistics(self, params: PyTree) -> PyTree:
    """Measures batch norm statistics over a sample of training images.

    Args:
      params: Canonical global parameters.

    Returns:
      The collection `batch_stats`: means over equal batches of each layer's
      mean and mean square, so the variance is that of the whole sample. Empty
      for a network without batch norm.
    """
    params = jax.device_put(params, self._device)
    # Equal batches only: a mean over batches then is the mean over images.
    size = min(self._batch_size, len(self._sample))
    total, count = None, 0
    for images, _ in _batches(self._sample, size):
      if len(images) < size:
        continue
      _, batch = self._with_batch_statistics(params, images)
      total = batch if total is None else jax.tree.map(jnp.add, total, batch)
      count += 1
    return jax.tree.map(lambda x: x / count, total)

  def __call__(self, params: PyTree) -> dict[str, float]:
    """Measures accuracies, as shares of 1, over whole sets.

    Args:
      params: Canonical global parameters.

    Returns:
      For each set, `NAME_accuracy` with recalibrated fixed statistics and
      `NAME_accuracy_paper` with the statistics of each batch.
    """
    params = jax.device_put(params, self._device)
    variables = {'params': params, 'batch_stats': self.statistics(params)}
    found = {}
    for name, split in self._dataset.tests.items():
      fixed = hits = 0
      for images, labels in _batches(split, self._batch_size):
        # Rows are independent under fixed statistics, so a last batch that is
        # not full can be padded; under its own statistics it cannot.
        padded = np.zeros((self._batch_size, *images.shape[1:]), images.dtype)
        padded[: len(images)] = images
        logits = self._with_fixed_statistics(variables, padded)
        fixed += int((logits.argmax(-1)[: len(labels)] == labels).sum())
        logits, _ = self._with_batch_statistics(params, images)
        hits += int((logits.argmax(-1) == labels).sum())
      found[f'{name}_accuracy'] = fixed / len(split)
      found[f'{name}_accuracy_paper'] = hits / len(split)
    return found

  def predictor(self, params: PyTree) -> Predictor:
    """Returns the model to deploy.

    Args:
      params: Canonical global parameters.

    Returns:
      Them with recalibrated fixed statistics, ready to use.
    """
    variables = {'params': params, 'batch_stats': self.statistics(params)}
    return Predictor(
      self.network,
      variables,
      self.scales,
      self._dataset.mean,
      self._dataset.std,
    )

  @partial(jax.jit, static_argnums=0)
  def _with_fixed_statistics(self, variables, images):
    images = data.normalise(images, self._dataset.mean, self._dataset.std)
    return self.network.apply(variables, images, self.scales)

  @partial(jax.jit, static_argnums=0)
  def _with_batch_statistics(self, params, images):
    images = data.normalise(images, self._dataset.mean, self._dataset.std)
    logits, measured = self.network.apply(
      {'params': params}, images, self.scales, mutable=['batch_stats']
    )
    return logits, measured.get('batch_stats', {})


def _batches(
  split: data.Split, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for start in range(0, len(split), batch_size):
    stop = start + batch_size
    yield split.images[start:stop], split.labels[start:stop]
