"""How the lowering tests compile: counting backends with and without Inductor's code generation.

`quick` runs Dynamo, AOTAutograd and our pass, then the rewritten graph as it is: seconds less than
Inductor, the same rewrite. `inductor` is the real backend with a compile counter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import lowerings

from intlass_ops import lowering
from intlass_ops.lowering import graph_pass, linears, records, subclasses, under_way


@dataclass
class Counting:
    """A backend that counts its calls and keeps the graphs after the pass."""

    real: bool = False
    options: dict[str, Any] | None = None
    compiles: int = 0
    graphs: list[torch.fx.GraphModule] = field(default_factory=list)

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.compiles += 1
        if self.real:
            return lowering.backend(gm, inputs, options=self.options)

        def forward(fx: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            before = {node.target for node in fx.graph.nodes}
            graph_pass.LOWERING(fx.graph)
            check_for_inductor(fx.graph, before)
            fx.recompile()
            self.graphs.append(fx)
            return fx.forward

        def plain(fx: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            return fx.forward

        compiler = aot_autograd(
            fw_compiler=forward,
            bw_compiler=plain,
            inference_compiler=forward,
            decompositions=select_decomp_table(),
        )
        gm, inputs, parts = graph_pass.apart(gm, list(inputs))
        return subclasses.given_whole(compiler(gm, inputs), parts)


def check_for_inductor(graph: torch.fx.Graph, before: set[Any]) -> None:
    """Inductor, which the quick backend leaves out, knows no operation that it decomposes itself,
    and lets no op of ours read a constant of the graph. Under CUDA graphs it asks for codes."""
    new = {node.target for node in graph.nodes} - before
    assert not new & select_decomp_table().keys() - lowerings.keys()
    ours = [node for node in graph.nodes if str(node.target).startswith("intlass.")]
    assert not [each for node in ours for each in node.all_input_nodes if each.op == "get_attr"]
    under_way.computes_codes(graph)


@contextmanager
def fresh() -> Iterator[None]:
    """No compiled code and no decisions from an earlier test."""
    torch._dynamo.reset()
    lowering.clear_report()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def outcomes() -> list[str]:
    decisions = lowering.report()
    broken = [d for d in decisions if d.reason.startswith(linears.INTERNAL)]
    assert not broken, broken
    return [d.outcome for d in decisions]


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    return float((y.float() - expected.float()).abs().max() / expected.float().abs().max())


TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
SWAPPED, DECLINED, DENSE = records.SWAPPED, records.DECLINED, records.DENSE


def cuda_trace(module: torch.nn.Module, x: torch.Tensor) -> torch.fx.Graph:
    """The graph a CUDA model would hand to our pass, after the pass; needs no GPU.

    Parameters and buffers become fake CUDA tensors; operations are decomposed as Inductor does.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            for t in state.values()
        ]
        fake_x = torch.empty(x.shape, dtype=x.dtype, device="cuda")

        def call(x: torch.Tensor, *tensors: torch.Tensor) -> Any:
            named = dict(zip(state, tensors, strict=True))
            return torch.func.functional_call(module, named, (x,))

        with torch.no_grad():
            traced = make_fx(call, decomposition_table=select_decomp_table())(fake_x, *fakes)
    graph = traced.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    graph_pass.rewrite(graph, graph_pass.editor_for(graph, frozenset(placeholders[1:])))
    return graph
