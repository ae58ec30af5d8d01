"""The mistakes in a config that need no data and no device, a line for each."""

import math
from typing import Any

import ml_collections

from resist_jax import data, models
from resist_jax.decomposition import Division
from resist_jax.errors import ConfigError, check_choice, did_you_mean
from resist_jax.exchange import FORMATS
from resist_jax.report.records import MAX_ROWS
from resist_jax.rounds import average
from resist_jax.run import cards
from resist_jax.run.config import (
  EXCHANGES,
  PHASE_FIELDS,
  build_model,
  check_divisions,
  chosen_depths,
  differences,
  flat,
  get_config,
  protocols,
)
from resist_jax.run.fields import each, value_of
from resist_jax.run.module_task import load
from resist_jax.run.optimizer import SCHEDULES

PROTOCOLS = ('resist', 'local_sgd', 'data_parallel')
# What a field may hold, and what a message calls it, by the default's type.
_TYPES: dict[type, tuple[Any, str]] = {
  bool: (bool, 'True or False'),
  int: (int, 'a whole number'),
  float: (int | float, 'a number'),
  str: (str, 'text'),
  tuple: (tuple | list, 'a tuple'),
  dict: (ml_collections.ConfigDict, 'a ConfigDict'),
}
# Names that a field may have, by field.
CHOICES: dict[str, tuple[str, ...]] = {
  'protocol': PROTOCOLS,
  'phases.protocol': PROTOCOLS[1:],
  'exchange': tuple(EXCHANGES),
  'wire_format': tuple(FORMATS),
  'dealing': ('random', 'spread'),
  'residual_scale': ('evaluation', 'training', 'none'),
  'data.augment': ('auto', *data.AUGMENTATIONS),
  'data.fill': tuple(data.FILLS),
  'data.flips': tuple(data.FLIPS),
  'data.streaming': tuple(data.STREAMING),
  'model.name': tuple(models.FAMILY),
  'model.norm': ('batch', 'group'),
  'model.stem': tuple(models.STEMS),
  'model.init': tuple(models.INITIAL),
  'model.dtype': ('float32', 'bfloat16'),
}
# Fields by the least value that they may have.
LEAST: dict[int, tuple[str, ...]] = {
  1: (
    'num_workers', 'num_rounds', 'local_steps', 'batch_size', 'eval_every',
    'checkpoint_every', 'devices_per_worker', 'data.image_size',
    'evaluation.batch_size', 'evaluation.statistics_images',
    'evaluation.batches_at_once',
  ),
  0: (
    'num_devices', 'min_depth', 'workers_per_process', 'keep_checkpoints',
    'local_steps_alpha', 'outer.lr', 'optimizer.warmup_rounds',
    'optimizer.weight_decay', 'optimizer.bias_rate', 'early_stopping.patience',
    'early_stopping.min_gain', *(f'phases.{field}' for field in PHASE_FIELDS),
  ),
  -1: ('data.pad',),
}  # fmt: skip
# Fields that must be greater than 0, and the unit where there is one.
POSITIVE = {
  'lr': '',
  'distillation.temperature': '',
  'faults.timeout': ' seconds',
  'faults.progress_timeout': ' seconds',
}
# Fields of at least 0 and less than 1, and of what they are a share.
SHARES = {
  'optimizer.momentum': '',
  'outer.momentum': '',
  'data.validation': 'the training set',
  'label_smoothing': 'each label',
  'distillation.weight': 'the loss',
}


def validate(config: ml_collections.ConfigDict, imports: bool = True) -> None:
  """Finds mistakes that need no data and no device.

  Args:
    config: As made by `get_config`.
    imports: Whether the module that it may name has to be there.

  Raises:
    ConfigError: On the first mistake.
  """
  _check_fields(config)
  _check_types(config)
  _check_finite(config)
  _check_choices(config)
  _check_bounds(config)
  _check_schedule(config)
  _check_lists(config)
  _check_steps(config)
  _check_dealing(config)
  _check_shared_every(config)
  _check_faults(config)
  _check_distillation(config)
  _check_outer_and_average(config)
  _check_phases(config)
  _check_devices(config)
  if config.model.module:
    _check_module(config, imports)
  elif len(config.model.options):
    raise ConfigError(
      'model.options is set, but model.module names no module that reads it.'
    )
  else:
    _check_model(config)


def _check_choices(config) -> None:
  for field, values in CHOICES.items():
    check_choice(field, value_of(config, field), values)


def _check_bounds(config) -> None:
  for least, fields in LEAST.items():
    for field in fields:
      value = value_of(config, field)
      if not value >= least:
        raise ConfigError(f'{field} is {value}; it must be at least {least}.')
  for field, what in POSITIVE.items():
    value = value_of(config, field)
    if not value > 0:
      raise ConfigError(f'{field} is {value}; it must be greater than 0{what}.')
  for field in ('faults.timeout', 'faults.progress_timeout'):
    if value_of(config, field) >= 1e9:  # `program` would take the default.
      raise ConfigError(
        f'{field} is {value_of(config, field)}; it must be less than 1e9 '
        'seconds, which are 31 years.'
      )
  for field, of in SHARES.items():
    value = value_of(config, field)
    if not 0 <= value < 1:
      must = f'is a share of {of},' if of else 'must be'
      raise ConfigError(
        f'{field} is {value}; it {must} at least 0 and less than 1.'
      )
  if not 0 <= config.seed < 2**32:
    raise ConfigError(
      f'seed is {config.seed}; it must be at least 0 and less than 2**32, '
      'because larger ones repeat.'
    )


def _check_lists(config) -> None:
  extra = config.data.extra_tests
  if not all(isinstance(x, str) for x in extra) or len(set(extra)) < len(extra):
    raise ConfigError(
      f'data.extra_tests is {extra}; it must name sets, each once.'
    )
  drops = config.optimizer.drops
  shares = [x for x in drops if isinstance(x, int | float) and 0 < x < 1]
  if len(shares) < len(drops) or shares != sorted(shares):
    raise ConfigError(
      f'optimizer.drops is {drops}; it must hold shares of the run, between 0 '
      'and 1, in order.'
    )


def _check_steps(config) -> None:
  steps = config.num_rounds * config.local_steps
  if steps >= 2**31:
    raise ConfigError(
      f'num_rounds is {config.num_rounds} and local_steps '
      f'{config.local_steps}, {steps} steps in all; steps must be fewer than '
      '2**31: lower one.'
    )
  warmup = config.optimizer.warmup_rounds * config.local_steps
  if warmup >= 2**31:
    raise ConfigError(
      f'optimizer.warmup_rounds is {config.optimizer.warmup_rounds}, {warmup} '
      'steps in all; they must be fewer than 2**31: lower it.'
    )
  if config.log.report and config.num_rounds > MAX_ROWS:
    raise ConfigError(
      f'num_rounds is {config.num_rounds}, and a report shows at most '
      f'{MAX_ROWS} rounds: set log.report to False, or let rounds have more '
      'local_steps.'
    )
  if 'data_parallel' not in protocols(config):
    return
  if config.wire_format == 'int8':
    raise ConfigError(
      'wire_format int8 sends changes between rounds, and data_parallel has '
      'none: use bfloat16 or float32.'
    )
  if config.local_steps_alpha:
    raise ConfigError(
      f'local_steps_alpha is {config.local_steps_alpha}, but data_parallel '
      'exchanges at every step: set it to 0.'
    )


def _check_dealing(config) -> None:
  if config.dealing == 'spread' and config.exchange != 'hand_over':
    raise ConfigError(
      f'dealing spread needs exchange hand_over, but exchange is '
      f'{config.exchange}: change one.'
    )
  if config.dealing == 'spread' and config.depths:
    raise ConfigError(
      f'dealing spread needs equal workers, but depths is {config.depths}: set '
      'it to (), or deal at random.'
    )


def _check_module(config, imports: bool) -> None:
  """Whether a chain has enough blocks is found when data are there."""
  for field, off in (
    ('partition_strided', False), ('evaluation.stream_blocks', False),
    ('label_smoothing', 0.0), ('distillation.weight', 0.0),
    ('model.gates', False),
  ):  # fmt: skip
    value = value_of(config, field)
    if value != off:
      raise ConfigError(
        f'{field} is {value}, which ResNets alone can do, but '
        f'model.module names {config.model.module!r}: leave it at {off}.'
      )
  _check_depths(config)
  if imports:
    load(config.model.module)


def _check_schedule(config) -> None:
  name = config.optimizer.schedule
  if ':' in name:  # A card's function; `optimizer.schedule` calls it.
    cards.function(name)
  elif name not in SCHEDULES:
    raise ConfigError(
      f'optimizer.schedule is {name!r}. {did_you_mean(name, SCHEDULES)}Use one '
      f'of {", ".join(SCHEDULES)}, or MODULE:FUNCTION.'
    )
  if name == 'one_cycle' and config.optimizer.warmup_rounds:
    raise ConfigError(
      'optimizer.schedule one_cycle has a rise of its own: set '
      'optimizer.warmup_rounds to 0.'
    )


def _check_devices(config) -> None:
  G = config.devices_per_worker
  if config.batch_size % G:
    raise ConfigError(
      f'batch_size is {config.batch_size}, not a multiple of '
      f'devices_per_worker {G}, which share it: change one.'
    )
  if config.num_devices % G:
    raise ConfigError(
      f'num_devices is {config.num_devices}, not a multiple of '
      f'devices_per_worker {G}: it counts the devices of all workers.'
    )
  if config.num_devices and config.num_workers % (config.num_devices // G):
    per_worker = f' / devices_per_worker {G}' if G > 1 else ''
    raise ConfigError(
      f'num_workers is {config.num_workers}, not a multiple of num_devices '
      f'{config.num_devices}{per_worker}: change one, or leave num_devices at '
      '0.'
    )


def _check_fields(config) -> None:
  """A card that was not made from `get_config` may lack or add fields."""
  for name, (_, theirs) in differences(
    _names(get_config().to_dict()), _names(config.to_dict())
  ).items():
    problem = 'lacks the field' if theirs is None else 'has an unknown field'
    raise ConfigError(
      f'the config {problem} {name}: begin with get_config() of '
      'resist_jax.run.config.'
    )


def _check_types(config) -> None:
  """A card that was not made from `get_config` may hold any values."""
  for field in each():
    value, default = value_of(config, field.name), field.default
    # A bool is an int for Python, but no number of workers.
    is_bool = isinstance(value, bool) == isinstance(default, bool)
    kind, called = _TYPES[type(default)]
    if field.any_type or (is_bool and isinstance(value, kind)):
      continue
    raise ConfigError(
      f'{field.name} is {value!r}; it must be {called}, such as {default!r}.'
    )


def _check_finite(config) -> None:
  for name, value in flat(config).items():
    numbers = value if isinstance(value, tuple | list) else (value,)
    if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
      raise ConfigError(f'{name} is {value}; it must be finite: give a number.')
    # Steps, rounds and examples are counted in 32 bits.
    if name != 'seed' and any(
      isinstance(x, int) and abs(x) >= 2**31 for x in numbers
    ):
      raise ConfigError(
        f'{name} is {value}; it must be less than 2**31: lower it.'
      )


def _names(config: dict) -> dict:
  return {
    name: _names(value)
    if isinstance(value, dict) and name != 'options'
    else True
    for name, value in config.items()
  }


def _check_faults(config) -> None:
  for name, what in (('loss_factor', 'loss'), ('update_factor', 'update')):
    factor = config.faults[name]
    if not (factor == 0 or factor > 1):
      raise ConfigError(
        f'faults.{name} is {factor}; it must be greater than 1, or 0 to leave '
        f'nobody out for its {what}.'
      )
  factor = config.faults.loss_factor
  if factor and not config.faults.leave_out:
    raise ConfigError(
      f'faults.loss_factor is {factor}, but faults.leave_out is off: turn it '
      'on, or set loss_factor to 0.'
    )
  if factor and 'data_parallel' in protocols(config):
    raise ConfigError(
      'faults.loss_factor compares losses at the end of a round, and '
      'data_parallel has averaged by then: set it to 0.'
    )


def _check_phases(config) -> None:
  full = sum(config.phases[field] for field in PHASE_FIELDS)
  protocol, between = config.phases.protocol, config.protocol
  if full and PROTOCOLS.index(protocol) <= PROTOCOLS.index(between):
    raise ConfigError(
      f'phases are full-model rounds of {protocol} in a run of resist'
      f'{" or local_sgd" if protocol == "data_parallel" else ""}, but protocol '
      f'is {between}: set phases.full_before and phases.full_after to 0.'
    )
  if full > config.num_rounds:
    raise ConfigError(
      f'phases ask for {full} full-model rounds of {config.num_rounds}: raise '
      'num_rounds or lower phases.'
    )


def _check_distillation(config) -> None:
  weight = config.distillation.weight
  if weight and 'data_parallel' in protocols(config):
    raise ConfigError(
      f'distillation.weight is {weight}, but all workers of data_parallel '
      'agree at every step: set it to 0.'
    )


def _check_shared_every(config) -> None:
  every, steps = config.shared_every, config.local_steps
  if not every:
    return
  if every < 0 or steps % every:
    raise ConfigError(
      f'shared_every is {every}; it must be a divisor of local_steps, {steps}, '
      'or 0.'
    )
  if config.protocol != 'resist':
    raise ConfigError(
      f'shared_every is {every}, but {config.protocol} divides nothing: set it '
      'to 0, or use protocol resist.'
    )
  if config.wire_format != 'float32':
    raise ConfigError(
      f'shared_every is {every}, which sends values, and wire_format '
      f'{config.wire_format} sends changes: use float32, or set it to 0.'
    )


def _check_outer_and_average(config) -> None:
  outer = config.outer
  if outer.momentum and not outer.lr:
    raise ConfigError(
      f'outer.momentum is {outer.momentum}, but there is no outer optimiser: '
      'set outer.lr, such as 1.0.'
    )
  if outer.nesterov and not outer.momentum:
    raise ConfigError(
      'outer.nesterov is on, but outer.momentum is 0: set that, such as 0.9.'
    )
  if outer.lr and config.wire_format != 'float32':
    raise ConfigError(
      f'wire_format {config.wire_format} would round away the small changes '
      'that outer takes: use float32, or set outer.lr to 0.'
    )
  decay = config.average.decay
  if not 0 <= decay <= average.LARGEST_DECAY:
    raise ConfigError(
      f'average.decay is {decay}; it must be at least 0 and less than 1, such '
      f'as 0.9, and at most {average.LARGEST_DECAY}.'
    )
  if decay and config.wire_format != 'float32' and config.protocol == 'resist':
    raise ConfigError(
      f'wire_format {config.wire_format} would round away the small steps of '
      'an average that moves with its blocks: use float32, or set '
      'average.decay to 0.'
    )


def _check_model(config) -> None:
  for name, values in (
    ('partition', config.partition),
    ('model.stage_sizes', config.model.stage_sizes),
    ('model.widths', config.model.widths),
  ):
    if not all(type(value) is int for value in values):
      raise ConfigError(f'{name} is {values}; it must hold whole numbers.')
  if config.model.gate_start != 1 and not config.model.gates:
    raise ConfigError(
      f'model.gate_start is {config.model.gate_start}, but there are no gates: '
      'turn model.gates on, or set it to 1.'
    )
  network = build_model(config, num_classes=2)
  if len(network.stage_sizes) != len(network.widths):
    raise ConfigError(
      f'model.stage_sizes has {len(network.stage_sizes)} stages and '
      f'model.widths {len(network.widths)}: give one width a stage.'
    )
  if min((*network.stage_sizes, *network.widths)) < 1:
    raise ConfigError('model.stage_sizes and model.widths must be at least 1.')
  if config.protocol != 'resist':
    _check_depths(config)
    return
  if not config.partition or len(set(config.partition)) < len(config.partition):
    raise ConfigError(
      'partition must name at least one stage, each once; protocol=local_sgd '
      'cuts none.'
    )
  _check_depths(config)
  for stage in config.partition:
    if not 1 <= stage <= len(network.stage_sizes):
      raise ConfigError(
        f'partition names stage {stage}; {config.model.name} has stages 1 to '
        f'{len(network.stage_sizes)}.'
      )
    length = network.stage_sizes[stage - 1] - 1
    depths = chosen_depths(config)
    sizes = (config.num_workers, config.min_depth, depths)
    divisions = {f'stage {stage}': Division(length, *sizes)}
    if config.partition_strided:
      branch = Division(1, config.num_workers, None)
      divisions[f'stage {stage}, with partition_strided'] = branch
    check_divisions(config, divisions)


def _check_depths(config) -> None:
  depths = config.depths
  if not depths and isinstance(depths, tuple | list):
    return
  whole = isinstance(depths, tuple | list) and all(
    type(depth) is int for depth in depths
  )
  if not whole and depths != 'by_speed':
    raise ConfigError(
      f'depths is {depths!r}; use a whole number for each worker, such as '
      '(8, 6, 4, 4), or by_speed, or ().'
    )
  if depths == 'by_speed' and config.min_depth:
    raise ConfigError(
      f'depths by_speed replaces min_depth, which is {config.min_depth}: set '
      'min_depth to 0.'
    )
  if config.protocol != 'resist':
    raise ConfigError(
      f'depths is {depths}, but {config.protocol} gives each worker all '
      'blocks: set it to (), or use protocol resist.'
    )
  several = len(config.partition) > 1 and not config.model.module
  if several or config.partition_strided:
    raise ConfigError(
      f'depths is {depths}, which fits one chain only, but partition and '
      'partition_strided cut several: cut one chain, or set depths to ().'
    )
