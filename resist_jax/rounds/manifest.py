"""A list of a folder's files with the SHA-256 of each, which shows damage.

Files that a list does not name may come and go. It never names those whose
names begin with a dot: tools such as Finder, and network file systems, put such
files beside those that were saved.
"""

from collections.abc import Mapping
import hashlib
import pathlib


def manifest(folder: pathlib.Path) -> dict[str, str]:
  """Lists the files of a folder, those of the folders in it included.

  Args:
    folder: Any folder.

  Returns:
    For each file, its path in the folder and its SHA-256 as hexadecimal digits.
  """
  names = {
    path: path.relative_to(folder).as_posix()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }
  return {
    name: _sha256(path)
    for path, name in names.items()
    if '/.' not in f'/{name}'
  }


def check(folder: pathlib.Path, manifest: Mapping[str, str]) -> str | None:
  """Compares the files of a folder with a list of them.

  Args:
    folder: The folder.
    manifest: The list.

  Returns:
    What is wrong with the first listed file that is not as it was, such as
    `d/0 is missing`; None if nothing is.

  Raises:
    PermissionError: If a file may not be read.
  """
  for name, digest in manifest.items():
    path = folder / name
    if not path.is_file():
      return f'{name} is missing'
    try:
      if _sha256(path) != digest:
        return f'{name} is not as it was written'
    except PermissionError:  # It says nothing about what the file holds.
      raise
    except OSError as error:
      return f'{name} cannot be read ({error.strerror})'
  return None


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
