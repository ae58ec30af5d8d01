"""Packages that are optional, see the extras in `setup.cfg`."""

import importlib
from typing import Any


def package(name: str) -> Any:
  """Imports a package that may not be installed.

  Args:
    name: Name of its module.

  Returns:
    The module.

  Raises:
    ImportError: If there is none. A folder of that name, which Python would
      import as an empty package, is none: wandb leaves one where it runs.
  """
  module = importlib.import_module(name)
  if hasattr(module, '__path__') and module.__file__ is None:
    raise ImportError(f'the folder {name} here is not the package')
  return module
