"""Bad arguments of the library: a `ValueError` must name each of them."""

from collections.abc import Callable
from functools import partial
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resist_jax import Trainer, data, decomposition, exchange
from resist_jax.models import ResNet
from resist_jax.run import export

S, T, B, WIDTH, LENGTH = 2, 2, 3, 4, 4
# A call that must fail: its group, what is bad, the call, what must be said.
Call = tuple[str, str, Callable[[], Any], str]


def loss_fn(params, present, batch, key):
  """The loss of a residual perceptron."""
  del key
  x = batch
  for w, p in zip(params['blocks']['w'], present['blocks'], strict=True):
    x = x + p * jnp.tanh(x @ w)
  return jnp.square(x @ params['out']).mean(), {}


def parameters() -> dict[str, Any]:
  """Returns the parameters of a small network."""
  rng = np.random.default_rng(0)
  blocks = rng.normal(size=(LENGTH, WIDTH, WIDTH)).astype(np.float32)
  return {'blocks': {'w': blocks}, 'out': np.ones(WIDTH, np.float32)}


def batch() -> np.ndarray:
  """Returns the batches of a round, `float32[S, T, B, WIDTH]`."""
  rng = np.random.default_rng(1)
  return rng.normal(size=(S, T, B, WIDTH)).astype(np.float32)


def trainer(**fields: Any) -> Trainer:
  """Returns a trainer of that network.

  Args:
    fields: Fields that are other than usual.
  """
  usual: dict[str, Any] = {
    'loss_fn': loss_fn,
    'optimizer': optax.sgd(0.1),
    'chains': ('blocks',),
    'num_workers': S,
    'local_steps': T,
  }
  return Trainer(**{**usual, **fields})


# Fields of a Trainer; a pair of a value and what must be said.
FIELDS: tuple[tuple[str, Any, str], ...] = (
  ('loss_fn', None, 'loss_fn'),
  ('optimizer', 'sgd', 'optimizer'),
  ('optimizer', None, 'optimizer'),
  ('chains', 'blocks', 'chains'),
  ('chains', ('blocks', 'blocks'), 'chains'),
  ('chains', ('block',), 'block'),
  ('chains', 3, 'chains'),
  ('num_workers', 0, 'num_workers'),
  ('num_workers', 2.0, 'num_workers'),
  ('num_workers', '2', 'num_workers'),
  ('num_workers', 5, '5 workers'),
  ('local_steps', 0, 'local_steps'),
  ('local_steps', None, 'local_steps'),
  ('exchange', 'hand_over', 'exchange'),
  ('exchange', exchange.hand_over, 'exchange'),
  ('mesh', 'cpu', 'mesh'),
  ('seed', -1, 'seed'),
  ('seed', 0.5, 'seed'),
  ('min_depth', 9, 'blocks'),
  ('min_depth', -1, 'min_depth'),
  ('min_depth', 'all', 'min_depth'),
  ('depths', (1,), 'depths'),
  ('depths', (1, 1), 'depths|blocks'),
  ('depths', (9, 9), 'depths|blocks'),
  ('depths', 2, 'depths'),
  ('depths', ('two', 'two'), 'depths'),
  ('average_gradients', True, 'average_gradients'),
  ('loss_factor', 0.5, 'loss_factor'),
  ('loss_factor', 'none', 'loss_factor'),
  ('update_factor', float('nan'), 'update_factor'),
  ('update_factor', -3, 'update_factor'),
)


def _other_loss(returned: Any) -> Callable[..., Any]:
  def other(params, present, batch, key):
    loss, _ = loss_fn(params, present, batch, key)
    return returned(loss)

  return other


LOSSES: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
  ('a loss without metrics', lambda loss: loss, 'loss_fn'),
  ('a loss that is a vector', lambda loss: (loss[None], {}), 'loss'),
  ('metrics that are a list', lambda loss: (loss, [loss]), 'metrics'),
  ('a metric that is a vector', lambda loss: (loss, {'a': loss[None]}), 'a'),
  ('a metric called loss', lambda loss: (loss, {'loss': loss}), 'loss'),
)
PARAMS: tuple[tuple[str, Callable[[dict], Any], str], ...] = (
  ('a list', lambda p: [p], 'params'),
  ('None', lambda p: None, 'params'),
  ('without the chain', lambda p: {'out': p['out']}, 'blocks'),
  ('whole numbers', lambda p: {**p, 'out': np.ones(4, int)}, 'out'),
  ('a chain of unequal leaves',
   lambda p: {**p, 'blocks': {'w': p['blocks']['w'], 'b': p['out'][:3]}},
   'blocks'),
  ('a chain that is a number', lambda p: {**p, 'blocks': np.float32(1)},
   'blocks'),
  ('an empty chain', lambda p: {**p, 'blocks': {}}, 'blocks'),
)  # fmt: skip
BATCHES: tuple[tuple[str, Callable[[], Any], str], ...] = (
  ('without the axis T', lambda: batch()[:, 0, 0], 'batch'),
  ('for three workers', lambda: np.ones((3, T, B, WIDTH), 'f'), 'batch'),
  ('for three steps', lambda: np.ones((S, 3, B, WIDTH), 'f'), 'batch'),
  ('None', lambda: None, 'batch'),
  ('a number', lambda: 1.0, 'batch'),
  ('an iterator of one', lambda: iter([batch()[:, 0]]), 'batch'),
  ('an empty iterator', lambda: iter([]), 'batch'),
)


def _train(batches: Any, **fields: Any) -> Any:
  made = trainer(**fields)
  return made.round(made.init(parameters()), batches)


def _with_state(change: Callable[[Any], Any]) -> Any:
  made = trainer()
  state = made.init(parameters())
  return made.round(change(state), batch())


def _consumed() -> Any:
  made = trainer()
  state = made.init(parameters())
  made.round(state, batch())
  return made.round(state, batch())


def predictor() -> export.Predictor:
  """Returns a small network to deploy, not trained."""
  network = ResNet(num_classes=3, stage_sizes=(1, 2), widths=(2, 2))
  shape = (4, 4, 1)
  variables = network.init(jax.random.key(0), jnp.zeros((1, *shape)))
  one = np.ones(1, np.float32)
  names = ('a', 'b', 'c')
  return export.Predictor(network, dict(variables), {}, one, one, names, shape)


IMAGES: tuple[tuple[str, Any], ...] = (
  ('a single one', np.zeros((4, 4, 1), np.uint8)),
  ('without channels', np.zeros((1, 4, 4), np.uint8)),
  ('of another size', np.zeros((1, 8, 8, 1), np.uint8)),
  ('fractions', np.zeros((1, 4, 4, 1), np.float32)),
  ('negative', np.full((1, 4, 4, 1), -1)),
  ('too large', np.full((1, 4, 4, 1), 256)),
  ('of unequal sizes', [np.zeros((4, 4, 1)), np.zeros((3, 4, 1))]),
  ('None', None),
  ('text', 'image.png'),
)


def calls(folder: pathlib.Path) -> list[Call]:
  """Returns calls that must fail.

  Args:
    folder: Where they find what they read.
  """
  (folder / 'model').mkdir(parents=True)
  (folder / 'file').touch()
  read: list[Call] = [
    ('export', what, partial(export.load, folder / name), says)
    for what, name, says in (
      ('no workdir', 'none', 'does not exist'),
      ('an empty model', '.', 'manifest.json is missing'),
      ('a file', 'file', 'does not exist'),
    )
  ]
  read += [
    ('Trainer.restore', what, partial(trainer().restore, folder / name), says)
    for what, name, says in (
      ('no folder', 'none', 'holds no state'),
      ('an empty folder', '.', 'holds no state'),
      ('a file', 'file', 'holds no state'),
    )
  ]
  predict = predictor()
  slots = partial(decomposition.sample_slots, jax.random.key(0))
  pure: list[Call] = [
    ('decomposition', 'no blocks', partial(slots, 0, 2), 'num_blocks|blocks'),
    ('decomposition', 'no workers', partial(slots, 4, 0), 'num_workers'),
    ('decomposition', 'too deep', partial(slots, 4, 2, 5), 'min_depth|blocks'),
    ('exchange', 'a format', partial(exchange.hand_over, 'int4'), 'int4'),
    ('exchange', 'a format', partial(exchange.masked_psum, 'fp8'), 'fp8'),
    ('data', 'a name', partial(data.load, ''), 'data set'),
  ]
  return [
    *(('Trainer', f'{name}={value!r}'[:60], partial(_train, batch(),
       **{name: value}), says) for name, value, says in FIELDS),
    *(('Trainer', what, partial(_train, batch(), loss_fn=_other_loss(f)), says)
      for what, f, says in LOSSES),
    *(('Trainer.init', what, lambda f=f: trainer().init(f(parameters())), says)
      for what, f, says in PARAMS),
    *(('Trainer.round', what, lambda f=f: _train(f()), says)
      for what, f, says in BATCHES),
    ('Trainer.round', 'a state used twice', _consumed, 'state'),
    ('Trainer.round', 'parameters as a state',
     lambda: _with_state(lambda state: parameters()), 'state'),
    ('Trainer.round', 'the state of another trainer',
     lambda: trainer(num_workers=1).round(
       trainer().init(parameters()), batch()), 'num_workers'),
    *(('Predictor', what, partial(predict, images), 'images')
      for what, images in IMAGES),
    *read,
    *pure,
  ]  # fmt: skip
