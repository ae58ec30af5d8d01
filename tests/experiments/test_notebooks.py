"""The notebooks run from top to bottom, and show what running them gives."""

import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.parse

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
import nbformat
import pytest
import setuptools

ROOT = pathlib.Path(__file__).parents[2]
PATHS = sorted((ROOT / 'experiments' / 'notebooks').glob('*.ipynb'))
# A notebook really trains, and its user may mix dtypes: it runs a JAX that
# compiles well and is not strict.
STRICT = (
  'XLA_FLAGS', 'JAX_DISABLE_MOST_OPTIMIZATIONS', 'JAX_NUMPY_RANK_PROMOTION',
  'JAX_NUMPY_DTYPE_PROMOTION',
)  # fmt: skip
FOLDERS = r'(?<![\w./:])/(?:home|root|tmp|var|mnt|opt|content|Users)\b'


def notebook(*sources):
  return nbformat.v4.new_notebook(
    cells=[nbformat.v4.new_code_cell(source) for source in sources]
  )


def execute(nb, folder):
  """Runs a notebook in place, in a kernel of this Python."""
  # With no folder to find kernels in, the one that ipykernel is remains.
  kernels = KernelSpecManager(kernel_dirs=[])
  client = NotebookClient(
    nb,
    km=AsyncKernelManager(kernel_spec_manager=kernels),
    startup_timeout=600,
    coalesce_streams=True,
    resources={'metadata': {'path': str(folder)}},
  )
  paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
  env = os.environ | {'PYTHONPATH': os.pathsep.join(paths)}
  for name in STRICT:
    env.pop(name, None)
  client.execute(cleanup_kc=True, env=env)


def code(nb):
  return [cell for cell in nb.cells if cell.cell_type == 'code']


def printed(cell):
  return ''.join(
    out.text for out in cell.outputs if out.output_type == 'stream'
  )


def kinds(nb):
  """What each cell shows, but not the numbers, which differ by machine.

  Nor what XLA may have to say on stderr about a machine that is slow.
  """
  return [
    [
      sorted(out.get('data', {})) or out.output_type
      for out in cell.outputs
      if out.get('name') != 'stderr'
    ]
    for cell in code(nb)
  ]


def check(nb):
  """Every cell ran once, in order, without an error or a machine's path."""
  cells = code(nb)
  counts = [cell.execution_count for cell in cells]
  assert counts == list(range(1, len(cells) + 1))
  for out in (out for cell in cells for out in cell.outputs):
    assert out.output_type != 'error'
    if out.get('name') == 'stderr':
      continue  # Where XLA tells of a slow machine, it names a folder.
    data = {k: v for k, v in out.get('data', {}).items() if k != 'image/png'}
    text = json.dumps([out.get('text', ''), data])
    assert not re.search(FOLDERS, text)
    assert str(ROOT) not in text
    assert tempfile.gettempdir() not in text


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_what_is_committed_was_run(path):
  nb = nbformat.read(path, as_version=4)
  nbformat.validate(nb)
  check(nb)
  outputs = [out for cell in code(nb) for out in cell.outputs]
  assert 'stderr' not in [out.get('name') for out in outputs]
  assert re.search('^assert ', code(nb)[-1].source, re.M)
  assert any('image/png' in kind for cell in kinds(nb) for kind in cell)


@pytest.mark.notebooks
@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_it_runs_and_its_claims_hold(path, tmp_path):
  committed = nbformat.read(path, as_version=4)
  nb = nbformat.read(path, as_version=4)
  execute(nb, tmp_path)  # Raises where a cell does.
  check(nb)
  assert kinds(nb) == kinds(committed), 'run the notebook, and commit it'
  assert printed(code(nb)[-1]) == printed(code(committed)[-1])


@pytest.mark.notebooks
@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_without_the_package_it_asks_where_to_get_it(path, tmp_path):
  install = code(nbformat.read(path, as_version=4))[0].source
  missing = "import sys\nsys.modules['resist_jax'] = None"
  with pytest.raises(CellExecutionError, match='set SOURCE to'):
    execute(notebook(missing, install), tmp_path)


def repository(folder):
  """Makes a git repository of the package as it is here, on a branch."""
  folder.mkdir(parents=True)
  for name in (
    'LICENSE',
    'README.md',
    'pyproject.toml',
    'requirements.txt',
    'setup.cfg',
  ):
    shutil.copy(ROOT / name, folder)
  package = folder / 'resist_jax'
  shutil.copytree(
    ROOT / 'resist_jax', package, ignore=shutil.ignore_patterns('__pycache__')
  )
  who = ('-c', 'user.name=x', '-c', 'user.email=x@example.org')
  for words in (
    ('init', '--quiet', '--initial-branch=trunk'),
    ('add', '.'),
    (*who, 'commit', '--quiet', '--message=all'),
  ):
    subprocess.run(['git', *words], cwd=folder, check=True)
  return folder


class Sessions(http.server.BaseHTTPRequestHandler):
  """Answers as the notebook server of Colab does."""

  def do_GET(self):
    file = 'https://github.com/someone/resist/blob/trunk/experiments/x.ipynb'
    path = 'fileId=' + urllib.parse.quote(file)
    self.send_response(200 if self.path == '/api/sessions' else 404)
    self.end_headers()
    self.wfile.write(json.dumps([{'path': path}]).encode())

  def log_message(self, *args):
    pass


@pytest.mark.notebooks
@pytest.mark.parametrize('place', ['clone', 'colab'])
def test_it_finds_the_package_in_its_clone_or_where_colab_has_it_from(
  place, tmp_path, monkeypatch
):
  if int(setuptools.__version__.split('.')[0]) < 77:
    pytest.skip("needs setuptools>=77: pip install '.[test]'")
  source, target = tmp_path / 'someone' / 'resist', tmp_path / 'installed'
  repository(source)
  # What is installed must not change, and nothing is fetched.
  monkeypatch.setenv('PIP_TARGET', str(target))
  monkeypatch.setenv('PIP_NO_DEPS', '1')
  monkeypatch.setenv('PIP_NO_BUILD_ISOLATION', '0')  # Sic: it means none.
  folder = source / 'experiments' / 'notebooks'
  server = http.server.HTTPServer(('127.0.0.1', 0), Sessions)
  if place == 'colab':
    folder = tmp_path / 'content'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('COLAB_JUPYTER_IP', '127.0.0.1')
    monkeypatch.setenv('KMP_TARGET_PORT', str(server.server_port))
    for name, value in (
      ('COUNT', '1'),
      ('KEY_0', f'url.{tmp_path.as_uri()}/.insteadOf'),
      ('VALUE_0', 'https://github.com/'),
    ):
      monkeypatch.setenv(f'GIT_CONFIG_{name}', value)
  folder.mkdir(parents=True)
  installs = {code(nbformat.read(p, as_version=4))[0].source for p in PATHS}
  (install,) = installs  # All notebooks have the same cell.
  missing = "import sys\nsys.modules['resist_jax'] = None"
  found = (
    f"del sys.modules['resist_jax']\nsys.path.insert(0, {str(target)!r})\n"
    'import resist_jax\nprint(resist_jax.__file__)'
  )
  nb = notebook(missing, install, found)
  try:
    execute(nb, folder)
  finally:
    if place == 'colab':
      server.shutdown()
    server.server_close()
  assert printed(nb.cells[2]).strip().startswith(str(target))


@pytest.mark.notebooks
def test_the_kernel_is_this_python_and_a_raising_cell_fails(tmp_path):
  nb = notebook('import sys\nprint(sys.executable)', '1 / 0')
  with pytest.raises(CellExecutionError, match='ZeroDivisionError'):
    execute(nb, tmp_path)
  assert printed(nb.cells[0]).strip() == sys.executable
  with pytest.raises(AssertionError):
    check(nb)


def test_a_path_of_a_machine_is_found():
  shown = nbformat.v4.new_output('stream', text='in /home/someone/runs')
  nb = notebook('')
  nb.cells[0].update(execution_count=1, outputs=[shown])
  with pytest.raises(AssertionError):
    check(nb)
  shown.text = 'https://example.org/home/page and 3/4'
  check(nb)
