"""Trains any network by ResIST and its baselines, all on the same budget.

`language` and `vision_transformer` each bring a `Task`, and this file does the
rest. All protocols take the same number of steps on every worker, with AdamW
and clipped gradients. A run that is stopped goes on where it was.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
import re
import shutil
import sys
import time
from typing import Any

import jax
import numpy as np
import optax

from experiments.runs import (
  RESULTS,
  begin,
  begin_run,
  history,
  paths_of_seeds,
  provenance,
  read,
  write_record,
)
import resist_jax as resist
from resist_jax import accounting, folders
from resist_jax.errors import ConfigError, Parser, message, refused
from resist_jax.rounds import avoid_loads
from resist_jax.run import program
from resist_jax.run.lock import locked
from resist_jax.run.workdir import json_object, replace_text, write_json

PyTree = Any
# Their names for readers.
PROTOCOLS = {
  'data_parallel': 'data parallel',
  'local_sgd': 'local SGD',
  'diloco': 'DiLoCo',
  'resist': 'ResIST',
  'resist_training_scale': 'ResIST, scale in training',
  'resist_outer': 'ResIST, outer optimiser',
}
WORKERS = (4, 2, 8)  # The most asked for first.
OUTER = optax.sgd(0.7, momentum=0.9, nesterov=True)


@dataclasses.dataclass(frozen=True)
class Budget:
  """How long a run is.

  Attributes:
    batch: Examples of a worker in a step.
    local_steps: T.
    rounds: Rounds of a run.
    rate: Learning rate after the warm-up; it falls to a tenth by a cosine.
    test_every: Rounds between tests.
  """

  batch: int
  local_steps: int
  rounds: int
  rate: float
  test_every: int


@dataclasses.dataclass(frozen=True)
class Task:
  """A network, its data and its budget.

  Attributes:
    data: Name of the data.
    budget: How long a run is.
    chain: Name of the chain that ResIST cuts.
    init: Draws global parameters from a seed.
    make_loss: Returns the trainer's loss function from the factor on the
      branches of blocks in training.
    batches: `batches(S, seed, round)`, a pytree of arrays `[S, T, B, ...]`.
    test: `test(params, scale)`, results on test data by name, where `scale` is
      the factor on the branches of blocks.
    config: What else a result file says about it.
  """

  data: str
  budget: Budget
  chain: str
  init: Callable[[int], dict[str, PyTree]]
  make_loss: Callable[[float], Callable]
  batches: Callable[[int, int, int], PyTree]
  test: Callable[[PyTree, float], dict[str, float]]
  config: Mapping[str, Any]


def make_trainer(task: Task, protocol: str, S: int, seed: int):
  """Returns the trainer of a protocol, and the scale of blocks in tests.

  Args:
    task: What to train.
    protocol: One of `PROTOCOLS`.
    S: Workers.
    seed: Seed of assignments.

  Returns:
    `(trainer, test_scale)`.
  """
  budget = task.budget
  steps = budget.rounds * budget.local_steps
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, budget.rate, steps // 20, steps, budget.rate / 10
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1)
  )
  cut = protocol.startswith('resist')
  in_training = S if protocol == 'resist_training_scale' else 1.0
  trainer = resist.Trainer(
    task.make_loss(in_training),
    optimizer,
    num_workers=S,
    local_steps=budget.local_steps,
    chains=(task.chain,) if cut else (),
    seed=seed,
    average_gradients=protocol == 'data_parallel',
    carry=protocol == 'data_parallel',
    outer=OUTER if protocol in ('diloco', 'resist_outer') else None,
  )
  return trainer, 1 / S if cut and in_training == 1 else 1.0


def run(
  task: Task, protocol: str, S: int, seed: int, folder: pathlib.Path
) -> dict[str, Any]:
  """Trains a run, or continues it.

  Args:
    task: What to train.
    protocol: One of `PROTOCOLS`.
    S: Workers.
    seed: Seed of parameters, batches and assignments.
    folder: Where its state is saved after each test.

  Returns:
    JSON values by name: what a worker computes, holds and sends, and `curve`,
    a row for each test.
  """
  trainer, test_scale = make_trainer(task, protocol, S, seed)
  avoid_loads(trainer.devices)
  rows, state = _begin(trainer, task, seed, folder)
  sent = trainer.bytes_per_round(state, num_devices=S)
  held = [x[0].size for x in jax.tree.leaves((state.shared, state.chain))]
  seconds = rows[-1]['seconds'] if rows else 0.0
  trainer = trainer.compile(state, task.batches(S, seed, 0))
  for index in range(int(state.round), task.budget.rounds):
    batches = task.batches(S, seed, index)
    since = time.perf_counter()
    state, metrics = trainer.round(state, batches)
    loss = float(np.asarray(metrics['loss']).mean())
    seconds += time.perf_counter() - since
    done = index + 1
    if done % task.budget.test_every and done != task.budget.rounds:
      continue
    row = {'round': done, 'steps': done * task.budget.local_steps}
    row |= {'bytes': done * sent, 'seconds': seconds, 'train_loss': loss}
    rows.append(row | task.test(trainer.params(state), test_scale))
    print(f'{protocol} S={S} seed {seed}: {rows[-1]}', file=sys.stderr)
    # A row that has no state yet is dropped when the run goes on.
    replace_text(folder / 'rows.json', json.dumps(rows))
    trainer.save(folder, state)
  assert trainer.programs is not None
  flops = accounting.compiled_flops(trainer.programs, S // trainer.devices.size)
  return {
    'bytes_per_round': sent,
    'params_per_worker': sum(held),
    'flops_per_step': flops,
    'curve': rows,
  }


def _begin(trainer, task: Task, seed: int, folder: pathlib.Path):
  """Returns the rows and the state that a run begins with, or goes on with."""
  log = folder / 'rows.json'
  if not log.exists():
    state = trainer.init(task.init(seed))
    trainer.save(folder, state)
    replace_text(log, '[]')
    return [], state
  try:
    state = trainer.restore(folder)
  except ValueError as error:  # Such as a damaged file.
    raise ConfigError(message(error)) from error
  rows = json.loads(log.read_text())
  return [row for row in rows if row['round'] <= int(state.round)], state


def parser(doc: str | None, scales: Sequence[str]) -> Parser:
  """Returns the flags that all such experiments have.

  Args:
    doc: The docstring of the module, whose first line becomes the help.
    scales: Choices of `--scale`; the last is the default.

  Returns:
    The parser.
  """
  found = Parser(description=(doc or '').split('\n')[0])
  add = found.add_argument
  add('--scale', choices=scales, default=scales[-1])
  add('--only', default='', help='such as resist_s4,diloco_s4')
  add('--seeds', type=int, default=2, help='how many, starting from 0')
  add('--data_dir', default='', help='folder of prepared TFDS data sets')
  add(
    '--runs',
    default='runs',
    type=folders.argument,
    help='folder for unfinished runs',
  )
  add('--results', type=folders.argument, default=RESULTS)
  add('--busy', action='store_true', help='other work runs on the machine')
  return found


def main(
  name: str, options: argparse.Namespace, load: Callable[[], Task]
) -> int:
  """Trains all that has no result file yet.

  Args:
    name: Name of the experiment, and of its folder of results.
    options: See `parser`.
    load: Reads the data, and returns the task.

  Returns:
    The exit code.
  """
  try:
    if options.seeds < 1:
      raise ConfigError(f'--seeds is {options.seeds}; it must be at least 1.')
    wanted = _wanted(options.only)
    task = load()
    for seed in range(options.seeds):
      for protocol, S in wanted:
        _complete(task, protocol, S, seed, name, options)
  except ConfigError as error:
    return refused(error)
  except program.MENDABLE as error:
    line, code = program.explain(error, str(options.runs))
    print(f'error: {line}', file=sys.stderr)
    return code
  return 0


def _complete(task: Task, protocol, S, seed, name, options) -> None:
  """Trains a run without a result file, and writes that."""
  run_name = f'{stem(task.data)}_{protocol}_s{S}_seed{seed}'
  target = options.results / name / options.scale / f'{run_name}.json'
  config = _config(task, protocol, S, seed)
  if target.exists():
    done = read(target)['config']
    if task.data == 'python':  # Longer or shorter in each version of it.
      config = {**config, 'text_bytes': done.get('text_bytes')}
    _check_same(config, done, target)
    print(f'{run_name} has a result already')
    return
  for path in paths_of_seeds(target.parent):  # Means are over one text.
    other = read(path)['config']
    if other['data'] == task.data:
      _check_same({'text_bytes': config.get('text_bytes')}, other, path)
  begin(target)
  folder = options.runs / name / options.scale / run_name
  begin_run(folder, options.busy)
  with locked(folder):
    begun = folder / 'config.json'
    if begun.exists():
      _check_same(config, json_object(begun), folder)
    write_json(begun, config)
    found = run(task, protocol, S, seed, folder)
    record = _record(task, config, found)
    record['provenance'] |= history(folder)
    write_record(target, record)
    shutil.rmtree(folder)


def stem(data: str) -> str:
  """Returns the name of data in the names of files.

  Args:
    data: A name, or a path.

  >>> stem('tfds:imdb_reviews/plain_text'), stem('/texts/my text.txt')
  ('plain_text', 'my_text')
  """
  return re.sub(r'\W+', '_', pathlib.Path(data).stem)


def _config(task: Task, protocol, S, seed) -> dict[str, Any]:
  """Returns what is trained, as a result file says it."""
  config = {'protocol': protocol, 'num_workers': S, 'data': task.data}
  config |= {'seed': seed, **dataclasses.asdict(task.budget), **task.config}
  return json.loads(json.dumps(config))


def _check_same(config, found, place: pathlib.Path) -> None:
  """Refuses to take the result of one setting for that of another."""
  for name, value in config.items():
    if found.get(name, value) != value:
      raise ConfigError(
        f'{place} is of a run with {name} {found[name]!r}, and this one has '
        f'{value!r}: name other folders in --runs and --results.'
      )


def _wanted(only: str) -> list[tuple[str, int]]:
  """Returns protocols and numbers of workers: all, or those that are named."""
  known = {f'{p}_s{S}': (p, S) for S in WORKERS for p in PROTOCOLS}
  names = only.split(',') if only else list(known)
  for name in names:
    if name not in known:
      raise ConfigError(
        f'--only names {name!r}: take some of {", ".join(known)}.'
      )
  return [known[name] for name in names]


def _record(task: Task, config, found) -> dict[str, Any]:
  sizes = accounting.measure(task.init(config['seed']), [task.chain])
  curve = found.pop('curve')
  tested = {k: v for k, v in curve[-1].items() if k.startswith('test_')}
  return {
    'provenance': provenance(),
    'config': config,
    'summary': {
      'seed': config['seed'],
      'params_total': sizes.total,
      'params_in_blocks': sizes.total - sizes.shared,
      **found,
      **tested,
    },
    'curve': curve,
  }
