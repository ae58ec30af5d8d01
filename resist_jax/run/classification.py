"""The loss of image classification, from example numbers to cross entropy."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from resist_jax import data
from resist_jax.data.augmentation import augment
from resist_jax.models.resnet import ResNet
from resist_jax.rounds.local_training import LossFn

METRICS = ('accuracy',)  # What the loss reports beside itself.


def make_loss(
  network: ResNet,
  dataset: data.Dataset,
  branch_scale: Mapping[str, float],
  pad: int,
  flip: bool,
  axis_name: str | None = None,
) -> LossFn:
  """Returns the loss of a sub-network, or of the full one, on a batch.

  Args:
    network: The global network; sub-networks are it with shorter chains.
    dataset: For its moments.
    branch_scale: For each chain that ResIST cuts, the factor on its residual
      branches in training.
    pad: See `augmentation.augment`.
    flip: See `augmentation.augment`.
    axis_name: The mesh axis over which a worker's batch is spread, if it is:
      the loss is then of a part, with batch norm and augmentation of the whole.

  Returns:
    A `LossFn` whose constants are all training images and labels,
    `(uint8[N, H, W, C], int32[N])`, and whose batch is `int32[B]`, examples of
    these; where they stream, constants are None and a batch is images and
    labels itself. It reports `accuracy`.
  """
  network = network.clone(norm_axis=axis_name)

  def loss_fn(params, present, constants, batch, key):
    if constants is not None:
      batch = jax.tree.map(lambda examples: examples[batch], constants)
    images, labels = batch
    images = augment(key, images, pad, flip, axis_name)
    images = data.normalise(images, dataset.mean, dataset.std)
    lengths = {n: len(jax.tree.leaves(params[n])[0]) for n in branch_scale}
    # An empty slot holds zeros; its scale of 0 also keeps NaN out of it.
    scales = {
      name: present.get(name, jnp.ones(length, jnp.float32))
      * branch_scale[name]
      for name, length in lengths.items()
    }
    subnetwork = network.with_chain_lengths(lengths)
    logits: Any = subnetwork.apply({'params': params}, images, scales)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hits = (logits.argmax(axis=-1) == labels).mean(dtype=jnp.float32)
    return loss.mean(), {'accuracy': hits}

  return loss_fn
