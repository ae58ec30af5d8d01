"""State dicts of plain PyTorch modules become our variables, and compute alike.

The names and shapes are tested without PyTorch; logits where it is installed.
"""

import functools
import importlib.util
import itertools

from covering import rest_is_slow
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_formats import NETWORKS, SMALL, images, made, needs

from resist_jax.models import ResNet, without_gates
from resist_jax.run import export, formats, plain

TORCHVISION = {
  'stem.conv': 'conv1',
  'stem.norm': 'bn1',
  'classifier': 'fc',
  'stages.0.0.conv1': 'layer1.0.conv1',
  'stages.1.2.norm2': 'layer2.2.bn2',
  'stages.1.0.shortcut': 'layer2.0.downsample.0',
  'stages.1.0.norm_shortcut': 'layer2.0.downsample.1',
}
CIFAR = TORCHVISION | {
  'classifier': 'linear',
  'stages.1.0.shortcut': 'layer2.0.shortcut.0',
  'stages.1.0.norm_shortcut': 'layer2.0.shortcut.1',
}


@pytest.mark.parametrize(
  ('convention', 'names'),
  [('torchvision', TORCHVISION), ('pytorch-cifar', CIFAR)],
)
def test_layers_have_the_names_of_a_convention(convention, names):
  for ours, theirs in names.items():
    assert formats._translated(convention, ours) == theirs


def renamed(arrays, convention):
  """The arrays of a network under the names of a convention."""
  found = {}
  for name, array in arrays.items():
    layer, _, kind = name.rpartition('.')
    if layer:  # `mean` and `std` are not in other state dicts.
      found[f'{formats._translated(convention, layer)}.{kind}'] = array
  return found


@pytest.mark.parametrize(
  ('kind', 'convention'),
  rest_is_slow(
    list(itertools.product(NETWORKS, formats._CONVENTIONS)),
    [
      ('bottleneck', 'pytorch-cifar'),
      ('heads cut, norm last', 'torchvision'),
    ],
  ),
)
def test_what_is_written_is_read_back(kind, convention):
  model = made(kind)
  arrays = renamed(plain.arrays(model), convention)
  network = model.network.clone(gate=None)  # They are in the last layers.
  found = formats.from_torch(arrays, network)
  params = without_gates(model.variables['params'], model.network)
  wanted = {**model.variables, 'params': params}
  assert jax.tree.structure(found) == jax.tree.structure(
    jax.tree.map(np.asarray, wanted)
  )
  again = export.Predictor(
    network, found, {}, model.mean, model.std, model.class_names,
    model.image_shape,
  )  # fmt: skip
  np.testing.assert_allclose(
    again.logits(images(5)), model.logits(images(5)), rtol=1e-4, atol=1e-4
  )


def test_names_may_be_given():
  model = made()
  arrays = {f'net/{k}': v for k, v in plain.arrays(model).items()}
  with pytest.raises(ValueError, match=r'other names .*: give names') as caught:
    formats.from_torch(arrays, model.network)
  assert '\n' not in str(caught.value)
  del arrays['net/mean'], arrays['net/std']
  found = formats.from_torch(arrays, model.network, names='net/{}'.format)
  stem = found['params']['stem']['kernel']
  np.testing.assert_array_equal(
    stem, model.variables['params']['stem']['kernel']
  )


@pytest.mark.parametrize(
  ('prefix', 'more'),
  [
    ('module.', {}),
    ('_orig_mod.', {}),
    ('module._orig_mod.', {}),
    ('_orig_mod.module.', {}),
    ('module.', {'n_averaged': np.array(3)}),
  ],
)
def test_all_names_may_begin_with_those_of_wrappers(prefix, more):
  model = made()
  arrays = renamed(plain.arrays(model), 'torchvision')
  wrapped = {f'{prefix}{name}': array for name, array in arrays.items()} | more
  found = formats.from_torch(wrapped, model.network)
  wanted = formats.from_torch(arrays, model.network)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    ({'stage_sizes': (2, 4)}, r'no array stages\.1\.3\..*other layers'),
    ({'stage_sizes': (2, 2)}, r'no place for 1\d arrays, such as stages\.1\.2'),
    ({'widths': (8, 8)}, 'has the shape .* the network is another one'),
    ({'num_classes': 4}, r'classifier\.\w+ has the shape'),
    ({'norm': 'group'}, 'no place for .*running_mean'),
  ],
)
def test_the_state_of_another_network_is_refused(fields, says):
  arrays = plain.arrays(made())
  with pytest.raises(ValueError, match=says) as caught:
    formats.from_torch(arrays, ResNet(**{**SMALL, **fields}))
  assert '\n' not in str(caught.value)


def test_a_module_is_no_state_dict():
  with pytest.raises(ValueError, match=r'not a state dict: give what state_di'):
    formats.from_torch(object(), ResNet(**SMALL))
  saved = {'epoch': 3, 'net': plain.arrays(made())}
  with pytest.raises(ValueError, match=r"under 'net': .* give state\['net'\]"):
    formats.from_torch(saved, ResNet(**SMALL))


@functools.cache
def modules():
  """A network as the authors' scripts name it, written for this test.

  Norms keep no running statistics, and the blocks of a divided chain multiply
  their branch by 1 / S in a test.
  """
  from torch import nn
  from torch.nn import functional

  def norm(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)

  def conv(inputs, width, size=3, stride=1):
    pad = size // 2
    return nn.Conv2d(inputs, width, size, stride, pad, bias=False)

  class Block(nn.Module):
    def __init__(self, inputs, width, stride, scale):
      super().__init__()
      self.bn1, self.conv1 = norm(inputs), conv(inputs, width, 3, stride)
      self.bn2, self.conv2 = norm(width), conv(width, width)
      self.downsample, self.scale = None, scale
      if stride > 1 or inputs != width:
        self.downsample = nn.Sequential(conv(inputs, width, 1, stride))

    def forward(self, x):
      first = functional.relu(self.bn1(x))
      kept = self.downsample(first) if self.downsample else x
      second = functional.relu(self.bn2(self.conv1(first)))
      return kept + self.scale * self.conv2(second)

  class Network(nn.Module):
    def __init__(self, scale):
      super().__init__()
      self.conv1 = conv(3, 8)
      self.layer1 = nn.Sequential(*(Block(8, 8, 1, 1) for _ in range(2)))
      self.layer2 = nn.Sequential(
        Block(8, 16, 2, 1), *(Block(16, 16, 1, scale) for _ in range(2))
      )
      self.fc = nn.Linear(16, 3)

    def forward(self, x):
      x = self.layer2(self.layer1(self.conv1(x)))
      return self.fc(x.mean(dim=(2, 3)))

  return Network


@needs('torch')
@pytest.mark.filterwarnings('ignore')
def test_a_release_of_the_authors_gives_the_same_logits(tmp_path):
  import torch

  torch.manual_seed(0)
  released = modules()(scale=0.25)
  with torch.no_grad():
    for parameter in released.parameters():
      parameter += 0.1 * torch.randn_like(parameter)
  torch.save(released.state_dict(), tmp_path / 'release.pt')
  state = torch.load(tmp_path / 'release.pt', weights_only=True)
  network = ResNet(**SMALL)
  variables = formats.from_torch(state, network)
  assert variables['batch_stats'] == {}
  rng = np.random.default_rng(0)
  pixels = rng.normal(size=(10, 12, 12, 3)).astype(np.float32)
  # As there: norms take the statistics of the test batch.
  logits, _ = network.apply(
    variables, jnp.asarray(pixels), {'stage2_chain': jnp.full(2, 0.25)},
    mutable=['batch_stats'],
  )  # fmt: skip
  with torch.no_grad():
    given = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    wanted = released.eval()(given).numpy()
  assert np.ptp(wanted) > 0.1
  np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


@needs('torch')
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['norm last', 'bottleneck', 'group norm'])
def test_tensors_of_modules_give_the_same_logits(kind, tmp_path):
  """Modules that were trained on by PyTorch: their statistics are their own."""
  import torch

  model = made(kind)
  formats.write(model, 'torch', tmp_path)
  spec = importlib.util.spec_from_file_location(
    'exported', tmp_path / 'network.py'
  )
  exported = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(exported)
  network = exported.load(tmp_path).train()
  pixels = torch.from_numpy(images(20).transpose(0, 3, 1, 2).copy())
  step = torch.optim.SGD(network.parameters(), 0.1)
  network(pixels).square().mean().backward()
  step.step()
  network.eval()
  found = formats.from_torch(network.state_dict(), model.network)
  again = export.Predictor(
    model.network, found, {}, model.mean, model.std, model.class_names,
    model.image_shape,
  )  # fmt: skip
  with torch.no_grad():
    wanted = network(pixels[:5]).numpy()
  assert np.abs(wanted - np.asarray(model.logits(images(20)[:5]))).max() > 1e-3
  np.testing.assert_allclose(
    again.logits(images(20)[:5]), wanted, rtol=2e-4, atol=2e-4
  )
