"""The settings of a run, why each has its value, and what a person gets wrong.

ConfigDict is read in `build.py` and above, and nowhere below.
"""

import ml_collections

from resist_jax import decomposition, wire
from resist_jax import model as model_lib
from resist_jax.dealing import Dealer

PROTOCOLS = ('resist', 'local_sgd', 'data_parallel')
EXCHANGES = ('hand_over', 'masked_psum')
AUGMENTATIONS = (
  'resized_crop_flip', 'resized_crop', 'crop_flip', 'crop', 'flip', 'none',
)  # fmt: skip
PHASE_FIELDS = ('full_before', 'full_after')

# What may change between two runs in the same workdir: a checkpoint holds the
# global model, so workers, devices and protocol are free (elastic resume).
ELASTIC = frozenset(
  {
    'protocol',
    'num_workers',
    'num_devices',
    'num_rounds',
    'min_depth',
    'exchange',
    'wire_format',
    'evaluation.batches_at_once',
    'eval_every',
    'checkpoint_every',
    'data.dir',
    'data.streaming',
    'data.extra_tests',
  }
)


class ConfigError(ValueError):
  """A mistake of the user's, told in one line that says what to do."""


def get_config() -> ml_collections.ConfigDict:
  """Returns the paper's CIFAR setting for four workers, on digits.

  >>> get_config().optimizer.momentum
  0.9
  """
  config = ml_collections.ConfigDict()
  config.protocol = 'resist'  # or local_sgd, data_parallel: the baselines.
  config.num_workers = 4  # S
  config.num_devices = 0  # D; 0: the largest divisor of S at hand.
  # Rounds of synchronisation, phases included; the schedule spans them all.
  config.num_rounds = 100
  config.local_steps = 50  # T, the paper's l; fewer for eight workers.
  config.min_depth = 0  # Blocks a worker runs at least; the paper: 5.
  # How blocks get to their next worker: hand_over sends those that move, and
  # needs a block for every worker; masked_psum sends all to all, and does not.
  config.exchange = 'hand_over'
  # What numbers travel as: float32 (exact), bfloat16, int8 (changes, with error
  # feedback; blocks that move in 16 bits).
  config.wire_format = 'float32'
  config.batch_size = 128  # Per worker, as in the paper.
  config.eval_every = 5  # Rounds; the last round is always evaluated.
  config.checkpoint_every = 5  # Rounds; the last round is always saved.
  config.seed = 0
  config.lr = 0.03  # The paper's for S=4 on CIFAR-100.
  config.partition = (3,)  # Stages whose chain is cut; the paper: section 3.
  # Where residual branches of cut chains shrink to their expected share:
  # evaluation (paper), training (inverted: grown there instead), or none.
  config.residual_scale = 'evaluation'

  # Rounds in which every worker trains the full model (local SGD), counted
  # within num_rounds. The paper warms up so on ImageNet.
  config.phases = ml_collections.ConfigDict()
  config.phases.full_before = 0
  config.phases.full_after = 0

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 5e-4  # On all parameters, as PyTorch does.
  config.optimizer.schedule = 'step'  # /10 at each drop; cosine, constant.
  config.optimizer.drops = (0.5, 0.75)  # Shares of the run; the paper's CIFAR.
  config.optimizer.warmup_rounds = 0  # Linear rise of the learning rate.
  # Keep momentum from round to round, averaged with the parameters, instead of
  # restarting it (paper). Twice the bytes. Data parallel always keeps it.
  config.optimizer.carry_momentum = False

  config.data = ml_collections.ConfigDict()
  config.data.name = 'digits'  # Or any TFDS image classification set.
  config.data.dir = ''  # Of prepared TFDS sets; empty: TFDS's own default.
  config.data.sharded = False  # Each worker its part; the paper: all of it.
  # resized_crop_flip (where images differ in size), resized_crop, crop_flip,
  # crop, flip, none; auto: by the set.
  config.data.augment = 'auto'
  # From memory, or from files while workers train; auto: by the set's size.
  config.data.streaming = 'auto'  # always, never.
  config.data.image_size = 224  # Pixels a side, of images that are resized.
  config.data.extra_tests = ()  # TFDS sets of the same classes to test on too.
  config.data.validation = 0.0  # Share of the training set to hold out.

  config.model = ml_collections.ConfigDict()
  config.model.name = 'PreActResNet101'
  config.model.stage_sizes = ()  # Empty: the family's.
  config.model.widths = ()  # Empty: the family's.
  config.model.norm = 'batch'  # Without running statistics (paper), or group.
  config.model.pre_activation = True  # False for the paper's ablation.
  config.model.stem = 'small'  # 3x3; imagenet: 7x7, stride 2, max pooling.
  config.model.dtype = 'float32'  # Of compute; bfloat16 on GPU and TPU.

  config.evaluation = ml_collections.ConfigDict()
  config.evaluation.batch_size = 100  # Test-batch statistics are of these.
  # Training images over which the deployed model's statistics are measured.
  config.evaluation.statistics_images = 2000
  # Batches whose activations a device holds while the blocks of cut chains
  # pass by; fewer batches at once, more passes.
  config.evaluation.batches_at_once = 32
  return config


def validate(config: ml_collections.ConfigDict) -> None:
  """Finds mistakes that need no data and no device.

  Args:
    config: As made by `get_config`.

  Raises:
    ConfigError: On the first mistake.
  """
  _check_fields(config)
  _one_of(config, 'protocol', PROTOCOLS)
  _one_of(config, 'exchange', EXCHANGES)
  _one_of(config, 'wire_format', tuple(wire.FORMATS))
  _one_of(config, 'residual_scale', ('evaluation', 'training', 'none'))
  _one_of(config.data, 'augment', ('auto', *AUGMENTATIONS))
  _one_of(config.data, 'streaming', ('auto', 'always', 'never'))
  _one_of(config.optimizer, 'schedule', ('step', 'cosine', 'constant'))
  _one_of(config.model, 'name', tuple(model_lib.FAMILY))
  _one_of(config.model, 'norm', ('batch', 'group'))
  _one_of(config.model, 'stem', ('small', 'imagenet'))
  _one_of(config.model, 'dtype', ('float32', 'bfloat16'))
  for field in (
    'num_workers', 'num_rounds', 'local_steps', 'batch_size', 'eval_every',
    'checkpoint_every',
  ):  # fmt: skip
    _at_least(field, config[field], 1)
  for field in ('num_devices', 'min_depth', 'seed'):
    _at_least(field, config[field], 0)
  for field in PHASE_FIELDS:
    _at_least(f'phases.{field}', config.phases[field], 0)
  _at_least('optimizer.warmup_rounds', config.optimizer.warmup_rounds, 0)
  _at_least('optimizer.weight_decay', config.optimizer.weight_decay, 0)
  for field in ('batch_size', 'statistics_images', 'batches_at_once'):
    _at_least(f'evaluation.{field}', config.evaluation[field], 1)
  if not config.lr > 0:
    raise ConfigError(f'lr is {config.lr}; it must be greater than 0.')
  if not 0 <= config.optimizer.momentum < 1:
    raise ConfigError(
      f'optimizer.momentum is {config.optimizer.momentum}; it must be at least '
      '0 and less than 1.'
    )
  if not 0 <= config.data.validation < 1:
    raise ConfigError(
      f'data.validation is {config.data.validation}; it is a share of the '
      'training set, at least 0 and less than 1.'
    )
  _at_least('data.image_size', config.data.image_size, 1)
  extra = config.data.extra_tests
  if len(set(extra)) < len(extra) or not all(isinstance(x, str) for x in extra):
    raise ConfigError(
      f'data.extra_tests is {extra}; it must name TFDS sets, each once.'
    )
  drops = config.optimizer.drops
  if not all(0 < drop < 1 for drop in drops) or list(drops) != sorted(drops):
    raise ConfigError(
      f'optimizer.drops is {drops}; it must hold shares of the run, between 0 '
      'and 1, in order.'
    )
  if config.protocol == 'data_parallel' and config.wire_format == 'int8':
    raise ConfigError(
      'wire_format int8 sends changes between rounds, and data_parallel has '
      'none: use bfloat16 or float32.'
    )
  full = sum(config.phases[field] for field in PHASE_FIELDS)
  if full and config.protocol != 'resist':
    raise ConfigError(
      f'phases are full-model rounds of protocol resist, not of '
      f'{config.protocol}: set them to 0.'
    )
  if full > config.num_rounds:
    raise ConfigError(
      f'phases ask for {full} full-model rounds of {config.num_rounds}: raise '
      'num_rounds or lower phases.'
    )
  if config.num_devices and config.num_workers % config.num_devices:
    raise ConfigError(
      f'num_workers is {config.num_workers}, not a multiple of num_devices '
      f'{config.num_devices}: change one, or leave num_devices at 0.'
    )
  _check_model(config)


def _check_fields(config) -> None:
  """A card that was not made from `get_config` may lack or add fields."""
  for name, (_, theirs) in differences(
    _names(get_config().to_dict()), _names(config.to_dict())
  ).items():
    problem = 'lacks the field' if theirs is None else 'has an unknown field'
    raise ConfigError(
      f'the config {problem} {name}: begin with resist_jax.config.get_config().'
    )


def _names(config: dict) -> dict:
  return {
    name: _names(value) if isinstance(value, dict) else True
    for name, value in config.items()
  }


def _check_model(config) -> None:
  for name, values in (
    ('partition', config.partition),
    ('model.stage_sizes', config.model.stage_sizes),
    ('model.widths', config.model.widths),
  ):
    if not all(type(value) is int for value in values):
      raise ConfigError(f'{name} is {values}; it must hold whole numbers.')
  network = build_model(config, num_classes=2)
  if len(network.stage_sizes) != len(network.widths):
    raise ConfigError(
      f'model.stage_sizes has {len(network.stage_sizes)} stages and '
      f'model.widths {len(network.widths)}: give one width a stage.'
    )
  if min((*network.stage_sizes, *network.widths)) < 1:
    raise ConfigError('model.stage_sizes and model.widths must be at least 1.')
  if config.protocol != 'resist':
    return
  if not config.partition or len(set(config.partition)) < len(config.partition):
    raise ConfigError(
      'partition must name at least one stage, each once; protocol=local_sgd '
      'cuts none.'
    )
  for stage in config.partition:
    if not 1 <= stage <= len(network.stage_sizes):
      raise ConfigError(
        f'partition names stage {stage}; {config.model.name} has stages 1 to '
        f'{len(network.stage_sizes)}.'
      )
    length = network.stage_sizes[stage - 1] - 1
    try:
      sizes = (length, config.num_workers, config.min_depth)
      decomposition.slots_per_worker(*sizes)
      if config.exchange == 'hand_over':
        Dealer(*sizes)
    except ValueError as error:
      raise ConfigError(f'stage {stage}: {error}') from error


def build_model(
  config: ml_collections.ConfigDict, num_classes: int, for_cpu: bool = True
) -> model_lib.ResNet:
  """Returns the network that `config.model` describes.

  Args:
    config: As made by `get_config`.
    num_classes: Width of the classifier.
    for_cpu: See `model.ResNet`.

  Returns:
    The global network.
  """
  sizes = {
    field: tuple(config.model[field])
    for field in ('stage_sizes', 'widths')
    if config.model[field]
  }
  return model_lib.FAMILY[config.model.name](
    num_classes=num_classes,
    norm=config.model.norm,
    pre_activation=config.model.pre_activation,
    stem=config.model.stem,
    dtype=config.model.dtype,
    for_cpu=for_cpu,
    **sizes,
  )


def differences(config: dict, other: dict, prefix: str = '') -> dict:
  """Returns the fields whose values differ.

  Args:
    config: Nested dictionary.
    other: Nested dictionary.
    prefix: Of the names returned.

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
    elif ours != theirs:
      found[name] = ours, theirs
  return found


def _one_of(config, field: str, values: tuple[str, ...]) -> None:
  if config[field] not in values:
    raise ConfigError(
      f'{field} is {config[field]!r}; use one of {", ".join(values)}.'
    )


def _at_least(name: str, value: float, least: int) -> None:
  if not value >= least:
    raise ConfigError(f'{name} is {value}; it must be at least {least}.')
