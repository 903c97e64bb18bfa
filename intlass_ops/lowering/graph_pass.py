"""The only file of `lowering` that touches torch._inductor, torch._dynamo or tracing internals.

Lives here: how our pass is hooked in, which placeholders are weights, how the graph is walked
and edited. Not here: what counts as a quantised weight (weights.py, activations.py) or what is
emitted for it (linears.py, rules.py).

Private APIs, checked on torch 2.11 and 2.13: `torch._inductor.config.joint_custom_pre_pass` (2.11
takes one callable, 2.13 also a list: we always install one callable and chain),
`torch._inductor.custom_graph_pass.CustomGraphPass`, `torch._inductor.compile_fx.compile_fx` with
`config_patches`, `torch._TorchCompileInductorWrapper` (mode and options, validated as Inductor
does), `torch._guards.TracingContext.try_get().fw_metadata.static_input_indices` and, of the inputs
that these count, `meta["desc"]`; `torch.utils._python_dispatch._disable_current_modes`; of Dynamo's
graphs `_param_name_to_source` and of their inputs `_dynamo_source` and
`meta["tensor_dict"]["_dynamo_static_input_type"]`;
`torch._inductor.codegen.triton.TritonKernel._filter_pdl`, the last step of a kernel's code, and
`torch._inductor.virtualized.V.graph.module`, the graph it is of;
`torch._inductor.ir.FallbackKernel.set_python_kernel_name`, what its code calls a custom op;
`torch._functorch._aot_autograd.subclass_codegen` (2.13: subclasses are taken apart by generated
code, before that by functions that ask each of them).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch._inductor.compile_fx as compile_module
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.source import AttrSource
from torch._inductor import config as inductor_config
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.ir import FallbackKernel
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import _disable_current_modes

from ..explain import is_strict
from ..ops._library import NAMESPACE
from . import (
    epilogues,
    lanes,
    linears,
    quantisers,
    records,
    runtime,
    siblings,
    spellings,
    subclasses,
    under_way,
)
from .editor import Editor

HOOK = "joint_custom_pre_pass"
EARLY = "triton.enable_pdl"
SUBCLASSES_ARE_ASKED = (
    importlib.util.find_spec("torch._functorch._aot_autograd.subclass_codegen") is None
)


class LoweringPass(CustomGraphPass):
    """Swaps quantised linears in one joint graph. One object per process.

    A new object per compile would make Dynamo see a new backend configuration each time and
    recompile; `uuid()` lets the FX graph cache and the AOTAutograd cache keep what we rewrote.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        rewrite(graph, _editor(graph))

    def uuid(self) -> bytes:
        return _own_hash()


def rewrite(graph: torch.fx.Graph, edit: Editor) -> None:
    """Apply the rules to every product of a graph and record each decision."""
    records.passed()
    passes = (linears.concerns, spellings.concerns, quantisers.concerns, siblings.concerns)
    if not any(concerns(node) for node in graph.nodes for concerns in passes):
        return
    if not edit.training:
        records.count("merged", siblings.merge_equal(graph))
        records.count("respelled", spellings.respell(edit))
    for node in [node for node in graph.nodes if linears.concerns(node)]:
        decision = linears.lower(edit, node)
        if decision is not None:
            records.record(decision)
    if not edit.training:
        # Each linear wrote its own copy of the scale that it shares with its siblings.
        siblings.merge_equal(graph)
        graph.eliminate_dead_code()  # quantisers that are our op now read x too
        records.count("quantisers", quantisers.fuse(edit))
        records.count("joined", siblings.join(edit))
    records.count("fused", siblings.fuse(edit))
    if not edit.training:
        records.count("epilogues", epilogues.fuse(edit))
        records.count("lanes", lanes.ask(edit))
    # The old dequantisation must go before Inductor plans memory for it.
    graph.eliminate_dead_code()
    graph.lint()


def editor_for(
    graph: torch.fx.Graph, static: frozenset[torch.fx.Node], *, training: bool = False
) -> Editor:
    values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    fake_mode = torch._guards.detect_fake_mode(values)
    return Editor(graph, static, fake_mode, _disable_current_modes, training=training)


def _editor(graph: torch.fx.Graph) -> Editor:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    context = torch._guards.TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    # The indices are those of the whole graph, not of a branch or a loop's body within it.
    whole = any("desc" in node.meta for node in placeholders)
    indices = metadata.static_input_indices if metadata is not None and whole else ()
    static = frozenset(placeholders[i] for i in indices if i < len(placeholders))
    training = any(node.name.startswith("tangents") for node in placeholders)
    return editor_for(graph, static, training=training)


class Chain(CustomGraphPass):
    """A pass that was there first, then ours; equal chains compare equal."""

    def __init__(self, first: tuple[Callable[..., Any], ...]) -> None:
        self.first = first

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self.first:
            each(graph)
        LOWERING(graph)

    def uuid(self) -> Any:
        parts = []
        for each in self.first:
            part = each.uuid() if isinstance(each, CustomGraphPass) else None
            if part is None:
                # Inductor's rule: a pass that cannot be identified switches caching off.
                return None
            parts.append(part)
        return (*parts, _own_hash())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and self.first == other.first

    def __hash__(self) -> int:
        return hash(self.first)


_HASH: list[bytes] = []
_LOCK = threading.Lock()


def _own_hash() -> bytes:
    """Hash of this package's Python sources: a changed rule must not meet an old cached graph."""
    with _LOCK:
        if not _HASH:
            digest = hashlib.sha256(torch.__version__.encode())
            for path in sorted(Path(__file__).parent.glob("*.py")):
                digest.update(path.name.encode() + path.read_bytes())
            _HASH.append(digest.digest())
        return _HASH[0]


LOWERING = LoweringPass()


def _as_tuple(hook: Any) -> tuple[Callable[..., Any], ...]:
    if hook is None:
        return ()
    if isinstance(hook, (list, tuple)):
        return tuple(hook)
    return (hook,)


def _chained(hook: Any) -> CustomGraphPass:
    """Whatever is installed, followed by our pass exactly once."""
    passes = _as_tuple(hook)
    if any(each is LOWERING or isinstance(each, Chain) for each in passes):
        if len(passes) == 1:
            return passes[0]  # type: ignore[return-value]
        flat: list[Callable[..., Any]] = []
        for each in passes:
            flat.extend(each.first if isinstance(each, Chain) else (each,))
        passes = tuple(each for each in flat if each is not LOWERING)
    return Chain(passes) if passes else LOWERING


def install() -> None:
    without_dispatcher()
    setattr(inductor_config, HOOK, _chained(getattr(inductor_config, HOOK)))
    _guard_replays()


def uninstall() -> None:
    rest: list[Callable[..., Any]] = []
    for each in _as_tuple(getattr(inductor_config, HOOK)):
        if isinstance(each, Chain):
            rest.extend(each.first)
        elif each is not LOWERING:
            rest.append(each)
    setattr(inductor_config, HOOK, None if not rest else rest[0] if len(rest) == 1 else rest)
    _unguard_replays()


def compile_with_pass(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None,
    options: Mapping[str, Any] | None,
) -> Callable[..., Any]:
    without_dispatcher()
    chosen = dict(torch._TorchCompileInductorWrapper(mode, dict(options or {}), None).config)
    chosen[HOOK] = _chained(chosen.get(HOOK, getattr(inductor_config, HOOK)))
    graphs = chosen.get("triton.cudagraphs", inductor_config.triton.cudagraphs)
    if graphs and waiting_first():
        # Without CUDA graphs it would cost the host more than the GPU gains.
        chosen.setdefault(EARLY, True)
    gm, inputs, parts = apart(gm, list(example_inputs))
    with _seeing_every_graph():
        compiled: Any = records.watch(
            lambda: compile_module.compile_fx(gm, inputs, config_patches=chosen)
        )
    compiled = subclasses.given_whole(compiled, parts)
    return _refreshing(compiled) if graphs else cast(Callable[..., Any], compiled)


@functools.cache
def waiting_first() -> bool:
    """Make Inductor's kernels that start before their predecessors have ended (programmatic
    dependent launch, Hopper and later) wait before they touch memory. False where none do.

    Ours let the next one start at once, to read weights while theirs runs. Inductor's wait only for
    results of the kernel just before, which must then have waited for all others. Having waited,
    they too let the next one start, which may be a GEMM, unless the graph computes its weights.
    """
    original = getattr(TritonKernel, "_filter_pdl", None)
    if original is None:
        return False

    def filtered(self: Any, code: Any) -> None:
        original(self, code)
        if self._enable_pdl_codegen():
            both = self.GDC_WAIT, self.GDC_LAUNCH
            module: Any = V.graph.module
            first = both[:1] if under_way.computes_codes(module.graph) else both
            rest = [each for each in code._lines if str(each).strip() not in both]
            code._lines = [*first, *rest]

    TritonKernel._filter_pdl = filtered  # type: ignore[method-assign]
    return True


@functools.cache
def without_dispatcher() -> None:
    """Make Inductor's Python code call the kernels of our ops themselves (`_library.implement`),
    which spares the host a way through the dispatcher back to Python."""
    kernels: Any = FallbackKernel
    original = getattr(kernels, "set_python_kernel_name", None)
    if original is None:
        return

    def named(self: Any, name: str | None) -> None:
        original(self, name)
        op, device = self.op_overload, self.get_device()
        in_python = not (V.graph.cpp_wrapper or getattr(V.graph, "fx_wrapper", False))
        ours = getattr(op, "namespace", "") == NAMESPACE
        if in_python and ours and device is not None and hasattr(op, device.type):
            self.python_kernel_name += f".{device.type}"

    kernels.set_python_kernel_name = named


class _Sources:
    """`subclasses.Sources` of Dynamo's graphs."""

    def is_weight(self, node: torch.fx.Node) -> bool:
        return bool((node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))

    def copy(self, old: Any, new: Any, part: str = "") -> None:
        new._dynamo_source = AttrSource(old._dynamo_source, part) if part else old._dynamo_source
        if part:
            kind = old.meta["tensor_dict"]["_dynamo_static_input_type"]
            new.meta["tensor_dict"] = {"_dynamo_static_input_type": kind}

    def copy_graph(self, old: Any, new: Any) -> None:
        new.meta = dict(old.meta)
        new._param_name_to_source = old._param_name_to_source


def apart(
    gm: torch.fx.GraphModule, inputs: list[Any]
) -> tuple[torch.fx.GraphModule, list[Any], subclasses.Parts]:
    """`subclasses.take_apart` where it saves something and the graph is one of Dynamo's."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    known = hasattr(gm, "_param_name_to_source") and len(placeholders) == len(inputs)
    if not SUBCLASSES_ARE_ASKED or not known:
        return gm, inputs, ()
    if not all(hasattr(node, "_dynamo_source") for node in placeholders):
        return gm, inputs, ()
    return subclasses.take_apart(gm, inputs, _Sources())


def recording_backend(
    seen: list[tuple[torch.fx.GraphModule, tuple[Any, ...]]],
) -> Callable[..., Any]:
    """A backend that runs our pass, and in place of the graph appends it and the tensors it is
    called with to `seen`."""

    def forward(fx: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        LOWERING(fx.graph)

        def run(arguments: list[Any]) -> Any:
            seen.append((fx, tuple(arguments)))
            raise _Seen

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return cast(
        Callable[..., Any],
        aot_autograd(
            fw_compiler=forward,
            inference_compiler=forward,
            decompositions=select_decomp_table(),
        ),
    )


class _Seen(Exception):
    """A graph was recorded: nothing needs to be computed."""


def trace(module: torch.nn.Module, backend: Callable[..., Any], x: torch.Tensor) -> None:
    """Call a module under a recording backend, whole, with a dynamic number of rows x[.., M, K]."""
    torch._dynamo.maybe_mark_dynamic(x, x.dim() - 2)
    with contextlib.suppress(_Seen):
        torch.compile(module, backend=backend, fullgraph=True)(x)


@contextlib.contextmanager
def many_traces() -> Iterator[None]:
    """Room for a trace of every shape; afterwards no guard keeps a module alive."""
    dynamo = torch._dynamo.config
    with dynamo.patch(recompile_limit=4096, accumulated_recompile_limit=65536):
        yield


def _seeing_every_graph() -> contextlib.AbstractContextManager[Any]:
    """Inside `strict()`, no graph comes from PyTorch's caches, which keep no decisions."""
    if is_strict():
        patched: Any = inductor_config.patch(force_disable_caches=True)
        return cast(contextlib.AbstractContextManager[Any], patched)
    return contextlib.nullcontext()


def _refreshing(compiled: Any) -> Callable[..., Any]:
    """A replayed CUDA graph runs no Python, so a weight that changed in place since the capture
    must be repacked, into the buffers the graph reads, before the replay."""

    def refreshed(*args: Any) -> Any:
        runtime.refresh_captured()
        return compiled(*args)

    return refreshed


def _guard_replays() -> None:
    """Do the same for plain Inductor, whose entry point is looked up at each compile."""
    if hasattr(compile_module.compile_fx, "intlass_original"):
        return
    original = compile_module.compile_fx

    @functools.wraps(original)
    def guarded(gm: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        parts: subclasses.Parts = ()
        if isinstance(gm, torch.fx.GraphModule):
            gm, inputs, parts = apart(gm, list(inputs))
        # compile_fx calls itself with its config_patches in force: the inner call sees them.
        with _seeing_every_graph():
            compiled = records.watch(lambda: original(gm, inputs, *args, **kwargs))
        compiled = subclasses.given_whole(compiled, parts)
        return _refreshing(compiled) if inductor_config.triton.cudagraphs else compiled

    guarded.intlass_original = original  # type: ignore[attr-defined]
    compile_module.compile_fx = guarded  # type: ignore[assignment]


def _unguard_replays() -> None:
    original = getattr(compile_module.compile_fx, "intlass_original", None)
    if original is not None:
        compile_module.compile_fx = original
