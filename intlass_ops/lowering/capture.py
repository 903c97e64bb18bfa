"""One quantised linear module read through its own forward, rebuilt around packed weights.

Lives here: `Session.convert`, used by prepare.py. The module runs once under the lowering pass;
the graph that comes out, and the tensors it was called with, say everything: the linear becomes a
module, what is left (the library's activation quantiser) stays a graph. Not here: hooks into
torch.compile (graph_pass.py), matching and packing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .. import lut4
from ..fp8_linear import Fp8Linear
from ..lut4_linear import Lut4Linear
from ..nn import Activation, IntLinear, PackedLinear
from . import full_range, graph_pass, records, requantise, runtime
from .gemms import shape_of
from .graph_linear import GraphLinear
from .graph_linear import NotConverted as NotConverted
from .siblings import LINEAR
from .storage import BETWEEN, DENSE, FP8, INT4, INT8, Packed, recipes_of

INT8_GEMM: Any = torch.ops.intlass.matmul_int8_bf16_tn.default
# Of modules that hold codes as buffers, only an Fp8Linear keeps FP8 when a model's dtype changes.
_MORE_THAN_FP8 = "FP8 weights with more than a bias around the product: compile the model instead"
_VIEWS = ("aten.view.", "aten.reshape.", "aten._unsafe_view.", "aten.alias.")


class Session:
    """Modules of one class share one trace."""

    def __init__(self) -> None:
        self._seen: list[tuple[GraphModule, tuple[Any, ...]]] = []
        self._backend = graph_pass.recording_backend(self._seen)

    def convert(
        self, module: nn.Module, x: Tensor, *, same_codes: bool = True
    ) -> tuple[nn.Module, str]:
        """A module with packed weights, and its scheme. x [1, M, K] or [M, K] is an example.

        same_codes: activations are quantised by the module's own arithmetic, never by ours.
        """
        self._seen.clear()
        before = len(records.report())
        try:
            with torch.no_grad():
                graph_pass.trace(module, self._backend, x)
            if len(self._seen) != 1:
                raise NotConverted(f"its forward is {len(self._seen)} graphs, not one")
            graph, arguments = self._seen[0]
            return _rebuild(graph, arguments, x, same_codes)
        except NotConverted as problem:
            declined = [d for d in records.report()[before:] if d.outcome == records.DECLINED]
            raise NotConverted(declined[0].reason if declined else str(problem)) from problem
        except Exception as problem:
            said = str(problem).strip().splitlines() or [""]
            raise NotConverted(f"{type(problem).__name__}: {said[0]}") from problem
        finally:
            self._seen.clear()


@contextlib.contextmanager
def session() -> Iterator[Session]:
    with graph_pass.many_traces():
        yield Session()


def _rebuild(
    source: GraphModule, arguments: tuple[Any, ...], x: Tensor, same_codes: bool
) -> tuple[nn.Module, str]:
    graph = Graph()
    values: dict[Node, Any] = {}
    graph.graph_copy(source.graph, values)
    copied = [values[n] for n in source.graph.nodes if n.op == "placeholder"]
    result = values_of_output(source, values)
    graph.output(result)
    owner = nn.Module()  # of what the graph names; few graphs become code
    for node in graph.find_nodes(op="get_attr"):
        setattr(owner, str(node.target), getattr(source, str(node.target)))
    tensors = dict(zip(copied, arguments, strict=True))
    entry = next((n for n, t in tensors.items() if _is(t, x)), None)
    if entry is None:
        raise NotConverted("its input does not reach the graph")
    products = [n for n in graph.nodes if n.target in (LINEAR, INT8_GEMM)]
    if not products:
        raise NotConverted("no product with a quantised weight")
    out: Any = result.meta.get("val") if isinstance(result, Node) else None
    if not isinstance(out, Tensor) or type(shape_of(result)[-2]) is int:
        raise NotConverted("its forward depends on the number of rows")
    weights = [_as_module(owner, graph, node, tensors, i) for i, node in enumerate(products)]
    calls = [node for node in graph.nodes if node.op == "call_module"]
    integer = any(not node.args[0].meta["val"].dtype.is_floating_point for node in calls)
    activation = None
    if len(calls) == 1:
        activation = _activation(owner, calls[0], tensors, x, same_codes)
    graph.eliminate_dead_code(lambda node: node.op == "call_module" or node.is_impure())
    _bind(owner, graph, entry, tensors, x)
    graph.lint()
    scheme = f"{max(weights)}a{8 if integer else 16}"
    plain = _plain(owner, entry, result, activation)
    if plain is not None:
        return plain, scheme
    if "fp8" in weights:
        raise NotConverted(_MORE_THAN_FP8)
    if x.dim() == 3:  # traced for x[1, M, K], as some libraries' functions know no x[M, K]
        with graph.inserting_after(entry):
            batch = graph.call_function(torch.ops.aten.unsqueeze.default, (entry, 0))
        entry.replace_all_uses_with(batch, lambda user: user is not batch)
    return GraphLinear(owner, graph, int(out.shape[-1])), scheme


def values_of_output(source: GraphModule, values: dict[Node, Any]) -> Any:
    """The only output of a graph; the copy's node."""
    (returned,) = next(n for n in source.graph.nodes if n.op == "output").args
    outputs = returned if isinstance(returned, (list, tuple)) else [returned]
    if len(outputs) != 1:
        raise NotConverted(f"its forward gives {len(outputs)} tensors")
    return values[outputs[0]]


def _is(value: Any, x: Tensor) -> bool:
    return isinstance(value, Tensor) and value.data_ptr() == x.data_ptr() and value.shape == x.shape


def _as_module(
    owner: nn.Module, graph: Graph, node: Node, tensors: dict[Any, Any], index: int
) -> str:
    """Replace a GEMM node by a call of a PackedLinear; returns its weight's part of the scheme."""
    arguments = [*node.args, None, None, None, None]
    k: int
    a_zero: Any
    bias: Any
    dtype: Any
    if node.target is LINEAR:
        x, leaves, text, a_scale, a_zero, bias, dtype = cast(list[Any], arguments)[:7]
        if recipes_of(text)[0].batch != 1 or BETWEEN in text:
            raise NotConverted("several weights in one module")
        packed = runtime.take([_evaluate(owner, leaf, tensors) for leaf in leaves], text)
        k = recipes_of(text)[0].k
    else:
        x, weight, a_scale, scales = cast(list[Any], arguments)[:4]
        rest = node.kwargs
        a_zero, bias, dtype = (rest.get(key) for key in ("a_zero", "bias", "out_dtype"))
        codes, found = tensors.get(weight), _evaluate(owner, scales, tensors)
        if codes is None:
            raise NotConverted("its codes are computed in the graph")
        n, k = codes.shape
        packed = Packed(INT8, codes, found.reshape(-1).expand(n).contiguous())
    if packed.kind == DENSE:
        raise NotConverted(packed.reason)
    owner.add_module(f"linear{index}", PackedLinear(packed, k))
    with graph.inserting_before(node):
        call = graph.call_module(f"linear{index}", (x, a_scale, a_zero, bias, dtype))
    call.meta = node.meta
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    if packed.kind in (FP8, *lut4.TABLES):
        return packed.kind
    return "w4" if packed.kind == INT4 else "w8"


def _evaluate(owner: nn.Module, node: Any, tensors: dict[Any, Any]) -> Tensor:
    """A node that depends on tensors of the module alone."""
    if node in tensors:
        found: Tensor = tensors[node]
        return found
    if isinstance(node, Node) and node.op == "get_attr":
        constant: Tensor = getattr(owner, str(node.target))
        return constant
    if not isinstance(node, Node) or node.op != "call_function":
        raise NotConverted("its scales are computed from its input")
    args, kwargs = torch.fx.node.map_arg(
        (node.args, node.kwargs), lambda each: _evaluate(owner, each, tensors)
    )
    result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def _bind(owner: nn.Module, graph: Graph, entry: Node, tensors: dict[Any, Any], x: Tensor) -> None:
    """Every other placeholder becomes a buffer, or the number of rows."""
    for i, (node, value) in enumerate(tensors.items()):
        if node is entry:
            continue
        if node.users:
            with graph.inserting_after(entry):
                if isinstance(value, Tensor):
                    name = f"tensor{i}"
                    owner.register_buffer(name, value.detach())
                    new = graph.get_attr(name)
                elif value == x.shape[-2]:
                    new = graph.call_function(torch.ops.aten.sym_size.int, (entry, x.dim() - 2))
                else:
                    raise NotConverted(f"its graph takes {value!r}")
            node.replace_all_uses_with(new)
        graph.erase_node(node)


def _activation(
    owner: nn.Module, call: Node, tensors: dict[Any, Any], x: Tensor, same_codes: bool
) -> Activation:
    """The quantiser of ours that may stand for what is before a product, if there is one."""
    codes, scale, zero, *_ = call.args
    if not isinstance(codes, Node) or not isinstance(scale, Node) or zero is not None:
        return None
    if not same_codes and _quantised_like_ours(owner, codes, scale, tensors, x):
        return "int8"
    source = full_range.quantised(codes, scale)
    return "int8_full_range" if source is not None and _is(tensors.get(source), x) else None


def _quantised_like_ours(
    owner: nn.Module, codes: Node, scale: Node, tensors: dict[Any, Any], x: Tensor
) -> bool:
    other = requantise.example(x)
    values = {node: other if _is(each, x) else each for node, each in tensors.items()}
    try:
        found = [_evaluate(owner, each, values) for each in (codes, scale)]
    except NotConverted:
        return False
    return requantise.like_ours(other, *found)


def _plain(owner: nn.Module, entry: Node, result: Node, activation: Activation) -> nn.Module | None:
    """The packed linear alone, if nothing but views and a bias is around it.

    activation: our own quantiser stands for whatever is before it.
    """
    node = result
    while str(node.target).startswith(_VIEWS):
        node = node.args[0]  # type: ignore[assignment]
    if node.op != "call_module" or not str(node.target).startswith("linear"):
        return None
    x, a_scale, a_zero, bias, dtype = node.args
    while isinstance(x, Node) and str(x.target).startswith(_VIEWS):
        x = x.args[0]
    if activation is None and (x is not entry or a_scale is not None or a_zero is not None):
        return None
    if dtype is not None and dtype != entry.meta["val"].dtype:
        return None
    if bias is not None and (not isinstance(bias, Node) or bias.op != "get_attr"):
        return None
    linear = owner.get_submodule(str(node.target))
    assert isinstance(linear, PackedLinear)
    value = None if bias is None else getattr(owner, str(bias.target))
    if linear.kind in (INT4, INT8) and linear.order is None:
        return IntLinear(
            linear.weight,
            linear.scales,
            linear.zeros,
            value,
            in_features=linear.in_features,
            activation=activation,
        )
    if activation is not None:
        return None
    if linear.kind in lut4.TABLES and linear.order is None and linear.in_features % 2 == 0:
        return Lut4Linear(linear.weight, linear.scales, value, linear.kind)
    if linear.kind == FP8:
        return None if linear.order is not None else Fp8Linear(linear.weight, linear.scales, value)
    linear.bias = value
    return linear
