"""Reads the bytes that a compiled SPMD program sends from its HLO text.

`compiled.as_text()` shows which collectives XLA kept, on which types, in which
loops. Their bytes are counted as those of ring algorithms, summed over all
devices.

Where TPUs form several slices, the text is the program of one slice, which all
of them run. It sends to the others through hosts; the attributes of such a
`send` say which devices take part. An all-reduce over slices has become one
inside each slice, one between them of padded shards, and an all-gather.

The names of scopes are metadata, which the key of JAX's persistent compilation
cache leaves out by default. A program that differs from a cached one only in
its scopes then comes back with the cached names, unless
`jax_compilation_cache_include_metadata_in_key` is set.
"""

import collections
from collections.abc import Iterable, Mapping
import math
import re
from typing import NamedTuple

import numpy as np

# How often a ring of g devices sends one operand, in units of g - 1. An
# all-gather, whose operand is a shard, sends it g times as often.
_RING_PASSES = {
  'all-gather': 1,
  'all-reduce': 2,
  'all-to-all': 1,
  'collective-broadcast': 1,
  'reduce-scatter': 1,
}
# The text does not say how much these send, or between which devices, unless a
# `send` is to another slice.
_UNCOUNTED = ('ragged-all-to-all', 'send')
_KINDS = ('collective-permute', *_RING_PASSES, *_UNCOUNTED)
# Other instructions call computations that never communicate.
_CALLERS = ('async', 'call', 'custom-call', 'fusion')
_CALLED = (
  *('calls', 'to_apply', 'called_computations', 'condition', 'body'),
  *('branch_computations', 'true_computation', 'false_computation'),
)
# The counter of a loop and its test consist of these.
_COUNTER_OPS = ('add', 'call', 'compare', 'copy', 'fusion', 'get-tuple-element')

_ARRAY = re.compile(r'\b([a-z]\w*)\[([^\]]*)\]')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) .*\{$')
_INSTRUCTION = re.compile(
  r'\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)'
)
_NAME = re.compile(r'%([\w.\-]+)')
# What a send to other slices belongs to, and between which devices: pairs, all
# devices of a group, or devices at the same places of slices. The number of a
# device is that of its slice times 100,000, plus its place in it.
_TO_SLICES = re.compile(
  r'_xla_megascale_target="?(\S+?)"?,_xla_megascale_transfer_type="(\w+)"'
)
_SLICE = 100_000
_SAME_PLACES = re.compile(r'\{([\d,]+)\}x\{(\d+):(\d+)\}')


class Collective(NamedTuple):
  """An instruction that moves data between devices.

  Attributes:
    kind: Its opcode, in the synchronous form.
    dtype: HLO's name of the element type, or several with commas.
    bytes: Size of the operands on one device.
    op_name: JAX's name stack and primitive, such as `jit(f)/shard_map/psum`.
  """

  kind: str
  dtype: str
  bytes: int
  op_name: str


class Instruction(NamedTuple):
  """A line of a computation.

  Attributes:
    name: Its name in the text.
    is_root: Whether it is the computation's result.
    type: Type of its result: an array, or a tuple in parentheses.
    opcode: What it does.
    argument: The text between its parentheses.
    operands: The instructions whose results it takes.
    attributes: The text after them.
  """

  name: str
  is_root: bool
  type: str
  opcode: str
  argument: str
  operands: tuple['Instruction', ...]
  attributes: str

  @property
  def kind(self) -> str:
    """Its opcode; the start of an asynchronous pair describes the pair."""
    return self.opcode.removesuffix('-start')

  @property
  def op_name(self) -> str:
    """JAX's name stack and primitive."""
    found = re.search(r'\bop_name="([^"]*)"', self.attributes)
    return found[1] if found else ''

  @property
  def operand_bytes(self) -> int:
    """Bytes of all its operands."""
    return sum(size(operand.type) for operand in self.operands)

  def called(self, *attributes: str) -> list[str]:
    """Returns the computations that these attributes name, in their order."""
    pattern = rf'\b(?:{"|".join(attributes)})=(\{{[^}}]*\}}|%[\w.\-]+)'
    found = re.findall(pattern, self.attributes)
    return [name for value in found for name in _NAME.findall(value)]


class Program(NamedTuple):
  """A parsed program, and what to count in it.

  Attributes:
    computations: Instructions by the name of their computation.
    entry: Name of the computation with which the program begins.
    num_devices: How many devices run it.
    branches: See `wire_bytes`.
    group_size: See `wire_bytes`.
    inside: Whether to count what devices of one group send each other.
    num_slices: How many TPU slices the devices are in.
  """

  computations: dict[str, list[Instruction]]
  entry: str
  num_devices: int
  branches: Mapping[str, int]
  group_size: int = 1
  inside: bool = False
  num_slices: int = 1

  def counts(self, devices: Iterable[int]) -> bool:
    """Returns whether to count what these devices send to each other."""
    groups = {device // self.group_size for device in devices}
    return (len(groups) == 1) == self.inside

  def root(self, computation: str) -> Instruction:
    """Returns the instruction whose result is the computation's."""
    return next(i for i in self.computations[computation] if i.is_root)


def wire_bytes(
  text: str,
  branches: Mapping[str, int],
  group_size: int = 1,
  inside: bool = False,
) -> int:
  """Counts the bytes that all devices together send in one execution.

  Args:
    text: HLO of a compiled SPMD program.
    branches: For each `jax.named_scope` around a `lax.switch`, the index of the
      branch taken, clamped as `lax.switch` does. Other scopes are ignored; a
      switch whose branches send equally much needs no entry.
    group_size: How many neighbouring devices form a group; bytes inside a group
      are not counted.
    inside: Count only the bytes inside groups instead.

  Returns:
    The bytes; a device that sends to itself sends none.

  Raises:
    ValueError: If the number of a loop's iterations or the branch of a
      conditional matters and is unknown, or if the text does not say how much
      a collective sends.
  """
  program = parse(text, branches)
  program = program._replace(group_size=group_size, inside=inside)
  if program.num_slices > 1 and group_size > 1:
    raise ValueError('The text numbers devices by slice: groups are unknown.')
  return _computation_bytes(program, program.entry)


def collectives(text: str) -> list[Collective]:
  """Lists the collectives of a program.

  Args:
    text: HLO of a compiled SPMD program.

  Returns:
    Each collective in the text once, also one that never runs.
  """
  return [
    Collective(i.kind, _dtypes(i), i.operand_bytes, i.op_name)
    for instructions in parse(text, {}).computations.values()
    for i in instructions
    if i.kind in _KINDS
  ]


def collectives_in_branches(
  text: str, scopes: Iterable[str]
) -> list[Collective]:
  """Lists the collectives that a device may reach without the others.

  A collective in a branch of a conditional waits for ever if another device
  takes another branch.

  Args:
    text: HLO of a compiled SPMD program.
    scopes: The `jax.named_scope`s around conditionals whose branch all devices
      choose alike.

  Returns:
    Each collective in a branch of any other conditional, once.
  """
  program = parse(text, dict.fromkeys(scopes, 0))
  found: dict[str, Collective] = {}
  seen = set()

  def walk(name: str, branch: bool):
    if (name, branch) in seen:
      return
    seen.add((name, branch))
    for i in program.computations[name]:
      if branch and i.kind in _KINDS:
        described = Collective(i.kind, _dtypes(i), i.operand_bytes, i.op_name)
        found[i.name] = described
      choice = i.kind == 'conditional'
      alike = choice and _scope(i.op_name, program.branches) is not None
      for called in i.called(*_CALLED):
        walk(called, branch or (choice and not alike))

  walk(program.entry, False)
  return list(found.values())


def num_donated(text: str) -> int:
  """Counts the arguments whose memory an output takes over.

  Args:
    text: HLO of a compiled program.

  Returns:
    The number of arrays.
  """
  aliases = re.search(r'\binput_output_alias=\{ (.*?) \}, ', text)
  return len(re.findall(r'\(\d+, \{', aliases[1])) if aliases else 0


def parse(text: str, branches: Mapping[str, int]) -> Program:
  """Reads a program.

  Args:
    text: HLO of a compiled program.
    branches: See `wire_bytes`.

  Returns:
    Its computations, each a list of instructions in their order.

  Raises:
    ValueError: If there is no program in the text.
  """
  computations: dict[str, list[Instruction]] = {}
  known: dict[str, Instruction] = {}  # Those of the current computation.
  current = entry = ''
  lines = text.splitlines()
  for line in lines:
    if header := _COMPUTATION.fullmatch(line):
      current, known = header[2], {}
      entry = current if header[1] else entry
      computations[current] = []
    elif current and (found := _INSTRUCTION.match(line)):
      root, name, shape, opcode, rest = found.groups()
      end = _closing(rest)
      # Operands precede those that use them.
      operands = tuple(known[o] for o in _NAME.findall(rest[:end]))
      known[name] = Instruction(
        name, bool(root), shape, opcode, rest[:end], operands, rest[end:]
      )
      computations[current].append(known[name])
  if not entry:
    raise ValueError('The text holds no ENTRY computation.')
  module = next((line for line in lines if line.startswith('HloModule')), '')
  counts = re.findall(r'\b(?:num_partitions|replica_count)=(\d+)', module)
  slices = [_slices(target) for target, _ in _TO_SLICES.findall(text)]
  return Program(
    computations,
    entry,
    math.prod(map(int, counts)),
    branches,
    num_slices=max(map(max, slices), default=1),
  )


def _slices(target: str) -> list[int]:
  """Returns the numbers of slices, from 1, that a send goes between."""
  if crossed := _SAME_PLACES.fullmatch(target):
    return _numbers(crossed[1])
  return [number // _SLICE for number in _numbers(target)]


def _closing(text: str) -> int:
  """Returns where the parenthesis closes that opened before the text."""
  depth = 1
  for i, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if not depth:
      return i
  return len(text)


def array_elements(shape: str) -> int:
  """Returns how many numbers an array has, or all those of a tuple."""
  return sum(
    math.prod(int(d) for d in dims.split(',') if d)
    for _, dims in _ARRAY.findall(shape)
  )


def size(shape: str) -> int:
  """Returns the bytes of an array, or of all those of a tuple."""
  total = 0
  for dtype, dims in _ARRAY.findall(shape):
    # The names tell the width: bf16, s4, f8e4m3fn; a token has none.
    width = re.search(r'\d+', dtype)
    bits = int(width[0]) if width else 8 * (dtype == 'pred')
    sizes = [int(d) for d in dims.split(',') if d]
    total += math.ceil(math.prod(sizes) * bits / 8)
  return total


def _dtypes(instruction: Instruction) -> str:
  types = ' '.join(operand.type for operand in instruction.operands)
  return ','.join(dict.fromkeys(dtype for dtype, _ in _ARRAY.findall(types)))


def _computation_bytes(program: Program, name: str) -> int:
  return sum(_sent(program, i) for i in program.computations[name])


def _sent(program: Program, instruction: Instruction) -> int:
  kind = instruction.kind
  if kind in _KINDS:
    return _collective_bytes(program, instruction)
  if kind == 'while':
    return _loop_bytes(program, instruction)
  if kind == 'conditional':
    return _conditional_bytes(program, instruction)
  if kind in _CALLERS:
    called = instruction.called('calls', 'to_apply', 'called_computations')
    return sum(_computation_bytes(program, name) for name in called)
  return 0


def _collective_bytes(program: Program, instruction: Instruction) -> int:
  kind, size = instruction.kind, instruction.operand_bytes
  to_slices = _TO_SLICES.search(instruction.attributes)
  if kind == 'send' and to_slices and not program.inside:
    return size * _passes_between_slices(*to_slices.groups())
  if kind in _UNCOUNTED:
    raise ValueError(f'Cannot count {instruction.name}: {instruction.op_name}')
  size *= program.num_slices  # Each of them runs this text.
  if kind == 'collective-permute':
    pairs = _lists(instruction.attributes, 'source_target_pairs')
    return size * sum(s != t and program.counts((s, t)) for s, t in pairs)
  groups = replica_groups(instruction.attributes, program.num_devices)
  counted = filter(program.counts, groups)
  return size * sum(_ring_passes(kind, len(group)) for group in counted)


def _ring_passes(kind: str, group: int) -> int:
  """Returns how often a group sends one operand."""
  shards = group if kind == 'all-gather' else 1
  return _RING_PASSES[kind] * (group - 1) * shards


def _passes_between_slices(target: str, transfer: str) -> int:
  """Returns how often devices of all slices send one operand to others."""
  if transfer == 'ONE_TO_ONE':
    return target.count('->')
  kind = transfer.lower().replace('_', '-')
  if crossed := _SAME_PLACES.fullmatch(target):
    places = int(crossed[3]) - int(crossed[2]) + 1
    return places * _ring_passes(kind, len(_slices(target)))
  groups = re.findall(r'\{([\d,]+)\}', target)
  return sum(_ring_passes(kind, len(_numbers(group))) for group in groups)


def _loop_bytes(program: Program, loop: Instruction) -> int:
  (condition,), (body,) = loop.called('condition'), loop.called('body')
  sent = _computation_bytes(program, body)
  checked = _computation_bytes(program, condition)
  if not sent and not checked:
    return 0
  trips = _trip_count(program, loop, condition, body)
  return trips * sent + (trips + 1) * checked


def _trip_count(
  program: Program, loop: Instruction, condition: str, body: str
) -> int:
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  # Else the loop must be `for i in range(limit)`, i an element of its state.
  test = _expression(program, program.root(condition))
  limit = re.fullmatch(r'state\[(\d+)\] < (\d+)', test)
  before, after = loop.operands[0], program.root(body)
  if limit and before.opcode == after.opcode == 'tuple':
    i = int(limit[1])
    start = _expression(program, before.operands[i])
    step = _expression(program, after.operands[i])
    if start == '0' and step == f'state[{i}] + 1':
      return int(limit[2])
  raise ValueError(f'Unknown trip count of loop {loop.name}: {loop.op_name}')


def _expression(
  program: Program,
  instruction: Instruction,
  arguments: tuple[str, ...] = ('state',),
) -> str:
  """Writes a loop counter's arithmetic as text, `?` where it is not that."""
  opcode, operands = instruction.opcode, instruction.operands
  if opcode == 'constant':
    return instruction.argument
  if opcode == 'parameter':
    index = int(instruction.argument)
    return arguments[index] if index < len(arguments) else '?'
  if opcode not in _COUNTER_OPS:
    return '?'
  values = tuple(_expression(program, o, arguments) for o in operands)
  if opcode in ('call', 'fusion'):
    (called,) = instruction.called('calls', 'to_apply')
    return _expression(program, program.root(called), values)
  if opcode == 'add':
    return ' + '.join(values)
  if opcode == 'compare':
    less = 'direction=LT' in instruction.attributes
    return ' < '.join(values) if less else '?'
  index = re.search(r'\bindex=(\d+)', instruction.attributes)
  return f'{values[0]}[{index[1]}]' if index else values[0]


def _conditional_bytes(program: Program, conditional: Instruction) -> int:
  names = conditional.called('branch_computations')
  if not names:  # On a predicate, which is the index of the branch.
    names = [
      *conditional.called('false_computation'),
      *conditional.called('true_computation'),
    ]
  scope = _scope(conditional.op_name, program.branches)
  if scope is not None:
    index = min(max(program.branches[scope], 0), len(names) - 1)
    return _computation_bytes(program, names[index])
  sent = {_computation_bytes(program, name) for name in names}
  if len(sent) > 1:
    name = f'{conditional.name}: {conditional.op_name}'
    raise ValueError(f'Unknown branch of conditional {name}')
  return sent.pop()


def _scope(op_name: str, branches: Mapping[str, int]) -> str | None:
  """Returns the innermost scope around a conditional that is a key."""
  # A scope outside an enclosing branch belongs to the enclosing conditional.
  path = re.split(r'\bbranch_\d+_fun\b', op_name)[-1].strip('/')
  found = [scope for scope in branches if f'/{scope}/' in f'/{path}/']

  def innermost(scope):  # The one that ends last, by its longest name.
    return f'/{path}/'.rfind(f'/{scope}/') + len(scope), len(scope)

  return max(found, key=innermost, default=None)


def replica_groups(attributes: str, num_devices: int) -> list[list[int]]:
  """Reads the devices of each replica group, in any notation.

  Args:
    attributes: Attributes of the collective, as text.
    num_devices: Number of devices of the program.

  Returns:
    Groups of device numbers; one group of all devices if the text names none.

  >>> replica_groups('replica_groups={{0,2},{1,3}}', 4)
  [[0, 2], [1, 3]]
  >>> replica_groups('replica_groups=[2,2]<=[2,2]T(1,0)', 4)
  [[0, 2], [1, 3]]
  >>> replica_groups("replica_groups=mesh['a'=2,'b'=2] {'a'}", 4)
  [[0, 2], [1, 3]]
  """
  iota = r'replica_groups=\[([\d,]+)\]<=(\S+)'
  if found := re.search(iota, attributes):
    return _laid_out(found[2]).reshape(_numbers(found[1])).tolist()
  mesh = r'replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}'
  if found := re.search(mesh, attributes):
    return _along_axes(*found.groups())
  return _lists(attributes, 'replica_groups') or [list(range(num_devices))]


def _lists(attributes: str, name: str) -> list[list[int]]:
  """Reads an attribute such as `{{0,1},{2,3}}`; none from `{}`."""
  found = re.search(rf'\b{name}=\{{([\d,{{}}]*)\}}', attributes)
  lists = re.findall(r'\{([\d,]+)\}', found[1]) if found else []
  return [_numbers(x) for x in lists]


def _along_axes(mesh: str, order: str, axes: str) -> list[list[int]]:
  """Reads `'a'=2,'b'=8` with `'a','b':(1)4`: along a, and along a part of b."""
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
  digits = []  # Stride and size of a device's position in the mesh.
  for axis, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
    inner = list(sizes.values())[list(sizes).index(axis) + 1 :]
    size = int(part or sizes[axis])
    stride = math.prod(inner) * sizes[axis] // (int(before or 1) * size)
    digits.append((stride, size))
  groups = collections.defaultdict(list)
  devices = _laid_out(order.strip() or f'[{math.prod(sizes.values())}]')
  for place, device in enumerate(devices.tolist()):
    along = sum(place // stride % size * stride for stride, size in digits)
    groups[place - along].append(device)
  return list(groups.values())


def _laid_out(text: str) -> np.ndarray:
  """Reads device numbers in order: `[2,4]T(1,0)`, or each by itself."""
  found = re.search(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if not found:
    return np.array(_numbers(text))
  shape, order = map(_numbers, found.groups(default=''))
  devices = np.arange(math.prod(shape)).reshape(shape)
  return devices.transpose(order or range(len(shape))).flatten()


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r'\d+', text)]
