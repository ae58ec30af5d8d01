"""The language model looks back only, and texts are read from anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tfds_sets import prepare

from experiments import gpt, text
from experiments import language_run as card_module
from experiments.configs import language as card
from experiments.transformer import Shape
from resist_jax.errors import ConfigError
from resist_jax.run import export
from resist_jax.run import train as train_lib

SHAPE = Shape(4, 16, 2, 12)


def test_a_byte_is_predicted_from_those_before_it_only():
  params = jax.jit(gpt.init, static_argnums=0)(SHAPE, 0)
  words = np.random.default_rng(0).integers(256, size=(2, 12)).astype(np.int32)
  other = words.copy()
  other[:, 7:] += 1
  logits = jax.jit(gpt.logits, static_argnums=3)
  found, changed = (
    np.asarray(logits(params, jnp.ones(4), x % 256, 2)) for x in (words, other)
  )
  np.testing.assert_array_equal(found[:, :7], changed[:, :7])
  assert (found[:, 7:] != changed[:, 7:]).any()


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


def test_a_text_of_tfds_is_read_as_prepared(tmp_path):
  reviews = [bytes([65 + i % 26]) * 499 for i in range(500)]
  examples = {
    'train': [{'text': x, 'label': i % 2} for i, x in enumerate(reviews)]
  }
  features = {
    'text': tfds.features.Text(),
    'label': tfds.features.ClassLabel(num_classes=2),
  }
  prepare(tmp_path, 'imdb_reviews/plain_text', features, examples)
  train, test = text.load('tfds:imdb_reviews/plain_text', str(tmp_path))
  assert (len(train), len(test)) == (225_000, 25_000)
  lines = bytes(train).split(b'\n')[:-1] + bytes(test).split(b'\n')[:-1]
  assert sorted(lines) == sorted(reviews)


def test_a_set_that_holds_no_text_or_is_not_there_is_refused(tmp_path):
  features = {'label': tfds.features.ClassLabel(num_classes=2)}
  prepare(tmp_path, 'numbers', features, {'train': [{'label': 0}]})
  for name in ('numbers', 'imdb_reviews'):
    with pytest.raises(ConfigError, match='a field text') as error:
      text.load(f'tfds:{name}', str(tmp_path))
    assert '\n' not in str(error.value)


@pytest.mark.experiments
def test_its_card_trains_and_other_workers_go_on_with_the_same_function(
  tmp_path,
):
  config = card.get_config()
  config.model.options.update(
    {'layers': 4, 'width': 16, 'heads': 2, 'length': 12, 'test_windows': 16}
  )
  config.num_rounds = config.local_steps = 1
  config.lr = 1e-12  # Rounds change nothing, to see what else does.
  with jax.numpy_dtype_promotion('standard'):  # As AdamW in optax needs.
    first = train_lib.train(config, tmp_path)
  assert first['test_perplexity'] == pytest.approx(256, rel=0.2)
  config.num_workers, config.num_rounds = 2, 2
  with jax.numpy_dtype_promotion('standard'):
    train_lib.train(config, tmp_path)
  params, scales = export.load_parameters(tmp_path)
  tested = card_module.data(config).tests['test'].arrays
  loss_fn = card_module.loss(config)
  found, _ = loss_fn(params, scales, jnp.asarray(tested), None)
  np.testing.assert_allclose(found, first['test_loss'], rtol=1e-5)
