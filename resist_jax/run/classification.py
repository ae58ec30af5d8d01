"""The loss of image classification."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from resist_jax import data, models
from resist_jax.rounds import LossFn

METRICS = ('accuracy',)  # What the loss reports beside itself.


class Objective(NamedTuple):
  """What a network's logits are compared with.

  Attributes:
    label_smoothing: The share of each label that all classes get, equally
      (Szegedy et al. 2016).
    distillation: The weight of the divergence from the network as last agreed;
      the labels have the rest (Hinton et al. 2015).
    temperature: Divides the logits in that divergence.
  """

  label_smoothing: float = 0.0
  distillation: float = 0.0
  temperature: float = 1.0


LABELS = Objective()  # Nothing but these.


def make_loss(
  network: models.ResNet,
  dataset: data.Dataset,
  branch_scale: Mapping[str, float],
  augmentation: data.Augmentation,
  objective: Objective = LABELS,
  axis_name: str | None = None,
) -> LossFn:
  """Returns the loss of a sub-network, or of the full one, on a batch.

  Args:
    network: The global network; sub-networks are it with shorter chains.
    dataset: Its moments normalise images.
    branch_scale: For each chain that ResIST cuts, the factor on its residual
      branches in training.
    augmentation: What happens to training images.
    objective: What logits are compared with.
    axis_name: The mesh axis over which a worker's batch is spread, if it is.
      The loss is then that of a device's part, while batch norm and
      augmentation are those of the whole batch.

  Returns:
    A `LossFn` whose constants are all training images and labels,
    `(uint8[N, H * W * C], int32[N])`, and whose batch is `int32[B]`, the
    numbers of examples. Where images stream there are no constants, and a batch
    is images and labels itself. It reports `accuracy`. With distillation it
    also takes `agreed`, the sub-network as the round began; it sees the same
    images.
  """
  network = network.clone(norm_axis=axis_name)
  image_shape = dataset.train.images.shape[1:]

  def loss_fn(params, present, batch, key, constants=None, agreed=None):
    if constants is not None:
      batch = data.pick(constants, batch, image_shape, augmentation.alternate)
    images, labels = batch
    images = data.augment(key, images, augmentation, axis_name)
    images = data.normalise(images, dataset.mean, dataset.std)
    lengths = {n: len(jax.tree.leaves(params[n])[0]) for n in branch_scale}
    # An empty slot holds zeros; its scale of 0 also keeps NaN out of it.
    scales = {
      name: present.get(name, jnp.ones(length, jnp.float32))
      * branch_scale[name]
      for name, length in lengths.items()
    }
    subnetwork = network.with_chain_lengths(lengths)

    def logits_of(params) -> Any:
      if network.saves_traffic:
        params = models.computed_kernels(params, network.dtype)
      return subnetwork.apply({'params': params}, images, scales)

    logits = logits_of(params)
    loss = _loss_of_labels(logits, labels, objective.label_smoothing)
    if agreed is not None:
      share = objective.distillation
      divergence = _divergence(logits, logits_of(agreed), objective.temperature)
      loss = (1 - share) * loss + share * divergence
    hits = (logits.argmax(axis=-1) == labels).mean(dtype=jnp.float32)
    return loss.mean(), {'accuracy': hits}

  return loss_fn


def _loss_of_labels(logits, labels, smoothing: float):
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  if smoothing:
    everywhere = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
    loss = (1 - smoothing) * loss + smoothing * everywhere
  return loss


def _divergence(logits, agreed, temperature: float):
  """Returns how far classes are from those as last agreed.

  Its gradient shrinks with the square of the temperature, which is made up for.
  """
  found, wanted = (
    jax.nn.log_softmax(x / temperature) for x in (logits, agreed)
  )
  # `agreed` has no gradient: the loss is differentiated by `params` alone.
  divergence = optax.losses.kl_divergence_with_log_targets(found, wanted)
  return temperature**2 * divergence
