"""Checkpoints come back bit for bit, or not at all."""

import jax
from jax.sharding import NamedSharding
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from resist_jax.decomposition.assignments import Assignment
from resist_jax.rounds import state as state_lib
from resist_jax.rounds.state import State
from resist_jax.run.checkpoint import KEEP, Checkpoints, SaveError, digest

# When one read of a damaged checkpoint fails, orbax closes its event loop under
# the reads beside it, which complain from their threads.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


SLOTS = {
  'chain': Assignment(np.array([[0, 2], [1, 3], [3, 4], [0, 4]], np.int32))
}


def state(seed, workers=4, **kwargs):
  rng = np.random.default_rng(seed)
  kernels = rng.normal(size=(workers, 2, 30, 40)).astype(np.float32)
  sharding = NamedSharding(state_lib.make_mesh(4), state_lib.SHARDED)
  return State(
    {'stem': np.tile(rng.normal(size=(1, 3, 8)), (workers, 1, 1))},
    {'chain': {'kernel': jax.device_put(kernels, sharding)}},
    SLOTS,
    **kwargs,
  )


def save(tmp_path, *steps, **kwargs):
  checkpoints = Checkpoints(tmp_path, state_lib.make_mesh(4))
  for step in steps:
    progress = {'round': step, 'note': [1, 2]}
    checkpoints.save(state(step, **kwargs), {'chain': 5}, progress)


def restore(tmp_path, num_devices=4):
  return Checkpoints(tmp_path, state_lib.make_mesh(num_devices)).restore()


def newest_files(tmp_path, step):
  folder = tmp_path / 'checkpoints' / str(step)
  return sorted(
    (path for path in folder.rglob('*') if path.is_file()),
    key=lambda path: -path.stat().st_size,
  )


def assert_is(restored, step):
  assert restored.progress == {'round': step, 'note': [1, 2]}
  assert restored.num_blocks == {'chain': 5}
  got, want = restored.state, state(step)
  np.testing.assert_array_equal(got.shared['stem'], want.shared['stem'][0])
  jax.tree.map(np.testing.assert_array_equal, got.chain, want.chain)
  np.testing.assert_array_equal(got.slots['chain'].slots, SLOTS['chain'].slots)


def test_nothing_there(tmp_path):
  assert restore(tmp_path) is None


def test_the_newest_comes_back(tmp_path):
  save(tmp_path, 1, 2)
  assert_is(restore(tmp_path), 2)
  assert restore(tmp_path).state.velocity is None


@pytest.mark.parametrize('num_devices', [1, 2, 4])
def test_workers_read_their_own_parts(tmp_path, num_devices):
  save(tmp_path, 1)
  restored = restore(tmp_path, num_devices)
  assert_is(restored, 1)
  kernel = restored.state.chain['chain']['kernel']
  shapes = {shard.data.shape for shard in kernel.addressable_shards}
  assert shapes == {(4 // num_devices, 2, 30, 40)}


def test_workers_that_devices_cannot_share_out_are_read_on_the_host(tmp_path):
  save(tmp_path, 1)
  restored = restore(tmp_path, 3)
  assert_is(restored, 1)
  assert isinstance(restored.state.chain['chain']['kernel'], np.ndarray)


def test_velocity_and_error_come_back(tmp_path):
  other = state(9)
  velocity = {'shared': other.shared, 'chain': other.chain}
  error = {'sent': np.ones((4, 7), np.float32)}
  save(tmp_path, 1, velocity=velocity, error=error)
  got = restore(tmp_path).state
  jax.tree.map(
    np.testing.assert_array_equal, got.velocity['chain'], other.chain
  )
  np.testing.assert_array_equal(
    got.velocity['shared']['stem'], other.shared['stem'][0]
  )
  jax.tree.map(np.testing.assert_array_equal, got.error, error)


def test_a_few_are_kept(tmp_path):
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
  """Round 3 comes again while the damaged checkpoint of round 4 is there."""
  save(tmp_path, 2, 4)
  cut(newest_files(tmp_path, 4)[0])
  assert_is(restore(tmp_path), 2)
  save(tmp_path, 3)
  assert_is(restore(tmp_path), 3)


def test_every_file_matters_or_is_not_read(tmp_path):
  """No damage anywhere brings back wrong numbers."""
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


def test_a_half_written_one_is_swept_away(tmp_path):
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


def test_the_digest_is_of_the_bytes():
  import hashlib

  tree = {'b': np.arange(3, dtype=np.float32), 'a': np.ones((), np.float32)}
  want = hashlib.sha256(tree['a'].tobytes() + tree['b'].tobytes()).hexdigest()
  assert digest(tree) == want
