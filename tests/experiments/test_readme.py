"""The README and the pages run, and results come from committed files."""

import argparse
import ast
import importlib
import importlib.util
import pathlib
import re
import runpy
import shlex
import sys
from unittest import mock

from absl import flags
import jax
import jax.numpy as jnp
import pytest

from experiments import readme
import resist_jax
from resist_jax.run import checks, command, export, train

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / 'README.md').read_text()
PAGES = sorted((ROOT / 'docs').rglob('*.md'))
FILES = [ROOT / 'README.md', *PAGES]
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def blocks(text, kind):
  return re.findall(rf'^```{kind}\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def commands():
  """All `python -m MODULE WORDS` in pages, README, tables and docstrings."""
  found = set()
  for path in FILES:
    text = path.read_text()
    shown = [line.strip() for line in '\n'.join(blocks(text, 'sh')).replace(
      '\\\n', ' '
    ).splitlines()]  # fmt: skip
    shown += re.findall(r'`(python -m [^`]+)`', text)
    for line in shown:
      words = re.search(r'python -m ([^#;|]+)', line)
      if words:
        found.add(' '.join(words[1].split()))
  return sorted(found)


class ParsedError(Exception):
  """Flags were found in order."""


@pytest.fixture
def only_parse(monkeypatch):
  """Argument parsers parse, and then stop the program."""
  parse = argparse.ArgumentParser.parse_args

  def parse_and_stop(self, *args, **kwargs):
    parse(self, *args, **kwargs)
    raise ParsedError

  monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_and_stop)


def test_the_readme_is_short():
  assert len(TEXT.splitlines()) < 200


@pytest.fixture
def usual_promotion():
  """Adam promotes types, as everybody's JAX does; tests are strict."""
  with jax.numpy_dtype_promotion('standard'):
    yield


def test_the_readme_runs(usual_promotion):
  names = {}
  trainer, functions = blocks(TEXT, 'python')
  exec(trainer, names)
  S, L = names['S'], names['L']
  x, y = names['x'], names['y']

  def error(blocks):
    params = {**names['params'], 'blocks': blocks}
    outputs = names['network'](params, x, jnp.full(L, 1 / S))
    return jnp.mean((outputs - y) ** 2)

  assert names['metrics']['loss'].shape == (S,)
  assert names['prediction'].shape == y[0, 0].shape
  assert error(names['params']['blocks']) < 0.3 * jnp.var(y)
  begun = names['blocks']
  exec(functions, names)
  assert error(names['blocks']) < 0.8 * error(begun)


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
def test_pages_run(path, tmp_path, monkeypatch, usual_promotion):
  monkeypatch.chdir(tmp_path)
  # A trained run takes minutes; that these functions exist counts here, and
  # what they take.
  load = mock.create_autospec(export.load, return_value=lambda images: images)
  monkeypatch.setattr(export, 'load', load)
  trained = mock.create_autospec(train.train, return_value=None)
  monkeypatch.setattr(train, 'train', trained)
  names = {'images': None}
  for block in blocks(path.read_text(), 'python'):
    exec(block, names)
  for block in blocks(path.read_text(), 'py'):  # They need files or extras.
    compile(block, path.name, 'exec')


@pytest.mark.filterwarnings('ignore:.*found in sys.modules.*')
@pytest.mark.parametrize('line', commands())
def test_commands_exist(line, only_parse, monkeypatch):
  module, *words = shlex.split(line.replace('...', ''))
  assert importlib.util.find_spec(module), module
  parse(module, words, monkeypatch)


def parse(module, words, monkeypatch):
  if module == 'resist_jax':
    if words and words != ['--help']:
      values = flags.FlagValues()
      command.define(values)
      options = command.parse([module, *words], values)
      # Without its module, which may be a reader's own.
      checks.validate(options.config, imports=False)
  elif module == 'experiments.plan':  # Its flags are absl's.
    importlib.import_module(module)
    assert {word[2:].partition('=')[0] for word in words} <= set(flags.FLAGS)
  elif module == 'experiments.launch.local':
    before, _, behind = ' '.join(words).partition(' -- ')
    run_main(module, [*before.split(), '--', 'x'], monkeypatch)
    parse('resist_jax', behind.split(), monkeypatch)
  elif words:
    run_main(module, words, monkeypatch)


def run_main(module, words, monkeypatch):
  monkeypatch.setattr(sys, 'argv', [module, *words])
  with pytest.raises(ParsedError):
    runpy.run_module(module, run_name='__main__', alter_sys=True)


def test_results_come_from_the_files():
  wanted = 'run python -m experiments.readme'
  assert readme.with_headline(TEXT) == TEXT, wanted
  assert readme.RESULTS.read_text() == readme.results(), wanted


def test_links_of_results_lead_somewhere():
  text = readme.results()
  titles = re.findall('^## (.*)$', text, re.MULTILINE)
  links = re.findall(r'\]\(#(.*)\)', text)
  assert links == [readme.anchor(title) for title in titles]
  assert len(links) > 10


@pytest.mark.parametrize('name', [*NAMES, 'RESULTS.md'])
def test_files_that_are_linked_exist(name):
  path = ROOT / name
  text = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.DOTALL | re.M)
  for link in re.findall(r'\]\(([^)#]+)[^)]*\)', text):
    if not link.startswith('http'):
      assert (path.parent / link).exists(), link


def test_make_targets_exist():
  makefile = (ROOT / 'Makefile').read_text()
  for path in FILES:
    for target in re.findall(r'^ *make ([\w-]+)', path.read_text(), re.M):
      assert re.search(f'^{target}:', makefile, re.M), target


def test_every_room_has_a_page_of_reference():
  pages = {path.stem for path in PAGES if path.parent.name == 'api'}
  package = pathlib.Path(resist_jax.__file__).parent
  rooms = {path.parent.name for path in package.glob('*/__init__.py')}
  assert pages == rooms | {'index', 'resist_jax'}
  # What the page of `run` shows is listed there: `--help` imports `run`, and
  # must not import JAX.
  for room in rooms - {'run'} | {'.'}:
    tree = ast.parse((package / room / '__init__.py').read_text())
    names = {
      target.id
      for node in tree.body
      if isinstance(node, ast.Assign)
      for target in node.targets
    }
    assert '__all__' in names, room
