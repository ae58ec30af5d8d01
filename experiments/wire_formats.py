"""What each wire format costs in accuracy and saves in bytes.

  python -m experiments.wire_formats --data=digits --seeds=3
  python -m experiments.wire_formats --data=cifar10 --data_dir=FOLDER --seeds=2

Runs the card of the data set (CIFAR-10 at its CPU scale) under ResIST in every
wire format and under exact local SGD, with the same seeds, skips what is done,
and keeps each run in experiments/results/wire_formats/.
"""

import argparse
import json
import pathlib
import statistics

from experiments.runs import run
from resist_jax import wire

RESULTS = pathlib.Path(__file__).parent / 'results' / 'wire_formats'
CARDS = {'digits': 'digits.py', 'cifar10': 'cifar10.py:cpu'}
KINDS = (
  *(('resist', name) for name in wire.FORMATS),
  ('local_sgd', 'float32'),
)


def main() -> None:
  """Runs what is missing, and prints a table of all there is."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--data', choices=CARDS, default='digits')
  parser.add_argument('--data_dir', default='', help='of prepared TFDS sets')
  parser.add_argument('--seeds', type=int, default=3)
  args = parser.parse_args()
  for seed in range(args.seeds):
    for protocol, wire_format in KINDS:
      flags = [
        f'--config.protocol={protocol}',
        f'--config.wire_format={wire_format}',
        f'--config.seed={seed}',
        f'--config.data.dir={args.data_dir}',
      ]
      name = f'{args.data}_{protocol}_{wire_format}_seed{seed}.json'
      run(CARDS[args.data], flags, RESULTS / name)
  for row in table(args.data):
    print('  '.join(cell.ljust(24) for cell in row))


def table(name: str) -> list[list[str]]:
  """Returns what the result files say of a data set.

  Args:
    name: Of the data set.

  Returns:
    A head and a row for each protocol and format; no row where there are no
    results.
  """
  rows = [
    ['', 'test accuracy, deployed', 'against float32', 'on the wire a round']
    + ['against local SGD']
  ]
  exact: dict[int, float] = {}
  for protocol, wire_format in KINDS:
    paths = sorted(RESULTS.glob(f'{name}_{protocol}_{wire_format}_seed*.json'))
    found = [json.loads(path.read_text())['summary'] for path in paths]
    if not found:
      continue
    accuracy = {s['seed']: 100 * s['test_accuracy'] for s in found}
    if (protocol, wire_format) == ('resist', 'float32'):
      exact = accuracy
    lost = [v - exact[k] for k, v in accuracy.items() if k in exact]
    sent = found[0]['wire_bytes_per_round']
    rows.append(
      [
        f'{protocol} {wire_format}'.replace('_', ' '),
        f'{spread(list(accuracy.values()))} %',
        f'{statistics.mean(lost):+.2f} points' if lost else '',
        f'{sent / 1e6:.2f} MB',
        f'{sent / found[0]["wire_bytes_per_round_local_sgd"]:.3f}',
      ]
    )
  return rows if rows[1:] else []


def spread(values: list[float]) -> str:
  """Returns the mean and, of several values, the standard deviation.

  Args:
    values: Of the seeds.

  Returns:
    Text.

  >>> spread([90.0, 92.0]), spread([90.0])
  ('91.0 ± 1.4', '90.0')
  """
  if len(values) == 1:
    return f'{values[0]:.1f}'
  return f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}'


if __name__ == '__main__':
  main()
