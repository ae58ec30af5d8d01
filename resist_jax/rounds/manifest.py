"""A list of a folder's files with the SHA-256 of each, which shows damage.

Files that a list does not name may come and go. It never names those whose
names begin with a dot: tools such as Finder, and network file systems, put such
files beside those that were saved.
"""

from collections.abc import Mapping
import errno
import hashlib
import pathlib

# What says that a file, or a part of it, is gone; decompressors give no number.
# Other errors, such as of permissions, of a network or of too many open files,
# do not tell what a file holds.
_LOST = (
  errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EBADMSG, None,
  getattr(errno, 'EUCLEAN', errno.EIO),  # Only Linux has it.
)  # fmt: skip


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
    OSError: If a file cannot be read, and may be intact: see `is_lost`.
  """
  for name, digest in manifest.items():
    path = folder / name
    try:
      if not path.is_file():
        return f'{name} is missing'
      if _sha256(path) != digest:
        return f'{name} is not as it was written'
    except OSError as error:
      if not is_lost(error):
        raise
      return f'{name} cannot be read ({error.strerror})'
  return None


def is_lost(error: BaseException) -> bool:
  """Returns whether an error of reading a file says that it is damaged.

  Args:
    error: What was raised.

  >>> is_lost(PermissionError(errno.EACCES, '')), is_lost(ValueError())
  (False, True)
  """
  return not isinstance(error, OSError) or error.errno in _LOST


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
