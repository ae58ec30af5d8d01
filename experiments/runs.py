"""A training run that leaves a result file with its provenance."""

import contextlib
import functools
import json
import pathlib
import shutil
import sys
from typing import Any

import jax
import ml_collections

from experiments.provenance import provenance
from resist_jax import report
from resist_jax.run import cards, train, workdir

RESULTS = pathlib.Path(__file__).parent / 'results'
# Of a row of the log, what a curve shows.
CURVE = ('round', 'protocol', 'train_loss', 'train_accuracy', 'test_accuracy',
         'test_accuracy_paper', 'seconds_training', 'bytes_total',
         'wire_bytes_total', 'slots', 'num_blocks')  # fmt: skip


def load_card(
  card: str, argument: str, overrides: dict[str, Any]
) -> ml_collections.ConfigDict:
  """Returns the config of an experiment card.

  Args:
    card: One of `cards.names`.
    argument: Its words, with commas between.
    overrides: Values by dotted name of the field.

  Returns:
    The config.
  """
  config = cards.load(f'{card}:{argument}')
  config.update_from_flattened_dict(overrides)
  return config


def run(
  config: ml_collections.ConfigDict,
  target: pathlib.Path,
  folder: pathlib.Path,
) -> None:
  """Trains once, or goes on, and keeps what a reader needs to check it.

  Args:
    config: Of the run.
    target: The result file; where it exists, nothing is done.
    folder: Workdir of the run. Stopped, it goes on from there; it is removed
      when the result is written.

  Raises:
    ConfigError: If the config, the data or the workdir will not do.
    train.NonFiniteError: If training diverges.
    interrupt.Interrupted: On SIGTERM or SIGINT, after a checkpoint.
  """
  if target.exists():
    return
  begin(target)
  summary = train.train(config, str(folder))
  rows = report.read_rows(folder / 'metrics.jsonl')
  kind = summary['device'].split(',')[0]
  record = {
    'provenance': provenance(f'{summary["num_devices"]} x {kind}'),
    'config': json.loads((folder / 'config.json').read_text()),
    'summary': summary,
    'curve': [{k: row[k] for k in CURVE if k in row} for row in rows],
  }
  record['config']['data']['dir'] = ''  # A place on one machine.
  target.parent.mkdir(parents=True, exist_ok=True)
  write_record(target, record)
  shutil.rmtree(folder)


def write_record(target: pathlib.Path, record: dict[str, Any]) -> None:
  """Writes a result file, whole or not at all, a round of its curve a line.

  Args:
    target: The file.
    record: JSON values; `curve`, if there, is a list of rows.
  """
  curve = record.get('curve', [])
  rows = ',\n    '.join(json.dumps(row) for row in curve)
  text = json.dumps({**record, 'curve': []} if curve else record, indent=2)
  text = text.replace('"curve": []', f'"curve": [\n    {rows}\n  ]')
  workdir.replace_text(target, text + '\n')


def mark_busy(target: pathlib.Path) -> None:
  """Keeps with a result that its machine did other work at the same time.

  Args:
    target: The result file.
  """
  record = json.loads(target.read_text())
  record['provenance']['busy'] = True
  write_record(target, record)


def begin(target: pathlib.Path) -> None:
  """Says what will be trained, after making sure that it can be kept.

  Args:
    target: The result file.

  Raises:
    ConfigError: If it cannot be written.
  """
  workdir.check_writable(target.parent, 'results')
  _begin_process()
  print(f'{target.parent.name}/{target.name}', file=sys.stderr, flush=True)


@functools.cache
def _begin_process() -> None:
  """Gives a process that will train several times its virtual CPU devices."""
  with contextlib.suppress(RuntimeError):  # JAX that runs keeps what it has.
    jax.config.update('jax_num_cpu_devices', 8)
