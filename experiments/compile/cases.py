"""What to compile: the programs of a run, and the networks that they train."""

from collections.abc import Iterator
import dataclasses
from typing import Any, NamedTuple

LARGEST = 22  # Blocks of the paper's chain: as many workers can share it.
CARD = -1  # The minimum depth that the card names.
FORMATS = ('float32', 'bfloat16', 'int8')
# What a run does with its programs.
FORMS = (
  'one_program',
  'host_stepped',
  'streamed',
  'exchange',
  'evaluation',
  'evaluation_by_blocks',
  'plain_flax',  # The step of one sub-network, as Flax users write it.
)


class Scale(NamedTuple):
  """How large the networks are.

  Attributes:
    card: The card that describes the run.
    changes: What differs from the card.
    images: How many training images lie on each device.
    gpt: The name of a scale of `experiments.language`.
  """

  card: str
  changes: dict[str, Any]
  images: int
  gpt: str


SCALES = {
  'smoke': Scale(
    'cifar100',
    {
      'local_steps': 2,
      'min_depth': 2,
      'batch_size': 8,
      'model.stage_sizes': (1, 1, 9, 1),
      'model.widths': (8, 8, 16, 16),
      'model.stem': 'strided',
    },
    256,
    'smoke',
  ),
  # The paper's widths, images and batches, with as few blocks as four workers
  # can share: the TPU compiler takes long for many.
  'short': Scale(
    'cifar100',
    {'model.stage_sizes': (1, 1, 5, 1), 'min_depth': 1},
    50_000,
    'cpu',
  ),
  'paper': Scale('cifar100', {}, 50_000, 'cpu'),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A part of a run.

  Attributes:
    form: One of `FORMS`.
    protocol: resist, local_sgd or data_parallel.
    num_workers: S.
    num_devices: D, or the number of groups.
    devices_per_worker: G.
    network: A name in `models.FAMILY`, or gpt.
    exchange: How blocks travel.
    wire_format: The format of the numbers that are sent.
    min_depth: Blocks that a worker runs at least, or `CARD`.
    dtype: Dtype of activations.
  """

  form: str
  protocol: str
  num_workers: int
  num_devices: int
  devices_per_worker: int = 1
  network: str = 'PreActResNet101'
  exchange: str = 'hand_over'
  wire_format: str = 'float32'
  min_depth: int = CARD
  dtype: str = 'bfloat16'

  @property
  def name(self) -> str:
    """A file name."""
    words = [self.form, self.network, self.protocol]
    words.append(f's{self.num_workers}d{self.num_devices}')
    if self.devices_per_worker > 1:
      words.append(f'g{self.devices_per_worker}')
    if self.protocol == 'resist' and self.form == 'exchange':
      words.append(self.exchange)
    if self.wire_format != 'float32':
      words.append(self.wire_format)
    if self.min_depth != CARD:
      words.append(f'depth{self.min_depth}')
    if self.dtype != 'bfloat16':
      words.append(self.dtype)
    return '_'.join(words)


def cases(count: int) -> Iterator[Case]:
  """Yields what is compiled for so many devices, the most asked for first.

  A program for TPUs takes all devices of its slices.

  Args:
    count: Number of devices.

  Yields:
    The cases.
  """
  if count > LARGEST:
    yield from _large(count)
    return
  D, depth = count, CARD if count <= 8 else 0
  yield Case('one_program', 'resist', D, D, min_depth=depth)
  yield from _exchanges(D, depth)
  yield Case('host_stepped', 'resist', D, D, min_depth=depth)
  yield Case('plain_flax', 'resist', D, D, min_depth=depth)
  yield Case('one_program', 'local_sgd', D, D)
  yield Case('one_program', 'data_parallel', D, D)
  for protocol in ('resist', 'local_sgd', 'data_parallel'):
    yield Case('one_program', protocol, D, D, network='gpt', dtype='float32')
  yield Case('evaluation', 'resist', D, D, min_depth=depth)
  yield Case('evaluation_by_blocks', 'resist', D, D, min_depth=depth)
  for G in (2, 4):
    if D % G == 0 and D > G:
      yield Case('one_program', 'resist', D // G, D // G, G)
  yield Case('streamed', 'resist', D, D, min_depth=depth)
  if 2 * D <= LARGEST:
    yield Case('one_program', 'resist', 2 * D, D, min_depth=0)
  yield Case('host_stepped', 'local_sgd', D, D)
  if D >= 8:  # The depth that the paper recommends, for any more workers, too.
    yield Case('host_stepped', 'resist', D, D, min_depth=5)
  for network in ('PreActResNet152', 'PreActResNet200'):
    yield Case('host_stepped', 'resist', D, D, network=network, min_depth=depth)


def _exchanges(D: int, depth: int) -> Iterator[Case]:
  for wire_format in FORMATS:
    for exchange in ('hand_over', 'masked_psum'):
      yield Case(
        'exchange', 'resist', D, D, exchange=exchange, wire_format=wire_format,
        min_depth=depth,
      )  # fmt: skip
    yield Case('exchange', 'local_sgd', D, D, wire_format=wire_format)


def _large(count: int) -> Iterator[Case]:
  """Yields 16 workers, each a group, and 22, who take turns on two groups."""
  for S, D in ((16, 16), (LARGEST, 2)):
    for form in ('exchange', 'one_program'):
      yield Case(form, 'resist', S, D, count // D, min_depth=0)
  for wire_format in ('bfloat16', 'int8'):
    yield Case(
      'exchange', 'resist', 16, 16, count // 16, wire_format=wire_format,
      min_depth=0,
    )  # fmt: skip
