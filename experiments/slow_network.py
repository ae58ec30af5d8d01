"""Measures training on slow links: seconds, bytes and time to an accuracy.

  sudo python -m experiments.slow_network

Four processes train on handwritten digits, each on a host of its own, which is
a network namespace (see `experiments.namespaces`). It measures the seconds of a
round and of its local training; the bytes on the interfaces, as the kernel
counts them and as the accounting predicts them; and the seconds of training
until a test accuracy is reached. The namespaces are removed at the end, also
after an interrupt. Each link and method has a result file in
experiments/results/slow_network/; existing ones are not measured again.
"""

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
from experiments.runs import (
  RESULTS,
  check_results,
  first_test,
  provenance,
  write_record,
)
from resist_jax import report
from resist_jax.errors import Parser

FOLDER = RESULTS / 'slow_network'
WORKERS = 4
PORT = 7777
SHORT = 2  # Rounds of the short run, whose bytes are subtracted.
# Test accuracy on digits, which all methods reach within the rounds below.
TARGET = 0.95
METHODS = {
  'data_parallel': ('--config.protocol=data_parallel',),
  'local_sgd': ('--config.protocol=local_sgd',),
  'resist_masked_psum': ('--config.exchange=masked_psum',),
  'resist_hand_over': (),
  'resist_hand_over_bfloat16': ('--config.wire_format=bfloat16',),
  'resist_hand_over_int8': ('--config.wire_format=int8',),
}
# `digits` shows how methods learn. `paper_shares` divides its parameters
# between the shared part and blocks as the paper's network does, and trains so
# little that it mostly exchanges.
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
HEADERS = 66  # Bytes of the Ethernet, IP and TCP headers of a packet.
CARD = '--config=experiments/configs/digits.py'


def measure(
  network: str, method: str, link: Link, folder: pathlib.Path
) -> dict[str, Any]:
  """Trains once on four hosts.

  Args:
    network: A key of `NETWORKS`.
    method: A key of `METHODS`.
    link: The link of each host.
    folder: Workdir of the run.

  Returns:
    The measurements, as JSON values by name.
  """
  flags = [CARD, *NETWORKS[network], *METHODS[method], f'--workdir={folder}']
  flags += [f'--config.num_workers={WORKERS}']
  sent = []
  with hosts(WORKERS, link) as started:
    # A run also sends bytes outside of its rounds. They do not depend on the
    # number of rounds, so subtracting those of a short run removes them.
    for rounds in (SHORT, None) if _counts_bytes(network, link) else (None,):
      shutil.rmtree(folder, ignore_errors=True)
      extra = [f'--config.num_rounds={rounds}'] if rounds else []
      before = _sent(started)
      _train(started, [*flags, *extra])
      summary = json.loads((folder / 'summary.json').read_text())
      after = _sent(started)
      sent.append((after - before, summary['wire_bytes_total']))
  rows = report.read_rows(folder / 'metrics.jsonl')
  whole = _seconds_of_a_round(rows)
  local = statistics.median(row['seconds_local'] for row in rows[1:])
  reached = first_test(rows, TARGET)
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
    'seconds_to_target': reached['seconds_training'] if reached else None,
    'seconds_training': rows[-1]['seconds_training'],
    'test_accuracy': summary['test_accuracy'],
    'summary': summary,
    'config': json.loads((folder / 'config.json').read_text()),
  }


def _counts_bytes(network: str, link: Link) -> bool:
  return network == 'paper_shares' and not link.rate


def _sent(senders: list[Host]) -> int:
  """Returns the bytes that all hosts have sent so far, without headers."""
  return sum(b - HEADERS * p for b, p in (host.sent() for host in senders))


def _train(on: list[Host], flags: list[str]) -> None:
  """Starts one process on each host, and waits for all of them."""
  started = []
  try:
    for i, host in enumerate(on):
      words = [sys.executable, '-m', 'resist_jax', *flags]
      words += [f'--coordinator={on[0].address}:{PORT}']
      words += [f'--num_processes={len(on)}', f'--process_id={i}']
      quiet = None if i == 0 else subprocess.DEVNULL
      started.append(
        subprocess.Popen(
          host.command(words),
          env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
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
    sys.exit(f'error: the processes ended with {codes}.')


def _seconds_of_a_round(rows: list[dict[str, Any]]) -> float:
  """Returns the median seconds of a round.

  A median, because the second round still compiles the program that reads its
  metrics. Only rows of the same kind are compared: the clock of a tested round
  is read at its end, that of another round when the next one has trained.
  """
  tested = [i for i, row in enumerate(rows) if 'test_accuracy' in row]
  read = tested if tested[1:] else range(len(rows) - 1)
  return statistics.median(
    (rows[j]['seconds_training'] - rows[i]['seconds_training']) / (j - i)
    for i, j in itertools.pairwise(read)
  )


def settings() -> Iterator[tuple[str, str, Link, pathlib.Path]]:
  """Yields what is measured: network, method, link and result file."""
  for network in NETWORKS:
    for link in LINKS:
      for method in METHODS:
        words = link.name.replace('/s', '').replace(',', '').split()
        name = '_'.join([network, *words, method])
        target = FOLDER / f'{name}.json'
        if network == 'digits' and link.name != '100 Mbit/s':
          continue  # The link does not change how the network learns.
        yield network, method, link, target


def main() -> None:
  """Measures everything that has no result file."""
  parser = Parser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument(
    '--only', default='', help='measure only names that contain this'
  )
  options = parser.parse_args()
  if not any(options.only in target.stem for *_, target in settings()):
    names = ', '.join(target.stem for *_, target in settings())
    parser.error(
      f'--only is {options.only!r}, but no name contains it: {names}.'
    )
  check_results(parser)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  for network, method, link, target in settings():
    if options.only not in target.stem:
      continue
    if target.exists():
      print(f'{target.stem} has a result already')
      continue
    print(target.stem, file=sys.stderr, flush=True)
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
      measured = measure(network, method, link, folder / 'run')
    except NotPossibleError as error:
      parser.error(str(error))
    finally:
      shutil.rmtree(folder, ignore_errors=True)
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
