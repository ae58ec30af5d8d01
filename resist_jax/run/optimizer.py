"""The optimiser of local training, and its learning rate over the whole run."""

from collections.abc import Sequence
from functools import partial
import math
import re

import jax
import jax.numpy as jnp
import ml_collections
import optax

from resist_jax.errors import FOREIGN, ConfigError, one_line
from resist_jax.run import cards

_NORM_BIAS = re.compile(r'norm\w*/bias$', re.IGNORECASE)


def make_optimizer(
  schedule: optax.Schedule,
  momentum: float,
  weight_decay: float,
  nesterov: bool = False,
  bias_rate: float = 1.0,
) -> optax.GradientTransformation:
  """Returns SGD with momentum and weight decay.

  As in the paper's PyTorch code, weight decay is added to the gradient of every
  parameter, before momentum.

  Args:
    schedule: Learning rate at a step of the whole run.
    momentum: Decay of the momentum; the paper's is 0.9.
    weight_decay: The paper's is 5e-4.
    nesterov: Whether to use Nesterov momentum, as in PyTorch (Sutskever et al.
      2013); the paper uses plain momentum.
    bias_rate: Factor on the gradients of norm biases, that is, their learning
      rate relative to that of the others.

  Returns:
    A complete optax transformation.
  """
  steps = [
    optax.add_decayed_weights(weight_decay, mask=_trained),
    optax.trace(decay=momentum, nesterov=nesterov),
    optax.scale_by_learning_rate(schedule),
  ]
  if bias_rate != 1:
    # Before the decay, which stays what it is.
    steps.insert(0, optax.stateless(partial(_scale_biases, bias_rate)))
  return optax.chain(*steps)


def _scale_biases(rate: float, grads, params):
  """Multiplies the gradients of the biases of norms."""
  del params
  if not any(map(_is_norm_bias, dict(jax.tree.leaves_with_path(grads)))):
    raise ConfigError(
      f'optimizer.bias_rate is {rate}, but the network has no norm bias, that '
      'is, no `bias` in a layer with `norm` in its name: set it to 1.'
    )
  return jax.tree.map_with_path(
    lambda path, g: g * rate if _is_norm_bias(path) else g, grads
  )


def _is_norm_bias(path) -> bool:
  return bool(_NORM_BIAS.search(_name(path)))


def _trained(params):
  """Marks the parameters that are trained: all but fixed filters."""
  return jax.tree.map_with_path(
    lambda path, _: _name(path) != 'stem/whitening', params
  )


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def described(
  section: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Returns the optimiser that a config describes.

  Args:
    section: The section `optimizer` of a config.
    schedule: Learning rate at a step of the whole run.
  """
  return make_optimizer(
    schedule,
    section.momentum,
    section.weight_decay,
    section.nesterov,
    section.bias_rate,
  )


def make_outer(
  lr: float, momentum: float, nesterov: bool
) -> optax.GradientTransformation | None:
  """Returns what takes the negative mean change; see `Trainer.outer`.

  Args:
    lr: Its rate; 0 for none, so that a round ends with the mean itself.
    momentum: Decay of its momentum; 0 keeps none.
    nesterov: Whether that is Nesterov's.
  """
  return optax.sgd(lr, momentum or None, nesterov) if lr else None


# One cycle rises for this share of the run, from this fraction of its peak.
_RISE, _START = 0.3, 25
SCHEDULES = ('step', 'cosine', 'linear', 'one_cycle', 'constant')


def make_schedule(
  name: str,
  lr: float,
  num_steps: int,
  warmup_steps: int = 0,
  drops: Sequence[float] = (0.5, 0.75),
) -> optax.Schedule:
  """Returns the learning rate as a function of the step in the whole run.

  Args:
    name: `step` divides by 10 at each of `drops`; `cosine` and `linear` fall to
      zero; `one_cycle` rises from `lr` / 25 over three tenths of the run, then
      falls to zero, both along a cosine; `constant` stays.
    lr: The peak rate.
    num_steps: Local steps of one worker in the whole run.
    warmup_steps: Steps of a linear rise from zero at the start.
    drops: Shares of the run; the default is the paper's CIFAR setting.

  Returns:
    A function from a step number to a `float32` rate.

  Raises:
    ValueError: If the name is unknown.

  >>> rate = make_schedule('step', lr=1.0, num_steps=100)
  >>> [round(float(rate(step)), 3) for step in (0, 49, 50, 75)]
  [1.0, 1.0, 0.1, 0.01]
  """
  steps = max(num_steps, 1)
  if name == 'step':
    at: dict[int, float] = {}
    for share in drops:  # Several may fall on one step.
      step = max(int(share * num_steps), 1)
      at[step] = 0.1 * at.get(step, 1.0)
    schedule = optax.piecewise_constant_schedule(lr, at)
  elif name == 'cosine':
    schedule = optax.cosine_decay_schedule(lr, steps)
  elif name == 'linear':
    schedule = optax.linear_schedule(lr, 0.0, steps)
  elif name == 'one_cycle':
    schedule = _one_cycle(lr, steps)
  elif name == 'constant':
    schedule = optax.constant_schedule(lr)
  else:
    raise ValueError(
      f'unknown learning rate schedule {name!r}: use one of '
      f'{", ".join(SCHEDULES)}.'
    )
  return with_warmup(schedule, warmup_steps)


def _one_cycle(lr: float, steps: int) -> optax.Schedule:
  """Returns a rise and a fall; that of optax needs implicit promotion."""
  rise, start = _RISE * steps, lr / _START

  def rate(step):
    up = (1 - jnp.cos(jnp.pi * step / rise)) / 2
    done = jnp.minimum((step - rise) / (steps - rise), 1)
    down = (1 + jnp.cos(jnp.pi * done)) / 2
    return jnp.where(step < rise, start + (lr - start) * up, lr * down)

  return rate


def with_warmup(schedule: optax.Schedule, warmup_steps: int) -> optax.Schedule:
  """Returns a schedule that rises linearly at the start.

  Args:
    schedule: A function from a step number to a rate.
    warmup_steps: Steps of the rise from zero, by which rates are multiplied.

  Returns:
    A function from a step number to a `float32` rate.
  """
  warmup = optax.linear_schedule(0.0, 1.0, max(warmup_steps, 1))

  def rate(step: jax.typing.ArrayLike) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    rise = warmup(step + 1) if warmup_steps else 1.0
    return jnp.asarray(schedule(step) * rise, jnp.float32)

  return rate


def schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
  """Returns the learning rate at a step of the whole run.

  Args:
    config: Config of the run, whose schedule may be a function of a card.

  Raises:
    ConfigError: If that function fails.
  """
  name, steps = (
    config.optimizer.schedule,
    config.num_rounds * config.local_steps,
  )
  warmup = config.optimizer.warmup_rounds * config.local_steps
  if ':' not in name:
    drops = config.optimizer.drops
    return make_schedule(name, config.lr, steps, warmup, drops)
  try:
    given = cards.function(name)(config.copy_and_resolve_references(), steps)
    rate = with_warmup(given, warmup)
    rates = [float(jax.jit(rate)(step)) for step in (0, steps - 1)]
  except FOREIGN as error:  # A card is a program: it can raise anything.
    raise ConfigError(
      f'optimizer.schedule {name} cannot be used ({one_line(error)}): it takes '
      'the config and the number of steps, and returns a function from a step '
      'to a rate, made of jax.numpy or optax.'
    ) from error
  if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
    raise ConfigError(
      f'optimizer.schedule {name} gives the rates {rates} at the first and the '
      'last step: they must be finite and not negative.'
    )
  return rate
