"""What ends a command early becomes a line and an exit code."""

import subprocess
import sys

import pytest

from resist_jax.errors import ConfigError, exit_code


def raising(error):
  def work():
    raise error

  return work


@pytest.mark.parametrize(
  ('error', 'code', 'says'),
  [
    (ConfigError('so it is: mend it.'), 2, 'so it is: mend it.'),
    (OSError(28, 'No space left on device'), 2, 'No space left'),
    (MemoryError(), 1, 'the memory does not suffice (MemoryError)'),
    (RuntimeError('RESOURCE_EXHAUSTED: 9G'), 1, 'a device with more'),
    (KeyboardInterrupt(), 130, 'it was interrupted'),
  ],
)
def test_what_a_person_can_mend_is_one_line(error, code, says, capsys):
  assert exit_code(raising(error)) == code
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ')
  assert says in line


def test_a_mistake_of_ours_keeps_its_traceback():
  with pytest.raises(ZeroDivisionError):
    exit_code(raising(ZeroDivisionError()))


def test_a_reader_that_has_seen_enough_is_no_error():
  """As in `python -m resist_jax.evaluate RUN | head -1`."""
  code = 'from resist_jax.errors import exit_code\n'
  code += 'exit(exit_code(lambda: [print("x" * 99) for _ in range(9999)]))'
  pipe = subprocess.PIPE
  with subprocess.Popen(
    [sys.executable, '-c', code], stdout=pipe, stderr=pipe, text=True
  ) as made:
    assert made.stdout.readline().startswith('x')
    made.stdout.close()
    assert made.stderr.read() == ''
  assert made.returncode == 0
