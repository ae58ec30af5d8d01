"""Arrows between rooms run one way."""

import ast
import pathlib

import resist_jax

PACKAGE = pathlib.Path(resist_jax.__file__).parent
ROOT = PACKAGE.parent

# What each room may import from; `errors` and `folders` are open to all.
ARROWS = {
  'errors': set(),
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
    allowed = ARROWS[room(path)] | {room(path), 'errors', 'folders'}
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


def test_there_is_no_drawer_for_everything():
  names = {
    path.stem for path in ROOT.rglob('*.py') if '.venv' not in path.parts
  }
  assert not names & {'utils', 'util', 'helpers', 'misc', 'common'}
