"""Checkpoints come back bit for bit, or not at all."""

import hashlib

import jax
from jax.sharding import NamedSharding
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from resist_jax.decomposition import Assignment
from resist_jax.rounds import State, make_mesh
from resist_jax.rounds.mesh import SHARDED
from resist_jax.rounds.moments import Parts
from resist_jax.rounds.storage import digest_of_arrays
from resist_jax.run.checkpoint import KEEP, Checkpoints, SaveError

# When one read of a damaged checkpoint fails, orbax closes its event loop while
# other reads are running, which complain from their threads.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)

SLOTS = np.array([[0, 2], [1, 3], [3, 4], [0, 4]], np.int32)


def state(step, **fields):
  """A state after a round, with random numbers drawn for it."""
  rng = np.random.default_rng(step)
  kernels = rng.normal(size=(4, 2, 30, 40)).astype(np.float32)
  sharding = NamedSharding(make_mesh(4), SHARDED)
  return State(
    {'stem': np.tile(rng.normal(size=(1, 3, 8)), (4, 1, 1))},
    {'chain': {'kernel': jax.device_put(kernels, sharding)}},
    {'chain': Assignment(SLOTS)},
    np.int32(step),
    {'chain': 5},
    **fields,
  )


def save(tmp_path, *steps, **fields):
  checkpoints = Checkpoints(tmp_path, make_mesh(4))
  for step in steps:
    progress = {'round': step, 'note': [1, 2]}
    checkpoints.save(state(step, **fields), progress)


def restore(tmp_path, num_devices=4):
  return Checkpoints(tmp_path, make_mesh(num_devices)).restore()


def newest_files(tmp_path, step):
  folder = tmp_path / 'checkpoints' / str(step)
  return sorted(
    (path for path in folder.rglob('*') if path.is_file()),
    key=lambda path: -path.stat().st_size,
  )


def assert_is(restored, step):
  assert restored.progress == {'round': step, 'note': [1, 2]}
  got, want = restored.stored.state, state(step)
  assert got.round == step
  assert got.num_blocks == {'chain': 5}
  np.testing.assert_array_equal(got.shared['stem'], want.shared['stem'][0])
  jax.tree.map(np.testing.assert_array_equal, got.chain, want.chain)
  np.testing.assert_array_equal(got.assignments['chain'].slots, SLOTS)


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
  assert restore(tmp_path) is None


def test_the_newest_comes_back(tmp_path):
  save(tmp_path, 1, 2)
  restored = restore(tmp_path)
  assert_is(restored, 2)
  assert restored.stored.state.carried is None
  assert restored.stored.state.error is None


@pytest.mark.parametrize('num_devices', [1, 2, 4])
def test_workers_read_their_own_parts(tmp_path, num_devices):
  save(tmp_path, 1)
  restored = restore(tmp_path, num_devices)
  assert_is(restored, 1)
  kernel = restored.stored.state.chain['chain']['kernel']
  shapes = {shard.data.shape for shard in kernel.addressable_shards}
  assert shapes == {(4 // num_devices, 2, 30, 40)}


def test_workers_that_devices_cannot_share_are_read_on_the_host(tmp_path):
  save(tmp_path, 1)
  restored = restore(tmp_path, 3)
  assert_is(restored, 1)
  assert isinstance(restored.stored.state.chain['chain']['kernel'], np.ndarray)


def test_moments_and_error_come_back(tmp_path):
  others = [state(seed) for seed in (8, 9)]  # As of Adam, which has two.
  moments = [{'shared': x.shared, 'chain': x.chain} for x in others]
  counts = [np.full(4, 7, np.int32), np.full(4, 3, np.int32)]
  error = {'sent': np.ones((4, 7), np.float32)}
  save(tmp_path, 1, carried=Parts(moments, counts), error=error)
  got = restore(tmp_path).stored.state
  for moment, other in zip(got.carried.moments, others, strict=True):
    jax.tree.map(np.testing.assert_array_equal, moment['chain'], other.chain)
    np.testing.assert_array_equal(
      moment['shared']['stem'], other.shared['stem'][0]
    )
  assert [int(count) for count in got.carried.rest] == [7, 3]
  jax.tree.map(np.testing.assert_array_equal, got.error, error)


def test_the_newest_three_are_kept(tmp_path):
  assert KEEP == 3
  save(tmp_path, *range(1, 7))
  kept = {path.name for path in (tmp_path / 'checkpoints').iterdir()}
  assert kept == {str(step) for step in range(7 - KEEP, 7)}


def test_a_round_can_be_saved_again(tmp_path):
  save(tmp_path, 1, 2)
  save(tmp_path, 2)
  assert_is(restore(tmp_path), 2)


def flip(path):
  content = bytearray(path.read_bytes())
  for i in range(len(content) // 4, len(content), 997):
    content[i] ^= 0xFF
  path.write_bytes(content)


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize('damage', [flip, cut, lambda path: path.unlink()])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path, damage, caplog):
  save(tmp_path, 1, 2)
  damage(newest_files(tmp_path, 2)[0])
  assert_is(restore(tmp_path), 1)
  assert 'round 2 is damaged' in caplog.text
  assert 'falling back to round 1' in caplog.text


def test_after_a_fallback_an_earlier_round_is_saved(tmp_path):
  """Round 3 is saved while the damaged checkpoint of round 4 exists."""
  save(tmp_path, 2, 4)
  cut(newest_files(tmp_path, 4)[0])
  assert_is(restore(tmp_path), 2)
  save(tmp_path, 3)
  assert_is(restore(tmp_path), 3)


def test_no_damage_to_any_file_brings_back_wrong_numbers(tmp_path):
  save(tmp_path, 1, 2)
  for path in newest_files(tmp_path, 2):
    whole = path.read_bytes()
    for damage in (flip, cut):
      damage(path)
      restored = restore(tmp_path)
      assert_is(restored, restored.progress['round'])
      path.write_bytes(whole)


def test_all_damaged_is_an_error(tmp_path):
  save(tmp_path, 1)
  cut(newest_files(tmp_path, 1)[0])
  with pytest.raises(
    ValueError, match=r'all 1 checkpoints .* move that folder'
  ):
    restore(tmp_path)


def test_a_half_written_checkpoint_is_deleted(tmp_path):
  save(tmp_path, 1)
  part = tmp_path / 'checkpoints' / '2.orbax-checkpoint-tmp'
  part.mkdir()
  (part / 'state').write_text('half')
  assert_is(restore(tmp_path), 1)
  save(tmp_path, 2)
  assert_is(restore(tmp_path), 2)


@pytest.mark.parametrize(
  ('error', 'count', 'again'),
  [
    (TimeoutError('Timeout waiting at barrier'), 2, True),
    (jax.errors.JaxRuntimeError('UNKNOWN: Gloo AllGather failed'), 2, True),
    (OSError(28, 'No space left on device'), 2, False),
    (TimeoutError('a slow disk'), 1, False),
  ],
)
def test_a_save_that_fails_says_whether_to_try_again(
  error, count, again, tmp_path, monkeypatch
):
  save(tmp_path, 1)

  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(ocp, 'save', fail)
  monkeypatch.setattr(jax, 'process_count', lambda: count)
  with pytest.raises(SaveError, match='the checkpoint of round 2') as caught:
    save(tmp_path, 2)
  assert caught.value.retryable == again
  assert ('make room' in str(caught.value)) != again
  monkeypatch.undo()
  assert restore(tmp_path).progress['round'] == 1


def test_the_digest_is_that_of_the_bytes():
  tree = {'b': np.arange(3, dtype=np.float32), 'a': np.ones((), np.float32)}
  want = hashlib.sha256(tree['a'].tobytes() + tree['b'].tobytes()).hexdigest()
  assert digest_of_arrays(tree) == want
