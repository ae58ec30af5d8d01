"""Every mistake that needs neither data nor devices gets its line."""

import pytest

from resist_jax import config as config_lib
from resist_jax import validation
from resist_jax.config import ConfigError


def test_the_defaults_are_valid():
  validation.validate(config_lib.get_config())


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    ({'protocol': 'resits'}, 'protocol .* resist, local_sgd, data_parallel'),
    ({'num_workers': 0}, 'num_workers is 0; it must be at least 1'),
    ({'num_rounds': 0}, 'num_rounds'),
    ({'local_steps': 0}, 'local_steps'),
    ({'batch_size': 0}, 'batch_size'),
    ({'eval_every': 0}, 'eval_every'),
    ({'checkpoint_every': 0}, 'checkpoint_every'),
    ({'seed': -1}, 'seed'),
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
    ({'exchange': 'ring'}, 'exchange is .* hand_over, masked_psum'),
    ({'wire_format': 'int4'}, 'wire_format .* float32, bfloat16, int8'),
    (
      {'protocol': 'data_parallel', 'wire_format': 'int8'},
      'int8 .* use bfloat16 or float32',
    ),
    ({'num_workers': 23, 'min_depth': 2}, 'of its own.*masked_psum'),
    ({'min_depth': 21}, 'can run at most 20.*masked_psum'),
    ({'evaluation.batches_at_once': 0}, 'batches_at_once'),
    ({'residual_scale': 'test'}, 'residual_scale'),
    ({'data.augment': 'mixup'}, 'augment'),
    ({'data.validation': 1.0}, 'data.validation'),
    ({'optimizer.schedule': 'linear'}, 'schedule'),
    ({'optimizer.momentum': 1.0}, 'momentum'),
    ({'optimizer.weight_decay': -0.1}, 'weight_decay'),
    ({'model.name': 'ResNet50'}, 'PreActResNet101'),
    ({'model.norm': 'layer'}, 'norm'),
    ({'model.stem': 'big'}, 'stem'),
    ({'model.dtype': 'float64'}, 'dtype'),
    ({'model.widths': (8, 8)}, '4 stages and model.widths 2'),
    ({'model.stage_sizes': (1, 1, 0, 1)}, 'at least 1'),
    ({'evaluation.batch_size': 0}, 'evaluation.batch_size'),
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
  ],
)
def test_a_mistake_gets_one_clear_line(fields, says):
  config = config_lib.get_config()
  config.update_from_flattened_dict(fields)
  with pytest.raises(ConfigError, match=says) as caught:
    validation.validate(config)
  assert '\n' not in str(caught.value)


def test_baselines_need_no_partition():
  config = config_lib.get_config()
  config.protocol, config.num_workers = 'local_sgd', 64
  validation.validate(config)


def test_elastic_fields_exist():
  flat = config_lib.get_config().to_dict()
  for name in config_lib.ELASTIC:
    value = flat
    for part in name.split('.'):
      value = value[part]
