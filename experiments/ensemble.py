"""Sub-ResNets that are never synchronised, as an ensemble: the paper's table.

  python -m experiments.ensemble --scale=cpu --data_dir=FOLDER

Each of S networks is as deep as a worker's sub-ResNet and trains alone, for as
many steps as a worker of Table 2. The ensemble averages their probabilities.
Unlike in the paper, each member has its own initial parameters.
"""

from collections.abc import Mapping
import json
import pathlib
import shutil

import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import paper, pictures, table2
from experiments.experiment import (
  Cell,
  Drawn,
  Experiment,
  Results,
  main,
  of_runs,
)
from experiments.runs import begin, history, provenance, write_record
from experiments.table import Table
from resist_jax import data, decomposition
from resist_jax.run import export, train
from resist_jax.run.config import build_model
from resist_jax.run.lock import locked

WORKERS = {'smoke': (2,), 'cpu': (2, 4), 'paper': (2, 4, 8)}


def cell(name: str, workers: int) -> Cell:
  """Returns the cell of an ensemble.

  Args:
    name: A card, `cifar10` or `cifar100`.
    workers: Number of members.

  Returns:
    The cell.
  """
  return Cell(f'{name}_s{workers}', name, f's{workers}')


def cells(scale: str) -> list[Cell]:
  """Returns the ensembles of both data sets."""
  return [cell(n, workers) for workers in WORKERS[scale] for n in table2.DATA]


def member(
  config: ml_collections.ConfigDict, number: int
) -> ml_collections.ConfigDict:
  """Returns the config of one network of an ensemble.

  Args:
    config: Config of the ResIST run, in which the member would be a worker.
    number: Number of the member, 0 to S - 1.

  Returns:
    The config of a run of one worker, which is tested at its end only.
  """
  S = config.num_workers
  stage_sizes = list(build_model(config, num_classes=2).stage_sizes)
  for stage in config.partition:
    length = stage_sizes[stage - 1] - 1
    sizes = length, S, config.min_depth
    stage_sizes[stage - 1] = 1 + decomposition.slots_per_worker(*sizes)
  alone = config.copy_and_resolve_references()
  alone.protocol, alone.num_workers, alone.min_depth = 'local_sgd', 1, 0
  alone.model.stage_sizes = tuple(stage_sizes)
  alone.seed = config.seed * S + number
  alone.eval_every = alone.num_rounds
  return alone


def train_ensemble(
  config: ml_collections.ConfigDict, target: pathlib.Path, folder: pathlib.Path
) -> None:
  """Trains the members of an ensemble, tests it, and writes its result file.

  Args:
    config: Config of the ResIST run, in which the members would be the workers.
    target: The result file.
    folder: Folder of the members' workdirs, which is deleted at the end.
  """
  begin(target)
  members = [member(config, number) for number in range(config.num_workers)]
  names = [f'member{number}' for number in range(len(members))]
  with locked(folder):  # A second copy of the command is refused at its start.
    summaries = [
      train.train(alone, str(folder / name))
      for alone, name in zip(members, names, strict=True)
    ]
  test = data.load(
    config.data.name, config.data.dir, config.data.validation
  ).tests['test']
  predictors = [export.load(folder / name) for name in names]
  num_correct = 0
  for rows in np.array_split(np.arange(len(test)), -(-len(test) // 500)):
    batch = test.take(rows)
    images = jnp.asarray(batch.images)
    mean = np.mean([predict(images) for predict in predictors], axis=0)
    num_correct += int((mean.argmax(axis=-1) == batch.labels).sum())
  kind = summaries[0]['device'].split(',')[0]
  record = {
    'provenance': provenance(f'{summaries[0]["num_devices"]} x {kind}')
    | history(folder),
    'config': json.loads(json.dumps(config.to_dict())),
    'summary': {
      'seed': config.seed,
      'test_accuracy': num_correct / len(test),
      'members': summaries,
    },
  }
  record['config']['data']['dir'] = ''  # It depends on the machine.
  write_record(target, record)
  shutil.rmtree(folder)


def tables(results: Results) -> list[Table]:
  """Compares ensembles with their members, ResIST and the paper's ensembles."""
  rows, found, shown = [], [], []
  for name, title in table2.DATA.items():
    for workers in WORKERS[results.scale]:
      run = cell(name, workers)
      records = results.of(run)
      if not records:
        continue
      resist = table2.cell(name, 'resist', workers)
      found += records
      shown += [*records, *results.of(resist)]
      alone = [
        100 * summary['test_accuracy']
        for record in records
        for summary in record['summary']['members']
      ]
      rows.append(
        [title, str(workers), f'{np.mean(alone):.1f}', results.percent(run)]
        + [results.percent(resist)]
        + [f'{paper.ENSEMBLE[name][workers]:.2f}']
        + [paper.ACCURACY[name]['resist'][workers]]
      )
  if not rows:
    return []
  caption = (
    f'Deployed test accuracy in %, {results.scale} scale: the mean of the '
    'members, each alone; their ensemble, which runs all of them; and ResIST. '
    f'Its runs are those of `experiments.table2`. {of_runs(shown)}'
  )
  head = ['data', 'members', 'alone', 'ensemble', 'ResIST']
  head += ['paper: ensemble', 'paper: ResIST']
  command = EXPERIMENT.made_by(results.scale, found)
  return [Table(caption, command, head, rows)]


def figures(results: Results) -> Mapping[str, Drawn]:
  """Draws the accuracy of ensembles and ResIST by the number of workers."""
  panels = {}
  for name, title in table2.DATA.items():
    # Only numbers of workers for which there is an ensemble.
    counts = [w for w in WORKERS[results.scale] if results.of(cell(name, w))]
    lines = {
      'ensemble': lambda workers, n=name: cell(n, workers),
      'ResIST': lambda workers, n=name: table2.cell(n, 'resist', workers),
    }
    panels[title] = {
      label: {
        str(workers): [100 * value for value in values]
        for workers in counts
        if (values := results.values(run(workers), 'test_accuracy'))
      }
      for label, run in lines.items()
    }
  return {'ensemble': pictures.steps(panels, xlabel='workers')}


def beside(scale: str) -> list[Cell]:
  """Returns the ResIST runs of Table 2 that stand beside the ensembles."""
  return [
    table2.cell(n, 'resist', S) for S in WORKERS[scale] for n in table2.DATA
  ]


EXPERIMENT = Experiment(
  'ensemble',
  'Never synchronised',
  cells,
  tables,
  figures,
  train_ensemble,
  beside=beside,
)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
