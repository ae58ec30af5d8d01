"""What a config becomes: scales, counts and devices."""

import jax
import pytest
from test_train import tiny_config

from resist_jax.errors import ConfigError
from resist_jax.run import summary, train


@pytest.mark.parametrize('where', ['evaluation', 'training', 'none'])
def test_the_global_model_means_the_same_in_all_phases(where):
  """A full-model phase trains the network that is evaluated."""
  config = tiny_config(residual_scale=where)
  setup = train.prepare(config)
  evaluated = float(setup.evaluator.scales['stage2_chain'][0])
  assert setup.training_scale('local_sgd')['stage2_chain'] == evaluated
  ratio = setup.training_scale('resist')['stage2_chain'] / evaluated
  assert ratio == pytest.approx(1 if where == 'none' else 4)


def test_baselines_scale_nothing():
  setup = train.prepare(tiny_config(protocol='local_sgd'))
  assert setup.training_scale('local_sgd') == {}
  assert setup.evaluator.scales == {}


def test_what_a_baseline_sends():
  def sent(**fields):
    return train.prepare(tiny_config(**fields)).phase(1).bytes_per_round

  sgd = sent(protocol='local_sgd')
  assert sent(protocol='data_parallel') == 2 * sgd  # T = 2.
  carried = {'protocol': 'local_sgd', 'optimizer.carry_momentum': True}
  assert sent(**carried) == 2 * sgd


def test_devices_that_are_not_there():
  with pytest.raises(ConfigError, match='but there are 4 here'):
    train.prepare(
      tiny_config(
        num_workers=8, num_devices=8, min_depth=1, exchange='masked_psum'
      )
    )
  assert train.prepare(tiny_config(num_devices=0)).mesh.devices.size == 4
  three = tiny_config(num_devices=0, num_workers=3)
  assert train.prepare(three).mesh.devices.size == 3
  jax.clear_caches()


def test_a_run_that_ends_with_full_models_is_summarised_as_resist():
  setup = train.prepare(tiny_config(**{'phases.full_after': 1}))
  assert setup.phase_name(3) == 'local_sgd'
  assert summary.typical_protocol(setup).num_blocks == {'stage2_chain': 5}
