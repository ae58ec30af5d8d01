"""Trains a whole run, and reads from its own programs what it sent."""

from unittest import mock

from resist_jax import accounting
from resist_jax.run import train


def train_and_compare(config, workdir):
  """Trains, and compares predicted bytes with those of compiled programs.

  Args:
    config: Config of the run.
    workdir: Its folder.

  Returns:
    What `train.train` returns.
  """
  summarise, ended = train.summarise, []

  def keep_and_summarise(setup, phase, params, progress, draw):
    ended.extend((phase, draw))
    return summarise(setup, phase, params, progress, draw)

  with mock.patch.object(train, 'summarise', keep_and_summarise):
    summary = train.train(config, str(workdir))
  assert_predicted_bytes_are_compiled(summary, *ended, config.seed)
  return summary


def assert_predicted_bytes_are_compiled(summary, phase, draw, seed):
  """Compares bytes between workers, and those inside groups of devices."""
  programs, protocol = phase.trainer.programs, phase.protocol
  before = protocol.assign(seed, draw - 1)
  after = protocol.assign(seed, draw, before)
  moves = {name: (before[name], after[name]) for name in before}
  branches = accounting.branches(protocol, moves)
  predicted = summary['wire_bytes_last_round']
  assert predicted['protocol'] == phase.name
  sent = accounting.compiled_wire_bytes(programs, branches)
  assert predicted['predicted'] == sent
  assert (sent > 0) == (summary['num_devices'] > programs.group_size)
  inside = accounting.compiled_wire_bytes(programs, branches, inside=True)
  step = summary['group_bytes_per_step']['predicted']
  assert step * protocol.steps == inside
  assert (inside > 0) == (programs.group_size > 1)
