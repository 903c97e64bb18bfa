"""A slice of a graph as a hashable string, and an interpreter that evaluates it on any leaves.

Lives here: `Program` (what the rewritten graph carries instead of values: the operations from the
leaves to one weight, as JSON, so that graphs that hold it can be cached and hashed), `extract`
(fx nodes to Program) and `Evaluation` (run it; re-run the part that depends on the codes with
other codes, in float64). Not here: what the values mean (weights.py).
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

MAX_OPERATIONS = 400
# Constants that a graph itself holds (torch.tensor([0, 4]) in a forward) are part of the program.
MAX_CONSTANT = 1024
_CONSTANT = "constant"
_BIT_CASTS = frozenset({"aten.view.dtype"})
_BY_INDEX = (
    "aten._unsafe_index",
    "aten.embedding",
    "aten.gather",
    "aten.index",
    "aten.scatter",
    "aten.take",
)
_UNINITIALISED = ("aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided")


class NotASlice(Exception):
    """The weight is not a pure function of static leaves; the message says why."""


class TooLong(NotASlice):
    """Nobody looked at all of what the weight is computed from."""


@dataclass(frozen=True)
class Operation:
    target: str
    args: Any
    kwargs: Any


@dataclass(frozen=True)
class Program:
    """Values 0 .. leaves-1 are the leaves, leaves + i is the result of operation i; the last one
    is the weight."""

    text: str

    @property
    def leaves(self) -> int:
        return int(_parse(self.text)[0])

    @property
    def operations(self) -> tuple[Operation, ...]:
        operations: tuple[Operation, ...] = _parse(self.text)[1]
        return operations

    @property
    def indexes(self) -> bool:
        """Whether values are used as indices. One out of range is an exception on a CPU; on a GPU
        it is a device-side assertion, which ends the process's CUDA context."""
        return any(op.target.startswith(_BY_INDEX) for op in self.operations)

    @property
    def result(self) -> int:
        return self.leaves + len(self.operations) - 1

    def part(self, leaves: Sequence[int], operations: Sequence[int]) -> Program:
        """The operations of these value indices alone, reading those values as leaves."""
        place = {index: {"v": i} for i, index in enumerate([*leaves, *operations])}
        kept = [self.operations[index - self.leaves] for index in operations]
        moved = [
            (op.target, renumbered(op.args, place), renumbered(op.kwargs, place)) for op in kept
        ]
        return Program(as_text(len(leaves), moved))


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[int, tuple[Operation, ...]]:
    leaves, operations = json.loads(text)
    return leaves, tuple(Operation(*each) for each in operations)


def target_name(target: Any) -> str:
    return "getitem" if target is operator.getitem else str(target)


@functools.lru_cache(maxsize=4096)
def resolve(name: str) -> Callable[..., Any]:
    if name == "getitem":
        return operator.getitem
    if name == _CONSTANT:
        return _constant
    namespace, packet, overload = name.split(".", 2)
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    return found


def _constant(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def is_pure(target: Any) -> bool:
    """Whether evaluating `target` again gives the same value and changes nothing."""
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not (
        target._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in target.tags
        or str(target).startswith(("profiler.", "_c10d", "c10d"))
    )


def walk(root: Node, is_leaf: Callable[[Node], bool]) -> tuple[list[Node], list[Node]]:
    """Leaves and inner nodes (in execution order) that `root` is computed from.

    Raises NotASlice at the first node that is neither a leaf nor a pure operation.
    """
    leaves: dict[Node, None] = {}
    inner: dict[Node, None] = {}
    stack: list[tuple[Node, bool]] = [(root, False)]
    seen: set[Node] = set()
    while stack:
        node, done = stack.pop()
        if done:
            inner[node] = None
            continue
        if node in seen:
            continue
        seen.add(node)
        if is_leaf(node):
            leaves[node] = None
            continue
        if node.op != "call_function":
            raise NotASlice(f"depends on {node.op} {node.name}")
        if not is_pure(node.target):
            raise NotASlice(f"{target_name(node.target)} is not a pure operation")
        if len(seen) > MAX_OPERATIONS:
            raise TooLong(f"more than {MAX_OPERATIONS} operations make the weight")
        stack.append((node, True))
        stack.extend((each, False) for each in reversed(node.all_input_nodes))
    return list(leaves), list(inner)


def extract(
    leaves: Sequence[Node], inner: Sequence[Node], constants: Mapping[Node, Tensor] | None = None
) -> tuple[Program, dict[Node, int]]:
    """The program of a walked slice and the value index of each node."""
    constants = constants or {}
    index = {node: i for i, node in enumerate((*leaves, *constants, *inner))}
    operations = [_encoded_constant(each) for each in constants.values()]
    operations += [
        (target_name(n.target), _encode(list(n.args), index), _encode(dict(n.kwargs), index))
        for n in inner
    ]
    return Program(as_text(len(leaves), operations)), index


def _encoded_constant(value: Tensor) -> tuple[str, Any, Any]:
    return _CONSTANT, [value.tolist(), _encode(value.dtype, {}), {"dev": 1}], {"k": {}}


def as_text(leaves: int, operations: Sequence[tuple[str, Any, Any]]) -> str:
    return json.dumps([leaves, operations], separators=(",", ":"), sort_keys=True)


def renumbered(value: Any, place: Mapping[int, Any]) -> Any:
    """An encoded argument with its value indices replaced."""
    if isinstance(value, list):
        return [renumbered(each, place) for each in value]
    if isinstance(value, dict) and "v" in value:
        return place[value["v"]]
    if isinstance(value, dict) and "k" in value:
        return {"k": {key: renumbered(each, place) for key, each in value["k"].items()}}
    return value


def _encode(value: Any, index: Mapping[Node, int]) -> Any:
    if isinstance(value, Node):
        return {"v": index[value]}
    if isinstance(value, (list, tuple)):
        return [_encode(each, index) for each in value]
    if isinstance(value, dict):
        return {"k": {key: _encode(each, index) for key, each in value.items()}}
    if isinstance(value, torch.dtype):
        return {"t": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"t": str(value).removeprefix("torch.")}
    if isinstance(value, torch.layout):
        return {"t": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"dev": 1}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.SymInt):
        raise NotASlice("its shape is dynamic")
    raise NotASlice(f"an argument of type {type(value).__name__}")


def _decode(value: Any, values: Sequence[Any], device: torch.device, wide: bool) -> Any:
    if isinstance(value, list):
        return [_decode(each, values, device, wide) for each in value]
    if not isinstance(value, dict):
        return value
    if "v" in value:
        found = values[value["v"]]
        if wide and isinstance(found, Tensor) and found.is_floating_point():
            return found.double()
        return found
    if "dev" in value:
        return device
    if "t" in value:
        named = getattr(torch, value["t"])
        # Wide evaluation follows real numbers through the casts: only the graph-precision value
        # decides what is right, so a cast that wraps shows up as a difference from it. A truth
        # value stays one: codes of one bit choose between two numbers.
        numbers = wide and isinstance(named, torch.dtype) and named != torch.bool
        return torch.float64 if numbers else named
    return {key: _decode(each, values, device, wide) for key, each in value["k"].items()}


def _used(value: Any) -> set[int]:
    if isinstance(value, list):
        return set().union(*(_used(each) for each in value)) if value else set()
    if isinstance(value, dict):
        if "v" in value:
            return {value["v"]}
        if "k" in value:
            return _used(list(value["k"].values()))
    return set()


@functools.lru_cache(maxsize=4096)
def inputs_of(program: Program) -> tuple[frozenset[int], ...]:
    """For each operation, the value indices it reads."""
    return tuple(frozenset(_used(op.args) | _used(op.kwargs)) for op in program.operations)


@functools.lru_cache(maxsize=4096)
def dependents(program: Program, index: int) -> tuple[int, ...]:
    """Value indices computed from value `index`, in execution order, itself excluded."""
    tainted = {index}
    found = []
    for i, used in enumerate(inputs_of(program), start=program.leaves):
        if used & tainted:
            tainted.add(i)
            found.append(i)
    return tuple(found)


def _affine_tensor(q: Tensor, scale: Any, zero: Any, *_: Any, **__: Any) -> Tensor:
    result: Tensor = (q.double() - zero) * scale
    return result


def _affine_channel(q: Tensor, scale: Tensor, zero: Any, axis: int, *_: Any, **__: Any) -> Tensor:
    shape = [-1 if i == axis % q.dim() else 1 for i in range(q.dim())]
    shift = 0 if zero is None else zero.reshape(shape)
    return (q.double() - shift) * scale.double().reshape(shape)


def _affine_group(q: Tensor, scale: Tensor, zero: Any, *rest: Any, **__: Any) -> Tensor:
    grouped = q.double().reshape(*scale.shape, -1)
    shift = 0 if zero is None else zero.unsqueeze(-1)
    return ((grouped - shift) * scale.double().unsqueeze(-1)).reshape(q.shape)


# PT2E's dequantisers insist on integer codes; in the wide evaluation codes are float64.
_WIDE: dict[str, Callable[..., Tensor]] = {
    "quantized_decomposed.dequantize_per_tensor.default": _affine_tensor,
    "quantized_decomposed.dequantize_per_tensor.tensor": _affine_tensor,
    "quantized_decomposed.dequantize_per_tensor.tensor2": _affine_tensor,
    "quantized_decomposed.dequantize_per_token.default": _affine_tensor,
    "quantized_decomposed.dequantize_per_channel.default": _affine_channel,
    "quantized_decomposed.dequantize_per_channel_group.default": _affine_group,
}


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype, copy=True)


# PyTorch registers it in Python, at half a millisecond a call.
_QUICK: dict[str, Callable[..., Tensor]] = {"prims.convert_element_type.default": _cast}


def device_of(leaves: Sequence[Any]) -> torch.device:
    """Where a slice is computed; scalars beside a weight on a GPU may be on the host."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    tensors.sort(key=lambda leaf: leaf.dim() == 0)
    return tensors[0].device if tensors else torch.device("cpu")


def _apply(op: Operation, values: Sequence[Any], device: torch.device, wide: bool) -> Any:
    args = _decode(op.args, values, device, wide)
    kwargs = _decode(op.kwargs, values, device, wide)
    function = _QUICK.get(op.target) or (_WIDE.get(op.target) if wide else None)
    result = (function or resolve(op.target))(*args, **kwargs)
    if op.target.startswith(_UNINITIALISED):
        # Fixed contents: a slice that lets uninitialised memory through fails its proof.
        result.view(torch.uint8).fill_(0x5A) if result.is_contiguous() else result.fill_(90)
    return result


class Evaluation:
    """One evaluation of a program: all values kept that a re-run with other codes may need."""

    def __init__(self, program: Program, leaves: Sequence[Tensor], keep: set[int] | None = None):
        """`keep` None keeps every value (probing); a set drops the others early (packing)."""
        self.program = program
        self.device = device_of(leaves)
        self.values: list[Any] = [*leaves, *([None] * len(program.operations))]
        self._dtypes: list[Any] = [getattr(value, "dtype", None) for value in self.values]
        inputs = inputs_of(program)
        last = {i: n for n, used in enumerate(inputs, start=len(leaves)) for i in used}
        for n, op in enumerate(program.operations, start=len(leaves)):
            result = _apply(op, self.values, self.device, False)
            self.values[n] = result
            self._dtypes[n] = getattr(result, "dtype", None)
            if keep is not None:
                for i in inputs[n - len(leaves)]:
                    if last[i] == n and i not in keep:
                        self.values[i] = None

    def weight(self) -> Tensor:
        weight: Tensor = self.values[self.program.result]
        return weight

    def coarsest(self, index: int) -> torch.finfo | None:
        """The least precise floating type that value `index` goes through on its way."""
        path = (self._dtypes[i] for i in dependents(self.program, index))
        kinds = [torch.finfo(d) for d in path if d is not None and d.is_floating_point]
        return max(kinds, key=lambda kind: kind.eps, default=None)

    def with_codes(self, index: int, codes: Tensor) -> Tensor:
        """The weight if value `index` were `codes`, everything downstream of it in float64."""
        values = list(self.values)
        values[index] = codes
        affected, first = dependents(self.program, index), self.program.leaves
        inputs, operations = inputs_of(self.program), self.program.operations
        last = {i: n for n in affected for i in inputs[n - first]}
        for n in affected:
            op = operations[n - first]
            if op.target in _BIT_CASTS:
                raise NotASlice("the codes' bits are reinterpreted downstream")
            values[n] = _apply(op, values, self.device, True)
            for i in inputs[n - first]:
                if last[i] == n and i != self.program.result:
                    values[i] = None
        weight: Tensor = values[self.program.result]
        return weight


def needed_for(program: Program, index: int) -> set[int]:
    """Values `with_codes(index, ...)` reads besides the codes, and the two it is compared with."""
    affected = set(dependents(program, index))
    read: set[int] = set()
    for n in affected:
        read |= set(inputs_of(program)[n - program.leaves])
    return (read - affected) | {index, program.result}
