"""Codes that a slice never holds in one tensor: each part is scaled, then the parts are joined.

Lives here: `joined`, which finds what may be the codes of all parts (nibbles scaled one after the
other and stacked; GGUF's Q6_K), and `through_one`, the slice with these going through one tensor on
their way: the same weight, its codes a value of the program like any other. Not here: whether they
are codes (probing.py, weights.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from .program import Evaluation, Program, as_text, inputs_of, renumbered

# More parts, or values in a part that may be its codes, are something else.
MOST_PARTS = 64
MOST_CODES = 8
_JOINS = ("aten.cat.default", "aten.stack.default")
_WRITES = ("aten.slice_scatter.default", "aten.select_scatter.default")
# What goes on with all parts at once, be they one or several, or with several only: one part that
# is computed with is another.
_VIEWS = (
    *("aten._unsafe_view.default", "aten.alias.default", "aten.clone.default"),
    *("aten.permute.default", "aten.reshape.default", "aten.squeeze.", "aten.t.default"),
    *("aten.transpose.int", "aten.unsqueeze.default", "aten.view.default"),
)
_STEPS = (
    *("aten.add.Tensor", "aten.div.Tensor", "aten.mul.Tensor", "aten.sub.Tensor"),
    *("aten.slice.Tensor", "prims.convert_element_type.default"),
)


def joined(evaluation: Evaluation, integral: Callable[[Any], bool]) -> Iterator[tuple[int, ...]]:
    """Values that may be the codes of all parts, one for each part.

    integral: whether an evaluated value is made of integers.
    """
    program, values = evaluation.program, evaluation.values
    parts = _parts(program, values)
    found = [_integers(program, values, part, integral) for part in parts]
    readers = Counter(index for each in found for index in each)
    # What several parts are computed from (zero points, packed bytes) are the codes of none.
    own = ([index for index in each if readers[index] == 1] for each in found)
    for members in zip(*own, strict=False):
        kinds = {(values[i].shape, values[i].dtype) for i in members}
        if len(kinds) == 1 < len(members):
            yield members


def _parts(program: Program, values: Sequence[Any]) -> tuple[int, ...]:
    """The values that the weight is put together from; itself if it is computed as a whole."""
    parts: dict[int, tuple[int, ...]] = {i: (i,) for i in range(program.leaves)}
    inputs = inputs_of(program)
    for index, op in enumerate(program.operations, start=program.leaves):
        own: tuple[int, ...] = (index,)
        if not inputs[index - program.leaves]:
            own = ()  # memory to write parts into
        elif not isinstance(values[index], Tensor):
            pass
        elif op.target in _JOINS:
            own = tuple(part for each in op.args[0] for part in parts[each["v"]])
        elif op.target in _WRITES:
            own = tuple(part for each in op.args[:2] for part in parts[each["v"]])
        elif op.target == "aten.copy.default":
            own = parts[op.args[1]["v"]]
        elif op.target.startswith(_VIEWS):
            own = parts[op.args[0]["v"]]
        elif op.target in _STEPS:
            sources = [parts[i] for i in _used(op.args)]
            several = (each for each in sources if len(each) > 1)
            own = next(several, own if any(sources) else ())
        parts[index] = own if len(own) <= MOST_PARTS else (index,)
    return parts[program.result]


def _used(args: Sequence[Any]) -> list[int]:
    return [each["v"] for each in args if isinstance(each, dict) and "v" in each]


def _integers(
    program: Program, values: Sequence[Any], part: int, integral: Callable[[Any], bool]
) -> list[int]:
    """Values of integers that a part of the same size is computed from, the nearest first."""
    found: list[int] = []
    seen, stack = {part}, [part]
    while stack and len(found) < MOST_CODES:
        index = max(stack)
        stack.remove(index)
        value = values[index]
        if isinstance(value, Tensor) and value.numel() == values[part].numel() and integral(value):
            found.append(index)
        if index >= program.leaves:
            before = inputs_of(program)[index - program.leaves] - seen
            seen |= before
            stack.extend(before)
    return found


def through_one(program: Program, members: Sequence[int]) -> tuple[Program, int]:
    """The program with these values stacked along a new last dimension and read from there; and
    which of its values the stack is."""
    first, inputs = program.leaves, inputs_of(program)
    before: set[int] = set()
    stack = list(members)
    while stack:
        index = stack.pop()
        if index not in before and index >= first:
            before.add(index)
            stack.extend(inputs[index - first])
    place: dict[int, Any] = {i: {"v": i} for i in range(first)}
    operations: list[tuple[str, Any, Any]] = []

    def add(target: str, args: Any, kwargs: Any) -> dict[str, int]:
        operations.append((target, args, kwargs))
        return {"v": first + len(operations) - 1}

    def copied(index: int) -> dict[str, int]:
        op = program.operations[index - first]
        return add(op.target, renumbered(op.args, place), renumbered(op.kwargs, place))

    for index in sorted(before):
        place[index] = copied(index)
    columns = [add("aten.unsqueeze.default", [place[i], -1], {"k": {}}) for i in members]
    codes = add("aten.cat.default", [columns, -1], {"k": {}})
    for n, index in enumerate(members):
        place[index] = add("aten.select.int", [codes, -1, n], {"k": {}})
    for index in range(first, program.result + 1):
        if index not in before:
            place[index] = copied(index)
    return Program(as_text(first, operations)), codes["v"]
