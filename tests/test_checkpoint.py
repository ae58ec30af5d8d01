"""Checkpoints come back bit for bit, or not at all."""

import jax
import numpy as np
import pytest

from resist_jax.checkpoint import KEEP, Checkpoints, digest

# When one read of a damaged checkpoint fails, orbax closes its event loop under
# the reads beside it, which complain from their threads.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


def state(seed):
  rng = np.random.default_rng(seed)
  return {
    'stem': {'kernel': rng.normal(size=(3, 3, 8)).astype(np.float32)},
    'chain': {'kernel': rng.normal(size=(9, 40, 40)).astype(np.float32)},
  }


def save(tmp_path, *steps, velocity=None):
  with Checkpoints(tmp_path) as checkpoints:
    for step in steps:
      checkpoints.save(state(step), velocity, {'round': step, 'note': [1, 2]})


def restore(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    return checkpoints.restore()


def newest_files(tmp_path, step):
  folder = tmp_path / 'checkpoints' / str(step)
  return sorted(
    (path for path in folder.rglob('*') if path.is_file()),
    key=lambda path: -path.stat().st_size,
  )


def assert_is(restored, step):
  assert restored.progress == {'round': step, 'note': [1, 2]}
  jax.tree.map(np.testing.assert_array_equal, restored.params, state(step))


def test_nothing_there(tmp_path):
  assert restore(tmp_path) is None


def test_the_newest_comes_back(tmp_path):
  save(tmp_path, 1, 2)
  assert_is(restore(tmp_path), 2)
  assert restore(tmp_path).velocity is None


def test_velocity_comes_back(tmp_path):
  save(tmp_path, 1, velocity=state(9))
  velocity = restore(tmp_path).velocity
  jax.tree.map(np.testing.assert_array_equal, velocity, state(9))


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


def test_the_digest_is_of_the_bytes():
  import hashlib

  tree = {'b': np.arange(3, dtype=np.float32), 'a': np.ones((), np.float32)}
  want = hashlib.sha256(tree['a'].tobytes() + tree['b'].tobytes()).hexdigest()
  assert digest(tree) == want
