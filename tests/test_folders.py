"""A folder is the one that people mean, or a line says what to name."""

import pathlib

import pytest

from resist_jax import folders
from resist_jax.errors import ConfigError
from resist_jax.report import page

HOME = pathlib.Path.home()


@pytest.mark.parametrize(
  ('name', 'folder'),
  [
    ('runs/first', pathlib.Path('runs/first')),
    ('~/runs', HOME / 'runs'),
    ('~', HOME),
    ('$THERE/first', pathlib.Path('/there/first')),
    ('${THERE}', pathlib.Path('/there')),
    ('$TILDE/first', HOME / 'first'),
    (pathlib.Path('~/runs'), HOME / 'runs'),
    ('run:1', pathlib.Path('run:1')),
    ('50$', pathlib.Path('50$')),
    ('Läuf 東京', pathlib.Path('Läuf 東京')),
  ],
)
def test_a_folder_is_found(name, folder, monkeypatch):
  monkeypatch.setenv('THERE', '/there')
  monkeypatch.setenv('TILDE', '~')
  assert folders.resolve(name, 'workdir') == folder


@pytest.mark.parametrize(
  ('name', 'says'),
  [
    ('', ': name a local folder'),
    (' ', ': name a local folder'),
    ('$UNSET/run', r'\$UNSET is not set: set it, or write'),
    ('${UNSET}', 'is not set'),
    ('$EMPTY/run', r'\$EMPTY is not set'),
    ('$BUCKET/run', 'a URL, .* mount it'),
    ('gs://bucket/run', 'a URL, .* mount it'),
    ('s3://bucket/run', 'a URL'),
    ('File:///tmp/run', 'a URL'),
    (pathlib.Path('gs://bucket/run'), 'a URL'),
    ('~no_such_user/run', 'no such home: write the folder out'),
    ('./~/run', 'no such home'),
    ('./gs://bucket', 'a URL'),
    ('gs://', 'a URL'),
    ('r\udce4n', 'not UTF-8: rename'),
    ('r\0n', 'zero byte'),
    (300 * 'r', 'too long for a path: choose a shorter one'),
  ],
)
def test_what_is_no_local_folder_is_refused_in_one_line(
  name, says, monkeypatch
):
  monkeypatch.delenv('UNSET', raising=False)
  monkeypatch.setenv('EMPTY', '')
  monkeypatch.setenv('BUCKET', 'gs://bucket')
  with pytest.raises(ConfigError, match=f'^workdir is .*{says}') as caught:
    folders.resolve(name, 'workdir')
  line = str(caught.value)
  assert '\n' not in line
  line.encode('utf-8')  # It can be printed.


def test_a_report_is_not_written_to_a_url(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert page.main([str(tmp_path), '--out=gs://bucket/report']) == 2
  assert '--out is ' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
