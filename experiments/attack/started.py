"""The tiny runs that are attacked, and the processes that train them."""

from collections.abc import Mapping, Sequence
import os
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

from absl import flags
import ml_collections

from experiments.launch import local
from resist_jax.run import command

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 240.0  # Seconds after which a process hangs, on a busy machine.
# A constant learning rate: a run that is given more rounds is then the same as
# one that had them from the start.
TINY = (
  '--config=digits:smoke',
  '--config.model.stage_sizes=(1,5)',
  '--config.model.widths=(4,4)',
  '--config.partition=(2,)',
  '--config.num_workers=2',
  '--config.batch_size=8',
  '--config.optimizer.schedule=constant',
  '--config.evaluation.batch_size=360',
  '--config.evaluation.statistics_images=100',
)


def config_of(*words: str) -> ml_collections.ConfigDict:
  """Returns the config that a command line asks for.

  Args:
    words: Flags, after those of `TINY`.
  """
  values = flags.FlagValues()
  command.define(values)
  argv = ['resist_jax', *TINY, '--workdir=unused', *words]
  return command.parse(argv, values).config


class Ended(NamedTuple):
  """A process that has ended.

  Attributes:
    code: Its exit code; None if it had to be killed after `LIMIT`.
    out: What it printed on stdout.
    err: What it printed on stderr.
  """

  code: int | None
  out: str
  err: str


class Started:
  """A process, whose output goes to files."""

  def __init__(
    self,
    words: Sequence[str],
    output: pathlib.Path,
    env: Mapping[str, str] | None = None,
    cwd: pathlib.Path = ROOT,
  ):
    """Starts it.

    Args:
      words: The command.
      output: Path of its output, without a suffix.
      env: Variables of the environment that it gets besides.
      cwd: Where it starts.
    """
    self._paths = [output.with_suffix(s) for s in ('.out', '.err')]
    path = {'PYTHONPATH': str(ROOT)}
    with self._paths[0].open('w') as out, self._paths[1].open('w') as err:
      self.process = subprocess.Popen(
        words,
        cwd=cwd,
        stdout=out,
        stderr=err,
        env={**os.environ, **path, **(env or {})},
      )

  def end(self) -> Ended:
    """Waits for its end, and kills it after `LIMIT`."""
    code: int | None
    try:
      code = self.process.wait(LIMIT)
    except subprocess.TimeoutExpired:
      self.kill()
      code = None
    out, err = (path.read_text(errors='replace') for path in self._paths)
    return Ended(code, out, err)

  def kill(self) -> None:
    """Ends it by SIGKILL."""
    self.process.kill()
    self.process.wait()


def alone(workdir: pathlib.Path, *words: str) -> list[str]:
  """Returns the command of a run of one process."""
  return [sys.executable, '-m', 'resist_jax', *TINY, f'--workdir={workdir}',
          *words]  # fmt: skip


def several(count: int, workdir: pathlib.Path, *words: str) -> list[list[str]]:
  """Returns the commands of a run of some processes; one has no coordinator."""
  if count == 1:
    return [alone(workdir, *words)]
  return local.commands(count, [*TINY, f'--workdir={workdir}', *words])


def start_all(
  commands: Sequence[Sequence[str]], output: pathlib.Path
) -> list[Started]:
  """Starts the processes of a run.

  Args:
    commands: Their commands.
    output: Path of their output; each adds its number and the time.
  """
  stamp = time.monotonic_ns()
  return [
    Started(words, output.with_name(f'{output.name}_{stamp}_{i}'))
    for i, words in enumerate(commands)
  ]
