"""The notebooks run from top to bottom, and show what running them gives."""

import json
import os
import pathlib
import re
import sys
import tempfile

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
import nbformat
import pytest

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
