# pyrefly: ignore-errors
"""A network that resist_jax trained, in plain PyTorch: this file is all of it.

network = load('FOLDER')
logits = network(pixels)  # uint8 [B, C, H, W], numbers from 0 to 255
names = [network.class_names[i] for i in logits.argmax(1)]

The folder holds this file, `network.pt` (a state dict) and `network.json`.
"""

import json
import pathlib

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


def load(folder):
  """Reads the network of a folder.

  Args:
    folder: Path of the folder with this file's network.pt and network.json.

  Returns:
    The network, in the mode of evaluation.
  """
  folder = pathlib.Path(folder)
  network = Network(**json.loads((folder / 'network.json').read_text('utf-8')))
  network.load_state_dict(torch.load(folder / 'network.pt', weights_only=True))
  return network.eval()


class Network(nn.Module):
  """A residual network of stages, which normalises its images itself."""

  def __init__(
    self, class_names, image_shape, stage_sizes, widths, bottleneck,
    pre_activation, norm, stem,
  ):  # fmt: skip
    super().__init__()
    self.class_names, self.image_shape = class_names, image_shape
    kind = {'bottleneck': bottleneck, 'before': pre_activation, 'norm': norm}
    channels = image_shape[2]
    self.register_buffer('mean', torch.zeros(channels, 1, 1))
    self.register_buffer('std', torch.ones(channels, 1, 1))
    self.stem = Stem(
      channels, widths[0], stem, None if pre_activation else norm
    )
    stages, before = [], widths[0]
    for number, (size, width) in enumerate(zip(stage_sizes, widths)):  # noqa: B905
      blocks = []
      for i in range(size):
        stride = 2 if i == 0 and number > 0 else 1
        blocks.append(Block(before, width, stride, **kind))
        before = 4 * width if bottleneck else width
      stages.append(nn.Sequential(*blocks))
    self.stages = nn.Sequential(*stages)
    self.classifier = nn.Linear(before, len(class_names))

  def forward(self, pixels):
    """Maps uint8 pixels from 0 to 255, [B, C, H, W], to logits, [B, n]."""
    if pixels.is_floating_point():  # Numbers from 0 to 1 would look black.
      raise ValueError(
        f'pixels are {pixels.dtype}; give uint8 numbers from 0 to 255: leave '
        'out transforms such as ToTensor, which divide them by 255.'
      )
    x = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
    x = self.stages(self.stem(x))
    return self.classifier(x.mean(dim=(2, 3)))


class Stem(nn.Module):
  """The layers before the first stage."""

  def __init__(self, channels, width, kind, norm):
    super().__init__()
    size, stride = (7 if kind == 'imagenet' else 3), 1 if kind == 'small' else 2
    self.whitening = None
    if kind == 'whitened':
      self.whitening = nn.Conv2d(channels, 8 * channels, 2, bias=False)
      channels = 8 * channels
    self.conv = convolution(channels, width, size, stride)
    self.norm = make_norm(norm, width) if norm else None
    self.pools = kind == 'imagenet'

  def forward(self, x):
    """Maps images to what the first stage takes."""
    if self.whitening is not None:
      x = F.relu(self.whitening(F.pad(x, (0, 1, 0, 1))))
    x = self.conv(x)
    x = x if self.norm is None else F.relu(self.norm(x))
    return F.max_pool2d(x, 3, 2, 1) if self.pools else x


class Block(nn.Module):
  """A residual block; `before`: norm and ReLU come before each convolution."""

  def __init__(self, inputs, width, stride, bottleneck, before, norm):
    super().__init__()
    sizes = [(width, 3, stride), (width, 3, 1)]
    if bottleneck:
      sizes = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
    channels = [inputs, *(features for features, _, _ in sizes)]
    self.before, self.depth = before, len(sizes)
    for i, (features, size, step) in enumerate(sizes, start=1):
      conv = convolution(channels[i - 1], features, size, step)
      self.add_module(f'conv{i}', conv)
      normed = channels[i - 1] if before else features
      self.add_module(f'norm{i}', make_norm(norm, normed))
    self.shortcut, self.norm_shortcut = None, None
    if stride != 1 or inputs != channels[-1]:
      self.shortcut = convolution(inputs, channels[-1], 1, stride)
      if not before:
        self.norm_shortcut = make_norm(norm, channels[-1])

  def forward(self, x):
    """Adds the branch to the shortcut."""
    branch = F.relu(self.norm1(x)) if self.before else x
    shortcut = x if self.shortcut is None else self.shortcut(branch)
    if self.norm_shortcut is not None:
      shortcut = self.norm_shortcut(shortcut)
    for i in range(1, self.depth + 1):
      if self.before and i > 1:
        branch = F.relu(getattr(self, f'norm{i}')(branch))
      branch = getattr(self, f'conv{i}')(branch)
      if not self.before:
        branch = getattr(self, f'norm{i}')(branch)
        branch = branch if i == self.depth else F.relu(branch)
    out = shortcut + branch
    return out if self.before else F.relu(out)


def convolution(inputs, features, size, stride):
  """Returns a convolution without bias, padded to keep the size."""
  pad = (size - 1) // 2
  return nn.Conv2d(inputs, features, size, stride, pad, bias=False)


def make_norm(kind, channels):
  """Returns a batch norm, or a group norm in groups of 16 or fewer channels."""
  if kind == 'batch':
    return nn.BatchNorm2d(channels, eps=1e-5)
  size = next(n for n in (16, 8, 4, 2, 1) if channels % n == 0)
  return nn.GroupNorm(channels // size, channels, eps=1e-6)
