"""Writes a trained network for another library, and reads one of PyTorch.

Each library is an extra: it is imported when its format is asked for.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
import importlib
import io
import json
import pathlib
import re
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np

from resist_jax import data, extras, folders
from resist_jax.errors import ConfigError
from resist_jax.models import ResNet
from resist_jax.run import onnx_graph, plain, workdir
from resist_jax.run.export import Parameters, Predictor


class Format(NamedTuple):
  """A format to write.

  Attributes:
    package: What is needed to write it.
    name: Name of what is written.
    write: Writes a network to a path.
    files: What always lies in it, if it is a folder; empty for a file.
    others: What may lie beside these.
  """

  package: str
  name: str
  write: Callable[[Any, pathlib.Path], None]
  files: tuple[str, ...] = ()
  others: tuple[str, ...] = ()


def write(model: Predictor | Parameters, kind: str, path: pathlib.Path) -> None:
  """Writes a network; a kill leaves what was there before, or all of the new.

  Args:
    model: The network; of one that is no ResNet, `safetensors` alone is known.
    kind: A key of `FORMATS`.
    path: The file or folder to write. What an earlier call wrote is replaced.

  Raises:
    ConfigError: If the package of the format is not installed, if the format
      cannot hold the network, or if something else is in the way.
  """
  if isinstance(model, Parameters) and kind != 'safetensors':
    raise ConfigError(
      f'--to={kind} writes ResNets only, but the network of this run comes '
      f'from the module {model.module}: use --to=safetensors, which holds '
      'every array under its path.'
    )
  package = FORMATS[kind].package
  try:
    extras.package(package)
  except ImportError as error:
    raise ConfigError(
      f'--to={kind} needs the package {package}, which cannot be imported here '
      f'({error}): pip install {package}.'
    ) from error
  check(kind, path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with folders.replacing(path) as part:
    FORMATS[kind].write(model, part)


def check(kind: str, path: pathlib.Path) -> None:
  """Checks that a network can be written to a place, and nothing gets lost.

  Args:
    kind: A key of `FORMATS`.
    path: See `write`.

  Raises:
    ConfigError: If it cannot.
  """
  files, others = {*FORMATS[kind].files}, {*FORMATS[kind].others}
  if not files:
    folders.check_file(path, '--out')
    return
  folders.check_writable(path, '--out')
  there = {p.name for p in path.glob('*')}
  # A folder that lacks some of its files is none that was written here.
  other = sorted(there - files - others if files <= there else there)
  if other:
    listed = ', '.join(other[:3]) + (', ...' if other[3:] else '')
    raise ConfigError(
      f'--out is {path}, a folder that holds other things ({listed}), and '
      f'--to={kind} writes a folder of its own: name a new one.'
    )


# What layers are called elsewhere: a pattern of our name, and theirs.
_CONVENTIONS = {
  'resist_jax': (),
  # Also the scripts that the authors of the paper released.
  'torchvision': (
    (r'^stem\.conv', 'conv1'),
    (r'^stem\.norm', 'bn1'),
    (r'^classifier', 'fc'),
    (r'\.norm_shortcut', '.downsample.1'),
    (r'\.shortcut', '.downsample.0'),
    (r'\.norm(\d)', r'.bn\1'),
  ),
  'pytorch-cifar': (
    (r'^stem\.conv', 'conv1'),
    (r'^stem\.norm', 'bn1'),
    (r'^classifier', 'linear'),
    (r'\.norm_shortcut', '.shortcut.1'),
    (r'\.shortcut(?!\.1)', '.shortcut.0'),
    (r'\.norm(\d)', r'.bn\1'),
  ),
}
_STAGE = re.compile(r'^stages\.(\d+)')


def from_torch(
  state: Mapping[str, Any],
  network: ResNet,
  names: Callable[[str], str] | None = None,
) -> dict[str, Any]:
  """Returns the variables of a network from a state dict of PyTorch.

  Args:
    state: By name, tensors of PyTorch or arrays. Prefixes that PyTorch's
      wrappers give all names, such as `module.`, are left out. A state dict
      does not tell the groups and the epsilon of a group norm: those of
      `network` have 16 channels a group and 1e-6.
    network: The network that it belongs to, such as
      `models.FAMILY['PreActResNet101'](num_classes=100)`.
    names: Maps the name of a layer that `--to=torch` gives it, such as
      `stages.2.1.conv1`, to its name in `state`. None finds out whether the
      names are those, those of torchvision and of the authors' scripts, or
      those of pytorch-cifar.

  Returns:
    `params` and `batch_stats`, as in `export.Predictor.variables`. The latter
    is empty where `state` has no running statistics: measure them, or let the
    network take those of each batch. Residual scales are not in a state dict:
    give the network those of the release, 1 / S on the divided chain.

  Raises:
    ValueError: If the state dict is that of another network.
  """
  if not isinstance(state, Mapping):
    raise ValueError(
      f'the state is a {type(state).__name__}, not a state dict: give what '
      'state_dict() of its modules returns.'
    )
  for name, inner in state.items():
    if isinstance(inner, Mapping):  # As checkpoints of scripts hold it.
      raise ValueError(
        f'the state holds a dictionary under {name!r}: if that is the state '
        f'dict, give state[{name!r}].'
      )
  given = {name: _as_array(tensor) for name, tensor in state.items()}
  given.pop('n_averaged', None)  # Of an `AveragedModel`.
  for prefix in ('module.', '_orig_mod.', 'module.'):  # One may be in another.
    if given and all(name.startswith(prefix) for name in given):
      given = {k.removeprefix(prefix): v for k, v in given.items()}
  return plain.variables(given, network, names or _convention(given))


def _convention(given: Collection[str]) -> Callable[[str], str]:
  """Returns the way in which the layers of a state dict are named."""
  for convention in _CONVENTIONS:
    named = partial(_translated, convention)
    if all(f'{named(x)}.weight' in given for x in ('stem.conv', 'classifier')):
      return named
  raise ValueError(
    f'the state dict has other names of layers ({", ".join(given)[:80]}): '
    'give names, a function from our name of a layer to its name there.'
  )


def _translated(convention: str, layer: str) -> str:
  """Returns what a convention calls a layer."""
  rules = _CONVENTIONS[convention]
  for pattern, theirs in rules:
    layer = re.sub(pattern, theirs, layer)
  if rules:
    layer = _STAGE.sub(lambda found: f'layer{int(found[1]) + 1}', layer)
  return layer


def _as_array(tensor: Any) -> np.ndarray:
  if hasattr(tensor, 'detach'):  # PyTorch need not be imported for that.
    tensor = tensor.detach().cpu().float().numpy()
  return np.asarray(tensor, np.float32)


def _safetensors(model: Predictor | Parameters, path: pathlib.Path) -> None:
  """Writes the arrays as they were trained, and what else a network needs."""
  library: Any = importlib.import_module('safetensors.numpy')
  if isinstance(model, Parameters):
    tree = {'params': model.params, 'scales': model.scales}
    record = {'module': model.module}
  else:
    tree = {**model.variables, 'scales': model.scales}
    record = plain.describe(model) | {
      'mean': model.mean.tolist(),
      'std': model.std.tolist(),
      'cut_heads': model.network.cut_heads,
      'gate': model.network.gate,
    }
  arrays = {
    jax.tree_util.keystr(place, simple=True, separator='/'): np.asarray(
      leaf, order='C'
    )
    for place, leaf in jax.tree.leaves_with_path(tree)
  }
  metadata = {name: json.dumps(value) for name, value in record.items()}
  # Written by Python, so that a full disk is an OSError.
  with folders.replacing(path) as part:
    part.write_bytes(library.save(arrays, metadata))


def _torch(model: Predictor, path: pathlib.Path) -> None:
  """Writes a state dict, and the modules that load it."""
  torch: Any = importlib.import_module('torch')
  path.mkdir()
  state = {
    name: torch.tensor(array) for name, array in plain.arrays(model).items()
  }
  # Written by Python, so that a full disk is an OSError.
  written = io.BytesIO()
  torch.save(state, written)
  with folders.replacing(path / 'network.pt') as part:
    part.write_bytes(written.getbuffer())
  workdir.write_json(path / 'network.json', plain.describe(model))
  modules = pathlib.Path(__file__).with_name('torch_network.py')
  shutil.copyfile(modules, path / 'network.py')


def _savedmodel(model: Predictor, path: pathlib.Path) -> None:
  """Writes a function of `uint8[B, H, W, C]` that returns logits."""
  tf: Any = importlib.import_module('tensorflow')
  jax2tf: Any = importlib.import_module('jax.experimental.jax2tf')
  apply = model.network.apply

  def logits(variables, images):
    pixels = data.normalise(images, model.mean, model.std)
    return apply(variables, pixels, model.scales)

  shape = ', '.join(('b', *map(str, model.image_shape)))
  converted = jax2tf.convert(
    logits,
    polymorphic_shapes=[None, f'({shape})'],
    with_gradient=False,
    # By default it would run on the kind of device that wrote it alone.
    native_serialization_platforms=('cpu', 'cuda', 'tpu'),
  )
  module = tf.Module()
  variables = jax.tree.map(np.asarray, dict(model.variables))
  module.variables_ = tf.nest.map_structure(tf.Variable, variables)
  signature = tf.TensorSpec([None, *model.image_shape], tf.uint8, 'images')
  module.logits = tf.function(
    lambda images: {'logits': converted(module.variables_, images)},
    input_signature=[signature],
    autograph=False,
  )
  # A constant would not be saved.
  module.class_names = tf.Variable(list(model.class_names), trainable=False)
  tf.saved_model.save(module, str(path), signatures=module.logits)


def _onnx(model: Predictor, path: pathlib.Path) -> None:
  """Writes a graph; the names of the classes are in its metadata."""
  onnx: Any = importlib.import_module('onnx')
  graph = onnx_graph.build(model)
  names = json.dumps(list(model.class_names))
  onnx.helper.set_model_props(graph, {'class_names': names})
  onnx.save_model(graph, str(path), format='protobuf')


FORMATS = {
  'safetensors': Format('safetensors', 'model.safetensors', _safetensors),
  'torch': Format(
    'torch', 'torch', _torch,
    ('network.pt', 'network.py', 'network.json'), ('__pycache__',),
  ),
  'savedmodel': Format(
    'tensorflow', 'savedmodel', _savedmodel,
    ('saved_model.pb', 'variables'), ('fingerprint.pb', 'assets'),
  ),
  'onnx': Format('onnx', 'model.onnx', _onnx),
}  # fmt: skip
