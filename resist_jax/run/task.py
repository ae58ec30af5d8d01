"""What a run learns: a network, its loss, its test, and what is kept of it.

`resnet_task` is the task of the ResNets, `module_task` that of a network from
a module of somebody else's.
"""

from collections.abc import Mapping
import pathlib
from typing import Any, NamedTuple, Protocol

from jax.sharding import Mesh
import ml_collections
import optax

from resist_jax import data
from resist_jax.rounds import LossFn, State

PyTree = Any
Dataset = data.Dataset | data.Tables


class Evaluation(NamedTuple):
  """A test of the global network.

  Attributes:
    measures: What the test found, by names that begin with that of the set. For
      images, shares of 1: for each set, `NAME_accuracy` with recalibrated fixed
      statistics and `NAME_accuracy_paper` with those of each batch.
    broken: By the same names, how many examples have an output that is not
      finite; no entry where none has.
    wire_bytes: What all devices together sent for it.
  """

  measures: dict[str, float]
  broken: dict[str, int]
  wire_bytes: int


class Test(Protocol):
  """Tests the global network."""

  def __call__(self, state: State) -> Evaluation:
    """Tests what workers hold, on all sets."""
    ...


class Task(Protocol):
  """What a run learns.

  Attributes:
    dataset: The examples.
    cuts: The chains that ResIST cuts: for each, the blocks that a worker runs
      at least; see `decomposition.slots_per_worker`.
    metrics: What the loss reports beside itself.
    measures: What a test of a set measures, without the name of the set.
    has_momenta: Whether all moments of the optimiser are sums of gradients,
      which are smaller where parameters are larger.
  """

  @property
  def dataset(self) -> Dataset:
    """See above."""
    ...

  @property
  def cuts(self) -> Mapping[str, int | None]:
    """See above."""
    ...

  @property
  def metrics(self) -> tuple[str, ...]:
    """See above."""
    ...

  @property
  def measures(self) -> tuple[str, ...]:
    """See above."""
    ...

  @property
  def has_momenta(self) -> bool:
    """See above."""
    ...

  def init(self, seed: int) -> PyTree:
    """Draws the initial parameters of the global network.

    Args:
      seed: Seed of the run.

    Returns:
      Pytree of arrays; its chains stack their blocks, `[L, ...]`.
    """
    ...

  def shapes(self) -> PyTree:
    """Returns what `init` returns, as `jax.ShapeDtypeStruct`s."""
    ...

  def make_loss(
    self, scale: Mapping[str, float], axis_name: str | None
  ) -> LossFn:
    """Returns the loss of a sub-network, or of the whole, on a batch.

    Args:
      scale: For each chain that ResIST cuts, the factor on its residual
        branches in training.
      axis_name: The mesh axis over which a worker's batch is spread, if it is.

    Returns:
      A `LossFn`; its constants are all examples, unless they are streamed.
    """
    ...

  def make_optimizer(
    self, schedule: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns what turns gradients into updates.

    Args:
      schedule: The learning rate, by the step of a worker.

    Returns:
      An optax transformation; it applies the rate and the sign, too.
    """
    ...

  def make_test(
    self,
    scales: Mapping[str, Any],
    mesh: Mesh,
    options: ml_collections.ConfigDict,
  ) -> Test:
    """Returns what tests the global network.

    Args:
      scales: Residual scale of each chain that ResIST cuts, `float32[L]`.
      mesh: Where the workers live.
      options: The section `evaluation` of the config.

    Returns:
      A `Test`: a function of the state.
    """
    ...

  def rescale(self, params: PyTree, factors: Mapping[str, float]) -> PyTree:
    """Multiplies the residual branches of chains by constant factors.

    Args:
      params: Global parameters, or a moment of them.
      factors: The factor of each chain to scale, by name.

    Returns:
      The parameters, scaled.
    """
    ...

  def save(
    self,
    workdir: pathlib.Path,
    state: State,
    params: PyTree,
    scales: Mapping[str, Any],
    test: Any,
  ) -> None:
    """Writes the trained network into the folder `model` of its run.

    Args:
      workdir: Workdir of the run.
      state: What the workers hold.
      params: Global parameters, which the state holds too.
      scales: See `make_test`.
      test: What `make_test` returned.
    """
    ...

  def flops(self, lengths: Mapping[str, int]) -> float | None:
    """Predicts the operations of training on one example; None: unknown.

    Args:
      lengths: Blocks that a worker runs, of each chain that is cut.

    Returns:
      Floating-point operations, a multiply-add counted as two.
    """
    ...

  def statistics(self, lengths: Mapping[str, int]) -> int:
    """Counts what devices of a worker average in a step inside the network.

    Args:
      lengths: See `flops`.

    Returns:
      How many numbers, those of the backward pass included.
    """
    ...
