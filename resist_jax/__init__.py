"""ResIST in JAX: layer-wise decomposition for distributed training.

A network with chains of identical blocks is cut at random into shallow
sub-networks. Each trains alone on its worker for some local steps; their
updates are aggregated; then new sub-networks are drawn.

Blocks of any network will do, stacked on the leading axis of their arrays:

>>> import jax, jax.numpy as jnp, optax
>>> import resist_jax as resist
>>> params = {'blocks': 0.1 * jax.random.normal(jax.random.key(0), (6, 8, 8))}
>>> def loss_fn(params, present, batch, key):
...   x = batch
...   for w, here in zip(params['blocks'], present['blocks']):
...     x = x + here * jnp.tanh(x @ w)  # A block that is absent adds nothing.
...   return jnp.square(x).mean(), {}
>>> trainer = resist.Trainer(
...   loss_fn, optax.sgd(0.1), chains=('blocks',), num_workers=2,
...   local_steps=4)
>>> state = trainer.init(params)
>>> for _ in range(3):
...   state, metrics = trainer.round(state, jnp.ones((2, 4, 16, 8)))
>>> trainer.params(state)['blocks'].shape, metrics['loss'].shape
((6, 8, 8), (2,))

`python -m resist_jax --workdir=DIR` trains residual networks on images from a
config. The packages: `decomposition` (what is cut and who holds what),
`exchange` (how parts travel), `rounds` (local training and exchange on a mesh),
`Trainer`, `models`, `data`, `accounting` (bytes, memory, FLOPs), `report`, and
`run` (a training from a config).

C. Dun, C. R. Wolfe, C. M. Jermaine, A. Kyrillidis. ResIST: Layer-Wise
Decomposition of ResNets for Distributed Training. UAI 2022. arXiv 2107.00961.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from resist_jax import accounting, decomposition, exchange, rounds
  from resist_jax.errors import ConfigError
  from resist_jax.rounds import State, make_mesh
  from resist_jax.trainer import Trainer

__version__ = '0.1.0'

__all__ = [
  'ConfigError',
  'State',
  'Trainer',
  'accounting',
  'decomposition',
  'exchange',
  'make_mesh',
  'rounds',
]

# Imported when they are used: the command line answers without JAX.
_HOMES = {
  'ConfigError': 'errors',
  'State': 'rounds',
  'Trainer': 'trainer',
  'make_mesh': 'rounds',
}
_ROOMS = 'data', 'models', 'report', 'run'


def __getattr__(name: str) -> Any:
  if name in _HOMES:
    return getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
  if name in (*__all__, *_ROOMS):
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
