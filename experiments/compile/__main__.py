"""Compiles the programs of a run for accelerators that are not here.

For each program it prints and writes what the compiler of that accelerator says
of it: memory of a device, bytes on the wire, operations, bytes between a device
and its memory, and the seconds that these take at least; beside what
`resist_jax.accounting` predicts. Nothing is run.

  python -m experiments.compile --target=v5e:2x2
  python -m experiments.compile --target=h100:4 --only=exchange
  python -m experiments.compile --target=v5e:2x2 --scale=smoke --out=FOLDER
  python -m experiments.compile --target='2*v5e:2x2' --list

Programs whose record exists are left as they are: a command that was stopped
goes on. The compilers come with `pip install '.[tpu]'` and `'.[cuda]'`, each in
an environment of its own.
"""

import re
import sys

import jax

from experiments.compile import cases, record, tables, targets
from experiments.runs import write_record
from resist_jax import folders
from resist_jax.errors import ConfigError, Parser, message, refused


def main() -> int:
  """Compiles; returns 1 if a program has a fault, see `faults`."""
  parser = Parser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--target', required=True, help='such as v5e:2x2, h100:8')
  parser.add_argument('--only', default='', help='cases whose names have this')
  parser.add_argument('--scale', choices=cases.SCALES, default='paper')
  parser.add_argument('--list', action='store_true', help='only name the cases')
  parser.add_argument(
    '--out', type=folders.output_folder, default=tables.FOLDER, help='a folder'
  )
  options = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')  # Ask for no device.
  try:
    target = targets.parse(options.target)
    wanted = [
      case
      for case in cases.cases(target.num_devices)
      if re.search(options.only, case.name)
    ]
    if not wanted:
      raise ConfigError(
        f'--only={options.only} matches no case: --list names them.'
      )
    if options.list:
      print('\n'.join(case.name for case in wanted))
      return 0
    target.devices()
    folders.check_writable(options.out, '--out')
  except (ConfigError, re.error) as error:
    return refused(error)
  folder = options.out / f'{options.scale}_{file_name(target)}'
  for case in wanted:
    path = folder / f'{case.name}.json'
    if path.exists():
      continue
    print(case.name, file=sys.stderr, flush=True)
    try:
      found = record.record(case, target, options.scale)
    except ValueError as error:  # Such as more workers than a chain has blocks.
      print(f'{case.name} is left out: {message(error)}', file=sys.stderr)
      continue
    write_record(path, found)
  try:
    for table in tables.tables(options.out, folder.name):
      print(table.caption, table.text(), sep='\n\n')
    records = tables.load(folder)
  except ConfigError as error:  # A record is damaged.
    return refused(error)
  return any(
    program['faults']
    for found in records
    for program in found['programs'].values()
  )


def file_name(target: targets.Target) -> str:
  """Returns the name of a target's folder."""
  return re.sub(r'\W', '_', target.name)


if __name__ == '__main__':
  sys.exit(main())
