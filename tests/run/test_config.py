"""Every mistake that needs neither data nor devices gets its line."""

import importlib

import absl.flags
import ml_collections
from ml_collections import config_flags
import pytest

from resist_jax.errors import ConfigError
from resist_jax.exchange import FORMATS, Exchange
from resist_jax.run import checks, fields
from resist_jax.run import config as config_lib


def test_the_defaults_are_valid():
  checks.validate(config_lib.get_config())


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    (
      {'protocol': 'resits'},
      'Did you mean resist.* resist, local_sgd, data_parallel',
    ),
    ({'num_workers': 0}, 'num_workers is 0; it must be at least 1'),
    ({'num_rounds': 0}, 'num_rounds'),
    ({'num_rounds': 2**31}, r'num_rounds is 2147483648; .* less than 2\*\*31'),
    ({'data.pad': 10**30}, r'data.pad is 1000.*must be less than 2\*\*31'),
    (
      {'num_rounds': 2**16, 'local_steps': 2**15},
      r'local_steps 32768, 2147483648 steps in all.*lower one',
    ),
    ({'local_steps': 0}, 'local_steps'),
    ({'batch_size': 0}, 'batch_size'),
    ({'eval_every': 0}, 'eval_every'),
    ({'checkpoint_every': 0}, 'checkpoint_every'),
    ({'keep_checkpoints': -1}, 'keep_checkpoints is -1; it must be at least 0'),
    ({'early_stopping.patience': -1}, 'early_stopping.patience is -1'),
    ({'early_stopping.min_gain': -0.1}, 'early_stopping.min_gain is -0.1'),
    ({'seed': -1}, 'seed'),
    ({'seed': 2**32}, r'seed is 4294967296; .* less than 2\*\*32'),
    ({'seed': 2**63}, 'seed is 9223372036854775808'),
    ({'lr': 0.0}, 'lr is 0.0'),
    ({'lr': float('nan')}, 'lr is nan'),
    ({'min_depth': 23}, 'stage 3: min_depth is 23; a chain of 22 blocks'),
    ({'num_workers': 23}, 'stage 3: 23 workers cannot share 22 blocks'),
    ({'num_workers': 4, 'num_devices': 3}, 'not a multiple of num_devices 3'),
    ({'partition': (5,)}, 'stage 5; .* stages 1 to 4'),
    ({'partition': ()}, 'at least one stage'),
    ({'partition': (3, 3)}, 'each once'),
    ({'partition': ('x',)}, 'whole numbers'),
    ({'model.stage_sizes': (1, 2.5, 3, 1)}, 'whole numbers'),
    ({'phases.full_before': 60, 'phases.full_after': 41}, '101 full-model'),
    ({'phases.full_before': -1}, 'phases.full_before'),
    (
      {'model.name': 'ResNet50'},
      "model.name is 'ResNet50'. Did you mean PreActBottleneckResNet50",
    ),
    (
      {'model.name': 'resnet101'},
      'mean PreActResNet101 or PreActBottleneckResNet101',
    ),
    ({'data.augment': 'crops'}, "data.augment is 'crops'. Did you mean crop"),
    (
      {'num_workers': 30},
      'at most 22 workers, or min_depth >= 1 with the',
    ),
    ({'exchange': 'ring'}, 'exchange is .* hand_over, masked_psum'),
    ({'wire_format': 'int4'}, 'wire_format .* float32, bfloat16, int8'),
    (
      {'protocol': 'data_parallel', 'wire_format': 'int8'},
      'int8 .* use bfloat16 or float32',
    ),
    ({'num_workers': 23, 'min_depth': 2}, 'of its own.*masked_psum'),
    ({'min_depth': 21}, 'can run at most 20.*masked_psum'),
    ({'depths': (8, 6, 4)}, r'stage 3: depths is \(8, 6, 4\), not one number'),
    ({'depths': (8, 6, 4, 3)}, '21 blocks in all, but the chain has 22'),
    ({'depths': (23, 6, 4, 3)}, 'allows 1 to 22'),
    ({'depths': (22, 6, 4, 0)}, 'allows 1 to 22'),
    ({'depths': (8, 6, 4, 4), 'min_depth': 2}, 'set that to 0'),
    ({'depths': 'by_speed', 'min_depth': 2}, 'set min_depth to 0'),
    ({'depths': 'by_weight'}, "depths is 'by_weight'; use a whole number"),
    ({'depths': 8}, 'depths is 8; use a whole number'),
    ({'depths': ''}, "depths is ''; use a whole number"),
    ({'depths': (8, 6, 4, 4.5)}, 'use a whole number'),
    ({'depths': (8, 6, 4, 4), 'partition': (2, 3)}, 'cut one chain'),
    (
      {
        'depths': (8, 6, 4, 4),
        'partition_strided': True,
        'exchange': 'masked_psum',
      },
      'cut one chain',
    ),
    ({'depths': (8, 6, 4, 4), 'protocol': 'local_sgd'}, 'protocol resist'),
    ({'depths': None, 'protocol': 'local_sgd'}, 'depths is None; use a whole'),
    ({'data.extra_tests': (['a'], ['b'])}, 'extra_tests is .*must name sets'),
    ({'depths': (22, 22, 1, 1)}, 'needs 12 replicas.* at most 3.*masked_psum'),
    ({'evaluation.batches_at_once': 0}, 'batches_at_once'),
    (
      {'num_rounds': 10**6 + 1, 'local_steps': 1},
      'at most 1000000 rounds: set log.report to False',
    ),
    ({'residual_scale': 'test'}, 'residual_scale'),
    ({'data.augment': 'mixup'}, 'augment'),
    ({'data.pad': -2}, 'data.pad is -2; it must be at least -1'),
    ({'data.fill': 'white'}, "fill is 'white'. Use one of black, reflection"),
    ({'data.flips': 'alternate'}, 'Did you mean alternating'),
    ({'label_smoothing': 1.0}, 'label_smoothing is 1.0; it is a share'),
    ({'distillation.weight': 1.0}, 'distillation.weight is 1.0; it is a share'),
    ({'distillation.temperature': 0.0}, 'temperature is 0.0; it must be gre'),
    ({'average.decay': 0.99999999}, 'decay is 0.99999999; .*most 0.999999'),
    (
      {'distillation.weight': 0.5, 'protocol': 'data_parallel'},
      'all workers of data_parallel agree at every step: set it to 0',
    ),
    ({'model.init': 'pytorch'}, 'Did you mean torch'),
    ({'data.validation': 1.0}, 'data.validation'),
    (
      {'optimizer.schedule': 'cosin'},
      "schedule is 'cosin'. Did you mean cosine.*step, cosine, linear, one_cyc",
    ),
    ({'optimizer.schedule': 'nowhere:rate'}, "'nowhere' of .*be imported"),
    ({'optimizer.schedule': 'no.py:rate'}, "'no.py' of .*cannot be imported"),
    (
      {'optimizer.schedule': 'optax:cosine_decay_schedul'},
      'no function .*Did you mean optax:cosine_decay_schedule',
    ),
    (
      {'optimizer.schedule': 'one_cycle', 'optimizer.warmup_rounds': 1},
      'a rise of its own: set optimizer.warmup_rounds to 0',
    ),
    (
      {'optimizer.warmup_rounds': 1_500_000_000},
      'optimizer.warmup_rounds is 1500000000, .* fewer than 2..31: lower it',
    ),
    ({'optimizer.momentum': 1.0}, 'momentum'),
    ({'optimizer.drops': ('half',)}, 'optimizer.drops is .*shares of the run'),
    ({'optimizer.weight_decay': -0.1}, 'weight_decay'),
    ({'optimizer.bias_rate': -1.0}, 'optimizer.bias_rate is -1.0'),
    ({'model.name': 'ResNet50'}, 'PreActResNet101'),
    ({'model.norm': 'layer'}, 'norm'),
    ({'model.stem': 'big'}, 'stem'),
    ({'model.dtype': 'float64'}, 'dtype'),
    ({'model.widths': (8, 8)}, '4 stages and model.widths 2'),
    ({'model.stage_sizes': (1, 1, 0, 1)}, 'at least 1'),
    ({'evaluation.batch_size': 0}, 'evaluation.batch_size'),
    (
      {'faults.timeout': 1e9},
      'faults.timeout is .*less than 1e9 seconds',
    ),
    ({'faults.loss_factor': 0.9}, 'faults.loss_factor is 0.9; .* than 1, or 0'),
    ({'faults.loss_factor': float('nan')}, 'faults.loss_factor is nan'),
    (
      {'faults.loss_factor': 2.0, 'faults.leave_out': False},
      'leave_out is off',
    ),
    (
      {'faults.loss_factor': 2.0, 'protocol': 'data_parallel'},
      'data_parallel has averaged by then',
    ),
    ({'protocol': 'local_sgd', 'phases.full_before': 1}, 'phases .* resist'),
    ({'phases.protocol': 'resist'}, 'phases.protocol is .resist.'),
    (
      {
        'protocol': 'data_parallel',
        'phases.full_after': 1,
        'phases.protocol': 'data_parallel',
      },
      'resist or local_sgd',
    ),
    *(
      (
        {'phases.full_after': 1, 'phases.protocol': 'data_parallel', **fields},
        said,
      )
      for fields, said in (
        ({'wire_format': 'int8'}, 'data_parallel has none'),
        ({'local_steps_alpha': 1.0}, 'exchanges at every step'),
        ({'distillation.weight': 0.5}, 'agree at every step'),
        ({'faults.leave_out': True, 'faults.loss_factor': 3.0}, 'by then'),
      )
    ),
    ({'outer.lr': -1.0}, 'outer.lr is -1.0; it must be at least 0'),
    ({'outer.lr': 1.0, 'outer.momentum': 1.0}, 'outer.momentum is 1.0; .*than'),
    ({'outer.momentum': 0.5}, 'there is no outer optimiser: set outer.lr'),
    ({'outer.lr': 1.0, 'outer.nesterov': True}, 'outer.momentum is 0: set'),
    (
      {'outer.lr': 1.0, 'wire_format': 'int8'},
      'wire_format int8 would round .* use float32, or set outer.lr to 0',
    ),
    ({'local_steps_alpha': -1.0}, 'local_steps_alpha is -1.0; it must be at'),
    (
      {'local_steps_alpha': 0.1, 'protocol': 'data_parallel'},
      'data_parallel exchanges at every step: set it to 0',
    ),
    ({'shared_every': 7}, 'shared_every is 7; .* a divisor of local_steps, 50'),
    ({'shared_every': -1}, 'shared_every is -1; it must be a divisor'),
    (
      {'shared_every': 10, 'protocol': 'local_sgd'},
      'local_sgd divides nothing: set it to 0',
    ),
    (
      {'shared_every': 10, 'wire_format': 'int8'},
      'wire_format int8 sends changes: use float32',
    ),
    ({'dealing': 'spred'}, 'Did you mean spread.* random, spread'),
    (
      {'dealing': 'spread', 'exchange': 'masked_psum'},
      'needs exchange hand_over, but exchange is masked_psum',
    ),
    (
      {'dealing': 'spread', 'depths': 'by_speed'},
      'needs equal workers, but depths is by_speed',
    ),
    ({'model.gate_start': 0.5}, 'there are no gates: turn model.gates on'),
    ({'average.decay': 1.0}, 'average.decay is 1.0; .* less than 1'),
    (
      {'average.decay': 0.9, 'wire_format': 'bfloat16'},
      'wire_format bfloat16 would round .* or set average.decay to 0',
    ),
  ],
)
def test_a_mistake_gets_one_clear_line(fields, says):
  config = config_lib.get_config()
  config.update_from_flattened_dict(fields)
  with pytest.raises(ConfigError, match=says) as caught:
    checks.validate(config)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('flag', 'value'),
  [
    ('(8, 6, 4, 4)', (8, 6, 4, 4)),
    ('8,6,4,4', (8, 6, 4, 4)),
    ('by_speed', 'by_speed'),
    ('()', ()),
  ],
)
def test_depths_are_read_from_a_command_line(flag, value):
  flags, argv = absl.flags.FlagValues(), ['program', f'--config.depths={flag}']
  config_flags.DEFINE_config_dict(
    'config', config_lib.get_config(), flag_values=flags, sys_argv=argv
  )
  flags(argv)
  assert flags.config.depths == value
  checks.validate(flags.config)


FLOATS = [f.name for f in fields.each() if isinstance(f.default, float)]


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('name', [*FLOATS, 'optimizer.drops'])
def test_no_float_may_be_infinite(name, value):
  config = config_lib.get_config()
  value = (0.5, value) if name == 'optimizer.drops' else value
  config.update_from_flattened_dict({name: value})
  with pytest.raises(ConfigError, match=f'^{name} is .*it must be finite'):
    checks.validate(config)


def test_baselines_need_no_partition():
  config = config_lib.get_config()
  config.protocol, config.num_workers = 'local_sgd', 64
  checks.validate(config)


def test_each_exchange_takes_each_wire_format():
  for make in config_lib.EXCHANGES.values():
    for name, form in FORMATS.items():
      exchange = make(name)
      assert isinstance(exchange, Exchange)
      assert exchange.format == form


def test_a_config_without_a_field_is_refused_with_the_place_to_begin():
  config = config_lib.get_config()
  del config.lr
  with pytest.raises(ConfigError, match='lacks the field lr: begin') as caught:
    checks.validate(config)
  place = str(caught.value).split('begin with get_config() of ')[1]
  module = importlib.import_module(place.removesuffix('.'))
  assert module.get_config is config_lib.get_config


@pytest.mark.parametrize(
  ('name', 'value', 'says'),
  [
    ('num_workers', '2', "num_workers is '2'; it must be a whole number"),
    ('num_workers', 2.0, r'num_workers is 2\.0; it must be a whole number'),
    ('num_rounds', True, 'num_rounds is True; it must be a whole number'),
    ('lr', None, 'lr is None; it must be a number'),
    ('partition', 2, 'partition is 2; it must be a tuple'),
    ('partition_strided', 1, 'partition_strided is 1; it must be True or F'),
    ('data.name', 3, r'data\.name is 3; it must be text'),
    ('optimizer.drops', 0.5, r'optimizer\.drops is 0\.5; it must be a tuple'),
    ('data', 'digits', 'data'),
  ],
)
def test_a_config_from_elsewhere_may_hold_no_other_types(name, value, says):
  """That of `get_config` refuses them itself."""
  fields = config_lib.get_config().to_dict()
  section, _, last = name.rpartition('.')
  (fields[section] if section else fields)[last] = value
  with pytest.raises(ConfigError, match=says) as caught:
    checks.validate(ml_collections.ConfigDict(fields))
  assert '\n' not in str(caught.value)


def test_whole_numbers_are_numbers_and_lists_are_tuples():
  fields = config_lib.get_config().to_dict()
  fields |= {'lr': 1, 'partition': [3]}
  checks.validate(ml_collections.ConfigDict(fields))


def test_elastic_fields_exist():
  flat = config_lib.get_config().to_dict()
  for name in config_lib.ELASTIC:
    value = flat
    for part in name.split('.'):
      value = value[part]
