"""A trained model, ready to use: parameters with fixed statistics.

predict = export.load('runs/resist')
predict(images).argmax(axis=-1)

A manifest of its files is written last: a model that lacks it is incomplete.
"""

import dataclasses
import errno
from functools import partial
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from resist_jax import data, folders
from resist_jax.errors import message
from resist_jax.models.resnet import ResNet
from resist_jax.rounds import nodes
from resist_jax.rounds.manifest import check, manifest
from resist_jax.run.workdir import json_object, write_json

PyTree = Any

FOLDER = 'model'
MANIFEST = 'manifest.json'


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
  """A trained global network.

  Attributes:
    network: The linen module.
    variables: `params`, and `batch_stats` measured over training images.
    scales: Residual scale of each chain that ResIST cuts, `float32[L]`.
    mean: `float32[C]`, mean of the training images as numbers from 0 to 1.
    std: `float32[C]`, their standard deviation.
    class_names: The name of each class.
    image_shape: `(H, W, C)` of the training images.
    resized: Whether these were cut at the centre and resized to that shape.
  """

  network: ResNet
  variables: dict[str, PyTree]
  scales: dict[str, np.ndarray]
  mean: np.ndarray
  std: np.ndarray
  class_names: tuple[str, ...]
  image_shape: tuple[int, ...]
  resized: bool = False

  def __call__(self, images: jax.typing.ArrayLike) -> jax.Array:
    """Classifies images.

    Args:
      images: Pixels as in the data set, whole numbers from 0 to 255,
        `[B, H, W, C]`.

    Returns:
      Probabilities, `float32[B, num_classes]`.

    Raises:
      ValueError: If the images are others than the network was trained on.
    """
    return jax.nn.softmax(self.logits(images))

  def logits(self, images: jax.typing.ArrayLike) -> jax.Array:
    """Classifies images.

    Args:
      images: See `__call__`.

    Returns:
      Logits, `float32[B, num_classes]`, of which `softmax` makes probabilities.

    Raises:
      ValueError: See `__call__`.
    """
    pixels = data.normalise(
      jnp.asarray(_as_pixels(images, self.image_shape)), self.mean, self.std
    )
    return _classify(self.network, self.variables, pixels, self.scales)


@partial(jax.jit, static_argnums=0)
def _classify(network, variables, images, scales):
  return network.apply(variables, images, scales)


def _as_pixels(images: Any, image_shape: tuple[int, ...]) -> Any:
  """Returns images as `uint8[B, H, W, C]`, or raises what to change."""
  if not isinstance(images, jax.Array):
    try:
      images = np.asarray(images)
    except ValueError as error:  # A list of unequal images.
      raise ValueError(
        f'images cannot be one array ({error}): give images of one size.'
      ) from error
  shape, wanted = images.shape, ', '.join(map(str, image_shape))
  if shape == image_shape:
    raise ValueError(
      f'images have the shape {shape}, of a single image: give images[None].'
    )
  if (*shape[1:], 1) == image_shape:
    raise ValueError(
      f'images have the shape {shape}, without channels: give '
      'images[..., None].'
    )
  if len(shape) != 4 or shape[1:] != image_shape:
    raise ValueError(
      f'images have the shape {shape}, but the network was trained on '
      f'[B, {wanted}]: convert their channels, and resize or crop them.'
    )
  if images.dtype == np.uint8:
    return images
  if not jnp.issubdtype(images.dtype, np.integer):
    raise ValueError(
      f'images are {images.dtype}, but the network was trained on whole '
      'numbers from 0 to 255: give those as uint8, such as '
      "(255 * images).round().astype('uint8') for numbers from 0 to 1."
    )
  if isinstance(images, jax.core.Tracer):  # Nobody knows its values yet.
    raise ValueError(
      f"images are {images.dtype}: inside jit, give images.astype('uint8')."
    )
  images = np.asarray(images)
  if images.size and not (images.min() >= 0 and images.max() <= 255):
    raise ValueError(
      f'images hold numbers from {images.min()} to {images.max()}, but the '
      'network was trained on 0 to 255: scale them to that.'
    )
  return images.astype(np.uint8)


def save(workdir: pathlib.Path, predictor: Predictor) -> None:
  """Writes a trained model into the folder `model` of its run.

  At any time that folder holds the model before, or the new one.

  Args:
    workdir: Workdir of the run.
    predictor: What to write.
  """
  network = {
    field.name: getattr(predictor.network, field.name)
    for field in dataclasses.fields(predictor.network)
    if field.name not in ('parent', 'name', 'platform')
  }
  record: Any = {
    'network': network | {'dtype': jnp.dtype(network['dtype']).name},
    'mean': predictor.mean.tolist(),
    'std': predictor.std.tolist(),
    'class_names': list(predictor.class_names),
    'image_shape': list(predictor.image_shape),
    'resized': predictor.resized,
  }
  state = {'variables': predictor.variables, 'scales': predictor.scales}
  write(workdir, state, record)


def write(workdir: pathlib.Path, state: PyTree, record: dict[str, Any]) -> None:
  """Writes arrays into the folder `model` of a run; see `save`.

  Args:
    workdir: Workdir of the run.
    state: The arrays.
    record: JSON values that tell what they are.

  Raises:
    OSError: If the disk is full, or fails.
  """
  folder = workdir.absolute() / FOLDER
  part = folder.with_name(f'{FOLDER}.part')
  try:
    ocp.save(
      str(part),
      jax.tree.map(np.asarray, state),
      overwrite=True,
      custom_metadata=record,
    )
  except ValueError as error:  # TensorStore has no other for what files raise.
    full = 'RESOURCE_EXHAUSTED' in str(error)
    raise OSError(
      errno.ENOSPC if full else errno.EIO,
      f'the model cannot be written ({message(error)[:100]})',
      str(folder),
    ) from error
  if jax.process_index() == 0:
    write_json(part / MANIFEST, manifest(part))
    folders.put(part, folder)


@dataclasses.dataclass(frozen=True)
class Parameters:
  """A trained network of somebody else's: its parameters alone.

  Attributes:
    module: The module that defines it, see `module_task`.
    params: The global parameters.
    scales: Residual scale of each chain that ResIST cuts, `float32[L]`.
    images: See `about_images`; None for tables, and in older models.
  """

  module: str
  params: PyTree
  scales: dict[str, np.ndarray]
  images: dict[str, Any] | None = None


def about_images(dataset: data.Dataset) -> dict[str, Any]:
  """Returns what a network has to be told of its training images.

  Args:
    dataset: The images.

  Returns:
    JSON values, by the names of attributes of `Predictor`.
  """
  return {
    'mean': dataset.mean.tolist(),
    'std': dataset.std.tolist(),
    'class_names': list(dataset.class_names),
    'image_shape': list(dataset.train.images.shape[1:]),
    'resized': dataset.resized,
  }


def load(workdir: str | os.PathLike[str]) -> Predictor:
  """Reads the trained model of a finished run.

  Args:
    workdir: Workdir of the run.

  Returns:
    The model; call it with images.

  Raises:
    FileNotFoundError: If the run has not finished.
    ValueError: If a file of the model is missing or damaged, or if it
      classifies no images.
  """
  found = read(workdir)
  if isinstance(found, Parameters):
    raise ValueError(
      f'the network of {workdir} comes from the module {found.module}, and '
      'export.load reads ResNets only: read its parameters with '
      'resist_jax.run.export.load_parameters.'
    )
  return found


def read(workdir: str | os.PathLike[str]) -> Predictor | Parameters:
  """Reads what a finished run has trained.

  Args:
    workdir: Workdir of the run.

  Returns:
    The model of a ResNet, or the parameters of another network.

  Raises:
    FileNotFoundError: If the run has not finished.
    ValueError: If a file of the model is missing or damaged.
  """
  record, state = _read(workdir)
  if 'module' in record:
    scales = state.get('scales', {})
    params, images = state['params'], record.get('images')
    return Parameters(record['module'], params, scales, images)
  network = record['network']
  for field in ('stage_sizes', 'widths'):
    network[field] = tuple(network[field])
  return Predictor(
    ResNet(**network),
    state['variables'],
    state['scales'],
    np.array(record['mean'], np.float32),
    np.array(record['std'], np.float32),
    tuple(record['class_names']),
    tuple(record['image_shape']),
    record.get('resized', False),  # Older models do not say.
  )


def load_parameters(
  workdir: str | os.PathLike[str], like: PyTree | None = None
) -> tuple[PyTree, PyTree]:
  """Reads the parameters of a finished run, whatever its network is.

  Args:
    workdir: Workdir of the run.
    like: Parameters, or their shapes, as `init` of the network makes them. They
      say which nodes the pytree has, and may be left out if these are
      dictionaries, lists and tuples.

  Returns:
    `(params, scales)`: the global parameters, and the residual scale of each
    chain that ResIST cuts, `float32[L]` by name.

  Raises:
    FileNotFoundError: If the run has not finished.
    ValueError: If a file of the model is missing or damaged, or if it is that
      of other parameters than `like`.
  """
  record, state = _read(workdir)
  params = state.get('variables', state)['params']
  if like is not None:
    names = [nodes.shapes_by_name(tree) for tree in (like, params)]
    differ = nodes.first_difference(*names)
    if differ:
      name, *shapes = differ
      ours, theirs = ('missing' if x is None else x for x in shapes)
      raise ValueError(
        f'{name} is {ours} in like, and {theirs} in the run in {workdir}: give '
        'the parameters of its network.'
      )
  elif record.get('nodes') is not None:  # Older models do not say.
    like = nodes.form_of(record['nodes'])
  if like is not None:
    params = nodes.with_nodes_of(like, params)
  return params, state.get('scales', {})


def _read(workdir: str | os.PathLike[str]) -> tuple[dict[str, Any], Any]:
  """Returns the record of a model and its arrays."""
  folder = folders.resolve(workdir, 'workdir').absolute() / FOLDER
  if not folder.is_dir():
    raise FileNotFoundError(
      f'{folder} does not exist: a run writes it when it has finished.'
    )
  problem = _problem(folder)
  if problem:
    raise ValueError(
      f'the model in {folder} cannot be used: {problem}. Run the command of '
      'its run again to rewrite it.'
    )
  metadata = ocp.metadata(str(folder))
  record: Any = metadata.custom_metadata
  return record, ocp.load(str(folder), metadata.metadata)


def _problem(folder: pathlib.Path) -> str | None:
  """Returns what is wrong with the files of a model, None if nothing is."""
  path = folder / MANIFEST
  if not path.is_file():
    return f'{MANIFEST} is missing, as it was not written to its end or is old'
  listed = json_object(path)
  if not listed:
    return f'{MANIFEST} is not as it was written'
  return check(folder, listed)
