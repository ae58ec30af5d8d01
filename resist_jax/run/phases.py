"""Phases, rounds of one protocol: a run may begin and end with another one.

A phase trains by a `Trainer`, made from the config of the run.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from resist_jax import accounting
from resist_jax.decomposition import Assignment
from resist_jax.exchange import DATA
from resist_jax.rounds import Protocol, mesh_sizes
from resist_jax.rounds.moments import take_apart
from resist_jax.run import optimizer
from resist_jax.run.averaged import AveragedTest
from resist_jax.run.config import make_exchange
from resist_jax.run.setup import Setup
from resist_jax.run.task import Test
from resist_jax.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What rounds of a protocol send.

  Attributes:
    protocol: Who holds what.
    sizes: Parameter counts, as the protocol cuts the network.
    mesh: Where the workers live.
    moments: Sizes of each moment of the optimiser, where they are carried; None
      for one moment of the parameters' size.
  """

  protocol: Protocol
  sizes: accounting.Sizes
  mesh: Mesh
  moments: Sequence[accounting.Sizes] | None

  @property
  def bytes_per_round(self) -> int:
    """Bytes of a round by the paper's count."""
    return accounting.paper_bytes(self.sizes, self.protocol, self.moments)

  def wire_bytes(
    self,
    before: Mapping[str, Assignment] | None = None,
    after: Mapping[str, Assignment] | None = None,
  ) -> int:
    """Predicts what a round sends from device to device.

    Args:
      before: The assignment of each chain in the round, on the host.
      after: The assignments after it; without both, the mean of all.

    Returns:
      Bytes that all devices together send.
    """
    moves = None
    if before is not None and after is not None:
      moves = {name: (before[name], after[name]) for name in before}
    D, G = mesh_sizes(self.mesh)
    return round(
      accounting.wire_bytes(
        self.sizes, self.protocol, D, moves, G, self.moments
      )
    )


@dataclasses.dataclass(frozen=True)
class Phase(Traffic):
  """Rounds of one protocol.

  Attributes:
    name: Name of the protocol.
    trainer: What trains.
  """

  name: str
  trainer: Trainer

  def at_once(self, count: int) -> 'Phase':
    """Returns the same with so many rounds as one; see `Trainer.at_once`."""
    return dataclasses.replace(
      self,
      protocol=self.protocol.lasting(count),
      trainer=self.trainer.at_once(count),
    )


def name_at(config: ml_collections.ConfigDict, round_index: int) -> str:
  """Returns the protocol of a round.

  Args:
    config: Config of the run.
    round_index: The round; past the last one, that of the last.
  """
  round_index = min(round_index, config.num_rounds - 1)
  before = round_index < config.phases.full_before
  after = round_index >= config.num_rounds - config.phases.full_after
  return config.phases.protocol if before or after else config.protocol


def typical_name(config: ml_collections.ConfigDict) -> str:
  """Returns the protocol of the rounds between full-model phases, if any."""
  last = config.num_rounds - 1 - config.phases.full_after
  return name_at(config, max(config.phases.full_before, last))


def make_phase(setup: Setup, name: str) -> Phase:
  """Builds the rounds of a protocol; nothing is compiled yet.

  Args:
    setup: Setup of the run.
    name: resist, local_sgd or data_parallel.

  Returns:
    The phase.
  """
  config, cuts = setup.config, name == 'resist'
  _, G = mesh_sizes(setup.mesh)
  scale, axis = training_scale(setup, name), DATA if G > 1 else None
  trainer = Trainer(
    setup.task.make_loss(scale, axis),
    setup.task.make_optimizer(setup.schedule),
    chains=tuple(setup.chains) if cuts else (),
    mesh=setup.mesh,
    seed=config.seed,
    constants=setup.constants,
    on_device=not setup.on_cpu,
    **_protocol_fields(setup, name),
  )
  found = describe(setup, name)
  return Phase(
    found.protocol, found.sizes, found.mesh, found.moments, name, trainer
  )


def describe(setup: Setup, name: str) -> Traffic:
  """Returns what rounds of a protocol would send in this run."""
  total = setup.sizes.total
  sizes = accounting.Sizes(total, total, {}, {})
  if name == 'resist':
    sizes = setup.sizes
  protocol = protocol_named(setup, name)
  moments = None
  if setup.config.model.module:  # It may have any optimiser.
    moments = _moments(setup, list(protocol.num_blocks))
  return Traffic(protocol, sizes, setup.mesh, moments)


def _moments(
  setup: Setup, chains: Sequence[str]
) -> list[accounting.Sizes] | None:
  """Counts the numbers of each moment of the optimiser; None if unknown."""
  rate = optax.constant_schedule(setup.config.lr)  # It changes no shape.
  made = setup.task.make_optimizer(rate)
  state = jax.eval_shape(made.init, setup.task.shapes())
  moments = take_apart(made, state).moments
  try:
    return [accounting.measure(moment, chains) for moment in moments]
  except KeyError:  # All around a chain is masked, which `carry` refuses.
    return None


def _protocol_fields(setup: Setup, name: str) -> dict:
  """Returns what a protocol's name means for this config."""
  config, parallel = setup.config, name == 'data_parallel'
  return {
    'num_workers': config.num_workers,
    'local_steps': config.local_steps,
    'exchange': make_exchange(config),
    'min_depth': setup.task.cuts,
    'depths': setup.depths if name == 'resist' else (),
    'average_gradients': parallel,
    'carry': config.optimizer.carry_momentum or parallel,
    'exclude_faulty': config.faults.leave_out,
    'loss_factor': config.faults.loss_factor,
    'update_factor': config.faults.update_factor,
    'outer': optimizer.make_outer(**config.outer),
    'average': config.average.decay,
    'shared_every': config.shared_every if name == 'resist' else 0,
    'give_agreed': config.distillation.weight > 0,
  }


def protocol_named(setup: Setup, name: str) -> Protocol:
  """Returns what a protocol means for rounds of this run."""
  num_blocks = setup.chains if name == 'resist' else {}
  return Protocol(num_blocks=num_blocks, **_protocol_fields(setup, name))


def global_scale(setup: Setup) -> dict[str, float]:
  """Returns the residual scale of the global network's cut chains."""
  scaled = setup.config.residual_scale == 'evaluation'
  return {
    chain: _share(setup, chain) if scaled else 1.0 for chain in setup.chains
  }


def _share(setup: Setup, chain: str) -> float:
  return accounting.expected_share(protocol_named(setup, 'resist'), chain)


def training_scale(setup: Setup, name: str) -> dict[str, float]:
  """Returns the factor on residual branches of cut chains in training.

  The global network must mean the same in all phases. Scaled at evaluation,
  sub-networks train at 1 and full models at the share (as the paper's warm-up
  does); scaled in training, sub-networks train at 1 / share.

  Args:
    setup: Setup of the run.
    name: Protocol of the phase.

  Returns:
    The factor for each chain.
  """
  where = setup.config.residual_scale
  scale = {}
  for chain in setup.chains:
    share = _share(setup, chain)
    if where == 'evaluation' and name != 'resist':
      scale[chain] = share
    elif where == 'training' and name == 'resist':
      scale[chain] = 1 / share
    else:
      scale[chain] = 1.0
  return scale


def make_test(setup: Setup) -> Test:
  """Returns what tests the global network, at its residual scale."""
  options = setup.config.evaluation
  test = setup.task.make_test(global_scales(setup), setup.mesh, options)
  return AveragedTest(test) if setup.config.average.decay else test


def global_scales(setup: Setup) -> dict[str, np.ndarray]:
  """Returns `global_scale` for each block, `float32[L]` by chain."""
  return {
    name: np.full(setup.chains[name], scale, np.float32)
    for name, scale in global_scale(setup).items()
  }
