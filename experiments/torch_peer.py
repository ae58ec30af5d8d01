"""Times a step of the paper's sub-ResNet, in turn here and in plain PyTorch.

PyTorch is not a dependency: `--torch` names a Python interpreter that has it.

  python -m experiments.torch_peer --torch=/path/to/python
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

from experiments.runs import RESULTS, provenance, write_record

FOLDER = RESULTS / 'bench'
ROOT = pathlib.Path(__file__).parent.parent
BLOCKS = 11  # Each of the paper's two workers holds 11 of 22 blocks.

PEER = """
import sys, time, torch
from torch import nn
from torch.nn import functional as F

def norm(width):
  return nn.BatchNorm2d(width, track_running_stats=False)

class Block(nn.Module):
  def __init__(self, before, width, stride):
    super().__init__()
    self.norms = nn.ModuleList([norm(before), norm(width)])
    conv = lambda i, s: nn.Conv2d(i, width, 3, s, 1, bias=False)
    self.convs = nn.ModuleList([conv(before, stride), conv(width, 1)])
    changes = before != width
    self.project = changes and nn.Conv2d(before, width, 1, stride, bias=False)

  def forward(self, x):
    h = F.relu(self.norms[0](x))
    shortcut = self.project(h) if self.project else x
    h = F.relu(self.norms[1](self.convs[0](h)))
    return shortcut + self.convs[1](h)

batch, blocks, steps = map(int, sys.argv[1:])
parts, before = [nn.Conv2d(3, 64, 3, 1, 1, bias=False)], 64
for width, size in zip((64, 128, 256, 512), (3, 4, 1 + blocks, 3)):
  for i in range(size):
    parts.append(Block(before, width, 2 if i == 0 and width > 64 else 1))
    before = width
parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100)]
best = float('inf')
for layout in (torch.contiguous_format, torch.channels_last):
  net = nn.Sequential(*parts).to(memory_format=layout)
  sgd = torch.optim.SGD(
    net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
  x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=layout)
  y = torch.randint(0, 100, (batch,))
  times = []
  for step in range(steps + 1):
    started = time.perf_counter()
    sgd.zero_grad()
    F.cross_entropy(net(x), y).backward()
    sgd.step()
    times.append(time.perf_counter() - started)
  best = min(best, sorted(times[1:])[steps // 2])
print(best, sum(p.numel() for p in net.parameters()))
"""


def main() -> None:
  """Measures, prints and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--torch', required=True, help='a Python interpreter with PyTorch'
  )
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--runs', type=int, default=5)
  parser.add_argument('--steps', type=int, default=7)
  args = parser.parse_args()
  ours, theirs, torch_params = [], [], 0
  for _ in range(args.runs):
    seconds, torch_params = _torch(args)
    theirs.append(seconds)
    result = _jax(args)
    ours.append(result['step_seconds'])
    if result['params_of_a_worker'] != torch_params:
      raise SystemExit(
        'error: the two networks have different numbers of parameters.'
      )
  ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
  record = {
    'command': 'python -m experiments.torch_peer --torch=PYTHON',
    'provenance': provenance(),
    'batch_size': args.batch_size,
    'params': torch_params,
    'runs': args.runs,
    'jax_seconds': statistics.median(ours),
    'torch_seconds': statistics.median(theirs),
    'ratio': ratio,
    'all': {'jax': ours, 'torch': theirs},
  }
  print(json.dumps(record, indent=2))
  write_record(FOLDER / f'peer_batch{args.batch_size}.json', record)


def _torch(args) -> tuple[float, int]:
  """Returns the seconds of a step in the faster of two memory layouts.

  Args:
    args: The arguments of the command line.

  Returns:
    Median seconds of a step, and the number of parameters.
  """
  sizes = map(str, (args.batch_size, BLOCKS, args.steps))
  command = [args.torch, '-c', PEER, *sizes]
  printed = subprocess.run(command, capture_output=True, text=True, check=True)
  seconds, params = printed.stdout.split()
  return float(seconds), int(params)


def _jax(args) -> dict:
  """Returns what `experiments.bench` measures for one of two workers."""
  out = FOLDER / 'peer.part'
  flags = [f'--batch_size={args.batch_size}', f'--repeats={args.steps}']
  subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.bench',
      '--network=paper',
      '--workers=2',
    ]
    + [*flags, '--only_step', f'--out={out}'],
    cwd=ROOT,
    check=True,
    capture_output=True,
  )
  result = json.loads(out.read_text())['results'][0]
  out.unlink()
  return result


if __name__ == '__main__':
  main()
