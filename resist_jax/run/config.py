"""The settings of a run, and why each has its value.

ConfigDict is read in `build.py` and above, and nowhere below.
"""

import ml_collections

from resist_jax import exchange, models

# Exchanges by the name that a config gives them; each takes a wire format.
EXCHANGES = {
  'hand_over': exchange.hand_over,
  'masked_psum': exchange.masked_psum,
}

PHASE_FIELDS = ('full_before', 'full_after')

# What may change between two runs in the same workdir: a checkpoint holds the
# global model, so workers, devices and protocol are free (elastic resume). A
# name stands for the fields under it, too.
ELASTIC = frozenset(
  {
    'protocol',
    'num_workers',
    'num_devices',
    'devices_per_worker',
    'num_rounds',
    'min_depth',
    'depths',
    'exchange',
    'wire_format',
    'evaluation.batches_at_once',
    'evaluation.stream_blocks',
    'eval_every',
    'checkpoint_every',
    'data.dir',
    'data.streaming',
    'data.extra_tests',
    'phases',
    'faults',
  }
)


def get_config() -> ml_collections.ConfigDict:
  """Returns the paper's CIFAR setting for four workers, on digits.

  >>> get_config().optimizer.momentum
  0.9
  """
  config = ml_collections.ConfigDict()
  config.protocol = 'resist'  # or local_sgd, data_parallel: the baselines.
  config.num_workers = 4  # S
  config.num_devices = 0  # D * G; 0: of those at hand, as many as share S out.
  # G; a host of several trains as one worker that averages gradients inside.
  config.devices_per_worker = 1
  # Rounds of synchronisation, phases included; the schedule spans them all.
  config.num_rounds = 100
  config.local_steps = 50  # T, the paper's l; fewer for eight workers.
  config.min_depth = 0  # Blocks a worker runs at least; the paper: 5.
  # Unequal workers: the number of blocks of each, such as (8, 6, 4, 4), or
  # by_speed, from step times measured as the run begins; (): an even deal.
  config.depths = ml_collections.FieldReference((), field_type=object)
  # How blocks get to their next worker: hand_over sends those that move, and
  # needs a block for every worker; masked_psum sends all to all, and does not.
  config.exchange = 'hand_over'
  # What numbers travel as: float32 (exact), bfloat16, int8 (changes, with error
  # feedback; blocks that move in 16 bits).
  config.wire_format = 'float32'
  config.batch_size = 128  # Per worker, as in the paper; its devices share it.
  config.eval_every = 5  # Rounds; the last round is always evaluated.
  config.checkpoint_every = 5  # Rounds; the last round is always saved.
  config.seed = 0
  config.lr = 0.03  # The paper's for S=4 on CIFAR-100.
  config.partition = (3,)  # Stages whose chain is cut; the paper: section 3.
  # Deal the first block of these stages, too, which changes stride and
  # channels: all but one worker run it as its shortcut alone (paper: ablation).
  config.partition_strided = False
  # Where residual branches of cut chains shrink to their expected share:
  # evaluation (paper), training (inverted: grown there instead), or none.
  config.residual_scale = 'evaluation'

  # Rounds in which every worker trains the full model (local SGD), counted
  # within num_rounds. The paper warms up so on ImageNet.
  config.phases = ml_collections.ConfigDict()
  config.phases.full_before = 0
  config.phases.full_after = 0

  # What happens to workers that fail.
  config.faults = ml_collections.ConfigDict()
  # A worker whose update is not finite is left out of the round's means; else
  # it stops the run. Costs memory: a worker's blocks as last agreed.
  config.faults.leave_out = True
  # Leave out, too, a worker whose loss is over so many times the median: it may
  # be finite and of no use, and what is too much is yours to say. 0: nobody.
  config.faults.loss_factor = 0.0
  # Seconds without a sign of another process after which this one ends. Less
  # finds it sooner; a host that is only busy should not count as lost.
  config.faults.timeout = 60.0

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
  # small: 3x3; strided: 3x3, stride 2; imagenet: 7x7, stride 2, max pooling.
  config.model.stem = 'small'
  config.model.dtype = 'float32'  # Of compute; bfloat16 on GPU and TPU.

  config.evaluation = ml_collections.ConfigDict()
  config.evaluation.batch_size = 100  # Test-batch statistics are of these.
  # Training images over which the deployed model's statistics are measured.
  config.evaluation.statistics_images = 2000
  # Test block by block, where the whole network fits on no device; otherwise
  # each device gathers all of it.
  config.evaluation.stream_blocks = False
  # Batches whose activations a device holds while blocks are streamed; with
  # fewer at once, the blocks come by more often.
  config.evaluation.batches_at_once = 32
  return config


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


def chosen_depths(config: ml_collections.ConfigDict) -> tuple[int, ...]:
  """Returns the depths that a config names, none where it names none.

  Args:
    config: A valid one; those `by_speed` are found in `speed.py`.

  Returns:
    See `decomposition.slots_per_worker`.
  """
  return () if isinstance(config.depths, str) else tuple(config.depths)


def build_model(
  config: ml_collections.ConfigDict, num_classes: int, for_cpu: bool = True
) -> models.ResNet:
  """Returns the network that `config.model` describes.

  Args:
    config: As made by `get_config`.
    num_classes: Width of the classifier.
    for_cpu: See `models.ResNet`.

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
    dtype=config.model.dtype,
    for_cpu=for_cpu,
    cut_heads=config.partition_strided,
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
