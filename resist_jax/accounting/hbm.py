"""Reads from a compiled program what bounds its time.

XLA's own count of memory traffic leaves out the libraries that a GPU program
calls, convolutions among them, and takes an array as read whole where a few
rows are picked. For a TPU it includes arrays in on-chip memory, which hold most
of what a short network computes.
"""

from collections import defaultdict
from collections.abc import Callable
from itertools import islice
import math
import re

from resist_jax.accounting.hlo import (
  Instruction,
  Program,
  array_elements,
  parse,
  size,
)

# These only name memory.
_FREE = (
  *('after-all', 'bitcast', 'constant', 'get-tuple-element', 'opt-barrier'),
  *('parameter', 'partition-id', 'replica-id', 'tuple'),
)
_NAMES = re.compile('"(?:AllocateBuffer|ConcatBitcast)"')  # Calls that do, too.
_PICKS = ('dynamic-slice', 'gather', 'slice')
_CALLED = ('calls', 'to_apply', 'called_computations')
# Their pairs are counted where they end, by the type of the result.
_COPIES = ('copy', *_PICKS, 'dynamic-update-slice')
_ARRAY = re.compile(r'\b[a-z]\w*\[[^\]]*\](?:\{[^}]*\})?')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def memory_traffic(text: str) -> int:
  """Counts the bytes between a device and its memory in one execution.

  Each instruction reads its operands and writes its result; a fusion counts as
  one instruction. Where some elements of an array are picked, only these are
  read, and where some are replaced in place, only these are written. Arrays
  that a TPU's compiler keeps on the chip are not counted.

  Args:
    text: HLO of a compiled program.

  Returns:
    The bytes, with the body of a loop counted once, and the branch of a
    conditional that moves most.
  """
  program = parse(text, {})
  return _total(program, program.entry, _bytes)


def estimated_cycles(text: str) -> int | None:
  """Adds up how long a TPU's compiler expects the instructions to take.

  Copies between the chip and its memory are not counted: they run meanwhile.

  Args:
    text: HLO of a compiled program.

  Returns:
    Cycles of the TPU's core; loops and conditionals count as in
    `memory_traffic`. None if the compiler estimates none, as those of GPUs.
  """
  program = parse(text, {})
  return _total(program, program.entry, _estimate) or None


# What an instruction without computations of its own costs.
_Count = Callable[[Program, Instruction], int]


def _total(program: Program, name: str, count: _Count) -> int:
  return sum(_cost(program, i, count) for i in program.computations[name])


def _cost(program: Program, i: Instruction, count: _Count) -> int:
  opcode = i.kind
  if opcode == 'while':
    return _total(program, i.called('body')[0], count)
  if opcode == 'conditional':
    branches = i.called(
      'branch_computations', 'true_computation', 'false_computation'
    )
    return max(_total(program, name, count) for name in branches)
  if opcode in ('call', 'async'):
    return sum(_total(program, name, count) for name in i.called(*_CALLED))
  return count(program, i)


def _estimate(program: Program, i: Instruction) -> int:
  del program
  found = _CYCLES.search(i.attributes)
  return int(found[1]) if found else 0


def _bytes(program: Program, i: Instruction) -> int:
  opcode = i.kind
  if opcode in _FREE or _NAMES.search(i.attributes):
    return 0
  if opcode.removesuffix('-done') in _COPIES:
    return _copied(i)
  if opcode.endswith('-done'):
    return 0
  if opcode == 'fusion':
    return _fused(program, i)
  return sum(_size(o.type) for o in i.operands) + _result(i)


def _copied(i: Instruction) -> int:
  """Returns what a copy reads and writes, or a slice that is one."""
  if i.opcode.endswith('-start'):
    return 0
  opcode = i.opcode.removesuffix('-done')
  operands = (i if i.opcode == opcode else i.operands[0]).operands
  written = operands[1] if opcode == 'dynamic-update-slice' else i
  moved = size(written.type)
  read = moved if _size(operands[0].type) else 0
  return read + (moved if _size(i.type) else 0)


def _size(shape: str) -> int:
  """Returns the bytes of those arrays that are not kept on the chip."""
  # A layout names the space of memory, unless it is the device's own.
  return sum(size(x) for x in _ARRAY.findall(shape) if 'S(' not in x)


def _result(i: Instruction) -> int:
  """Returns the bytes of a result, without the workspace of a library."""
  if i.opcode == 'custom-call' and '"__cu' in i.attributes:
    return _size(re.sub(r'\b[us]8\[\d*\]', '', i.type))
  return _size(i.type)


def _fused(program: Program, fusion: Instruction) -> int:
  """Counts what a fusion reads of its operands, and what it writes."""
  (name,) = fusion.called('calls')
  shares = _needed(program, name)
  read = sum(
    math.ceil(shares[place] * _size(operand.type))
    for place, operand in enumerate(fusion.operands)
  )
  # Types inside a fusion do not say where arrays are.
  results = iter(_ARRAY.findall(fusion.type))
  written = 0
  for r in _roots(program, name):
    whole = sum(_size(x) for x in islice(results, len(_ARRAY.findall(r.type))))
    replaces = r.opcode == 'dynamic-update-slice'
    written += size(r.operands[1].type) if replaces and whole else whole
  return read + written


def _roots(program: Program, name: str) -> tuple[Instruction, ...]:
  """Returns the instructions whose results a computation returns."""
  root = program.root(name)
  return root.operands if root.opcode == 'tuple' else (root,)


def _needed(program: Program, name: str) -> dict[int, float]:
  """Returns which part of each parameter a fusion's computation needs."""
  body = program.computations[name]
  users = defaultdict(list)
  for i in body:
    for place, operand in enumerate(i.operands):
      users[operand.name].append((place, i))
  needed = {r.name: 1.0 for r in _roots(program, name)}
  for i in reversed(body):  # Users come after what they use.
    if i.opcode == 'tuple':
      continue
    shares = [
      needed[user.name] * _share(program, place, user, i)
      for place, user in users[i.name]
      if user.opcode != 'tuple'
    ]
    needed[i.name] = min(1.0, needed.get(i.name, 0.0) + sum(shares))
  return {
    int(i.argument): needed[i.name] for i in body if i.opcode == 'parameter'
  }


def _share(
  program: Program, place: int, user: Instruction, operand: Instruction
) -> float:
  """Returns which part of an operand its user needs."""
  if user.opcode == 'fusion':
    (name,) = user.called('calls')
    return _needed(program, name)[place]
  if place == 0 and user.opcode in _PICKS:
    picked = array_elements(user.type)
    return min(1.0, picked / max(1, array_elements(operand.type)))
  return float(place > 0 or user.opcode != 'dynamic-update-slice')
