"""A model on disk is right or refused, and classifies only its own images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from resist_jax.run import export

SHAPE = (4, 4, 1)
NAMES = ('cat', 'dog', 'eel')


@pytest.fixture(scope='module')
def predictor():
  """A network that was not trained: its numbers are arbitrary anyway."""
  network = tiny.network(norm='group', dtype='float32')
  variables = {'params': tiny.init(network), 'batch_stats': {}}
  scales = {tiny.CHAIN: np.full(5, 0.25, np.float32)}
  mean, std = np.float32([0.5]), np.float32([0.25])
  return export.Predictor(network, variables, scales, mean, std, NAMES, SHAPE)


@pytest.fixture
def saved(predictor, tmp_path):
  export.save(tmp_path, predictor)
  return tmp_path


def equal(ours, theirs):
  trees = ours.variables['params'], theirs.variables['params']
  same = jax.tree.map(np.array_equal, *trees)
  return (
    jax.tree.all(same)
    and jax.tree.all(jax.tree.map(np.array_equal, ours.scales, theirs.scales))
    and (ours.mean, ours.std) == (theirs.mean, theirs.std)
    and ours.network == theirs.network
    and ours.class_names == theirs.class_names
    and ours.image_shape == theirs.image_shape
  )


def files(folder):
  paths = (folder / export.FOLDER).rglob('*')
  return sorted(path for path in paths if path.is_file())


def refusal(folder):
  """Returns the line that refuses a model; None if it is loaded."""
  try:
    export.load(folder)
  except ValueError as error:
    message = str(error)
    assert '\n' not in message
    assert str(folder / export.FOLDER) in message
    assert 'command of its run again' in message
    return message
  return None


def test_a_model_is_loaded_as_it_was_saved(saved, predictor):
  assert equal(export.load(saved), predictor)
  export.save(saved, predictor)  # In the place of another one.
  assert equal(export.load(saved), predictor)
  assert [path.name for path in saved.iterdir()] == [export.FOLDER]
  # Files of others do no harm.
  (saved / export.FOLDER / '.DS_Store').write_bytes(b'')
  assert equal(export.load(saved), predictor)


def test_a_model_of_a_gpu_is_loaded_for_the_platform_here(predictor, tmp_path):
  network = predictor.network.clone(platform='gpu')
  export.save(tmp_path, dataclasses.replace(predictor, network=network))
  assert equal(export.load(tmp_path), predictor)


def flip_bits(folder, count, seed):
  """Yields the file of each of some bits, spread over files, while flipped."""
  rng = np.random.default_rng(seed)
  paths = files(folder)
  for number in range(count):
    path = paths[number % len(paths)]
    whole = path.read_bytes()
    if not whole:
      continue
    content = bytearray(whole)
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    yield path
    path.write_bytes(whole)


@pytest.mark.parametrize(
  'count', [20, pytest.param(200, marks=pytest.mark.slow)]
)
def test_a_flipped_bit_is_never_a_wrong_model(count, saved):
  for path in flip_bits(saved, count, seed=count):
    message = refusal(saved)
    assert message, path
    if path.name != export.MANIFEST:
      assert f'{path.name} is not as it was written' in message
  assert refusal(saved) is None


def test_a_file_that_is_cut_or_missing_is_named(saved):
  for path in files(saved):
    whole = path.read_bytes()
    for content in {whole[: len(whole) // 2], b'', b'[]', b'null', b'{}'}:
      path.write_bytes(content)
      assert path.name in (refusal(saved) or path.name * (content == whole))
    path.unlink()
    assert path.name in (refusal(saved) or '')
    path.write_bytes(whole)
  assert refusal(saved) is None


def test_a_model_of_older_versions_says_what_to_do(saved):
  (saved / export.FOLDER / export.MANIFEST).unlink()
  message = refusal(saved)
  assert 'manifest.json is missing' in message
  assert 'or is old' in message


@pytest.mark.parametrize('step', ['write_json', 'folders.put'])
def test_an_interrupted_save_leaves_the_model_before(
  step, predictor, tmp_path, monkeypatch
):
  def interrupt(*args):
    raise KeyboardInterrupt

  def save_and_interrupt():
    with monkeypatch.context() as patch:
      patch.setattr(f'resist_jax.run.export.{step}', interrupt)
      with pytest.raises(KeyboardInterrupt):
        export.save(tmp_path, predictor)

  save_and_interrupt()
  with pytest.raises(FileNotFoundError, match='when it has finished'):
    export.load(tmp_path)
  # What orbax leaves when it is killed.
  (tmp_path / 'model.part.orbax-checkpoint-tmp').mkdir()
  export.save(tmp_path, predictor)
  save_and_interrupt()
  assert equal(export.load(tmp_path), predictor)
  export.save(tmp_path, predictor)
  assert equal(export.load(tmp_path), predictor)


IMAGES = np.arange(2 * 16).reshape(2, *SHAPE)


@pytest.mark.parametrize(
  ('images', 'says'),
  [
    (IMAGES / 255, 'float64, .* as uint8'),
    (jnp.zeros((2, *SHAPE)), 'float32, .* as uint8'),
    (IMAGES > 3, 'bool, .* as uint8'),
    (IMAGES - 1, 'from -1 to 30, .* 0 to 255'),
    (IMAGES * 9, 'from 0 to 279, .* 0 to 255'),
    (IMAGES[0], r'a single image: give images\[None\]'),
    (IMAGES[..., 0], r'without channels: give images\[..., None\]'),
    (np.zeros((2, 4, 4, 3), np.uint8), r'\[B, 4, 4, 1\]: convert'),
    (np.zeros((2, 8, 8, 1), np.uint8), r'\[B, 4, 4, 1\]: convert'),
    (np.zeros((2, 1, 4, 4), np.uint8), r'\[B, 4, 4, 1\]: convert'),
    (np.uint8(7), 'convert their channels'),
    ('cat', 'convert their channels'),
    ([[1], [1, 2]], 'one array'),
    (None, 'convert their channels'),
  ],
)
def test_images_that_it_was_not_trained_on_are_refused(images, says, predictor):
  with pytest.raises(ValueError, match=f'^images .*{says}') as caught:
    predictor(images)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'images',
  [
    IMAGES,
    IMAGES.tolist(),
    jnp.array(IMAGES),
    *(IMAGES.astype(kind) for kind in (np.int8, np.uint16, '>i4')),
  ],
  ids=['int64', 'list', 'jax', 'int8', 'uint16', 'big-endian'],
)
def test_whole_numbers_of_any_type_are_pixels(images, predictor):
  want = predictor(IMAGES.astype(np.uint8))
  np.testing.assert_array_equal(predictor(images), want)
  assert want.shape == (2, 3)


def test_a_predictor_can_be_compiled(predictor):
  images = jnp.asarray(IMAGES, jnp.uint8)
  got = jax.jit(predictor)(images)
  np.testing.assert_allclose(got, predictor(images), rtol=1e-5)
  with pytest.raises(ValueError, match='inside jit'):
    jax.jit(predictor)(images.astype(int))
