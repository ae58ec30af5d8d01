"""What the processes of a run must have in common: settings, versions, code.

A run also notes in its file `code.json` what a person's own code was, because a
loss or a schedule that changes between two starts changes what the run means.
"""

import ast
from collections.abc import Iterator, Mapping
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sysconfig
from typing import Any

from absl import logging
import jax
from ml_collections import ConfigDict

from resist_jax import folders
from resist_jax.errors import FOREIGN
from resist_jax.run import workdir
from resist_jax.run.config import value_if_there

CODE = 'code.json'
# Options of JAX that change what a program computes, or whether it ends.
_JAX_OPTIONS = (
  'jax_enable_x64', 'jax_default_matmul_precision', 'jax_default_prng_impl',
  'jax_threefry_partitionable', 'jax_platforms', 'jax_random_seed_offset',
  'jax_debug_nans', 'jax_debug_infs', 'jax_disable_jit',
  'jax_cpu_collectives_implementation',
)  # fmt: skip
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'orbax-checkpoint')
# Packages by which JAX finds accelerators; without them it takes the CPU.
_PLUGINS = re.compile('jax[-_]cuda|jax[-_]rocm|libtpu')


def describe(config: ConfigDict) -> dict[str, Any]:
  """Returns what all processes of a run must have in common.

  Args:
    config: Config of the run; fields may be missing.

  Returns:
    JSON values by what messages call them. Each host may keep the data in a
    folder of its own; `train` compares the data.
  """
  fields = config.to_dict()
  if isinstance(fields.get('data'), dict):
    fields['data'].pop('dir', None)
  return {
    'config': fields,
    'versions': {name: importlib.metadata.version(name) for name in _PACKAGES},
    'kinds of device': _accelerators(),
    'code of resist_jax': _digest_of('resist_jax'),
    **{f'code of {n}': _digest_of(n) for n in _own_code(config).values()},
    'jax.config': {
      name: str(getattr(jax.config, name, None)) for name in _JAX_OPTIONS
    },
  }


def _accelerators() -> dict[str, Any]:
  """Returns by which packages JAX finds accelerators, and which are there.

  A host without its driver would train on the CPU, and the others wait for it.
  """
  if getattr(jax.config, 'jax_platforms', None) == 'cpu':
    return {}
  names = {d.name or '' for d in importlib.metadata.distributions()}
  packages = sorted(filter(_PLUGINS.match, names))
  return {
    'packages for accelerators': packages,
    # Without such a package, JAX takes the CPU beside any GPU.
    'an NVIDIA GPU': bool(packages) and os.path.exists('/dev/nvidiactl'),
  }


def warn_of_changes(folder: pathlib.Path, config: ConfigDict) -> None:
  """Warns that a person's own code is not that of the last start of a run.

  Args:
    folder: The workdir of a run that goes on.
    config: Its config.
  """
  before = workdir.json_object(folder / CODE)
  for field, digest in _digests(config).items():
    if before.get(field, digest) != digest:
      logging.warning(
        'the code of %s, or what it imports, has changed since the run was '
        'last started: the rounds that follow are trained by the new one',
        field,
      )


def note(folder: pathlib.Path, config: ConfigDict) -> None:
  """Notes what a person's own code is, see `warn_of_changes`."""
  if digests := _digests(config):
    workdir.write_json(folder / CODE, digests)


def _digests(config: ConfigDict) -> Mapping[str, str]:
  names = _own_code(config)
  return {field: _digest_of(name) for field, name in names.items()}


def _own_code(config: ConfigDict) -> dict[str, str]:
  """Returns the modules and files that a config names, by its fields."""
  names = {'model.module': value_if_there(config, 'model.module')}
  schedule = value_if_there(config, 'optimizer.schedule')
  if isinstance(schedule, str) and ':' in schedule:
    names['optimizer.schedule'] = schedule.rpartition(':')[0]
  return {
    field: name
    for field, name in names.items()
    if name and isinstance(name, str)
  }


def _digest_of(name: str) -> str:
  """Returns some digits of a digest of a module's code.

  Args:
    name: The name of a module, whose whole package counts, or `FILE.py`. A
      module that is a file counts with those beside it that it imports.

  Returns:
    The digits; nothing where it is not found, which `validate` will report.
  """
  try:
    if name.endswith('.py'):
      files = _with_imports(folders.resolve(name, 'the file'))
    else:
      spec = importlib.util.find_spec(name.partition('.')[0])
      assert spec
      roots = [*map(pathlib.Path, spec.submodule_search_locations or ())]
      files = [(p, r) for r in roots for p in sorted(r.rglob('*.py'))]
      if not roots:
        files = _with_imports(pathlib.Path(spec.origin or ''))
    sha = hashlib.sha256()
    for path, root in files:
      sha.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return sha.hexdigest()[:12]
  except FOREIGN:
    return ''


def _with_imports(
  file: pathlib.Path,
) -> list[tuple[pathlib.Path, pathlib.Path]]:
  """Returns a file and those beside it that it imports, with their folder.

  They are found by reading the files, without running them.
  """
  folder, found, new = file.parent, {file}, [file]
  if str(folder) in (
    sysconfig.get_path('purelib'),
    sysconfig.get_path('platlib'),
  ):
    return [(file, folder)]  # Beside it lies all that is installed.
  while new:
    for place in _imported(new.pop(), folder):
      for path in (place.with_suffix('.py'), place / '__init__.py'):
        if path.is_file() and path not in found:
          found.add(path)
          new.append(path)
  return [(path, folder) for path in sorted(found)]


def _imported(
  file: pathlib.Path, folder: pathlib.Path
) -> Iterator[pathlib.Path]:
  """Yields the paths of the modules that a file imports, without suffix."""
  for node in ast.walk(ast.parse(file.read_bytes())):
    above, names = folder, []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      before = f'{node.module}.' if node.module else ''
      names = [f'{before}{alias.name}' for alias in node.names]
      above = file.parents[node.level - 1] if node.level else folder
    for name in names:
      place = above
      for part in name.split('.'):  # Packages are imported with what they hold.
        place = place / part
        yield place
