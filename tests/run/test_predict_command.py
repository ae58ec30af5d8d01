"""A finished run is asked for the likeliest classes of files."""

import csv
import io
import os

import numpy as np
from PIL import Image
import pytest
from test_train import least_config
import tfds_sets

from resist_jax import data
from resist_jax.run import export, predict_command, train


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
  """A run on digits, and a folder of the first test images."""
  folder = tmp_path_factory.mktemp('digits')
  train.train(least_config(), folder / 'run')
  images = data.load('digits').tests['test'].images[:70]
  (folder / 'files').mkdir()
  for i, image in enumerate(images):
    Image.fromarray(image[..., 0]).save(folder / 'files' / f'{i:02}.png')
  return folder, images


def command(capsys, *words):
  code = predict_command.main([*map(str, words)])
  printed = capsys.readouterr()
  return code, printed.out, printed.err


def table(text):
  return list(csv.DictReader(io.StringIO(text)))


def test_every_file_has_the_classes_that_the_network_gives(
  digits, capsys, tmp_path
):
  folder, images = digits
  code, out, _ = command(capsys, folder / 'run', folder / 'files')
  assert code == 0
  rows = table(out)
  predict = export.load(folder / 'run')
  shares = np.asarray(predict(images))
  assert len(rows) == 70
  for i, (row, share) in enumerate(zip(rows, shares, strict=True)):
    assert row['file'] == str(folder / 'files' / f'{i:02}.png')
    order = np.argsort(-share, kind='stable')[:5]
    assert [row[f'class_{n}'] for n in range(1, 6)] == list(map(str, order))
    found = [float(row[f'probability_{n}']) for n in range(1, 6)]
    np.testing.assert_allclose(found, share[order], atol=2e-6)
  files = [folder / 'files' / '01.png', folder / 'files' / '00.png']
  path = tmp_path / 'some.csv'
  words = (*files, '--top=2', f'--out={path}')
  assert command(capsys, folder / 'run', *words) == (0, '', '')
  some = table(path.read_text())
  assert [row['file'] for row in some] == list(map(str, files))
  assert len(some[0]) == 5
  assert some[1]['class_2'] == rows[0]['class_2']


@pytest.mark.slow
def test_photographs_are_cut_as_the_tests_of_the_run_are(capsys, tmp_path):
  for i, (photo, label) in enumerate(tfds_sets.photographs(30)):
    path = tmp_path / 'photos' / ('china', 'flower')[label] / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo).save(path)
  square = tmp_path / 'photos' / 'china' / 'square.png'
  Image.fromarray(np.asarray(Image.open(path).resize((16, 16)))).save(square)
  fields = {'data.name': str(tmp_path / 'photos'), 'data.image_size': 16}
  config = least_config(batch_size=4, **fields)
  train.train(config, tmp_path / 'run')
  model = export.load(tmp_path / 'run')
  assert model.resized
  split = data.load_test(
    str(tmp_path / 'photos'), model.class_names, model.image_shape, True
  )
  wanted = {bytes(image) for image in split.images[:]}
  paths = data.listed_files([str(tmp_path / 'photos')])
  found = data.read_files(paths, model.image_shape, True)
  assert {bytes(image) for image in found} == wanted
  code, out, _ = command(capsys, tmp_path / 'run', square)
  assert code == 0
  (row,) = table(out)
  assert {row['class_1'], row['class_2']} == {'china', 'flower'}
  assert 'class_3' not in row


def test_a_file_that_is_no_image_is_named(digits, capsys, tmp_path):
  folder, _ = digits
  notes = tmp_path / 'notes.txt'
  notes.write_text('no image')
  half = tmp_path / 'half.png'
  content = (folder / 'files' / '00.png').read_bytes()
  half.write_bytes(content[: len(content) - 30])
  for path in (notes, half, tmp_path / 'nowhere.png'):
    code, _, err = command(capsys, folder / 'run', path)
    (line,) = err.splitlines()
    assert code == 2
    assert str(path) in line
  (tmp_path / 'empty').mkdir()
  code, _, err = command(capsys, folder / 'run', tmp_path / 'empty')
  assert (code, len(err.splitlines())) == (2, 1)
  assert 'empty holds no file' in err
  os.mkfifo(tmp_path / 'pipe.png')  # Nobody will ever write to it.
  code, _, err = command(capsys, folder / 'run', tmp_path / 'pipe.png')
  assert (code, len(err.splitlines())) == (2, 1)
  assert 'it is no file' in err
  code, _, err = command(capsys, tmp_path, notes)
  assert (code, len(err.splitlines())) == (2, 1)
  words = (folder / 'files', f'--out={tmp_path}/no/where.csv')
  code, _, err = command(capsys, folder / 'run', *words)
  assert (code, len(err.splitlines())) == (2, 1)
  code, _, err = command(capsys, folder / 'run', notes, '--top=0')
  assert '--top is 0' in err
  code, _, err = command(capsys, folder / 'run', folder / 'files', '--top=11')
  assert (code, len(err.splitlines())) == (2, 1)
  assert '--top is 11, but the network has 10 classes' in err


def test_a_file_written_before_stays_when_an_image_is_broken(
  digits, capsys, tmp_path
):
  folder, _ = digits
  out, broken = tmp_path / 'old.csv', tmp_path / 'broken.png'
  out.write_text('kept')
  broken.write_bytes(b'no image')
  code, printed, _ = command(capsys, folder / 'run', broken, f'--out={out}')
  assert (code, printed, out.read_text()) == (2, '', 'kept')
  # Without --out nothing is printed, either; nor is a part left behind.
  code, printed, _ = command(capsys, folder / 'run', broken)
  assert (code, printed) == (2, '')
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'broken.png',
    'old.csv',
  ]
  for wrong in (tmp_path / 'none' / 'x.csv', tmp_path):
    code, _, said = command(capsys, folder / 'run', broken, f'--out={wrong}')
    assert code == 2
    assert '--out is' in said


def test_a_file_that_is_cut_is_named_with_its_remedy(digits, capsys, tmp_path):
  folder, _ = digits
  noise = np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8)
  Image.fromarray(noise).save(tmp_path / 'cut.png')
  content = (tmp_path / 'cut.png').read_bytes()
  (tmp_path / 'cut.png').write_bytes(content[: len(content) // 2])
  code, out, said = command(capsys, folder / 'run', tmp_path / 'cut.png')
  assert (code, out) == (2, '')
  assert 'cut.png' in said
  assert 'prepare' not in said
