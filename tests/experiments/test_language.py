"""The language model is one network whichever way it is cut and read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import gpt, language, protocols, text
from experiments.transformer import BLOCKS, Shape
from resist_jax.errors import ConfigError

SHAPE = Shape(4, 16, 2, 12)


@pytest.fixture(autouse=True)
def _promotion():
  """Adam in optax mixes dtypes; the package does not."""
  with jax.numpy_dtype_promotion('standard'):
    yield


def test_a_byte_is_predicted_from_those_before_it_only():
  params = gpt.init(SHAPE, 0)
  words = np.random.default_rng(0).integers(256, size=(2, 12)).astype(np.int32)
  other = words.copy()
  other[:, 7:] += 1
  found, changed = (
    np.asarray(gpt.logits(params, jnp.ones(4), x % 256, 2))
    for x in (words, other)
  )
  np.testing.assert_array_equal(found[:, :7], changed[:, :7])
  assert (found[:, 7:] != changed[:, 7:]).any()


def test_a_block_that_is_absent_changes_nothing_and_has_no_gradient():
  params, loss_fn = gpt.init(SHAPE, 0), gpt.make_loss(SHAPE)
  batch = text.batch(np.arange(200, dtype=np.uint8), (3,), 12, [0])
  present = {BLOCKS: jnp.array([1.0, 0.0, 1.0, 1.0])}
  (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    params, present, batch, None
  )
  kept = np.array([0, 2, 3])
  fewer = {
    **params,
    BLOCKS: jax.tree.map(lambda x: x[kept], params['blocks']),
  }
  want, _ = loss_fn(fewer, {BLOCKS: jnp.ones(3)}, batch, None)
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  for leaf in jax.tree.leaves(grads[BLOCKS]):
    assert not leaf[1].any()
    assert leaf[0].any() or not leaf.any()


@pytest.mark.parametrize('protocol', ['resist_outer', 'data_parallel'])
def test_a_run_that_stops_goes_on_to_the_same_end(
  protocol, tmp_path, monkeypatch
):
  task = language.task('python', 'smoke', text.load(text.SOURCES))
  args = (task, protocol, 2, 0)
  for name in ('whole', 'stopped'):
    (tmp_path / name).mkdir()
  want = protocols.run(*args, tmp_path / 'whole')['curve']
  drawn, draw = [], text.batch

  def fail_later(*values):
    drawn.append(values)
    if len(drawn) > 3:  # For shapes, and for two rounds.
      raise RuntimeError('stopped')
    return draw(*values)

  monkeypatch.setattr(text, 'batch', fail_later)
  with pytest.raises(RuntimeError, match='stopped'):
    protocols.run(*args, tmp_path / 'stopped')
  monkeypatch.setattr(text, 'batch', draw)
  got = protocols.run(*args, tmp_path / 'stopped')['curve']
  assert len(drawn) == 4
  assert [row['test_loss'] for row in got] == [row['test_loss'] for row in want]
  assert got[-1]['bytes'] == want[-1]['bytes'] > 0


def test_training_and_test_text_share_nothing(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_bytes(bytes(i % 256 for i in range(300_000)))
  train, test = text.load(str(path))
  assert (len(train), len(test)) == (270_000, 30_000)
  path.write_bytes(b'short')
  with pytest.raises(ConfigError, match='has 5 bytes'):
    text.load(str(path))
  with pytest.raises(ConfigError, match='No such file'):
    text.load(str(tmp_path / 'none'))
