"""What the launcher of an elastic run asks about its config and its workdir.

  python -m experiments.launch.elastic_check fits LEAST MOST PROCESSES ARG ...
  python -m experiments.launch.elastic_check complete ARG ...

The first refuses a config that does not fit every number of hosts: a host that
goes or comes could end the run. LEAST and MOST are those of --hosts, and
PROCESSES those of each host. The second ends with 0 if the run is complete, and
with 1 if it is not. Both are processes of their own: a module that the config
names may take a device.
"""

import pathlib
import sys

from ml_collections import ConfigDict

from resist_jax.__main__ import parse
from resist_jax.errors import ConfigError, refused
from resist_jax.run.checks import validate
from resist_jax.run.command import Options
from resist_jax.run.config import for_processes
from resist_jax.run.module_task import function_of, load
from resist_jax.run.workdir import json_object


def check(config: ConfigDict, hosts: range, processes_per_host: int) -> None:
  """Checks a config for each number of hosts.

  Args:
    config: As the command line gives it.
    hosts: How many hosts there may be.
    processes_per_host: How many processes each of them has.

  Raises:
    ConfigError: On the first mistake; names the number of hosts if it fits
      another one.
  """
  wrong = {}
  for count in hosts:
    processes = count * processes_per_host
    own = for_processes(config, processes)
    try:
      validate(own)
      _check_division(own, processes)
    except ConfigError as error:
      wrong[count] = str(error)
  if not wrong:
    if len(hosts) > 1:
      _check_rescale(config)
    return
  count, problem = next(iter(wrong.items()))
  if list(wrong.values()) != [problem] * len(hosts):
    problem = f'--hosts allows {count}, but then {problem}'
  raise ConfigError(problem)


def _check_division(config: ConfigDict, processes: int) -> None:
  """Checks what `setup` finds later, among the devices of all hosts."""
  if config.num_workers % processes:
    raise ConfigError(
      f'num_workers is {config.num_workers}, no multiple of {processes} '
      'processes: set workers_per_process, such as to 1.'
    )
  least = processes * config.devices_per_worker
  if config.num_devices % least:
    raise ConfigError(
      f'num_devices is {config.num_devices}, no multiple of {least}, the '
      'processes times devices_per_worker: leave it at 0.'
    )


def _check_rescale(config: ConfigDict) -> None:
  """Checks that a network can follow a residual scale that changes."""
  name = config.model.module
  changes = config.workers_per_process and config.protocol == 'resist'
  if (
    name and changes and config.residual_scale == 'evaluation'
    and function_of(load(name), 'rescale') is None
  ):  # fmt: skip
    raise ConfigError(
      f'residual_scale evaluation changes with the number of hosts, and {name} '
      'defines no function rescale(config, params, factors): add it, or set '
      'residual_scale to none.'
    )


def is_complete(options: Options) -> bool:
  """Returns whether a run has ended after its last round, or early.

  A run that has stopped early goes on with other rules for that, and a run
  that has ended is tested on further sets.
  """
  folder, config = pathlib.Path(options.workdir), options.config.to_dict()
  summary = json_object(folder / 'summary.json')
  rounds = summary.get('rounds')
  ended = isinstance(rounds, int) and rounds >= options.config.num_rounds
  before = json_object(folder / 'config.json')
  same = all(
    before.get(name) == config.get(name)
    for name in ('early_stopping', 'best_by')
  )
  tests = [
    list((c.get('data') or {}).get('extra_tests') or ())
    for c in (before, config)
  ]
  return tests[0] == tests[1] and (
    ended or (same and bool(summary.get('stopped_early')))
  )


def main() -> int:
  """Returns 2 if the config does not fit, after a line that says why."""
  if sys.argv[1] == 'complete':
    options = parse(['resist_jax', *sys.argv[2:]], answers=False)
    return 0 if is_complete(options) else 1
  least, most, each = map(int, sys.argv[2:5])
  options = parse(['resist_jax', *sys.argv[5:]], answers=False)
  try:
    check(options.config, range(least, most + 1), each)
  except ConfigError as error:
    return refused(error)
  return 0


if __name__ == '__main__':
  sys.exit(main())
