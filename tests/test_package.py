"""A wheel holds all that a run needs, and runs in an empty folder."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
import setuptools

import resist_jax
from resist_jax.run import cards

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ('pyproject.toml', 'setup.cfg', 'requirements.txt', 'README.md')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  if int(setuptools.__version__.split('.')[0]) < 77:
    pytest.skip("needs setuptools>=77: pip install '.[test]'")
  source = tmp_path_factory.mktemp('source')
  for name in (*SOURCES, 'LICENSE'):
    shutil.copy(ROOT / name, source)
  ignored = shutil.ignore_patterns('__pycache__')
  shutil.copytree(ROOT / 'resist_jax', source / 'resist_jax', ignore=ignored)
  code = 'from setuptools import build_meta; build_meta.build_wheel(".")'
  subprocess.run(
    [sys.executable, '-c', code], cwd=source, capture_output=True, check=True
  )
  (path,) = source.glob('*.whl')
  return path


def test_a_wheel_holds_cards_and_types(wheel):
  with zipfile.ZipFile(wheel) as opened:
    names = set(opened.namelist())
  assert 'resist_jax/py.typed' in names
  for card in cards.names():
    assert f'resist_jax/run/cards/{card}.py' in names
  modules = {
    str(path.relative_to(ROOT)) for path in (ROOT / 'resist_jax').rglob('*.py')
  }
  assert {name for name in names if name.endswith('.py')} == modules
  assert wheel.name.split('-')[:2] == ['resist_jax', resist_jax.__version__]


@pytest.mark.slow
def test_a_wheel_trains_on_digits_in_an_empty_folder(wheel, tmp_path):
  site, folder = tmp_path / 'site', tmp_path / 'empty'
  zipfile.ZipFile(wheel).extractall(site)
  folder.mkdir()
  environment = {**os.environ, 'PYTHONPATH': str(site)}

  def run(*words):
    return subprocess.run(
      [sys.executable, *words],
      cwd=folder,
      env=environment,
      capture_output=True,
      text=True,
      timeout=1000,
    )

  where = run('-c', 'import resist_jax; print(resist_jax.__file__)').stdout
  assert pathlib.Path(where.strip()) == site / 'resist_jax' / '__init__.py'
  result = run(
    '-m', 'resist_jax', '--workdir=run', '--config.num_rounds=1',
    '--config.local_steps=2', '--config.num_workers=2', '--config.batch_size=8',
    '--config.model.stage_sizes=1,5', '--config.model.widths=8,8',
    '--config.partition=2', '--config.evaluation.statistics_images=100',
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  summary = json.loads((folder / 'run' / 'summary.json').read_text())
  assert summary['dataset'] == 'digits'
  assert summary['num_devices'] == 2  # Virtual ones, made by the program.
  assert 'test accuracy' in result.stdout
  assert 'report.html' in result.stdout
  assert [path.name for path in folder.iterdir()] == ['run']
