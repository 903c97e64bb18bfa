"""The private hooks of PyTorch that lowering/graph_pass.py stands on: fail loudly when one goes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any
from unittest.mock import Mock

import graph_zoo
import pytest
import torch
from lowering_helpers import SWAPPED, Counting, fresh, outcomes, relative_error
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import intlass_ops
from intlass_ops import lowering
from intlass_ops.lowering import editor, graph_pass, program, rules, under_way


def test_inductor_hook_and_entry_point() -> None:
    config = torch._inductor.config
    assert hasattr(config, graph_pass.HOOK)
    assert issubclass(graph_pass.LoweringPass, torch._inductor.custom_graph_pass.CustomGraphPass)
    parameters = inspect.signature(torch._inductor.compile_fx.compile_fx).parameters
    assert "config_patches" in parameters
    wrapper = torch._TorchCompileInductorWrapper("reduce-overhead", {}, None)
    assert wrapper.config["triton.cudagraphs"] is True


def test_static_inputs_are_told_to_the_pass() -> None:
    seen: list[int] = []

    class Look(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(len(graph_pass._editor(graph).static))

        def uuid(self) -> str:
            return "look"

    with fresh(), torch.no_grad():
        options = {"joint_custom_pre_pass": Look()}
        torch.compile(graph_zoo.SubMul(), options=options)(torch.randn(2, graph_zoo.K).bfloat16())
    assert seen == [3], "TracingContext.fw_metadata.static_input_indices lost the buffers"


def test_linears_in_branches_are_found() -> None:
    """Inductor runs the pass on branches first, whose inputs the static indices do not count."""
    first, second = graph_zoo.SubMul(), graph_zoo.Int32Words()

    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gain", torch.ones(graph_zoo.K, dtype=torch.bfloat16))
            self.first, self.second = first, second

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.gain * x  # the gain is the graph's first input, x the branches'
            return torch.cond(x.sum() > 0, self.first, self.second, (x,))

    def forward(fx: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        with torch._inductor.config.patch({graph_pass.HOOK: graph_pass.LOWERING}):
            return torch._inductor.compile_fx._recursive_joint_graph_passes(fx).forward

    backend = aot_autograd(
        fw_compiler=forward, inference_compiler=forward, decompositions=select_decomp_table()
    )
    module, x = Branches(), torch.randn(2, graph_zoo.K).bfloat16()
    with fresh(), torch.no_grad():
        compiled = torch.compile(module, backend=backend, fullgraph=True)
        for each in (x, -x):
            assert relative_error(compiled(each), module(each)) < 2e-2
    assert outcomes() == [SWAPPED, SWAPPED]


def _gemm(*, computed: bool) -> torch.fx.Graph:
    """Of a weight given to the graph, or computed by it."""

    def f(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        codes = (w + 1 if computed else w).view(32, 64)
        return intlass_ops.matmul_int8_bf16_tn(x, codes, None, s)

    sizes: Any = ((2, 64), torch.bfloat16), ((64, 32), torch.int8), ((32,), torch.float32)
    return make_fx(f)(*(torch.ones(shape, dtype=dtype) for shape, dtype in sizes)).graph


@pytest.mark.parametrize("computed", [False, True])
def test_inductors_kernels_wait_before_they_touch_memory(computed: bool) -> None:
    kernel: Any = torch._inductor.codegen.triton.TritonKernel
    assert graph_pass.waiting_first()
    code = torch._inductor.utils.IndentedBuffer()
    with code.indent():
        code.writelines(["load", kernel.GDC_WAIT, "load", kernel.GDC_WAIT, kernel.GDC_LAUNCH])
    code.writeline("store")
    self = Mock(GDC_WAIT=kernel.GDC_WAIT, GDC_LAUNCH=kernel.GDC_LAUNCH)
    graph = Mock(module=Mock(graph=_gemm(computed=computed)))
    with torch._inductor.virtualized.V.set_graph_handler(graph):
        kernel._filter_pdl(self, code)
    lines = [each.strip() for each in code.getvalue().splitlines()]
    first = [kernel.GDC_WAIT] if computed else [kernel.GDC_WAIT, kernel.GDC_LAUNCH]
    assert lines == [*first, "load", "load", "store"]


def test_compiled_code_calls_kernels_without_the_dispatcher() -> None:
    x = torch.randn(2, graph_zoo.K).bfloat16()
    with fresh(), torch.no_grad():
        compiled = torch.compile(graph_zoo.SubMul(), backend=lowering.backend)
        y, (code,) = torch._inductor.utils.run_and_get_code(compiled, x)
        assert "linear_from_leaves.default.cpu(" in code
        with torch.profiler.profile() as profile:  # which shall see the op
            assert torch.equal(compiled(x), y)
        assert "intlass::linear_from_leaves" in {event.name for event in profile.events()}


@pytest.mark.parametrize(("mode", "graphs"), [(None, False), ("reduce-overhead", True)])
def test_mode_reaches_inductor(mode: str | None, graphs: bool) -> None:
    seen: list[bool] = []

    class Look(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            config = torch._inductor.config.triton
            assert config.enable_pdl == config.cudagraphs
            seen.append(config.cudagraphs)

        def uuid(self) -> str:
            return "look"

    x = torch.randn(2, graph_zoo.K).bfloat16()
    config = torch._inductor.config
    with fresh(), torch.no_grad(), config.patch(joint_custom_pre_pass=Look()):
        torch.compile(graph_zoo.SubMul(), backend=lowering.backend, mode=mode)(x)
        assert outcomes() == [SWAPPED]
    assert seen == [graphs]


def test_backend_is_registered_by_name() -> None:
    names = {each.name for each in entry_points(group="torch_dynamo_backends")}
    if "intlass" not in names:
        pytest.skip("the package is not installed, only imported")
    with fresh(), torch.no_grad():
        x = torch.randn(2, graph_zoo.K).bfloat16()
        torch.compile(graph_zoo.SubMul(), backend="intlass")(x)
        assert outcomes() == [SWAPPED]


def test_recipes_survive_as_text() -> None:
    """A recipe in a cached graph is read back by another process."""
    from intlass_ops.lowering.weights import Recipe

    text = '[1,[["aten.alias.default",[{"v":0}],{"k":{}}]]]'
    recipe = Recipe(program.Program(text), 0, "kn", 2, 3, 5)
    assert Recipe.parse(recipe.text()) == recipe
    assert len({rule.name for rule in rules.RULES}) == len(rules.RULES)
    assert editor.CAST is torch.ops.prims.convert_element_type.default


@pytest.mark.parametrize("computed", [False, True])
def test_graphs_that_compute_codes_are_known(computed: bool) -> None:
    """A GEMM that starts early must not read them (lowering/under_way.py)."""
    backend = Counting()
    given = torch.randint(-8, 8, (32, 64), dtype=torch.int8)
    scales = torch.ones(32)

    def step(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        a, a_scale, _ = intlass_ops.quantize_int8(x)
        b = weight + 1 if computed else weight
        return intlass_ops.matmul_int8_bf16_tn(a, b, a_scale, scales)

    with fresh(), torch.no_grad():
        torch.compile(step, backend=backend, fullgraph=True)(torch.randn(3, 64), given)
    (graph,) = backend.graphs
    assert under_way.computes_codes(graph.graph) == computed
