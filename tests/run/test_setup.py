"""Tests of what a config becomes: scales, counts and devices."""

import dataclasses

import jax
import pytest
from test_train import tiny_config

from resist_jax import data
from resist_jax.errors import ConfigError
from resist_jax.run import phases
from resist_jax.run.setup import prepare


@pytest.mark.parametrize('where', ['evaluation', 'training', 'none'])
def test_the_global_model_means_the_same_in_all_phases(where):
  """A full-model phase trains the network that is evaluated."""
  setup = prepare(tiny_config(residual_scale=where))
  evaluated = phases.global_scale(setup)['stage2_chain']
  full, cut = (
    phases.training_scale(setup, name)['stage2_chain']
    for name in ('local_sgd', 'resist')
  )
  assert full == evaluated
  assert cut / evaluated == pytest.approx(1 if where == 'none' else 4)
  by_block = phases.global_scales(setup)['stage2_chain']
  assert by_block.tolist() == [pytest.approx(evaluated)] * 5


def test_baselines_scale_nothing():
  setup = prepare(tiny_config(protocol='local_sgd'))
  assert phases.training_scale(setup, 'local_sgd') == {}
  assert phases.global_scales(setup) == {}


def test_a_baseline_sends_gradients_at_each_step_or_carries_momentum():
  def sent(**fields):
    setup = prepare(tiny_config(**fields))
    phase = phases.make_phase(setup, phases.name_at(setup.config, 1))
    return phase.bytes_per_round

  sgd = sent(protocol='local_sgd')
  assert sent(protocol='data_parallel') == 2 * sgd  # T = 2.
  carried = {'protocol': 'local_sgd', 'optimizer.carry_momentum': True}
  assert sent(**carried) == 2 * sgd


def test_a_phase_trains_by_the_protocol_that_it_describes():
  """The trainer of a phase takes its fields from the config, as it does."""
  setup = prepare(
    tiny_config(min_depth=2, wire_format='int8', **{'faults.loss_factor': 3.0})
  )
  shapes = jax.eval_shape(
    lambda: setup.task.network.init(
      jax.random.key(0), jax.numpy.zeros((1, *setup.task.image_shape))
    )
  )['params']
  for name in ('resist', 'local_sgd'):
    phase = phases.make_phase(setup, name)
    ours, theirs = phase.trainer.protocol(shapes), phase.protocol
    cut = name == 'resist'
    assert ours.num_blocks == ({'stage2_chain': 5} if cut else {})
    for field in dataclasses.fields(ours):
      if field.name != 'exchange':  # Functions, made for each.
        assert getattr(ours, field.name) == getattr(theirs, field.name)
    assert ours.exchange.format == theirs.exchange.format
    assert ours.divisions == theirs.divisions


def test_devices_that_are_missing_are_refused():
  with pytest.raises(ConfigError, match='but there are 4 here'):
    prepare(
      tiny_config(
        num_workers=8, num_devices=8, min_depth=1, exchange='masked_psum'
      )
    )
  assert prepare(tiny_config(num_devices=0)).mesh.devices.size == 4
  three = tiny_config(num_devices=0, num_workers=3)
  assert prepare(three).mesh.devices.size == 3
  jax.clear_caches()


def test_each_virtual_device_is_counted_as_a_copy_of_the_images(monkeypatch):
  asked = []
  load = data.load
  monkeypatch.setattr(
    data, 'load', lambda *a, **k: asked.append(k['copies']) or load(*a, **k)
  )
  prepare(tiny_config())
  prepare(tiny_config(num_devices=1))
  assert asked == [5, 2]  # That of the host is one of them.


def test_a_run_that_ends_with_full_models_is_summarised_as_resist():
  config = tiny_config(**{'phases.full_after': 1})
  assert phases.name_at(config, 3) == 'local_sgd'
  name = phases.typical_name(config)
  typical = phases.describe(prepare(config), name)
  assert name == 'resist'
  assert typical.protocol.num_blocks == {'stage2_chain': 5}
