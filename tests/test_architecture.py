"""Arrows run one way, and a file is one idea."""

import ast
import pathlib

import resist_jax

PACKAGE = pathlib.Path(resist_jax.__file__).parent
ROOT = PACKAGE.parent

# A module may import those in the lines above its own.
LAYERS = [
  {'decomposition', 'layers', 'optimizer', 'interrupt', 'plots', 'clock'}
  | {'placement', 'processes', 'replica_groups'},
  {'dealing', 'wire', 'hlo', 'blocks'},
  {'exchange', 'model'},
  {'hand_over', 'state', 'config', 'initial', 'health'},
  {'local_training', 'accounting', 'streaming'},
  {'catalog', 'feeding', 'validation', 'metrics', 'teams', 'synchronisation'},
  {'rounds', 'data', 'checkpoint', 'records'},
  {'footprint', 'report', 'export', 'augmentation', 'workdir'},
  {'evaluate', 'classification', 'phase'},
  {'build'},
  {'entry', 'summary', 'speed'},
  {'train'},
  {'__main__'},
]


def imports(path):
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'resist_jax':
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      if node.module.startswith('resist_jax.'):
        found.add(node.module.split('.')[1])
    elif isinstance(node, ast.Import):
      names = [alias.name.split('.') for alias in node.names]
      found |= {name[1] for name in names if name[0] == 'resist_jax'}
  return found


def modules():
  paths = {path.stem: path for path in PACKAGE.glob('*.py')}
  del paths['__init__']
  return paths


def test_every_module_has_its_place():
  assert set().union(*LAYERS) == set(modules())


def test_arrows_run_one_way():
  below = set()
  for layer in LAYERS:
    for name in layer:
      upward = imports(modules()[name]) - below
      assert not upward, f'{name} imports {upward}'
    below |= layer


def test_decomposition_stands_alone():
  assert imports(modules()['decomposition']) == set()


def test_training_and_evaluation_say_shard_map():
  said = {n for n, p in modules().items() if 'jax.shard_map' in p.read_text()}
  assert said == {'rounds', 'evaluate'}


def test_a_config_is_read_above_the_libraries_only():
  said = {
    name
    for name, path in modules().items()
    if 'ConfigDict' in path.read_text() or 'ml_collections' in path.read_text()
  }
  assert said == {'config', 'validation', 'build', 'train', '__main__'}


def test_no_file_is_over_350_lines():
  for folder in ('resist_jax', 'experiments', 'tests'):
    for path in (ROOT / folder).rglob('*.py'):
      assert len(path.read_text().splitlines()) <= 350, path


def test_there_is_no_drawer_for_everything():
  names = {
    path.stem for path in ROOT.rglob('*.py') if '.venv' not in path.parts
  }
  assert not names & {'utils', 'util', 'helpers', 'misc', 'common'}
