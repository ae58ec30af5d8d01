"""A trained model, ready to use: parameters with fixed statistics.

predict = export.load('runs/resist')
predict(images).argmax(axis=-1)
"""

import dataclasses
from functools import partial
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from resist_jax import data
from resist_jax.models.resnet import ResNet

PyTree = Any

FOLDER = 'model'


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
  """A trained global network.

  Attributes:
    network: The linen module.
    variables: `params`, and `batch_stats` measured over training images.
    scales: Residual scale of each chain that ResIST cuts, `float32[L]`.
    mean: `float32[C]`, mean of the training images as numbers from 0 to 1.
    std: `float32[C]`, their standard deviation.
  """

  network: ResNet
  variables: dict[str, PyTree]
  scales: dict[str, np.ndarray]
  mean: np.ndarray
  std: np.ndarray

  def __call__(self, images: jax.Array) -> jax.Array:
    """Classifies images.

    Args:
      images: `uint8[B, H, W, C]`, as in the data set.

    Returns:
      Probabilities, `float32[B, num_classes]`.
    """
    images = data.normalise(jnp.asarray(images), self.mean, self.std)
    return _classify(self.network, self.variables, images, self.scales)


@partial(jax.jit, static_argnums=0)
def _classify(network, variables, images, scales):
  return jax.nn.softmax(network.apply(variables, images, scales))


def save(workdir: pathlib.Path, predictor: Predictor) -> None:
  """Writes a trained model into the folder `model` of its run.

  Args:
    workdir: Workdir of the run.
    predictor: What to write.
  """
  network = {
    field.name: getattr(predictor.network, field.name)
    for field in dataclasses.fields(predictor.network)
    if field.name not in ('parent', 'name', 'for_cpu')
  }
  record = {
    'network': network | {'dtype': jnp.dtype(network['dtype']).name},
    'mean': predictor.mean.tolist(),
    'std': predictor.std.tolist(),
  }
  state = {'variables': predictor.variables, 'scales': predictor.scales}
  ocp.save(
    str(workdir.absolute() / FOLDER),
    jax.tree.map(np.asarray, state),
    overwrite=True,
    custom_metadata=record,
  )


def load(workdir: str | pathlib.Path) -> Predictor:
  """Reads the trained model of a finished run.

  Args:
    workdir: Workdir of the run.

  Returns:
    The model; call it with images.

  Raises:
    FileNotFoundError: If the run has not finished.
  """
  folder = pathlib.Path(workdir).absolute() / FOLDER
  if not folder.is_dir():
    raise FileNotFoundError(
      f'{folder} does not exist: a run writes it when it has finished.'
    )
  metadata = ocp.metadata(str(folder))
  record: Any = metadata.custom_metadata
  state: Any = ocp.load(str(folder), metadata.metadata)
  network = record['network']
  for field in ('stage_sizes', 'widths'):
    network[field] = tuple(network[field])
  return Predictor(
    ResNet(**network),
    state['variables'],
    state['scales'],
    np.array(record['mean'], np.float32),
    np.array(record['std'], np.float32),
  )
