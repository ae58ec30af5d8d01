"""Reads what a compiled program reads and writes in a device's memory.

XLA's own count leaves out the libraries that a GPU program calls, convolutions
among them, and takes an array as read whole where a few rows are picked.
"""

from collections import defaultdict
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
_PICKS = ('dynamic-slice', 'gather', 'slice')
_CALLED = ('calls', 'to_apply', 'called_computations')


def memory_traffic(text: str) -> int:
  """Counts the bytes between a device and its memory in one execution.

  Each instruction reads its operands and writes its result; a fusion is one. Of
  an array from which some elements are picked, only these are read, and where
  some are replaced in place, only these are written.

  Args:
    text: HLO of a program compiled for GPUs.

  Returns:
    The bytes, with the body of a loop counted once, and the branch of a
    conditional that moves most.
  """
  program = parse(text, {})
  return _moved(program, program.entry)


def _moved(program: Program, name: str) -> int:
  return sum(_bytes(program, i) for i in program.computations[name])


def _bytes(program: Program, i: Instruction) -> int:
  opcode = i.opcode.removesuffix('-start')
  if opcode in _FREE or opcode.endswith('-done'):
    return 0
  if opcode == 'while':
    return _moved(program, i.called('body')[0])
  if opcode == 'conditional':
    branches = i.called(
      'branch_computations', 'true_computation', 'false_computation'
    )
    return max(_moved(program, name) for name in branches)
  if opcode in ('call', 'async'):
    return sum(_moved(program, name) for name in i.called(*_CALLED))
  if opcode == 'fusion':
    return _fused(program, i)
  if opcode in _PICKS:
    return 2 * size(i.type)
  if opcode == 'dynamic-update-slice':
    return 2 * size(i.operands[1].type)
  return i.operand_bytes + _result(i)


def _result(i: Instruction) -> int:
  """Returns the bytes of a result, without the workspace of a library."""
  if i.opcode == 'custom-call' and '"__cu' in i.attributes:
    return size(re.sub(r'\b[us]8\[\d*\]', '', i.type))
  return size(i.type)


def _fused(program: Program, fusion: Instruction) -> int:
  """Counts what a fusion reads of its operands, and what it writes."""
  (name,) = fusion.called('calls')
  body = program.computations[name]
  root = program.root(name)
  roots = root.operands if root.opcode == 'tuple' else (root,)
  users = defaultdict(list)
  for i in body:
    for place, operand in enumerate(i.operands):
      users[operand.name].append((place, i))
  used: dict[str, float] = {r.name: 1.0 for r in roots}
  total = sum(_written(r) for r in roots)
  for i in reversed(body):  # Users come after what they use.
    if i.opcode == 'tuple':
      continue
    shares = [
      used[user.name] * _share(place, user, i)
      for place, user in users[i.name]
      if user.opcode != 'tuple'
    ]
    used[i.name] = min(1.0, used.get(i.name, 0.0) + sum(shares))
    if i.opcode == 'parameter':
      total += math.ceil(used[i.name] * size(i.type))
  return total


def _share(place: int, user: Instruction, operand: Instruction) -> float:
  """Returns which part of an operand its user needs."""
  if place == 0 and user.opcode in _PICKS:
    picked = array_elements(user.type)
    return min(1.0, picked / max(1, array_elements(operand.type)))
  return float(place > 0 or user.opcode != 'dynamic-update-slice')


def _written(root: Instruction) -> int:
  replaces = root.opcode == 'dynamic-update-slice'
  return size((root.operands[1] if replaces else root).type)
