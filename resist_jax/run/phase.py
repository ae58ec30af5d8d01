"""Rounds of one protocol, and what they send."""

from collections.abc import Mapping
import dataclasses

from resist_jax import accounting, rounds
from resist_jax.decomposition.assignments import Assignment
from resist_jax.rounds import state as state_lib


@dataclasses.dataclass(frozen=True)
class Phase:
  """Rounds of one protocol: a resist run may begin and end with local SGD.

  Attributes:
    name: The protocol.
    protocol: What it means for rounds.
    run: The compiled round.
    sizes: Parameter counts, as the protocol cuts the network.
    num_devices: D, or groups of them.
    devices_per_worker: G.
  """

  name: str
  protocol: state_lib.Protocol
  run: rounds.Round
  sizes: accounting.Sizes
  num_devices: int
  devices_per_worker: int

  @property
  def bytes_per_round(self) -> int:
    """By the paper's count."""
    return accounting.paper_bytes(self.sizes, self.protocol)

  def wire_bytes(
    self, before: Mapping[str, Assignment], after: Mapping[str, Assignment]
  ) -> int:
    """Predicts what a round sends from device to device.

    Args:
      before: The deal of each chain in the round.
      after: The deals after it.

    Returns:
      Bytes, of all devices together.
    """
    deals = {name: (before[name], after[name]) for name in before}
    D, G = self.num_devices, self.devices_per_worker
    return round(accounting.wire_bytes(self.sizes, self.protocol, D, deals, G))
