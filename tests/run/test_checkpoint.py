"""Checkpoints come back bit for bit, or not at all."""

import errno
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from resist_jax.decomposition import Assignment
from resist_jax.errors import NonFiniteError
from resist_jax.rounds import State, make_mesh, manifest, storage
from resist_jax.rounds.mesh import SHARDED
from resist_jax.rounds.moments import Parts
from resist_jax.rounds.storage import digest_of_arrays
from resist_jax.run import checkpoint, examined, workdir
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
  stem = np.tile(rng.normal(size=(1, 3, 8)).astype(np.float32), (4, 1, 1))
  return State(
    {'stem': jax.device_put(stem, sharding)},
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
  checkpoints.finish()


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


@pytest.mark.parametrize(
  ('keep', 'best', 'left'),
  [(0, None, '123456'), (1, None, '6'), (2, 3, '356'), (1, 6, '6')],
)
def test_all_or_some_of_the_newest_and_the_best_are_kept(
  keep, best, left, tmp_path
):
  checkpoints = Checkpoints(tmp_path, make_mesh(4), keep)
  for step in range(1, 7):
    checkpoints.save(state(step), {'round': step}, best and min(best, step))
  checkpoints.finish()
  assert {p.name for p in (tmp_path / 'checkpoints').iterdir()} == set(left)
  listed = {p.name for p in (tmp_path / 'digests').iterdir()}
  assert listed == {f'{step}.json' for step in left}


def test_the_known_good_one_is_kept_beside_the_newest(tmp_path):
  checkpoints = Checkpoints(tmp_path, make_mesh(4), keep=1)
  checkpoints.save(state(1), {'round': 1})
  checkpoints.finish()
  checkpoints.tested(1)
  for step in (2, 3):
    checkpoints.save(state(step), {'round': step})
  checkpoints.finish()
  left = {p.name for p in (tmp_path / 'checkpoints').iterdir()}
  assert left == {'1', '3'}


def test_the_best_before_stays_until_the_next_best_is_whole(tmp_path):
  """A kill while that one is written must not lose both."""
  checkpoints = Checkpoints(tmp_path, make_mesh(4), keep=1)
  checkpoints.save(state(1), {'round': 1}, 1)
  checkpoints.save(state(2), {'round': 2}, 1)
  checkpoints.save(state(3), {'round': 3}, 3)  # It finishes that of round 2.
  left = workdir.saved_rounds(tmp_path / 'checkpoints')
  assert {1, 2} <= set(left)
  checkpoints.finish()
  assert workdir.saved_rounds(tmp_path / 'checkpoints') == [3]


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


def delete_manifest(tmp_path, step):
  (tmp_path / 'digests' / f'{step}.json').unlink()


@pytest.mark.parametrize('steps', [(1,), (1, 2)])
def test_a_kill_before_the_manifest_costs_nothing(steps, tmp_path, caplog):
  save(tmp_path, *steps)
  delete_manifest(tmp_path, steps[-1])
  assert_is(restore(tmp_path), steps[-1])
  assert f'round {steps[-1]} has no manifest' in caplog.text
  caplog.clear()
  assert_is(restore(tmp_path), steps[-1])  # It has one now.
  assert not caplog.text


def test_checkpoints_that_were_copied_alone_go_on_and_count_as_own(tmp_path):
  save(tmp_path / 'from', 1, 2)
  shutil.copytree(tmp_path / 'from/checkpoints', tmp_path / 'to/checkpoints')
  (tmp_path / 'to' / 'digests').mkdir()  # As older versions left them.
  (tmp_path / 'to' / 'digests' / '2.sha256').write_text('0')
  assert_is(restore(tmp_path / 'to'), 2)
  save(tmp_path / 'to', 3, 4, 5, 6)
  # Nobody has read round 1, so nobody knows whose it is.
  assert names(tmp_path / 'to') == {'1', '4', '5', '6'}


def test_a_broken_one_without_manifest_is_passed_over_and_kept(
  tmp_path, caplog
):
  save(tmp_path, 1, 2)
  delete_manifest(tmp_path, 2)
  cut(newest_files(tmp_path, 2)[0])
  assert_is(restore(tmp_path), 1)
  assert 'falling back to round 1' in caplog.text
  save(tmp_path, 2)
  assert (tmp_path / 'set_aside' / '2').is_dir()
  assert_is(restore(tmp_path), 2)


def test_a_file_cut_short_shows_without_manifest(tmp_path):
  save(tmp_path, 1, 2)
  for path in newest_files(tmp_path, 2)[:4]:
    whole = path.read_bytes()
    cut(path)
    (tmp_path / 'digests' / '2.json').unlink(missing_ok=True)
    restored = restore(tmp_path)
    assert_is(restored, restored.progress['round'])
    path.write_bytes(whole)


def test_a_flipped_bit_of_a_number_shows_without_manifest(tmp_path, caplog):
  """Random bits stand in the file as they are; its format notices no flip."""
  rng = np.random.default_rng(0)
  bits = rng.integers(0, 2**32, (4, 2, 500), np.uint32).view(np.int32)
  save(tmp_path, 1)
  newer = state(2)
  placed = jax.device_put(bits, newer.chain['chain']['kernel'].sharding)
  newer = newer._replace(chain={'chain': {'bits': placed}})
  checkpoints = Checkpoints(tmp_path, make_mesh(4))
  checkpoints.save(newer, {'round': 2, 'note': [1, 2]})
  checkpoints.finish()
  some = bits[1].tobytes()[:200]
  (path,) = (p for p in newest_files(tmp_path, 2) if some in p.read_bytes())
  whole = path.read_bytes()
  for bit in (0, 7, 300, 1599):
    spoilt = bytearray(whole)
    spoilt[whole.index(some) + bit // 8] ^= 1 << bit % 8
    path.write_bytes(spoilt)
    (tmp_path / 'digests' / '2.json').unlink(missing_ok=True)
    caplog.clear()
    assert_is(restore(tmp_path), 1)
    assert 'its numbers are not as they were written' in caplog.text
  path.write_bytes(whole)
  assert restore(tmp_path).progress['round'] == 2


def test_another_digit_in_the_description_shows_without_manifest(
  tmp_path, caplog
):
  save(tmp_path, 1, 2)
  delete_manifest(tmp_path, 2)
  path = tmp_path / 'checkpoints' / '2' / '_CHECKPOINT_METADATA'
  text = path.read_text()
  assert '[[0, 2], [1, 3]' in text
  path.write_text(text.replace('[[0, 2], [1, 3]', '[[0, 3], [1, 3]'))
  assert_is(restore(tmp_path), 1)
  assert 'its description does not match its digest' in caplog.text


def test_an_older_checkpoint_has_no_sums(tmp_path, monkeypatch):
  """It is used as before where its manifest is missing."""
  monkeypatch.setattr(storage, '_digest_of_description', lambda _: None)
  monkeypatch.setattr(checkpoint, '_SUMS', 'something')
  save(tmp_path, 1)
  monkeypatch.undo()
  delete_manifest(tmp_path, 1)
  restored = restore(tmp_path)
  assert restored.progress.pop('something')
  assert_is(restored, 1)


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'int8', 'int32', 'bool']
)
def test_sums_of_a_device_are_those_of_the_host(dtype):
  rng, mesh = np.random.default_rng(0), make_mesh(4)
  values = (100 * rng.normal(size=(4, 3, 5))).astype(jnp.dtype(dtype))
  values[1:] = values[0]
  placed = jax.device_put(values, NamedSharding(mesh, SHARDED))
  error = {'b': placed, 'c': jnp.ones((4, 2))}
  live = State({'a': placed}, {}, {}, np.int32(1), {}, error=error)
  found = examined.examine(live, mesh)
  assert found.finite
  read = live._replace(shared={'a': values[0]}, error={**error, 'b': values})
  assert found.sums == examined.sums_on_host(read)
  assert found.sums[0] == 4 * found.sums[2] % 2**32 > 0


def test_a_copy_under_another_number_is_not_that_round(tmp_path, caplog):
  save(tmp_path, 1, 2)
  folder = tmp_path / 'checkpoints'
  shutil.copytree(folder / '2', folder / '7')
  assert_is(restore(tmp_path), 2)
  assert 'it is that of round 2' in caplog.text
  assert names(tmp_path) == {'1', '2', '7'}


def names(tmp_path):
  return {path.name for path in (tmp_path / 'checkpoints').iterdir()}


def test_what_others_put_beside_checkpoints_stays(tmp_path, caplog):
  save(tmp_path, 1, 2)
  folder = tmp_path / 'checkpoints'
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  (elsewhere / 'precious').touch()
  shutil.copytree(folder / '1', folder / '1.bak')
  shutil.copytree(folder / '2', folder / '2_best')
  (folder / '2024').mkdir()
  (folder / '2024' / 'mine').touch()
  (folder / 'notes.txt').touch()
  (folder / '.DS_Store').touch()
  (folder / '99.orbax-checkpoint-tmp').symlink_to(elsewhere)
  (folder / '0').symlink_to(elsewhere)
  theirs = names(tmp_path) - {'1', '2'}
  assert_is(restore(tmp_path), 2)
  assert not caplog.text
  save(tmp_path, *range(3, 8))
  assert names(tmp_path) == theirs | {'5', '6', '7'}
  for path in (elsewhere / 'precious', folder / '2024' / 'mine'):
    assert path.exists()
  assert len(list((folder / '2_best').rglob('*'))) > 5


def test_files_that_tools_leave_in_checkpoints_are_no_damage(tmp_path, caplog):
  save(tmp_path, 1, 2)
  delete_manifest(tmp_path, 2)
  store, *others = (
    tmp_path / 'checkpoints' / '2' / name
    for name in ('.DS_Store', '.nfs0001', 'Thumbs.db', 'd/.DS_Store')
  )
  store.write_text('1')
  assert_is(restore(tmp_path), 2)  # And gets a manifest.
  caplog.clear()
  store.write_text('2')
  for path in others:
    path.parent.mkdir(exist_ok=True)
    path.touch()
  assert_is(restore(tmp_path), 2)
  assert not caplog.text


def test_a_folder_in_the_way_is_not_overwritten(tmp_path):
  mine = tmp_path / 'checkpoints' / '2' / 'mine'
  mine.parent.mkdir(parents=True)
  mine.touch()
  save(tmp_path, 1)
  with pytest.raises(SaveError, match='checkpoints/2 is something else') as no:
    save(tmp_path, 2)
  assert f'move that out of {tmp_path}' in str(no.value)
  assert not no.value.retryable
  assert mine.exists()
  assert_is(restore(tmp_path), 1)


def test_a_file_that_may_not_be_read_is_not_taken_for_damaged(
  tmp_path, monkeypatch
):
  """Tests run as root, which may read everything."""
  save(tmp_path, 1, 2)

  def forbidden(path):
    raise PermissionError(errno.EACCES, 'Permission denied', str(path))

  monkeypatch.setattr(manifest, '_sha256', forbidden)
  with pytest.raises(
    ValueError, match=r'Permission denied.*let this user read'
  ):
    Checkpoints(tmp_path, make_mesh(4)).restore()
  monkeypatch.undo()
  assert Checkpoints(tmp_path, make_mesh(4)).restore().progress['round'] == 2


@pytest.mark.parametrize('listed', [True, False])
@pytest.mark.parametrize('number', [errno.ESTALE, errno.ENOTCONN, errno.EMFILE])
def test_a_server_that_is_away_damages_nothing(
  number, listed, tmp_path, monkeypatch
):
  """Else an older checkpoint replaces the newest, which is deleted."""
  save(tmp_path, 1, 2)
  if not listed:
    (tmp_path / 'digests' / '2.json').unlink()

  def away(*args):
    raise OSError(number, os.strerror(number), str(tmp_path))

  monkeypatch.setattr(manifest, '_sha256', away)
  with pytest.raises(OSError, match=os.strerror(number)):
    Checkpoints(tmp_path, make_mesh(4)).restore()
  monkeypatch.undo()
  assert Checkpoints(tmp_path, make_mesh(4)).restore().progress['round'] == 2


def test_all_damaged_is_an_error(tmp_path):
  save(tmp_path, 1)
  cut(newest_files(tmp_path, 1)[0])
  with pytest.raises(
    ValueError, match=r'all 1 checkpoints .* choose another workdir'
  ):
    restore(tmp_path)


@pytest.mark.parametrize('suffix', ['', '-1764288000'])
def test_a_half_written_checkpoint_is_deleted(suffix, tmp_path):
  save(tmp_path, 1)
  part = tmp_path / 'checkpoints' / f'2.orbax-checkpoint-tmp{suffix}'
  part.mkdir()
  (part / 'state').write_text('half')
  assert_is(restore(tmp_path), 1)
  assert not part.exists()
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
@pytest.mark.parametrize('late', [False, True])
def test_a_save_that_fails_says_whether_to_try_again(
  late, error, count, again, tmp_path, monkeypatch
):
  """Also late, while orbax writes in the background."""
  save(tmp_path, 1)

  def fail(*args, **kwargs):
    monkeypatch.setattr(jax, 'process_count', lambda: count)
    raise error

  begin = (lambda *args, **kwargs: mock.Mock(result=fail)) if late else fail
  monkeypatch.setattr(ocp, 'save_async', begin)
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


def poisoned(where, value):
  """A state with one number that is not finite."""
  moment = state(9)
  moments = [{'shared': moment.shared, 'chain': moment.chain}]
  error = {'sent': np.ones((4, 7), np.float32)}
  whole = state(2, carried=Parts(moments, [np.ones(4)]), error=error)

  def poison(path, x):
    if where not in jax.tree_util.keystr(path, simple=True, separator='/'):
      return x
    spoilt = np.array(x)
    spoilt[(-1,) * x.ndim] = value
    if not isinstance(x, jax.Array):
      return spoilt
    return jax.device_put(spoilt, x.sharding)

  return jax.tree_util.tree_map_with_path(poison, whole)


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize(
  'where', ['shared/stem', 'chain/chain', 'moments/0/chain', 'rest', 'error']
)
def test_what_is_not_finite_is_not_saved(where, value, tmp_path):
  save(tmp_path, 1)
  checkpoints = Checkpoints(tmp_path, make_mesh(4))
  with pytest.raises(NonFiniteError, match=r'round 2: .* not finite'):
    checkpoints.save(poisoned(where, value), {'round': 2})
  assert names(tmp_path) == {'1'}
  checkpoints.save(poisoned('nowhere', value), {'round': 2})
  checkpoints.finish()
  assert names(tmp_path) == {'1', '2'}


def test_an_empty_slot_may_hold_anything(tmp_path):
  slots = np.array([[0, 2], [1, 3], [4, 5], [0, 5]], np.int32)  # 5 is L.
  whole = state(1)
  kernels = np.array(whole.chain['chain']['kernel'])
  kernels[slots == 5] = np.nan
  chain = {'chain': {'kernel': kernels}}
  whole = whole._replace(chain=chain, assignments={'chain': Assignment(slots)})
  checkpoints = Checkpoints(tmp_path, make_mesh(4))
  checkpoints.save(whole, {'round': 1})
  checkpoints.finish()
  assert names(tmp_path) == {'1'}


def saved_and_tested(tmp_path, steps, tests):
  """Saves rounds, of which some were tested; returns the checkpoints."""
  checkpoints = Checkpoints(tmp_path, make_mesh(4))
  checkpoints.restore()
  for step in steps:
    checkpoints.save(state(step), {'round': step, 'note': [1, 2]})
    if step in tests:
      checkpoints.tested(step)
  checkpoints.finish()
  return checkpoints


def test_a_save_goes_on_while_its_arrays_are_given_away(tmp_path):
  checkpoints = Checkpoints(tmp_path, make_mesh(4))
  spoil = jax.jit(
    lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0
  )
  for step in (1, 2, 3):
    whole = state(step)
    checkpoints.save(whole, {'round': step, 'note': [1, 2]})
    chain = spoil(whole.chain)
    for _ in range(5):  # Each may write where the one before was read.
      chain = jax.block_until_ready(spoil(chain))
  checkpoints.finish()
  assert_is(restore(tmp_path), 3)


def test_a_save_that_fails_is_told_when_it_ends_and_costs_no_other(tmp_path):
  save(tmp_path, 1)
  checkpoints = Checkpoints(tmp_path, make_mesh(4))
  checkpoints.save(state(2), {'round': 2, 'note': [1, 2]})
  shutil.rmtree(tmp_path / 'digests')
  (tmp_path / 'digests').write_text('This is a file.')
  with pytest.raises(SaveError, match='round 2 cannot be written'):
    checkpoints.save(state(3), {'round': 3})
  (tmp_path / 'digests').unlink()
  assert_is(restore(tmp_path), 2)


def test_the_newest_known_good_one_is_kept(tmp_path):
  saved_and_tested(tmp_path, range(1, 8), tests=[1, 2])
  assert names(tmp_path) == {'2', '5', '6', '7'}
  saved_and_tested(tmp_path, [8, 9], tests=[])  # By a run that goes on.
  assert names(tmp_path) == {'2', '7', '8', '9'}
  saved_and_tested(tmp_path, [10, 11], tests=[10])
  assert names(tmp_path) == {'9', '10', '11'}
  assert {p.name for p in (tmp_path / 'digests').iterdir()} == {
    '9.json', '10.json', '11.json', 'good.json',
  }  # fmt: skip


@pytest.mark.parametrize('again', [False, True])
def test_after_a_divergence_newer_ones_are_set_aside(again, tmp_path):
  checkpoints = saved_and_tested(tmp_path, range(1, 6), tests=[3])
  if again:
    checkpoints = saved_and_tested(tmp_path, [], tests=[])
  shutil.copytree(tmp_path / 'checkpoints/5', tmp_path / 'checkpoints/5_best')
  assert checkpoints.distrust() == 3
  assert names(tmp_path) == {'3', '5_best'}
  aside = {path.name for path in (tmp_path / 'set_aside').iterdir()}
  assert aside == {'4', '4.json', '5', '5.json'}
  assert_is(restore(tmp_path), 3)
  assert saved_and_tested(tmp_path, [4], tests=[]).distrust() == 3
  assert_is(restore(tmp_path), 3)
  for name in ('4', '4.json'):  # What is there can be taken back.
    folder = 'digests' if name.endswith('.json') else 'checkpoints'
    shutil.move(tmp_path / 'set_aside' / name, tmp_path / folder / name)
  assert_is(restore(tmp_path), 4)


def test_a_test_after_a_checkpoint_makes_that_one_good(tmp_path):
  checkpoints = saved_and_tested(tmp_path, [2], tests=[])
  checkpoints.tested(3)
  checkpoints.save(state(4), {'round': 4})
  assert checkpoints.distrust() == 2
  assert names(tmp_path) == {'2'}


def test_nothing_is_set_aside_where_that_would_not_help(tmp_path):
  assert saved_and_tested(tmp_path / 'a', [1, 2], tests=[]).distrust() is None
  assert saved_and_tested(tmp_path / 'b', [1, 2], tests=[2]).distrust() is None
  for folder in (tmp_path / 'a', tmp_path / 'b'):
    assert names(folder) == {'1', '2'}


def test_a_known_good_one_that_is_damaged_gives_way_to_an_older_one(tmp_path):
  saved_and_tested(tmp_path, [1, 2], tests=[2])
  cut(newest_files(tmp_path, 2)[0])
  checkpoints = saved_and_tested(tmp_path, [], tests=[])
  checkpoints.save(state(3), {'round': 3})
  assert checkpoints.distrust() == 1


def test_a_record_of_tests_that_is_damaged_is_none(tmp_path):
  saved_and_tested(tmp_path, [1, 2], tests=[1])
  for text in ('', '[]', '{"round": "x"}', 'x'):
    (tmp_path / 'digests' / 'good.json').write_text(text)
    assert saved_and_tested(tmp_path, [], tests=[]).distrust() is None


def test_checkpoints_may_lie_on_another_disk(tmp_path):
  there = '/dev/shm' if pathlib.Path('/dev/shm').is_dir() else None
  with tempfile.TemporaryDirectory(dir=there) as disk:
    (tmp_path / 'checkpoints').symlink_to(disk)
    (tmp_path / 'link').symlink_to(tmp_path)
    checkpoints = saved_and_tested(tmp_path / 'link', range(1, 6), tests=[4])
    assert names(tmp_path) == {'3', '4', '5'}
    assert checkpoints.distrust() == 4
    assert_is(restore(tmp_path), 4)
    aside = json.loads((tmp_path / 'set_aside' / '5.json').read_text())
    assert '_CHECKPOINT_METADATA' in aside
