"""Full-model rounds at the end of a run, beside plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import rows, tiny_config

from resist_jax.rounds import assemble
from resist_jax.run import train, workdir
from resist_jax.run.setup import prepare

CHAIN, LENGTH, DEPTH = 'stage2_chain', 5, 3
FIELDS = {
  'num_rounds': 2,
  'phases.full_after': 1,
  'min_depth': DEPTH,
  'optimizer.weight_decay': 0.0,
  'optimizer.momentum': 0.5,
}


def plain_round(setup, params, number):
  """Trains whole networks for a round, by local SGD or data parallel."""
  # What sub-networks have at 1, the whole one has at the share that trained.
  cut = setup.config.protocol == 'resist'
  scale = {CHAIN: DEPTH / LENGTH} if cut else {}
  loss_fn = setup.task.make_loss(scale, None)
  data = jax.tree.map(jnp.asarray, setup.pipeline.constants)
  gradient = jax.jit(
    jax.grad(lambda p, batch: loss_fn(p, {}, batch, jax.random.key(0), data)[0])
  )
  numbers = setup.pipeline.batches(number)
  S, T, _ = numbers.shape
  rates = [float(setup.schedule(number * T + t)) for t in range(T)]
  parallel = setup.config.phases.protocol == 'data_parallel'
  workers = [params] * S
  trace = [jax.tree.map(jnp.zeros_like, params)] * S
  for t in range(T):
    grads = [gradient(workers[s], numbers[s, t]) for s in range(S)]
    if parallel:
      grads = [mean(grads)] * S
    trace = [
      jax.tree.map(lambda m, g: 0.5 * m + g, *both)
      for both in zip(trace, grads, strict=True)
    ]
    workers = [
      optax.apply_updates(w, jax.tree.map(lambda m, t=t: -rates[t] * m, moved))
      for w, moved in zip(workers, trace, strict=True)
    ]
  return mean(workers)


def mean(trees):
  return jax.tree.map(lambda *x: sum(x) / len(trees), *trees)


@pytest.mark.parametrize(
  ('protocol', 'full'),
  [
    ('resist', 'local_sgd'),
    ('resist', 'data_parallel'),
    ('local_sgd', 'data_parallel'),
  ],
)
def test_full_model_rounds_equal_a_plain_loop(tmp_path, protocol, full):
  config = tiny_config(
    **FIELDS, **{'protocol': protocol, 'phases.protocol': full}
  )
  after = {}

  def watch(row, state):
    after[row['round']] = jax.tree.map(np.asarray, assemble(state).params)

  train.train(config, tmp_path, callbacks=[watch])
  assert [row['protocol'] for row in rows(tmp_path)] == [protocol, full]
  want = plain_round(prepare(config), after[1], 1)
  moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), after[1], after[2])
  assert max(jax.tree.leaves(moved)) > 1e-3
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
    after[2],
    jax.tree.map(np.asarray, want),
  )


def test_a_stop_between_two_phases_changes_nothing(tmp_path):
  """Norms of updates before a phase judge nobody in it, in either case."""
  config = tiny_config(
    **{**FIELDS, 'num_rounds': 3, 'protocol': 'local_sgd'},
    **{'phases.protocol': 'data_parallel', 'optimizer.carry_momentum': True},
    **{'optimizer.schedule': 'step', 'optimizer.drops': ()},  # Constant.
  )
  found = {}
  for name, stops in (('whole', (3,)), ('stopped', (2, 3))):

    def watch(row, state, name=name):
      if row['round'] == 3:
        found[name] = jax.tree.map(np.asarray, state)

    for rounds in stops:
      config.num_rounds = rounds
      config.phases.full_after = int(rounds == 3)
      train.train(config, tmp_path / name, callbacks=[watch])
  jax.tree.map(np.testing.assert_array_equal, found['whole'], found['stopped'])


def test_an_ended_run_names_no_phase_that_it_did_not_train(tmp_path, caplog):
  """Fewer rounds may end a run, but then its last ones were no full models."""
  config = tiny_config(**{**FIELDS, 'num_rounds': 1, 'phases.full_after': 0})
  train.train(config, tmp_path)
  longer = tiny_config(**FIELDS)
  # As a run that was stopped before its last phase.
  workdir.write_json(tmp_path / 'config.json', longer.to_dict())
  config.phases.full_after = 1
  summary = train.train(config, tmp_path)
  assert summary['wire_bytes_last_round']['protocol'] == 'resist'
  assert list(summary['memory_per_device']['peaks']) == ['resist']
  assert 'the last round was one of resist' in caplog.text
