"""Levers that the paper does not have, as fields of a config: on digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import rows, stopped_at, tiny_config
from wire import train_and_compare

from resist_jax.rounds import Whole
from resist_jax.rounds.moments import Parts
from resist_jax.run import export, lengths, optimizer, phases, restore, train
from resist_jax.run.setup import prepare

CHAIN = 'stage2_chain'


def trained(folder):
  return export.load(folder).variables['params']


def assert_goes_on_to_the_same_bits(fields, round_index, patch, tmp_path):
  """Also compares the bytes predicted with those of the compiled programs."""
  whole = train_and_compare(tiny_config(**fields), tmp_path / 'whole')
  folder = tmp_path / 'stopped'
  stopped_at(round_index, patch, folder, tiny_config(**fields))
  log = rows(folder)
  again = train.train(tiny_config(**fields), folder)
  # No round is trained twice: it would have taken other seconds.
  assert rows(folder)[: len(log)] == log
  for name in ('params_hash', 'test_accuracy', 'bytes_total', 'rounds'):
    assert again[name] == whole[name], name
  losses = [
    [row['train_loss'] for row in rows(path)]
    for path in (folder, tmp_path / 'whole')
  ]
  assert losses[0] == losses[1]
  return whole


OUTER = {'outer.lr': 1.0, 'outer.momentum': 0.5, 'outer.nesterov': True}
ALL = {
  **OUTER,
  'average.decay': 0.5,
  'dealing': 'spread',
  'distillation.weight': 0.5,
  'local_steps_alpha': 0.01,
  'min_depth': 3,
  'model.gates': True,
  'shared_every': 1,
}


def test_levers_reach_the_trainer():
  """Each worker of four gets one block of each half of eight."""
  fields = {**ALL, 'min_depth': 0, 'model.gate_start': 0.5}
  setup = prepare(tiny_config(**fields, **{'model.stage_sizes': (1, 9)}))
  trainer = phases.make_phase(setup, 'resist').trainer
  assert (trainer.average, trainer.shared_every) == (0.5, 1)
  assert trainer.give_agreed
  assert phases.make_phase(setup, 'local_sgd').trainer.shared_every == 0
  change = jnp.float32(2)
  update, _ = trainer.outer.update(change, trainer.outer.init(change))
  assert update == -3  # The change, and half of it ahead.
  params = setup.task.init(0)
  np.testing.assert_array_equal(params[CHAIN]['gate'], np.full(8, 0.5))
  state = trainer.distribute(Whole(params))
  slots = np.asarray(state.assignments[CHAIN].slots)
  assert (slots // 4 == [[0, 1]]).all()


@pytest.mark.slow
def test_a_run_with_all_levers_goes_on(monkeypatch, tmp_path):
  """The last two of four rounds are trained as one."""
  found = assert_goes_on_to_the_same_bits(ALL, 1, monkeypatch, tmp_path)
  log = rows(tmp_path / 'whole')
  assert [row.get('rounds', 1) for row in log] == [1, 1, 2]
  assert train.train(tiny_config(**ALL), tmp_path / 'whole') == found


@pytest.mark.slow
def test_groups_of_devices_send_what_is_predicted(tmp_path):
  groups = {'num_devices': 4, 'devices_per_worker': 2}
  found = train_and_compare(tiny_config(**ALL, **groups), tmp_path)
  assert found['devices_per_worker'] == 2


@pytest.mark.slow
def test_half_an_outer_step_is_half_the_way_to_the_mean(tmp_path):
  for name, fields in (('mean', {}), ('half', {'outer.lr': 0.5})):
    train.train(tiny_config(num_rounds=1, **fields), tmp_path / name)
  start = prepare(tiny_config()).task.init(0)
  want = jax.tree.map(
    lambda x, y: (np.asarray(x) + y) / 2, start, trained(tmp_path / 'mean')
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    trained(tmp_path / 'half'),
    want,
  )


@pytest.mark.slow
def test_a_run_with_an_outer_optimiser_goes_on(monkeypatch, tmp_path):
  """Its momentum lasts from phase to phase, too."""
  fields = {**OUTER, 'min_depth': 3, 'phases.full_before': 1}
  assert_goes_on_to_the_same_bits(fields, 2, monkeypatch, tmp_path)


def test_all_that_is_kept_stays_when_the_residual_scale_changes():
  setup = prepare(tiny_config(**OUTER))
  params = setup.task.init(0)
  parts = Parts([params], [])
  whole = Whole(params, outer=parts, average=parts)
  new = restore._rescaled(setup, whole, {CHAIN: 2.0})
  (average,), (momentum,) = new.average.moments, new.outer.moments
  for tree, factor in ((new.params, 2), (average, 2), (momentum, 0.5)):
    for layer, scale in (('conv1', 1), ('conv2', factor)):
      got, want = (x[CHAIN][layer]['kernel'] for x in (tree, params))
      np.testing.assert_allclose(got, scale * np.asarray(want), rtol=1e-6)


@pytest.mark.slow
def test_an_average_is_tested_exported_and_kept(monkeypatch, tmp_path):
  """The network of the last round is tested beside it."""
  fields = {'average.decay': 0.5, 'min_depth': 3, 'phases.full_after': 1}
  fields |= {'eval_every': 1, 'num_rounds': 3}
  found = assert_goes_on_to_the_same_bits(fields, 2, monkeypatch, tmp_path)
  plain = train.train(
    tiny_config(**{**fields, 'average.decay': 0.0}), tmp_path / 'plain'
  )
  for name in ('test_accuracy', 'test_accuracy_paper'):
    unaveraged = [r[f'{name}_unaveraged'] for r in rows(tmp_path / 'whole')]
    assert unaveraged == [r[name] for r in rows(tmp_path / 'plain')]
    assert found[f'{name}_unaveraged'] == plain[name]
  assert found['params_hash'] != plain['params_hash']
  images = prepare(tiny_config()).dataset.tests['test']
  hits = np.asarray(export.load(tmp_path / 'whole')(images.images)).argmax(-1)
  assert (hits == images.labels).mean() == pytest.approx(found['test_accuracy'])
  tests = 'evaluation_wire_bytes_total'
  assert found[tests] == 2 * plain[tests]


@pytest.mark.slow
def test_rounds_grow_as_the_rate_falls_and_a_run_goes_on(monkeypatch, tmp_path):
  """The paper's rate falls to a tenth after rounds 4 and 6 of 8."""
  fields = {'local_steps_alpha': 0.01, 'num_rounds': 8, 'eval_every': 3}
  fields |= {'checkpoint_every': 1, 'min_depth': 3, 'average.decay': 0.5}
  # (0.01 / 0.003)^2 is 11 steps, but a phase of two rounds follows.
  found = assert_goes_on_to_the_same_bits(
    {**fields, 'phases.full_after': 2}, 6, monkeypatch, tmp_path
  )
  log = rows(tmp_path / 'whole')
  assert [row['round'] for row in log] == [1, 2, 3, 4, 6, 8]
  assert [row.get('rounds', 1) for row in log] == [1, 1, 1, 1, 2, 2]
  tested = [row['round'] for row in log if 'test_accuracy' in row]
  assert tested == [3, 6, 8]
  assert found['rounds'] == 8
  sent = dict.fromkeys(('resist', 'local_sgd'), 0)
  before = 0
  for row in log:
    sent[row['protocol']] = row['bytes_total'] - before
    before = row['bytes_total']
  assert found['bytes_total'] == 5 * sent['resist'] + sent['local_sgd']


@pytest.mark.slow
def test_local_sgd_and_streams_take_longer_rounds_too(tmp_path):
  fields = {'local_steps_alpha': 1.0, 'protocol': 'local_sgd'}
  fields['data.streaming'] = 'always'
  found = train_and_compare(tiny_config(**fields), tmp_path)
  assert [row['rounds'] for row in rows(tmp_path)] == [4]
  assert found['bytes_total'] == found['bytes_per_round']


@pytest.mark.parametrize('schedule', ['one_cycle', 'cosine'])
def test_no_rise_of_the_rate_makes_rounds_long(schedule):
  config = tiny_config(num_rounds=32, local_steps_alpha=0.04)
  config.optimizer.schedule = schedule
  found = lengths.make(config, optimizer.schedule(config))
  done, counts = 0, []
  while done < 32:
    counts.append(found.at(done))
    done += counts[-1]
  assert (done, counts[0], max(counts) > 2) == (32, 1, True)
  assert found.of_phase(0) == set(counts)


@pytest.mark.slow
def test_the_shared_part_is_exchanged_in_between(monkeypatch, tmp_path):
  """In rounds of two steps once more, and in rounds at once so, too."""
  fields = {'shared_every': 1, 'min_depth': 3, 'phases.full_after': 1}
  fields |= {'local_steps_alpha': 0.01, 'num_rounds': 6}
  found = assert_goes_on_to_the_same_bits(fields, 2, monkeypatch, tmp_path)
  log = rows(tmp_path / 'whole')
  assert [row.get('rounds', 1) for row in log] == [1, 1, 1, 2, 1]
  sent = np.diff([0, *(row['bytes_total'] for row in log)])
  shared = 2 * 4 * 4 * found['params_shared']
  # The first and fourth row, of 2 and 4 steps: 2 and 4 shared exchanges.
  assert sent[3] - sent[0] == 2 * shared
  assert found['bytes_per_round'] == sent[0]


@pytest.mark.slow
def test_gates_are_learned_and_exported(tmp_path):
  fields = {'model.gates': True, 'model.gate_start': 0.5, 'min_depth': 3}
  found = train.train(tiny_config(**fields), tmp_path)
  gates = trained(tmp_path)[CHAIN]['gate']
  assert len(np.unique(gates)) == 5  # They do not only decay.
  images = prepare(tiny_config()).dataset.tests['test']
  hits = np.asarray(export.load(tmp_path)(images.images)).argmax(-1)
  assert (hits == images.labels).mean() == pytest.approx(found['test_accuracy'])
