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
from resist_jax import report

FOLDER = RESULTS / 'slow_network'
WORKERS = 4
PORT = 7777
SHORT = 2  # Rounds of a run that another one is compared with.
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
# The digits' own network learns; the other one has the paper's shares of shared
# parameters and of blocks, and does next to nothing but exchange.
NETWORKS = {
  'digits': ('--config.eval_every=2',),
  'paper_shares': (
    '--config.model.name=PreActResNet101',
    '--config.model.stage_sizes=(1, 1, 15, 2)',
    '--config.model.widths=(32, 64, 128, 256)',
    '--config.num_rounds=8',
    '--config.local_steps=4',
    '--config.batch_size=8',
    '--config.eval_every=1000',
    '--config.checkpoint_every=1000',
    '--config.evaluation.statistics_images=120',
  ),
}
HEADERS = 66  # Bytes of a packet that are not the program's: Ethernet, IP, TCP.
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
  sent = []
  with hosts(WORKERS, link) as found:
    # What a run sends besides its rounds is the same for any number of them.
    for rounds in (SHORT, None) if _counts_bytes(network, link) else (None,):
      shutil.rmtree(folder, ignore_errors=True)
      extra = [f'--config.num_rounds={rounds}'] if rounds else []
      before = _sent(found)
      _train(found, [*flags, *extra])
      summary = json.loads((folder / 'summary.json').read_text())
      after = _sent(found)
      sent.append((after - before, summary['wire_bytes_total']))
  rows = report.read_rows(folder / 'metrics.jsonl')
  whole = _seconds_of_a_round(rows)
  local = statistics.median(row['seconds_local'] for row in rows[1:])
  counted = {}
  if len(sent) == 2:
    counted = {
      'rounds_counted': len(rows) - SHORT,
      'kernel_bytes': sent[1][0] - sent[0][0],
      'accounted_bytes': sent[1][1] - sent[0][1],
    }
  return {
    'rounds': len(rows),
    'seconds_round': whole,
    'seconds_local': local,
    'seconds_exchange': whole - local,
    **counted,
    'seconds_to_target': _seconds_to(rows),
    'seconds_training': rows[-1]['seconds_training'],
    'test_accuracy': summary['test_accuracy'],
    'summary': summary,
    'config': json.loads((folder / 'config.json').read_text()),
  }


def _counts_bytes(network: str, link: Link) -> bool:
  return network == 'paper_shares' and not link.rate


def _sent(found: list[Host]) -> int:
  """Returns what all hosts have sent so far, by the kernel, without headers."""
  return sum(b - HEADERS * p for b, p in (host.sent() for host in found))


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


def _seconds_of_a_round(rows: list[dict[str, Any]]) -> float:
  """Returns the median: the second round still compiles what reads its metrics.

  The clock of a row is read when the next round has trained, already; that of a
  tested one at its own end.
  """
  tested = [i for i, row in enumerate(rows) if 'test_accuracy' in row]
  read = tested if tested[1:] else range(len(rows) - 1)
  return statistics.median(
    (rows[j]['seconds_training'] - rows[i]['seconds_training']) / (j - i)
    for i, j in itertools.pairwise(read)
  )


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
        if network == 'digits' and link.name != '100 Mbit/s':
          continue  # How it learns does not depend on the link.
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
      shutil.rmtree(folder, ignore_errors=True)
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
