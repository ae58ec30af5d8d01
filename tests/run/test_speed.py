"""Depths follow speed, and runs of unequal workers keep their promises."""

import itertools

import jax
import numpy as np
import pytest
from test_train import rows, stopped_at, tiny_config
from wire import train_and_compare

from resist_jax import report
from resist_jax.run import phases, speed, train
from resist_jax.run.checks import validate
from resist_jax.run.setup import prepare


def slowest(shared, block, depths):
  return max(s + d * b for s, b, d in zip(shared, block, depths, strict=True))


@pytest.mark.parametrize('seed', range(5))
def test_no_other_depths_finish_sooner(seed):
  rng = np.random.default_rng(seed)
  S, L = 3, 9
  shared, block = rng.uniform(0, 3, S), rng.uniform(0.5, 3, S)
  depths = speed.depths_by_speed(shared.tolist(), block.tolist(), L)
  assert sum(depths) == L
  assert min(depths) >= 1
  best = min(
    slowest(shared, block, other)
    for other in itertools.product(range(1, L + 1), repeat=S)
    if sum(other) >= L
  )
  assert slowest(shared, block, depths) == pytest.approx(best)


def test_equal_workers_get_equal_depths():
  depths = speed.depths_by_speed([1.0] * 4, [0.5] * 4, 22)
  assert depths == (6, 6, 5, 5)
  # One worker that is hopelessly slow still holds a block.
  assert speed.depths_by_speed([0, 0], [1, 1000], 8) == (7, 1)


def test_noise_cannot_make_a_block_free():
  seconds = np.array([[2.0, 4.0], [4.0, 3.9]])
  shared, block = speed.split_seconds(1, 3, seconds)
  assert shared[0] == 1
  assert block[0] == 1
  assert block[1] > 0
  assert shared[1] > 3


@pytest.mark.slow
@pytest.mark.parametrize('D', [2, 4])
def test_times_are_of_every_worker_and_two_depths(D):
  config = tiny_config(depths='by_speed', num_devices=D)
  few, many, seconds = speed.time_workers(prepare(config))
  assert (few, many) == (1, 2)
  assert seconds.shape == (4, 2)
  assert (seconds > 0).all()


def test_each_device_is_timed_where_they_are_not_alike(monkeypatch):
  timed = []

  def seconds(setup, row, depth):
    timed.append((row, depth))
    return float(row + depth)

  monkeypatch.setattr(speed, '_step_seconds', seconds)
  monkeypatch.setattr(speed.Setup, 'on_cpu', False)
  setup = prepare(tiny_config(depths='by_speed', num_devices=2))
  *_, found = speed.time_workers(setup)
  assert timed == [(0, 1), (0, 2), (1, 1), (1, 2)]
  assert found.tolist() == [[1, 2], [1, 2], [2, 3], [2, 3]]


@pytest.mark.slow
@pytest.mark.parametrize('exchange', ['hand_over', 'masked_psum'])
def test_a_run_of_unequal_workers(exchange, tmp_path):
  depths = (3, 1, 2, 1)
  config = tiny_config(depths=depths, exchange=exchange)
  summary = train_and_compare(config, tmp_path)
  assert summary['depths'] == list(depths)
  for row in rows(tmp_path):
    held = row['slots']['stage2_chain']
    assert tuple(map(len, held)) == depths
    assert set().union(*held) == {0, 1, 2, 3, 4}
  assert summary['wire_bytes_last_round']['predicted'] > 0
  assert summary['params_per_worker'] == (
    summary['params_shared'] + 3 * summary['params_per_block']
  )
  assert summary['bytes_per_round'] == 8 * (
    4 * summary['params_shared'] + 7 * summary['params_per_block']
  )
  scale = phases.global_scale(prepare(config))
  assert scale == {'stage2_chain': 7 / 20}
  flops = summary['flops_per_image']
  assert flops['compiled'] == pytest.approx(flops['predicted'], rel=0.25)


@pytest.mark.parametrize(
  'fields',
  [
    pytest.param(
      {'depths': (3, 1, 2, 1), 'optimizer.carry_momentum': True},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {'depths': 'by_speed', 'num_devices': 2}, marks=pytest.mark.slow
    ),
    pytest.param(
      {'depths': (2, 1, 1, 1), 'phases.full_before': 1, 'wire_format': 'int8'},
      marks=pytest.mark.slow,
    ),
  ],
  ids=['named', 'by_speed', 'phases'],
)
def test_a_stopped_run_ends_bit_equal(fields, monkeypatch, tmp_path):
  # Other times on each start: a resumed run must not ask for them again.
  measured = iter([(3.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 3.0)])

  def times(setup):
    block = np.array(next(measured))
    return 1, 2, np.stack([block, 2 * block], axis=1)

  monkeypatch.setattr(speed, 'time_workers', times)
  stopped_at(1, monkeypatch, tmp_path / 'stopped', tiny_config(**fields))
  log = rows(tmp_path / 'stopped')
  again = train.train(tiny_config(**fields), str(tmp_path / 'stopped'))
  monkeypatch.setattr(
    speed, 'time_workers', lambda _: (1, 2, np.array([[3, 6.0], *3 * [[1, 2]]]))
  )
  whole = train.train(tiny_config(**fields), str(tmp_path / 'whole'))
  assert again['depths'] == whole['depths']
  assert again['params_hash'] == whole['params_hash']
  assert len(rows(tmp_path / 'stopped')) == 4
  assert rows(tmp_path / 'stopped')[: len(log)] == log  # With the same seconds.


@pytest.mark.slow
def test_depths_are_elastic(monkeypatch, tmp_path):
  stopped_at(1, monkeypatch, tmp_path, tiny_config(depths=(2, 1, 1, 1)))
  before = rows(tmp_path)
  start = len(before)
  monkeypatch.setattr(
    speed, 'time_workers', lambda _: (1, 2, np.array([[1, 2.0], [3, 6.0]]))
  )
  config = tiny_config(depths='by_speed', num_workers=2, num_devices=2)
  summary = train.train(config, str(tmp_path))
  assert summary['depths'] == [4, 1]  # Not those of four workers.
  log = report.read_rows(tmp_path / 'metrics.jsonl')
  held = [list(map(len, row['slots']['stage2_chain'])) for row in log]
  assert held == start * [[2, 1, 1, 1]] + (4 - start) * [[4, 1]]
  assert log[:start] == before
  assert log[start]['train_loss'] < log[0]['train_loss'] + 0.3


def test_a_config_by_speed_is_valid():
  config = tiny_config(depths='by_speed')
  validate(config)
  assert prepare(config).depths == ()
  assert len(jax.devices()) == 4
