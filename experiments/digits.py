"""ResIST and its baselines on handwritten digits: the README's first table.

  python -m experiments.digits --seeds=3

Runs the card `digits.py` for each protocol and seed, skips what is done, and
keeps each run's summary, config and provenance in experiments/results/digits/.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

from experiments.provenance import provenance

RESULTS = pathlib.Path(__file__).parent / 'results' / 'digits'
CARD = pathlib.Path(__file__).parent / 'configs' / 'digits.py'
PROTOCOLS = ('resist', 'local_sgd', 'data_parallel')


def main() -> None:
  """Runs what is missing."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--seeds', type=int, default=3)
  args = parser.parse_args()
  RESULTS.mkdir(parents=True, exist_ok=True)
  for seed in range(args.seeds):
    for protocol in PROTOCOLS:
      target = RESULTS / f'{protocol}_seed{seed}.json'
      if not target.exists():
        run(protocol, seed, target)


def run(protocol: str, seed: int, target: pathlib.Path) -> None:
  """Trains once and keeps what a reader needs to check it.

  Args:
    protocol: Of the run.
    seed: Of the run.
    target: The result file.
  """
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder) / protocol  # Pictures bear its name.
    flags = [
      f'--config.protocol={protocol}',
      f'--config.seed={seed}',
      f'--workdir={workdir}',
    ]
    subprocess.run(
      [sys.executable, '-m', 'resist_jax', f'--config={CARD}', *flags],
      check=True,
    )
    record = {
      'provenance': provenance(),
      'config': json.loads((workdir / 'config.json').read_text()),
      'summary': json.loads((workdir / 'summary.json').read_text()),
    }
    if protocol == 'resist' and seed == 0:
      picture = 'decomposition.png'
      shutil.copy(workdir / picture, RESULTS / picture)
  target.write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
  main()
