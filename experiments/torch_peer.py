"""Times a step of the paper's sub-ResNet, in turn here and in plain PyTorch.

PyTorch is not a dependency: `--torch` names a Python interpreter that has it.
It may train with automatic mixed precision, and compiled; its fastest form
counts.

  python -m experiments.torch_peer --torch=/path/to/python
  python -m experiments.torch_peer --torch=/path/to/python --workers=4 \
    --batch_size=128 --dtype=bfloat16 --compile --steps=20 --runs=1 --out=FILE
"""

from collections.abc import Iterator
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from experiments.runs import (
  RESULTS,
  command,
  count,
  load,
  machine,
  parsed,
  provenance,
  write_record,
)
from experiments.table import Table
from resist_jax.errors import ConfigError, Parser, one_line, refused

FOLDER = RESULTS / 'bench'
ROOT = pathlib.Path(__file__).parent.parent
LENGTH = 22  # Blocks of the chain that is cut: a worker of two has 11.

PEER = """
import json, statistics, sys, time, torch
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

batch, blocks, repeats, steps = map(int, sys.argv[1:5])
precision, compiles = sys.argv[5], sys.argv[6] == 'True'
device = 'cuda' if torch.cuda.is_available() else 'cpu'
torch.backends.cudnn.benchmark = True
torch.backends.cudnn.allow_tf32 = precision == 'tensorfloat32'
torch.backends.cuda.matmul.allow_tf32 = precision == 'tensorfloat32'
parts, before = [nn.Conv2d(3, 64, 3, 1, 1, bias=False)], 64
for width, size in zip((64, 128, 256, 512), (3, 4, 1 + blocks, 3)):
  for i in range(size):
    parts.append(Block(before, width, 2 if i == 0 and width > 64 else 1))
    before = width
parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100)]

def wait():
  if device == 'cuda':
    torch.cuda.synchronize()

def measure(layout, mode=None):
  net = nn.Sequential(*parts).to(device, memory_format=layout)
  sgd = torch.optim.SGD(
    net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
  x = torch.randn(batch, 3, 32, 32, device=device)
  x = x.contiguous(memory_format=layout)
  y = torch.randint(0, 100, (batch,), device=device)
  model = torch.compile(net, mode=mode) if mode else net
  times = []
  for turn in range(repeats + 1):
    wait()
    started = time.perf_counter()
    for _ in range(steps):
      sgd.zero_grad()
      with torch.autocast(device, torch.bfloat16, precision == 'bfloat16'):
        loss = F.cross_entropy(model(x), y)
      loss.backward()
      sgd.step()
    wait()
    times.append((time.perf_counter() - started) / steps)
  return statistics.median(times[1:])

found = {
  'contiguous': measure(torch.contiguous_format),
  'channels_last': measure(torch.channels_last),
}
# The latter as CUDA graphs: else the host takes longer than the device.
for mode in ('default', 'reduce-overhead') if compiles else ():
  try:
    found[f'compiled, {mode}'] = measure(torch.channels_last, mode)
  except Exception as error:
    print(error, file=sys.stderr)
name = torch.cuda.get_device_name() if device == 'cuda' else device
params = sum(p.numel() for part in parts for p in part.parameters())
print(json.dumps({'seconds': found, 'params': params, 'device': name,
                  'torch': torch.__version__}))
"""


def main() -> None:
  """Measures, prints and writes the result."""
  parser = Parser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--torch', required=True, help='a Python interpreter with PyTorch'
  )
  parser.add_argument('--batch_size', type=count, default=16)
  parser.add_argument('--workers', type=count, default=2, help='1: all blocks')
  parser.add_argument('--runs', type=count, default=5)
  parser.add_argument('--repeats', type=count, default=7, help='timed calls')
  parser.add_argument('--steps', type=count, default=1, help='of a timed call')
  parser.add_argument(
    '--dtype', default='float32', choices=['float32', 'bfloat16']
  )
  parser.add_argument(
    '--precision',
    choices=['highest', 'tensorfloat32'],
    help='of float32; highest by default, as PyTorch has it',
  )
  parser.add_argument('--compile', action='store_true', help='torch.compile')
  args = parsed(parser, free=['torch'])
  if args.dtype == 'float32':
    args.precision = args.precision or 'highest'
  try:
    _measure(args)
  except ConfigError as error:
    sys.exit(refused(error))
  except subprocess.CalledProcessError as error:  # It has said why.
    sys.exit(error.returncode)


def _measure(args) -> None:
  blocks = -(-LENGTH // args.workers)
  ours, theirs, peer = [], [], {}
  for _ in range(args.runs):
    peer = _torch(args, blocks)
    theirs.append(peer['seconds'])
    result = _jax(args)
    ours.append(result['step_seconds'])
    if result['params_of_a_worker'] != peer['params']:
      raise SystemExit(
        'error: the two networks have different numbers of parameters.'
      )
  best = [min(seconds.values()) for seconds in theirs]
  ratio = statistics.median(a / b for a, b in zip(ours, best, strict=True))
  record = {
    'command': re.sub(
      r'--torch[ =]\S+', '--torch=PYTHON', command('experiments.torch_peer')
    ),
    'provenance': provenance(),
    'versions': {'torch': peer['torch']},
    'torch_device': peer['device'],
    'dtype': args.dtype,
    'precision': args.precision,
    'batch_size': args.batch_size,
    'blocks': blocks,
    'params': peer['params'],
    'runs': args.runs,
    'jax_seconds': statistics.median(ours),
    'torch_seconds': statistics.median(best),
    'ratio': ratio,
    'all': {'jax': ours, 'torch': theirs},
  }
  print(json.dumps(record, indent=2))
  kept = '_kept' if 'MALLOC_TRIM_THRESHOLD_' in os.environ else ''
  kind = record['provenance']['device'].split(' x ')[1].replace(' ', '_')
  where = '' if kind == 'cpu' else f'{kind}_{args.dtype}_torch_'
  name = f'{where}peer_batch{args.batch_size}{kept}.json'
  path = args.out or FOLDER / name
  write_record(path, record)


def _torch(args, blocks: int) -> dict:
  """Returns the seconds of a step in each form, and what PyTorch says of it."""
  sizes = map(str, (args.batch_size, blocks, args.repeats, args.steps))
  precision = args.precision or args.dtype
  words = [args.torch, '-c', PEER, *sizes, precision, str(args.compile)]
  try:
    printed = subprocess.run(
      words, stdout=subprocess.PIPE, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError) as error:
    raise ConfigError(
      f'--torch={args.torch} cannot train with PyTorch ({one_line(error)[:200]}'
      '): name a Python interpreter that has it.'
    ) from error
  return json.loads(printed.stdout.splitlines()[-1])


def _jax(args) -> dict:
  """Returns what `experiments.bench` measures for one worker."""
  words = [sys.executable, '-m', 'experiments.bench', '--network=paper']
  names = ['workers', 'batch_size', 'repeats', 'steps', 'dtype']
  names += ['precision'] if args.precision else []
  words += [f'--{name}={getattr(args, name)}' for name in names]
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / 'ours.json'
    subprocess.run(
      [*words, '--only_step', f'--out={out}'],
      cwd=ROOT,
      check=True,
      stdout=subprocess.DEVNULL,
    )
    return json.loads(out.read_text())['results'][0]


def tables() -> Iterator[Table]:
  """Yields a step here beside one in PyTorch, for each machine and setting."""
  alike: dict[Any, list[Any]] = {}
  for r in [*load('bench/peer_*.json'), *load('bench/*torch_*.json')]:
    where = machine(r['provenance'], count=False)
    precision = '' if r['precision'] == 'highest' else r['precision']
    key = where, r['batch_size'], r['blocks'], precision or r['dtype']
    alike.setdefault(key, []).append(r)
  for key, records in alike.items():
    yield _beside_torch(key, records)


def _beside_torch(key, records) -> Table:
  where, batch_size, blocks, precision = key
  first = records[0]
  on_cpu = first['provenance']['device'].endswith(' cpu')
  goal = 'The goal was a ratio of at most 1.2. ' if on_cpu else ''
  kept = (
    ' "Kept": the C library of both keeps the memory of a step for the next '
    'one, as docs/running.md says.'
  )
  caption = (
    f"One step of the paper's sub-ResNet ({blocks} blocks, batch size "
    f'{batch_size}{"" if on_cpu else f", {precision}"}) here and in plain '
    f'PyTorch. {goal}Medians of {first["runs"]} alternating runs, and of their '
    f'ratios, {where}.{kept if on_cpu else ""}'
  )
  rows = []
  for r in records:
    keeps = 'MALLOC_TRIM_THRESHOLD_' in r['provenance'].get('environment', {})
    times = [r[k] for k in ('jax_seconds', 'torch_seconds')]
    rows.append(
      ([('freed', 'kept')[keeps]] if on_cpu else [r['versions']['torch']])
      + [f'{x:.2f}' if on_cpu else f'{x:.5f}' for x in times]
      + [f'{r["ratio"]:.2f}']
    )
  head = ['JAX, seconds', 'PyTorch, seconds', 'ratio']
  head = ['memory' if on_cpu else 'PyTorch', *head]
  return Table(caption, first['command'], head, rows)


def accelerator_tables() -> Iterator[Table]:
  """Yields both networks' steps in bfloat16 beside the device's own rate."""
  for r in load('bench/*_torch.json'):
    if 'results' not in r:  # Of the command, which writes another form.
      continue
    rows = []
    for network in r['results']:
      flop = {
        x['blocks']: (x['flop_per_second'], x['flop_per_second_of_matmul'])
        for record in load('bench/*_bfloat16_*.json')
        if 'results' in record and record['provenance'] == r['provenance']
        for x in record['results']
        if 'flop_per_second' in x
      }
      ours, peak = flop[network['blocks']]
      theirs = {
        name: seconds
        for name, seconds in network['torch_seconds'].items()
        if 'again' not in name
      }
      eager = min(v for k, v in theirs.items() if 'compiled' not in k)
      graphs = theirs.get('compiled, reduce-overhead')
      rows.append(
        [
          f'{network["network"]}, {network["blocks"]} blocks',
          f'{1e3 * network["jax_seconds"]:.2f} ms',
          f'{ours / 1e12:.0f} TFLOP/s',
          f'{ours / peak:.0%}',
          f'{1e3 * eager:.2f} ms',
          f'{1e3 * graphs:.2f} ms' if graphs else '',
        ]
      )
    torch = r['versions']['torch']
    eager = r['results'][0]['torch_seconds']
    again = eager['channels_last, measured again'] / eager['channels_last'] - 1
    caption = (
      "A step of the paper's networks in bfloat16, batch size "
      f'{r["batch_size"]}, {machine(r["provenance"], count=False)}, and of '
      f'PyTorch {torch} '
      'with automatic mixed precision. "Share of a product" is the rate '
      'divided by that of a large product of matrices on the same device. '
      'PyTorch compiled uses CUDA graphs; the full network was not compiled. '
      'Medians of calls of 20 steps. JAX and PyTorch ran apart, and the result '
      'file was put together by hand: the command below measures both in turn, '
      'one network a call (the full one with --workers=1), and writes another '
      'form of file. An eager step that was measured twice took '
      f'{again:.0%} longer.'
    )
    head = ['network', 'JAX', 'rate', 'share of a product', 'PyTorch, eager']
    head.append('PyTorch, compiled')
    command = (
      'python -m experiments.torch_peer --torch=PYTHON --workers=4 '
      f'--batch_size={r["batch_size"]} --dtype={r["dtype"]} --steps=20 '
      '--compile --out=FILE'
    )
    yield Table(caption, command, head, rows)


if __name__ == '__main__':
  main()
