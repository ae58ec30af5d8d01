"""The fields of a config: the default of each one, and the reason for it.

`get_config` and the text of `--help` are both made from `FIELDS`. This module
imports neither JAX nor the other packages, so that `--help` answers at once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections


class Field(NamedTuple):
  """A setting of a run.

  Attributes:
    name: Dotted, such as `optimizer.momentum`.
    default: The value if neither a card nor the command line sets another.
    reason: What the field does, and where its default comes from.
    any_type: Whether values of other types than the default's are accepted.
  """

  name: str
  default: Any
  reason: str
  any_type: bool = False


# By heading, in the order in which a reader meets them.
FIELDS = {
  'Workers and rounds': (
    Field(
      'protocol',
      'resist',
      'resist, or a baseline: local_sgd (every worker trains the whole '
      'network) or data_parallel (workers average gradients at every step).',
    ),
    Field('num_workers', 4, 'S: workers, each of which trains a sub-network.'),
    Field(
      'workers_per_process',
      0,
      'If set, each process has so many workers, and num_workers follows the '
      'number of processes, which may change whenever the run is resumed.',
    ),
    Field(
      'num_devices',
      0,
      'D * G: devices of all workers together. 0 takes as many of the devices '
      'at hand as share num_workers equally.',
    ),
    Field(
      'devices_per_worker',
      1,
      'G: devices that share the batch of one worker and average gradients at '
      'every step, such as the GPUs of one host.',
    ),
    Field(
      'num_rounds',
      100,
      'Rounds of synchronisation, those of phases included. The learning rate '
      'schedule spans all of them.',
    ),
    Field(
      'local_steps',
      50,
      "T: optimiser steps of a worker in a round, the paper's l. The paper "
      'takes fewer for eight workers.',
    ),
    Field(
      'local_steps_alpha',
      0.0,
      'If set, rounds grow longer as the learning rate falls, towards '
      '(local_steps_alpha / rate)^2 steps: 2, 4, 8, ... rounds are trained as '
      'one, without the exchanges between them. 0: none are (paper).',
    ),
    Field('seed', 0, 'Determines initial parameters, batches and assignments.'),
  ),
  'Cutting the network': (
    Field(
      'partition',
      (3,),
      'Stages whose chain of blocks is divided among the workers. The paper '
      'divides section 3.',
    ),
    Field(
      'partition_strided',
      False,
      'Also assign the first block of these stages, which changes stride and '
      "channels, to one worker: the others run its shortcut alone (the paper's "
      'ablation).',
    ),
    Field(
      'min_depth',
      0,
      'The least number of blocks that a worker runs; 0: its equal share. The '
      'paper recommends 5; the CIFAR cards take those that give its Table 1.',
    ),
    Field(
      'depths',
      (),
      'For unequal workers: the number of blocks of each, such as (8,6,4,4), '
      'or by_speed, which measures step times when the run begins. (): equal '
      'shares.',
      any_type=True,
    ),
    Field(
      'residual_scale',
      'evaluation',
      'When the residual branches of divided chains are scaled by the share of '
      'workers that hold a block: evaluation (paper), training (by the inverse '
      'of that share), or none.',
    ),
  ),
  'Exchange': (
    Field(
      'exchange',
      'hand_over',
      'How blocks reach their next worker. hand_over sends only the blocks '
      'that move, and needs at least one block for every worker; masked_psum '
      'sends all blocks to all workers, and works for any number of them.',
    ),
    Field(
      'wire_format',
      'float32',
      'The format of numbers that are sent: float32 (exact), bfloat16, or int8 '
      '(changes with error feedback; blocks that move take 16 bits).',
    ),
    Field(
      'dealing',
      'random',
      'Which blocks a worker gets: random ones (paper), or spread: one from '
      'each part of the chain, as far as the numbers allow; hand_over only.',
    ),
    Field(
      'shared_every',
      0,
      'If set, a divisor of local_steps: workers average the shared part after '
      'so many steps, and exchange blocks at the end of the round only. 0: all '
      'at the end (paper).',
    ),
  ),
  'Full-model phases': (
    Field(
      'phases.full_before',
      0,
      'First rounds in which every worker trains the full network. The paper '
      'warms up this way on ImageNet.',
    ),
    Field('phases.full_after', 0, 'The same for the last rounds.'),
    Field(
      'phases.protocol',
      'local_sgd',
      'The protocol of these rounds: local_sgd or data_parallel. A run of '
      'local_sgd may have such rounds of data_parallel, too.',
    ),
  ),
  'Optimiser': (
    Field(
      'batch_size',
      128,
      "Images of a worker in a step, as in the paper. The worker's devices "
      'share them.',
    ),
    Field('lr', 0.03, "The paper's learning rate for S=4 on CIFAR-100."),
    Field('optimizer.momentum', 0.9, 'As in the paper.'),
    Field(
      'optimizer.nesterov',
      False,
      'Use Nesterov momentum, as in PyTorch. The paper uses plain momentum.',
    ),
    Field(
      'optimizer.weight_decay',
      5e-4,
      'As in the paper; on all parameters that are trained, as PyTorch applies '
      'it.',
    ),
    Field(
      'optimizer.bias_rate',
      1.0,
      'The learning rate of the biases of norms, relative to that of other '
      'parameters. Fast recipes for CIFAR take 64; the paper takes 1.',
    ),
    Field(
      'label_smoothing',
      0.0,
      'The share of each label that all classes get, equally. Fast recipes for '
      'CIFAR take 0.2; the paper takes none.',
    ),
    Field(
      'distillation.weight',
      0.0,
      'If set, such as 0.5, the share of the loss that keeps the outputs of a '
      'sub-network near those that it gave when the round began; the labels '
      'have the rest. It takes another forward pass. 0: none (paper).',
    ),
    Field(
      'distillation.temperature',
      2.0,
      'Divides the logits of both; larger ones compare unlikely classes, too.',
    ),
    Field(
      'optimizer.schedule',
      'step',
      'step divides the learning rate by 10 at each of optimizer.drops '
      '(paper); cosine, linear, one_cycle (rises, then falls) or constant; or '
      'MODULE:FUNCTION or FILE.py:FUNCTION, a function of the config and the '
      'number of steps that returns an optax schedule.',
    ),
    Field(
      'optimizer.drops',
      (0.5, 0.75),
      "When the schedule step divides, in shares of the run: the paper's for "
      'CIFAR.',
    ),
    Field(
      'optimizer.warmup_rounds',
      0,
      'Rounds in which the learning rate rises linearly.',
    ),
    Field(
      'optimizer.carry_momentum',
      False,
      'Keep the momentum from round to round, averaged with the parameters, '
      'and send twice the bytes. Otherwise it restarts every round (paper). '
      'Data parallel always keeps it.',
    ),
  ),
  'Outer optimiser and average': (
    Field(
      'outer.lr',
      0.0,
      'If set, an optimiser takes the negative mean change of each round as '
      'its gradient, with this rate, such as 1. 0: a round ends with the mean '
      'itself (paper).',
    ),
    Field(
      'outer.momentum',
      0.0,
      'Momentum of the outer optimiser. It belongs to a block, and is sent '
      'with it.',
    ),
    Field('outer.nesterov', False, "Whether that is Nesterov's."),
    Field(
      'average.decay',
      0.0,
      'If set, such as 0.9, the network that is tested and exported is an '
      'exponential moving average over rounds with this decay. It is sent with '
      'the blocks that move. 0: the network of the last round (paper).',
    ),
  ),
  'Data': (
    Field(
      'data.name',
      'digits',
      'digits, which need no download, the path of a folder of images or of a '
      'file *.npz, huggingface:NAME, or a TFDS image classification set.',
    ),
    Field(
      'data.dir',
      '',
      "Folder of prepared TFDS sets; ~ and $NAME are filled in. Empty: TFDS's "
      'own default.',
    ),
    Field(
      'data.train_split',
      '',
      'The split to train on, or a part of one, such as train[:80%]. Empty: '
      'train.',
    ),
    Field(
      'data.test_split',
      '',
      'The split to test on. Empty: test, or validation without a test; of a '
      'set that has only train, a fixed fifth is held out.',
    ),
    Field(
      'data.sharded',
      False,
      'Show each worker only its own part of the training set. In the paper '
      'each sees all of it.',
    ),
    Field(
      'data.augment',
      'auto',
      'resized_crop_flip (if images differ in size), resized_crop, crop_flip, '
      'crop, flip, or none. auto chooses by the data set.',
    ),
    Field(
      'data.pad',
      -1,
      'Pixels that crop and crop_flip add on every side. -1: an eighth of the '
      'shorter side, 4 of 32 as in the paper.',
    ),
    Field(
      'data.fill',
      'black',
      'What these pixels show: black (paper), or a reflection of those inside.',
    ),
    Field(
      'data.flips',
      'random',
      'random mirrors an image with probability 1/2; alternating does so in '
      'every other epoch of a worker, so that no epoch repeats the last one.',
    ),
    Field(
      'data.streaming',
      'auto',
      'Read images from files while the workers train (always), or from memory '
      '(never). auto chooses by the size of the data set.',
    ),
    Field('data.image_size', 224, 'Pixels a side of images that are resized.'),
    Field(
      'data.extra_tests',
      (),
      'Sets with the same classes to test on as well, named as in data.name.',
    ),
    Field(
      'data.validation',
      0.0,
      'Share of the training set to hold out for validation.',
    ),
  ),
  'Model': (
    Field(
      'model.name',
      'PreActResNet101',
      "The paper's network for CIFAR. The others are PreActResNet18, 34, 152, "
      '200 and Tiny, and PreActBottleneckResNet50, 101 and 152.',
    ),
    Field(
      'model.stage_sizes',
      (),
      'Blocks of each stage. The first one, where stride and channels may '
      'change, is on every worker; the others are the chain that is divided: a '
      'stage of 5 has a chain of 4. Empty: those of the model that is named.',
    ),
    Field(
      'model.widths',
      (),
      'Channels of each stage. Empty: those of the model that is named.',
    ),
    Field(
      'model.norm',
      'batch',
      'batch: batch norm without running statistics in training (paper); or '
      'group.',
    ),
    Field(
      'model.pre_activation', True, "Turn it off for the paper's ablation."
    ),
    Field(
      'model.stem',
      'small',
      'small: 3x3; strided: 3x3 with stride 2; whitened: the same behind 2x2 '
      'filters that are not trained, but measured when the run begins: they '
      'decorrelate patches of training images; imagenet: 7x7 with stride 2, '
      'then max pooling.',
    ),
    Field(
      'model.init',
      'he',
      'What draws the initial values: he (He et al. 2015, by fan-out), or '
      "torch, PyTorch's default (uniform, of variance 1 / (3 fan-in)), for "
      'which the paper chose its learning rates.',
    ),
    Field(
      'model.gates',
      False,
      'Multiply the residual branch of each block by a number that is learned. '
      'An export has it in the last layer of the branch.',
    ),
    Field('model.gate_start', 1.0, 'The value of these numbers at first.'),
    Field(
      'model.module',
      '',
      'Import name of a Python module that defines a network of your own. Then '
      'partition and all fields of model except model.options are ignored, and '
      'so are optimizer.momentum, nesterov, weight_decay and bias_rate if the '
      'module defines an optimiser. See help(resist_jax.run.module_task).',
    ),
    Field(
      'model.options',
      {},
      'Values that a card passes to that module, by any names.',
    ),
    Field(
      'model.dtype',
      'float32',
      'Format of activations: float32, or bfloat16 on GPU and TPU. Parameters '
      'stay in float32.',
    ),
  ),
  'Evaluation and checkpoints': (
    Field(
      'eval_every', 5, 'Rounds between tests. The last round is always tested.'
    ),
    Field(
      'checkpoint_every',
      5,
      'Rounds between checkpoints. The last round is always saved.',
    ),
    Field(
      'evaluation.at_start',
      False,
      'Also test the network before the first round, so that curves begin at '
      'round 0. It costs one more test.',
    ),
    Field(
      'keep_checkpoints',
      3,
      'Newest checkpoints to keep, besides the newest that a test has '
      'confirmed. 0: all.',
    ),
    Field(
      'keep_best',
      False,
      'Also save each round whose test is the best so far, by best_by, and '
      'keep the best one.',
    ),
    Field(
      'best_by',
      'auto',
      'The measure that says which test is the best: a name in metrics.jsonl, '
      'such as validation_accuracy, or test_accuracy_paper with test-batch '
      'statistics. A metric of your own needs a sign, such as -test_error if '
      'low values are better. auto: validation_accuracy if data.validation '
      'holds images out, otherwise test_accuracy.',
    ),
    Field(
      'early_stopping.patience',
      0,
      'Stop after so many tests in a row without a gain, by best_by. 0: train '
      'all rounds.',
    ),
    Field(
      'early_stopping.min_gain',
      0.0,
      'A test counts as a gain only if it beats the last gain by more than '
      'this; for accuracies a fraction, such as 0.001.',
    ),
    Field(
      'evaluation.batch_size',
      100,
      "Images of a test batch. The paper's accuracy takes batch statistics "
      'over these.',
    ),
    Field(
      'evaluation.statistics_images',
      2000,
      'Training images over which the statistics of the deployed model are '
      'measured.',
    ),
    Field(
      'evaluation.stream_blocks',
      False,
      'Test block by block, for a network that fits on no device. Otherwise '
      'each device gathers the whole network.',
    ),
    Field(
      'evaluation.batches_at_once',
      32,
      'Batches whose activations a device holds while it tests block by '
      'block. Fewer need less memory and more passes.',
    ),
  ),
  'Log': (
    Field(
      'log.report',
      True,
      'Write report.html and its pictures into the workdir at the end; python '
      '-m resist_jax.report writes them at any time.',
    ),
    Field(
      'log.tensorboard',
      True,
      'Write the log for TensorBoard, too, into the folder tensorboard of the '
      'workdir.',
    ),
    Field(
      'log.wandb_project',
      '',
      'Also send the log to this project of Weights & Biases, which needs the '
      'package wandb. WANDB_MODE=offline keeps it in the workdir.',
    ),
  ),
  'Workers that fail': (
    Field(
      'faults.leave_out',
      True,
      'Leave a worker whose update is not finite out of the means of the '
      "round, instead of stopping the run. This keeps a copy of each worker's "
      'parameters.',
    ),
    Field(
      'faults.loss_factor',
      0.0,
      'Also exclude a worker whose loss is more than this many times the '
      'median. 0: nobody, because the right limit depends on the task.',
    ),
    Field(
      'faults.update_factor',
      10.0,
      'Also exclude a worker whose update is, by its norm, more than this '
      'many times as large as those of the others and of recent rounds. 0: '
      'nobody. In healthy runs on digits no update came near it: see '
      'RESULTS.md.',
    ),
    Field(
      'faults.timeout',
      60.0,
      'A process ends when it has had no sign of another one for so many '
      'seconds. A short time finds a dead process sooner, but may take a busy '
      'one for dead.',
    ),
    Field(
      'faults.progress_timeout',
      1800.0,
      'In a run of several processes, each ends when a round, a test, a save '
      'or the export takes more than so many seconds: processes that are alive '
      'may still wait for each other for ever. Raise it where these are slow.',
    ),
  ),
}


def each() -> Iterator[Field]:
  """Yields all fields, in the order of `FIELDS`."""
  for fields in FIELDS.values():
    yield from fields


def value_of(config: ml_collections.ConfigDict, name: str) -> Any:
  """Returns the value of a field.

  Args:
    config: One that has the field.
    name: Dotted, such as `optimizer.momentum`.
  """
  for part in name.split('.'):
    config = config[part]
  return config


def get_config() -> ml_collections.ConfigDict:
  """Returns the paper's CIFAR setting for four workers, on digits.

  >>> get_config().optimizer.momentum
  0.9
  """
  config = ml_collections.ConfigDict()
  for field in each():
    section, _, name = field.name.rpartition('.')
    if section and section not in config:
      config[section] = ml_collections.ConfigDict()
    value = field.default
    if isinstance(value, dict):
      value = ml_collections.ConfigDict(value)
    if field.any_type:
      value = ml_collections.FieldReference(value, field_type=object)
    (config[section] if section else config)[name] = value
  return config
