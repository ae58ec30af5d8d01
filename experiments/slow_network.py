"""Four processes on slow links, measured: seconds, bytes, time to accuracy.

  sudo python -m experiments.slow_network

Each process is a host of its own, in a network namespace (see
`experiments.namespaces`), and trains on handwritten digits. What is measured:
seconds of a round, those of local training apart; bytes on the interfaces, by
the kernel's count, beside the accounting's; and seconds of training to a test
accuracy. Namespaces are removed at the end, also where it is interrupted.
Result files go to experiments/results/slow_network/, one for each link and
method; what is there is not measured again.
"""

import argparse
from collections.abc import Iterator
import itertools
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from experiments.namespaces import LINKS, Host, Link, NotPossibleError, hosts
from experiments.provenance import provenance
from experiments.runs import RESULTS, write_record
from resist_jax import metrics

FOLDER = RESULTS / 'slow_network'
WORKERS = 4
PORT = 7777
# Of the digits' test images; all methods reach it within the rounds below.
TARGET = 0.95
METHODS = {
  'data_parallel': ('--config.protocol=data_parallel',),
  'local_sgd': ('--config.protocol=local_sgd',),
  'resist_masked_psum': ('--config.exchange=masked_psum',),
  'resist_hand_over': (),
  'resist_hand_over_bfloat16': ('--config.wire_format=bfloat16',),
  'resist_hand_over_int8': ('--config.wire_format=int8',),
}
# The digits' own network learns; one of the paper's proportions, a quarter as
# wide, has its shares of shared parameters and of blocks.
NETWORKS = {
  'digits': ('--config.eval_every=2',),
  'paper': (
    '--config.model.name=PreActResNet101',
    '--config.model.stage_sizes=(3, 4, 23, 3)',
    '--config.model.widths=(16, 32, 64, 128)',
    '--config.min_depth=0',
    '--config.num_rounds=6',
    '--config.local_steps=4',
    '--config.batch_size=8',
    '--config.eval_every=1000',
    '--config.evaluation.statistics_images=200',
  ),
}
CARD = '--config=experiments/configs/digits.py'


def measure(
  network: str, method: str, link: Link, folder: pathlib.Path
) -> dict[str, Any]:
  """Trains once on four hosts.

  Args:
    network: A key of `NETWORKS`.
    method: A key of `METHODS`.
    link: Between the hosts.
    folder: For the run.

  Returns:
    JSON values: what was measured.
  """
  flags = [CARD, *NETWORKS[network], *METHODS[method], f'--workdir={folder}']
  flags += [f'--config.num_workers={WORKERS}']
  with hosts(WORKERS, link) as found:
    _train(found, flags)
    sent = [host.sent() for host in found]
  rows = metrics.read_rows(folder / 'metrics.jsonl')
  summary = json.loads((folder / 'summary.json').read_text())
  seconds = [row['seconds_training'] for row in rows]
  # The first round may wait for what is done once; the others tell.
  rounds = [b - a for a, b in itertools.pairwise(seconds)]
  local = [row['seconds_local'] for row in rows[1:]]
  exchange = [a - b for a, b in zip(rounds, local, strict=True)]
  return {
    'rounds': len(rows),
    'seconds_round': statistics.median(rounds),
    'seconds_local': statistics.median(local),
    'seconds_exchange': statistics.median(exchange),
    'seconds_to_target': _seconds_to(rows),
    'seconds_training': seconds[-1],
    'test_accuracy': summary['test_accuracy'],
    'kernel_bytes': sum(b for b, _ in sent),
    'kernel_packets': sum(p for _, p in sent),
    'wire_bytes': summary['wire_bytes_total'],
    'evaluation_wire_bytes': summary['evaluation_wire_bytes_total'],
    'summary': summary,
    'config': json.loads((folder / 'config.json').read_text()),
  }


def _train(found: list[Host], flags: list[str]) -> None:
  """Runs one process on each host, and waits for all of them."""
  started = []
  try:
    for i, host in enumerate(found):
      words = [sys.executable, '-m', 'resist_jax', *flags]
      words += [f'--coordinator={found[0].address}:{PORT}']
      words += [f'--num_processes={len(found)}', f'--process_id={i}']
      quiet = None if i == 0 else subprocess.DEVNULL
      started.append(
        subprocess.Popen(
          host.command(words),
          stdout=subprocess.DEVNULL,
          stderr=quiet,
          start_new_session=True,
        )
      )
    codes = [process.wait() for process in started]
  finally:
    for process in started:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
  if any(codes):
    raise RuntimeError(f'the processes ended with {codes}.')


def _seconds_to(rows: list[dict[str, Any]]) -> float | None:
  for row in rows:
    if row.get('test_accuracy', 0) >= TARGET:
      return row['seconds_training']
  return None


def jobs(only: str) -> Iterator[tuple[str, str, Link, pathlib.Path]]:
  """Yields what is not measured yet."""
  for network in NETWORKS:
    for link in LINKS:
      for method in METHODS:
        words = link.name.replace('/s', '').replace(',', '').split()
        name = '_'.join([network, *words, method])
        target = FOLDER / f'{name}.json'
        if only in name and not target.exists():
          yield network, method, link, target


def main() -> None:
  """Measures what is missing."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--only', default='', help='names that have this')
  options = parser.parse_args()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  for network, method, link, target in jobs(options.only):
    print(target.stem, file=sys.stderr, flush=True)
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
      measured = measure(network, method, link, folder / 'run')
    except NotPossibleError as error:
      print(f'left out: {error}', file=sys.stderr)
      continue
    finally:
      shutil.rmtree(folder)
    FOLDER.mkdir(parents=True, exist_ok=True)
    record = {
      'command': 'python -m experiments.slow_network',
      'network': network,
      'method': method,
      'link': link.name,
      'flags': [*NETWORKS[network], *METHODS[method]],
      'target': TARGET,
      **measured,
      'provenance': provenance(f'{WORKERS} x cpu'),
    }
    write_record(target, record)


if __name__ == '__main__':
  main()
