"""ResIST and its baselines on handwritten digits: the README's first table.

  python -m experiments.digits --seeds=3

Runs the card `digits.py` for each protocol and seed, skips what is done, and
keeps each run's summary, config and provenance in experiments/results/digits/.
"""

import argparse
import pathlib

from experiments.runs import run

RESULTS = pathlib.Path(__file__).parent / 'results' / 'digits'
PROTOCOLS = ('resist', 'local_sgd', 'data_parallel')


def main() -> None:
  """Runs what is missing."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--seeds', type=int, default=3)
  args = parser.parse_args()
  for seed in range(args.seeds):
    for protocol in PROTOCOLS:
      shown = protocol == 'resist' and seed == 0
      run(
        'digits.py',
        [f'--config.protocol={protocol}', f'--config.seed={seed}'],
        RESULTS / f'{protocol}_seed{seed}.json',
        RESULTS / 'decomposition.png' if shown else None,
      )


if __name__ == '__main__':
  main()
