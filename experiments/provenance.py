"""Where a result comes from, to be written beside it."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')


def provenance(device: str = '') -> dict[str, Any]:
  """Returns commit, versions and device of this process.

  Args:
    device: Count and kind, where another process had them: asking here would
      take an accelerator from the next one.

  Returns:
    JSON values; the commit ends in `+` where code differs from it. Where the
    code came without its repository, RESIST_JAX_COMMIT says which it is.
  """
  return {
    'commit': _commit(),
    'python': platform.python_version(),
    'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
    'device': device
    or f'{len(jax.devices())} x {jax.devices()[0].device_kind}',
    'processor': _processor(),
    'cores': os.cpu_count(),
  }


_CODE = ('.', ':!experiments/results', ':!README.md')


def _commit() -> str:
  root = pathlib.Path(__file__).parent.parent

  def git(*args: str) -> str:
    command = ['git', '-C', str(root), *args]
    return subprocess.run(
      command, capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    # Results, tables and pictures that other runs leave change no code.
    changes = git('status', '--porcelain', '--untracked-files=no', '--', *_CODE)
    dirty = '+' if changes else ''
    return git('rev-parse', '--short=12', 'HEAD') + dirty
  except (OSError, subprocess.CalledProcessError):
    return os.environ.get('RESIST_JAX_COMMIT', 'unknown')


def _processor() -> str:
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor()
  names = [line.split(':')[1].strip() for line in lines if 'model name' in line]
  return names[0] if names else platform.processor()
