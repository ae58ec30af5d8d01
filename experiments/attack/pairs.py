"""Pairs of processes that differ in one thing: both must say which, and end."""

from collections.abc import Mapping
import gzip
import importlib.util
import pathlib
import random
import shutil
from typing import Any, NamedTuple

from experiments.attack import judged, started
from experiments.attack.judged import Case

# A field, and its value in process 1; process 0 has that of `started.TINY`.
FIELDS = {
  'protocol': 'local_sgd',
  'num_workers': 4,
  'num_devices': 2,
  'devices_per_worker': 2,
  'num_rounds': 3,
  'local_steps': 3,
  'seed': 1,
  'partition': '(1,)',
  'min_depth': 3,
  'depths': '(2,2)',
  'residual_scale': 'training',
  'exchange': 'masked_psum',
  'wire_format': 'int8',
  'phases.full_before': 1,
  'phases.full_after': 1,
  'batch_size': 4,
  'lr': 0.050001,
  'optimizer.momentum': 0.8,
  'optimizer.drops': '(0.5,0.7)',
  'optimizer.carry_momentum': True,
  'data.name': 'mnist',
  'data.sharded': True,
  'data.augment': 'flip',
  'data.validation': 0.1,
  'model.name': 'PreActResNet18',
  'model.widths': '(4,8)',
  'model.norm': 'group',
  'eval_every': 2,
  'evaluation.batch_size': 120,
  'faults.leave_out': False,
}
OPTIONS = {
  'jax_enable_x64': ('JAX_ENABLE_X64', '1'),
  'jax_default_matmul_precision': ('JAX_DEFAULT_MATMUL_PRECISION', 'highest'),
  'jax_default_prng_impl': ('JAX_DEFAULT_PRNG_IMPL', 'rbg'),
  'jax_threefry_partitionable': ('JAX_THREEFRY_PARTITIONABLE', '0'),
}
_DIGITS = 'datasets/data/digits.csv.gz'
NOT_TRIED = (
  'other versions of JAX or of other packages',
  'fields that differ in more than two processes',
  'two hosts',
)


class Pair(NamedTuple):
  """What process 1 has instead of what process 0 has.

  Attributes:
    group: Kind of the difference.
    name: Its name.
    says: A pattern that both lines must match.
    words: Flags that process 1 gets besides.
    env: Variables that process 1 gets besides.
  """

  group: str
  name: str
  says: str
  words: tuple[str, ...] = ()
  env: Mapping[str, str] = {}


def of_all(folder: pathlib.Path) -> list[Pair]:
  """Returns the pairs, and writes what they need.

  Args:
    folder: Where to.
  """
  fields = [
    Pair('field', name, rf'\b{name} is ', (f'--config.{name}={value}',))
    for name, value in FIELDS.items()
  ]
  options = [
    Pair('option of JAX', name, name, env=dict([variable]))
    for name, variable in OPTIONS.items()
  ]
  # Any change of the data changes more than one thing that is compared.
  data = [
    Pair('data', name, r'data set digits\.\S+ is ', env={'PYTHONPATH': path})
    for name, path in (
      ('an image', _digits(folder / 'image', 100, 5)),
      ('a label', _digits(folder / 'label', 100, -1)),
      ('the number of images', _digits(folder / 'fewer')),
    )
  ]
  places = [
    Pair('code', 'a comment', 'code of resist_jax',
         env={'PYTHONPATH': _code(folder / 'code')}),
    Pair('folder', 'workdir', 'workdir', (f'--workdir={folder}/other',)),
    Pair('place', 'num_processes', 'num_processes', ('--num_processes=3',)),
  ]  # fmt: skip
  return [*fields, *options, *data, *places]


def _digits(folder: pathlib.Path, row: int = -1, column: int = 0) -> str:
  """Writes digits of which one number differs, or without the last of them.

  Returns:
    A folder for PYTHONPATH, which holds the digits and nothing else of their
    package.
  """
  spec = importlib.util.find_spec('sklearn')
  assert spec
  assert spec.origin
  whole = pathlib.Path(spec.origin).parent / _DIGITS
  lines = gzip.decompress(whole.read_bytes()).decode().splitlines()
  if row < 0:
    lines = lines[:-1]
  else:
    numbers = lines[row].split(',')
    numbers[column] = str((int(numbers[column]) + 1) % 10)
    lines[row] = ','.join(numbers)
  target = folder / 'sklearn' / _DIGITS
  target.parent.mkdir(parents=True)
  target.write_bytes(gzip.compress('\n'.join(lines).encode()))
  (folder / 'sklearn' / '__init__.py').touch()
  return f'{folder}:{started.ROOT}'


def _code(folder: pathlib.Path) -> str:
  """Copies the package, and adds a comment to one file."""
  package = folder / 'resist_jax'
  ignored = shutil.ignore_patterns('__pycache__')
  shutil.copytree(started.ROOT / 'resist_jax', package, ignore=ignored)
  with (package / 'errors.py').open('a') as file:
    file.write('# Another line.\n')
  return str(folder)


def attack(seed: int, share: float, folder: pathlib.Path) -> dict[str, Any]:
  """Starts the pairs, one after another.

  Args:
    seed: Which process gets the difference.
    share: Share of the pairs to start.
    folder: An empty folder.

  Returns:
    The record.
  """
  rng = random.Random(seed)
  pairs = of_all(folder)
  if share < 1:
    pairs = rng.sample(pairs, max(1, round(share * len(pairs))))
  cases = [_start(pair, rng.randrange(2), folder) for pair in pairs]
  config = {'flags': started.TINY, 'limit_seconds': started.LIMIT}
  return judged.record('pairs', config, seed, cases, folder, NOT_TRIED)


def _start(pair: Pair, odd: int, folder: pathlib.Path) -> Case:
  """Starts a pair, and judges how both processes end.

  Args:
    pair: What differs.
    odd: The process that has the difference.
    folder: Where their outputs go.
  """
  run = folder / 'run'
  commands = started.several(2, run)
  commands[odd] += pair.words
  output = folder / 'output'
  output.mkdir(exist_ok=True)
  # Not from the folder of the package: it would come before PYTHONPATH.
  both = [
    started.Started(
      words, output / str(i), pair.env if i == odd else None, folder
    )
    for i, words in enumerate(commands)
  ]
  ends = [process.end() for process in both]
  outcome, said = judged.worst(
    judged.refusal(*end, says=f'.*{pair.says}') for end in ends
  )
  shutil.rmtree(run, ignore_errors=True)
  return Case(pair.group, f'{pair.name} of process {odd}', outcome, said)
