"""The tables of compiled programs, from their records."""

from collections.abc import Iterator, Mapping
import pathlib
import shlex
from typing import Any

from experiments.compile import chips, targets
from experiments.runs import RESULTS, read
from experiments.table import Table

FOLDER = RESULTS / 'compile'
MIB = 2**20
HEAD = ['case', 'program', 'workers', 'arguments, MiB', 'scratch, MiB']
HEAD += [
  'sent, MB',
  'GFLOP',
  'memory traffic, GB',
  'at least, ms',
  'compile, s',
]


def tables(folder: pathlib.Path = FOLDER, target: str = '*') -> Iterator[Table]:
  """Yields a table for each target that has records.

  Args:
    folder: Where the folders of all targets are.
    target: Name of a folder in it; by default all.

  Yields:
    Tables; none where nothing was compiled.
  """
  for path in sorted(p for p in folder.glob(target) if p.is_dir()):
    records = load(path)
    if records:
      yield _table(records)


def load(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the records of a target.

  Args:
    folder: Their folder.

  Returns:
    The records, by name.
  """
  return [read(path) for path in sorted(folder.glob('*.json'))]


def _table(records: list[dict[str, Any]]) -> Table:
  first = records[0]
  target, scale = targets.parse(first['target']), first['scale']
  chip = target.chip
  compilers = ' and '.join(dict.fromkeys(map(compiler, records)))
  caption = (
    f'Programs compiled for {target.name} at the {scale} scale by '
    f'{compilers}; '
    'none was run. In brackets, how far the prediction is off: "=" means not '
    'at all. Workers are S, on D devices or groups of G. Memory is that of a '
    'device; "sent" is what all devices together send in one execution, in '
    'groups between workers + inside them. Operations and memory traffic count '
    'the body of a loop once, so those of a round hold one step. "At least" '
    f'divides them by {chip.flops / 1e12:.0f} TFLOP/s and '
    f'{chip.bandwidth / 1e9:.0f} GB/s.'
  )
  if chip.clock:
    caption += (
      ' "Estimate" adds up how long the compiler expects the instructions to '
      f'take, at {chip.clock / 1e9:.2f} GHz.'
    )
  rows = [
    _row(record, name, target)
    for record in records
    for name in record['programs']
  ]
  head = list(HEAD)
  if chip.clock:
    head.insert(-1, 'estimate, ms')
  command = 'python -m experiments.compile '
  command += shlex.quote(f'--target={target.name}')
  if scale != 'paper':
    command += f' --scale={scale}'
  return Table(caption, command, head, rows)


COMPILERS = tuple(
  module.replace('_', '-') for module, _ in targets.COMPILERS.values()
)


def compiler(record: Mapping[str, Any]) -> str:
  """Returns the versions of JAX and of the compiler behind a record."""
  versions = record['provenance']['versions']
  return ', '.join(
    f'{name} {version}'
    for name, version in versions.items()
    if name in ('jax', *COMPILERS)
  )


def _row(
  record: Mapping[str, Any], name: str, target: targets.Target
) -> list[str]:
  case, read = record['case'], record['programs'][name]
  predicted, chip = record['predicted'][name], target.chip
  memory, scratch = read['memory'], predicted['scratch']
  arithmetic = 1e3 * max(read['flops'], 0) / chip.flops
  traffic = 1e3 * read['hbm_bytes'] / chip.bandwidth
  sent = [
    _beside(read['wire'][kind], predicted['wire'][kind], 1e6)
    for kind in predicted['wire']
  ]
  return [
    described(case),
    name,
    _workers(case),
    _beside(memory['arguments'], predicted['arguments'], MIB),
    _beside(memory['temporary'], sum(scratch.values()) or None, MIB),
    ' + '.join(sent),
    f'{max(read["flops"], 0) / 1e9:.1f}',
    f'{read["hbm_bytes"] / 1e9:.2f}',
    f'{max(arithmetic, traffic):.2f}',
    *_estimate(read, chip),
    f'{read["seconds"]["compile"]:.0f}',
  ]


def _estimate(read: Mapping[str, Any], chip: chips.Chip) -> list[str]:
  """Returns the milliseconds that the compiler expects, where it says so."""
  if not chip.clock:
    return []
  return [f'{1e3 * (read["estimated_cycles"] or 0) / chip.clock:.2f}']


def described(case: Mapping[str, Any]) -> str:
  """Returns what a case is, in words.

  Args:
    case: The fields of a `Case`.

  Returns:
    A few words.
  """
  words = [case['network'].removeprefix('PreAct'), case['protocol']]
  words.append(case['form'])
  if case['form'] == 'exchange' and case['protocol'] == 'resist':
    words.append(case['exchange'])
  if case['form'] == 'exchange':
    words.append(case['wire_format'])
  return ', '.join(words).replace('_', ' ')


def _workers(case: Mapping[str, Any]) -> str:
  S, D, G = (
    case[k] for k in ('num_workers', 'num_devices', 'devices_per_worker')
  )
  if case['form'] == 'plain_flax':
    return f'1 of {S}'
  return f'{S} on {D}' + (f' x {G}' if G > 1 else '')


def _beside(read: float | str, predicted: float | None, unit: float) -> str:
  """Writes a number, and how far the prediction is off."""
  if isinstance(read, str):
    return f'unread ({(predicted or 0) / unit:.1f} predicted)'
  number = f'{read / unit:.1f}'
  if predicted is None:
    return number
  if read == predicted:
    return f'{number} (=)' if read else '0'
  if not read or not predicted:
    return f'{number} ({predicted / unit:.1f})'
  return f'{number} ({predicted / read - 1:+.1%})'
