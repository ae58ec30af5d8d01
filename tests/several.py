"""Processes of one run, which tests kill and suspend."""

import os
import pathlib
import subprocess
import time

from experiments.launch import local
from resist_jax import report

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT = 20  # Seconds without a heartbeat after which a process is dead.
LIMIT = 1000  # Seconds after which a process hangs, however busy the machine.
TINY = (
  '--config=digits:smoke',
  '--config.model.name=PreActResNet18',
  '--config.model.stage_sizes=(1, 6)',
  '--config.model.widths=(8, 8)',
  '--config.partition=(2,)',
  '--config.num_workers=2',
  '--config.batch_size=16',
  '--config.evaluation.statistics_images=200',
  '--config.eval_every=1000000',
  '--config.checkpoint_every=5',
  '--config.log.report=False',
  f'--config.faults.timeout={TIMEOUT}.0',
)
FOREVER = '--config.num_rounds=1000000'


class Several:
  """Processes that train in one workdir."""

  def __init__(
    self, folder, *flags, count=2, prefix=(), env=None, only_last=()
  ):
    """Starts them; `prefix` replaces `python -m resist_jax`.

    The last process gets some more flags.
    """
    self.workdir = folder
    args = [*TINY, f'--workdir={folder}', *flags]
    self._outputs = []
    self.processes = []
    for command in local.commands(count, args):
      if prefix:
        command[:3] = prefix
      number = len(self.processes)
      command += only_last if number == count - 1 else ()
      path = pathlib.Path(f'{folder}.{time.monotonic_ns()}.{number}')
      self._outputs.append(path)
      with path.open('w') as output:
        self.processes.append(
          subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, **(env or {})},
          )
        )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()

  def rounds(self):
    """Returns how many rounds are in the log."""
    return len(report.read_rows(self.workdir / 'metrics.jsonl'))

  def checkpoints(self):
    """Returns the rounds whose checkpoint has a manifest, in order."""
    paths = (self.workdir / 'digests').glob('[0-9]*.json')
    return sorted(int(path.stem) for path in paths)

  def wait_for_rounds(self, count):
    """Waits until the log has rounds; all processes must be alive."""
    self._wait_until(lambda: self.rounds() >= count)

  def wait_for_checkpoints(self, count):
    """Waits until some are listed; on a busy machine that takes many rounds."""
    self._wait_until(lambda: len(self.checkpoints()) >= count)

  def wait_for_output(self, number, text):
    """Waits until a process has printed a text; all must be alive."""
    self._wait_until(lambda: text in self.output(number))

  def _wait_until(self, reached):
    deadline = time.monotonic() + LIMIT
    while not reached():
      dead = [i for i, p in enumerate(self.processes) if p.poll() is not None]
      assert not dead, self.output(dead[0])
      assert time.monotonic() < deadline, self.output(0)
      time.sleep(0.1)

  def wait(self, number):
    """Waits for the end of a process and returns its exit code."""
    return self.processes[number].wait(LIMIT)

  def output(self, number):
    """Returns what a process has printed."""
    return self._outputs[number].read_text()

  def errors(self, number):
    """Returns the lines in which a process reports errors."""
    lines = self.output(number).splitlines()
    return [line for line in lines if line.startswith('error: ')]
