"""Arrows between rooms run one way."""

import argparse
import ast
import pathlib

import pytest

import resist_jax
from resist_jax import errors
from resist_jax.report import page
from resist_jax.run import evaluate_command, export_command, predict_command

PACKAGE = pathlib.Path(resist_jax.__file__).parent
ROOT = PACKAGE.parent

# What each room may import from. The first three are open to all.
ARROWS = {
  'errors': set(),
  'extras': set(),
  'folders': set(),
  'decomposition': set(),
  'models': set(),
  'data': set(),
  'report': set(),
  'exchange': {'decomposition'},
  'rounds': {'exchange', 'decomposition'},
  'accounting': {'rounds', 'exchange', 'decomposition'},
  'trainer': {'rounds', 'exchange', 'decomposition', 'accounting'},
  'run': {
    'trainer', 'rounds', 'exchange', 'decomposition', 'accounting', 'models',
    'data', 'report',
  },
  '__main__': {'run'},
  'evaluate': {'run'},
  'export': {'run'},
  'predict': {'run'},
}  # fmt: skip


def room(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def modules():
  return [p for p in PACKAGE.rglob('*.py') if p != PACKAGE / '__init__.py']


def imports(path):
  """The rooms that a file imports from."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'resist_jax':
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      if node.module.startswith('resist_jax.'):
        found.add(node.module.split('.')[1])
    elif isinstance(node, ast.Import):
      names = [alias.name.split('.') for alias in node.names]
      found |= {
        name[1] for name in names if name[0] == 'resist_jax' and name[1:]
      }
  return found


def test_every_file_is_in_a_room():
  assert {room(path) for path in modules()} == set(ARROWS)


def test_arrows_run_one_way():
  for path in modules():
    allowed = ARROWS[room(path)] | {room(path), 'errors', 'extras', 'folders'}
    assert imports(path) <= allowed, path


def test_a_room_says_what_it_is_for():
  for path in PACKAGE.glob('*/__init__.py'):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc, path
    assert len(doc.splitlines()[0].split()) > 4, path


def test_a_config_is_read_in_one_room_only():
  said = {
    room(path)
    for path in modules()
    if 'ConfigDict' in path.read_text() or 'ml_collections' in path.read_text()
  }
  assert said == {'run'}


def written_to(call):
  """What a call writes a file to, or opens to write it; None if nothing."""
  name = getattr(call.func, 'attr', getattr(call.func, 'id', ''))
  # Of a method, what it is called on comes first.
  first = [call.func.value] if isinstance(call.func, ast.Attribute) else []
  args = [*first, *call.args]
  if name in ('write_text', 'write_bytes'):
    return args[0]
  modes = [k.value for k in call.keywords if k.arg == 'mode'] + args[1:2]
  said = {mode.value for mode in modes if isinstance(mode, ast.Constant)}
  writing = {kind + more for kind in 'wx' for more in ('', 'b', 't', '+', 'b+')}
  return args[0] if name == 'open' and said & writing else None


def test_files_are_replaced_whole_or_not_at_all():
  """A kill leaves the old one: all are written to a part of `replacing`.

  The log and the lock of a run, which begin empty, are opened to append.
  """
  whole, others = [], []
  for path in modules():
    if path.stem == 'streams':  # It opens the null device, by its number.
      continue
    nodes = list(ast.walk(ast.parse(path.read_text())))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    places = {call: written_to(call) for call in calls}
    writes = {call for call, place in places.items() if place is not None}
    safe = set()
    for node in nodes:
      for item in node.items if isinstance(node, ast.With) else ():
        if ast.unparse(item.context_expr).startswith('folders.replacing('):
          part = ast.unparse(item.optional_vars)
          inside = writes & {*ast.walk(node)}
          safe |= {x for x in inside if ast.unparse(places[x]) == part}
    whole += safe
    others += [f'{path}:{call.lineno}' for call in writes - safe]
  assert not others
  assert len(whole) > 4


def test_every_command_tells_a_mistake_in_one_line():
  """By `errors.Parser`: that of argparse prints its usage before the line."""
  files = [*modules(), *(ROOT / 'experiments').rglob('*.py')]
  plain = [p for p in files if 'argparse.ArgumentParser(' in p.read_text()]
  assert not plain
  (base,) = errors.Parser.__bases__
  assert base is argparse.ArgumentParser


@pytest.mark.parametrize('words', [[], ['run'], ['run', 'x', '--bogus=1']])
@pytest.mark.parametrize(
  'main',
  [export_command.main, predict_command.main, evaluate_command.main, page.main],
)
def test_a_wrong_usage_is_one_line(main, words, capsys):
  if main in (evaluate_command.main, page.main):
    words = words and [*words, '--bogus=1']
  with pytest.raises(SystemExit, match='2'):
    main(words if main is not predict_command.main else words[:1])
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ')
  assert line.endswith('--help lists all arguments.')


def test_there_is_no_drawer_for_everything():
  names = {
    path.stem for path in ROOT.rglob('*.py') if '.venv' not in path.parts
  }
  assert not names & {'utils', 'util', 'helpers', 'misc', 'common'}
