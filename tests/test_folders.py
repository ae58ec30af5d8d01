"""A folder is the one that people mean, or a line says what to name."""

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from resist_jax import folders
from resist_jax.errors import ConfigError, Parser
from resist_jax.report import page
from resist_jax.run import cards

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
    ('', ': name a local path'),
    (' ', ': name a local path'),
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
    (3, 'which is no path: name'),
    (None, 'which is no path: name'),
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


def test_a_folder_that_exists_may_have_a_dollar_in_its_name(
  tmp_path, monkeypatch
):
  monkeypatch.delenv('b', raising=False)
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a$b').mkdir()
  assert folders.resolve('a$b', 'workdir') == pathlib.Path('a$b')
  monkeypatch.setenv('b', 'c')
  assert folders.resolve('a$b', 'workdir') == pathlib.Path('ac')


def test_a_report_is_not_written_to_a_url(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert page.main([str(tmp_path), '--out=gs://bucket/report']) == 2
  assert '--out is ' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_every_command_and_card_finds_home(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setenv('THERE', str(tmp_path))
  assert page.main(['~/nowhere']) == 2
  assert f'{tmp_path}/nowhere has no config.json' in capsys.readouterr().err
  (tmp_path / 'card.py').write_text(
    'from resist_jax.run.config import get_config\n'
    'def rate(config, steps): return 0.1\n'
  )
  assert cards.load('~/card.py').num_rounds == 100
  assert cards.function('$THERE/card.py:rate')(None, 3) == 0.1
  with pytest.raises(ConfigError, match='UNSET is not set'):
    cards.load('$UNSET/card.py')
  parser = Parser('it')
  parser.add_argument('--out', type=folders.argument)
  assert parser.parse_args(['--out=~/x']).out == tmp_path / 'x'
  with pytest.raises(SystemExit, match='2'):
    parser.parse_args(['--out=gs://bucket/x'])
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: argument --out: it is 'gs://bucket/x', a URL")


@pytest.mark.parametrize(
  ('kind', 'place'),
  [
    (folders.output_file, 'folder'),
    (folders.output_file, 'file/below'),
    (folders.output_folder, 'file'),
    (folders.output_folder, 'file/below'),
  ],
)
def test_an_output_is_refused_before_the_work(tmp_path, kind, place, capsys):
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'file').write_text('')
  parser = Parser('it')
  parser.add_argument('--out', type=kind)
  new = tmp_path / 'new' / 'it'
  assert parser.parse_args([f'--out={new}']).out == new
  assert not new.parent.exists()
  with pytest.raises(SystemExit, match='2'):
    parser.parse_args([f'--out={tmp_path / place}'])
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: argument --out: the path ')


KILLED = """
import os, pathlib, signal, sys
from resist_jax import folders
with folders.replacing(pathlib.Path(sys.argv[1])) as part:
  if sys.argv[2] == 'folder':
    part.mkdir()
    part = part / 'a'
  part.write_text('half')
  os.kill(os.getpid(), signal.SIGKILL)
"""


def filled(path, kind, text):
  with folders.replacing(path) as part:
    if kind == 'folder':
      part.mkdir()
      (part / 'b').write_text(text)
      part = part / 'a'
    part.write_text(text)


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_a_kill_leaves_what_was_there(kind, tmp_path):
  path = tmp_path / 'it'
  kill = [sys.executable, '-c', KILLED, str(path), kind]
  assert subprocess.run(kill).returncode == -signal.SIGKILL
  assert not path.exists()
  filled(path, kind, 'old')
  assert subprocess.run(kill).returncode == -signal.SIGKILL
  file = path / 'a' if kind == 'folder' else path
  assert file.read_text() == 'old'

  def stop():
    with folders.replacing(path) as part:
      part.write_text('half')
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    stop()
  assert file.read_text() == 'old'
  filled(path, kind, 'new')
  assert file.read_text() == 'new'
  assert [p.name for p in tmp_path.iterdir()] == ['it']  # And no part.


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_there_is_always_a_whole_one(kind, tmp_path):
  path, odd, stop = tmp_path / 'it', [], threading.Event()
  filled(path, kind, 'old')

  def look():
    while not stop.is_set():
      inside = [path / 'a', path / 'b'] if kind == 'folder' else [path]
      for file in inside:
        try:
          found = os.open(file, os.O_RDONLY)
        except FileNotFoundError:
          odd.append(file)
          continue
        with open(found) as opened:
          odd.extend({opened.read()} - {'old', 'new'})

  reader = threading.Thread(target=look)
  reader.start()
  try:
    for number in range(200):
      filled(path, kind, ('new', 'old')[number % 2])
  finally:
    stop.set()
    reader.join()
  assert not odd


def test_a_folder_is_replaced_where_two_cannot_be_swapped(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(folders, '_exchange', lambda one, other: False)
  for text in ('old', 'new'):
    filled(tmp_path / 'it', 'folder', text)
  assert (tmp_path / 'it' / 'b').read_text() == 'new'
  assert [p.name for p in tmp_path.iterdir()] == ['it']


def test_links_stay_and_devices_are_written_to(tmp_path):
  filled(tmp_path / 'it', 'file', 'old')
  (tmp_path / 'link').symlink_to('it')
  filled(tmp_path / 'link', 'file', 'new')
  assert (tmp_path / 'link').is_symlink()
  assert (tmp_path / 'it').read_text() == 'new'
  (tmp_path / 'it').chmod(0o600)
  filled(tmp_path / 'it', 'file', 'secret')
  assert (tmp_path / 'it').stat().st_mode & 0o777 == 0o600
  os.mkfifo(tmp_path / 'pipe')
  with folders.replacing(tmp_path / 'pipe') as part:
    assert part == tmp_path / 'pipe'
