"""What a config means: the chains to cut, the network, what may change.

`fields` has the fields themselves, with their defaults and reasons.
"""

from collections.abc import Mapping
import json
from typing import Any

import ml_collections

from resist_jax import data, exchange, models
from resist_jax.decomposition import Division
from resist_jax.errors import ConfigError
from resist_jax.run.fields import each, value_of
from resist_jax.run.fields import get_config as get_config

# Exchanges by the name that a config gives them; each takes a wire format.
EXCHANGES = {
  'hand_over': exchange.hand_over,
  'masked_psum': exchange.masked_psum,
}

PHASE_FIELDS = ('full_before', 'full_after')  # How many rounds.

# What tells how rounds are trained, and may differ from round to round.
TRAINED_BY = frozenset(
  {
    'protocol',
    'num_workers',
    'min_depth',
    'depths',
    'exchange',
    'wire_format',
    'dealing',
    'shared_every',
    'local_steps_alpha',
  }
)

# What may change between two runs in the same workdir: a checkpoint holds the
# global model, so workers, devices and protocol are free (elastic resume). A
# name stands for the fields under it, too.
ELASTIC = TRAINED_BY | {
  'phases',
  'workers_per_process',
  'num_devices',
  'devices_per_worker',
  'num_rounds',
  'evaluation.at_start',
  'evaluation.batches_at_once',
  'evaluation.stream_blocks',
  'eval_every',
  'checkpoint_every',
  'keep_checkpoints',
  'keep_best',
  'best_by',
  'early_stopping',
  'data.dir',
  'data.streaming',
  'data.extra_tests',
  'faults',
  'log',
}


def protocols(config: ml_collections.ConfigDict) -> set[str]:
  """Returns the protocols of the rounds of a run.

  Args:
    config: A config.
  """
  full = any(config.phases[field] for field in PHASE_FIELDS)
  return {config.protocol, *([config.phases.protocol] if full else [])}


def value_if_there(config: ml_collections.ConfigDict, name: str) -> Any:
  """Returns the value of a field; None if a card has left it out.

  Args:
    config: A config, perhaps without some fields and sections.
    name: See `fields.value_of`.
  """
  found: Any = config
  for part in name.split('.'):
    if not isinstance(found, ml_collections.ConfigDict):
      return None
    found = found.get(part)
  return found


def flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the value of each field, by its dotted name.

  Args:
    config: A valid one.
  """
  return {field.name: value_of(config, field.name) for field in each()}


def cut_chains(config: ml_collections.ConfigDict) -> dict[str, int | None]:
  """Returns the chains that ResIST cuts.

  Args:
    config: A valid one.

  Returns:
    For each, the blocks that a worker runs at least. It may go without those
    of `partition_strided`: None, see `decomposition.slots_per_worker`.
  """
  chains: dict[str, int | None] = {
    models.chain_name(stage): config.min_depth for stage in config.partition
  }
  if config.partition_strided:
    chains |= {models.branch_name(stage): None for stage in config.partition}
  return chains


def for_processes(
  config: ml_collections.ConfigDict, num_processes: int
) -> ml_collections.ConfigDict:
  """Returns the config with as many workers as the processes are to have.

  Args:
    config: As made by `get_config`.
    num_processes: Number of processes of the run.

  Returns:
    A copy; `num_workers` is unchanged unless `workers_per_process` is set.
  """
  per_process = config.get('workers_per_process')
  config = config.copy_and_resolve_references()
  # `validate` reports a mistake.
  if isinstance(per_process, int) and per_process > 0:
    config.num_workers = per_process * num_processes
  return config


def make_exchange(config: ml_collections.ConfigDict) -> exchange.Exchange:
  """Returns the exchange that a config describes."""
  spread = {'spread': True} if config.dealing == 'spread' else {}
  return EXCHANGES[config.exchange](config.wire_format, **spread)


def check_divisions(
  config: ml_collections.ConfigDict, divisions: Mapping[str, Division]
) -> None:
  """Checks that the exchange of a config can serve chains.

  Args:
    config: One whose exchange and wire format are known.
    divisions: How each chain is divided, by what messages call it.

  Raises:
    ConfigError: If it cannot.
  """
  made = make_exchange(config)
  for what, division in divisions.items():
    try:
      made.check(division)
    except ValueError as error:
      raise ConfigError(f'{what}: {error}') from error


def chosen_depths(config: ml_collections.ConfigDict) -> tuple[int, ...]:
  """Returns the depths that a config names, none where it names none.

  Args:
    config: A valid one; those `by_speed` are found in `speed.py`.

  Returns:
    See `decomposition.slots_per_worker`.
  """
  return () if isinstance(config.depths, str) else tuple(config.depths)


def build_model(
  config: ml_collections.ConfigDict,
  num_classes: int,
  platform: str | None = None,
) -> models.ResNet:
  """Returns the network that `config.model` describes.

  Args:
    config: As made by `get_config`.
    num_classes: Width of the classifier.
    platform: See `models.ResNet`.

  Returns:
    The global network.
  """
  sizes = {
    field: tuple(config.model[field])
    for field in ('stage_sizes', 'widths')
    if config.model[field]
  }
  return models.FAMILY[config.model.name](
    num_classes=num_classes,
    norm=config.model.norm,
    pre_activation=config.model.pre_activation,
    stem=config.model.stem,
    initial=config.model.init,
    dtype=config.model.dtype,
    platform=platform,
    cut_heads=config.partition_strided,
    gate=config.model.gate_start if config.model.gates else None,
    **sizes,
  )


def augmentation(
  config: ml_collections.ConfigDict, dataset: data.Dataset
) -> data.Augmentation:
  """Returns what happens to training images.

  Args:
    config: A valid one.
    dataset: The images.
  """
  fields = config.data
  return data.choose(
    fields.augment, dataset, fields.pad, fields.fill, fields.flips
  )


def differences(config: dict, other: dict, prefix: str = '') -> dict:
  """Returns the fields whose values differ.

  Args:
    config: Nested dictionary.
    other: Nested dictionary.
    prefix: What the names returned begin with.

  Returns:
    `{name: (value in config, value in other)}`, None where a field is missing.

  >>> differences({'a': 1, 'b': {'c': 2}}, {'a': 1, 'b': {'c': 3}})
  {'b.c': (2, 3)}
  """
  found = {}
  for field in sorted(config.keys() | other.keys()):
    name, ours, theirs = prefix + field, config.get(field), other.get(field)
    if isinstance(ours, dict) and isinstance(theirs, dict):
      found |= differences(ours, theirs, prefix=f'{name}.')
    elif ours != theirs and json.dumps(ours) != json.dumps(theirs):
      found[name] = ours, theirs  # NaN, as an option may be, equals itself.
  return found
