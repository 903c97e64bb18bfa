"""QATLinear: its formulas forward and backward, conversion, and whether training recovers."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from lowering_helpers import fresh
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter

import intlass_ops as ia
from intlass_ops import straight_through
from intlass_ops.nn import IntLinear
from intlass_ops.qat import QATConfig, QATLinear, RotatedIntLinear, convert_
from intlass_ops.rotation import hadamard_matrix, rotate

BITS = {"w4a4": (4, 4), "w4a8": (4, 8), "w8a8": (8, 8)}
QUEST = {4: 0.3534, 8: 0.0309}


def quantised(t: Tensor, bits: int, method: str) -> tuple[Tensor, Tensor]:
    """(t̂, which elements are not clipped), float64, one scale a row, by the formula."""
    qmax = 2 ** (bits - 1) - 1
    t = t.double()
    rms, amax = t.square().mean(1, keepdim=True).sqrt(), t.abs().amax(1, keepdim=True)
    s = QUEST[bits] * rms if method == "quest" else amax / qmax
    q = (t / s).round()
    return q.clamp(-qmax, qmax) * s, q.abs() <= qmax


def expected(
    x: Tensor, w: Tensor, b: Tensor, dy: Tensor, config: QATConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dx, dw, db of the module docstring's formulas."""
    h = hadamard_matrix(config.rotation, dtype=torch.float64) if config.rotation else torch.eye(16)
    h = h.double()
    w_bits, a_bits = BITS[config.scheme]
    x_hat, x_kept = quantised(rotate(x.double(), h), a_bits, config.method)
    w_hat, w_kept = quantised(rotate(w.double(), h), w_bits, config.method)
    y = x_hat @ w_hat.T + b.double()
    dx = rotate((dy.double() @ w_hat) * x_kept, h.T.contiguous())
    dw = rotate((dy.double().T @ x_hat) * w_kept, h.T.contiguous())
    return y, dx, dw, dy.double().sum(0)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().cpu().double() - b).norm() / b.norm())


CONFIGS = [
    QATConfig("w4a4", 32, "quest", "float"),
    QATConfig("w4a8", None, "abs_max", "float"),
    QATConfig("w8a8", 64, "quest", "int8"),
    QATConfig("w4a4", 16, "abs_max", "int8"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.scheme}-{c.method}-{c.backward}")
def test_formulas(config: QATConfig, device: str) -> None:
    torch.manual_seed(0)
    layer = QATLinear(nn.Linear(128, 48), config)
    x, dy = torch.randn(40, 128, requires_grad=True), torch.randn(40, 48)
    w, b = layer.weight.detach(), layer.bias.detach()
    y, dx, dw, db = expected(x.detach(), w, b, dy, config)
    layer = layer.to(device)
    moved = x.detach().to(device).requires_grad_()
    out = layer(moved)
    assert relative(out, y) < 1e-3  # few codes of the rotated weight fall on the other side
    total = [torch.zeros_like(t) for t in (moved, layer.weight, layer.bias)]
    repeats = 1 if config.backward == "float" else 200
    for _ in range(repeats):  # stochastic rounding: the mean is right
        grads = torch.autograd.grad(
            out, (moved, layer.weight, layer.bias), dy.to(device), retain_graph=True
        )
        for t, g in zip(total, grads, strict=True):
            t += g / repeats
    tolerance = 2e-3 if repeats == 1 else 4e-3
    errors = [relative(t, e) for t, e in zip(total, (dx, dw, db), strict=True)]
    assert max(errors) < tolerance, errors


def test_gradient_codes_are_unbiased_and_within_a_step() -> None:
    torch.manual_seed(0)
    dy, rows, columns = torch.randn(4, 64), torch.rand(4) + 0.5, torch.rand(64) + 0.5
    dy[3] = 0
    by_row, by_column = dy * columns, (dy * rows[:, None]).T
    errors = [torch.zeros_like(by_row), torch.zeros_like(by_column)]
    for seed in torch.randint(2**62, (2000, 1)):
        codes = torch.ops.intlass.quantize_gradient(dy, rows, columns, seed)
        for error, t, q, s in zip(
            errors, (by_row, by_column), codes[::2], codes[1::2], strict=True
        ):
            steps = (q[:, : t.shape[1]] * s - t) / s
            assert float(steps.abs().max()) <= 1 + 1e-4
            error += steps / 2000
    # A rounding has at most half a step of deviation; 5 sigma of the mean of 2000.
    assert max(float(error.abs().max()) for error in errors) < 5 * 0.5 / 2000**0.5


def test_straight_through_where_nothing_is_rounded() -> None:
    """Integers with amax 127 are their own codes: the gradients are those of a plain layer."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 8)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-127, 128, (8, 32)))
        linear.weight[:, 0] = 127
    x = torch.randint(-127, 128, (4, 32)).float()
    x[:, 1] = -127
    x.requires_grad_()
    layer = QATLinear(linear, QATConfig("w8a8", None, "abs_max", "float"))
    dy = torch.randint(-3, 4, (4, 8)).float()
    grads = torch.autograd.grad(layer(x), (x, linear.weight, linear.bias), dy)
    plain = torch.autograd.grad(linear(x), (x, linear.weight, linear.bias), dy)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.scheme}-{c.method}")
def test_conversion_computes_the_same(config: QATConfig, device: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 64, bias=False))
    parameters = [p.data_ptr() for p in model.parameters()]
    ia.quantize_(model, config)
    assert [p.data_ptr() for p in model.parameters()] == parameters
    model.to(device)
    x = torch.randn(2, 5, 128, device=device)
    before = model(x)
    convert_(model)
    kind = RotatedIntLinear if config.rotation else IntLinear
    assert all(type(model[i]) is kind for i in (0, 2))
    assert not list(model.parameters())
    assert torch.equal(model(x), before)


def test_conversion_in_place_needs_a_model_around_the_layer() -> None:
    with pytest.raises(TypeError, match=r"^convert_: the model is a QATLinear itself"):
        convert_(QATLinear(nn.Linear(32, 8), QATConfig()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_numbers_of_tokens_that_are_left_open_get_no_guard(dynamic: bool) -> None:
    """Whether there are more than a few decides how codes are stored, where it is known."""

    def step(x: Tensor) -> Tensor:
        return x + 1 if straight_through._is_known(x.shape[0] > 16) else x - 1

    frames = CompileCounter()
    with fresh():
        compiled = torch.compile(step, backend=frames, fullgraph=True, dynamic=dynamic)
        found = [float(compiled(torch.zeros(m, 64))[0, 0]) for m in (40, 8)]
    assert found == ([-1, -1] if dynamic else [1, -1])
    assert frames.frame_count == (1 if dynamic else 2)
    assert [float(step(torch.zeros(m, 64))[0, 0]) for m in (40, 8)] == [1, -1]


def test_compiles_without_graph_breaks() -> None:
    model = nn.Sequential(QATLinear(nn.Linear(64, 32), QATConfig("w8a8", 32, "quest", "float")))
    x = torch.randn(8, 64, requires_grad=True)
    y = model(x)
    (plain,) = torch.autograd.grad(y.square().sum(), x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.allclose(grad, plain)


def test_a_compiled_model_quantises_an_input_once() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    model = Pair()
    ia.quantize_(model, QATConfig("w8a8", 32, "quest", "int8"))
    targets: list[str] = []

    def note(graph: torch.fx.GraphModule, _inputs: object) -> object:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(
        fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition
    )
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    compiled(torch.randn(8, 64, requires_grad=True)).sum().backward()
    assert targets.count("intlass.fused_quantize.default") == 3
    assert targets.count("intlass.transpose_codes.default") == 3
    assert targets.count("intlass.quantize_gradient.default") == 2


def test_refusals() -> None:
    with pytest.raises(ValueError, match="QATConfig: rotation=48; expected one of"):
        QATConfig(rotation=48)
    model = nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 64))
    with pytest.raises(ValueError, match="quantize_: 1: QATLinear: K=40 is not a multiple of 32"):
        ia.quantize_(model, QATConfig())
    assert all(type(layer) is nn.Linear for layer in model)
    with pytest.raises(ValueError, match=r"QATLinear: x is \(3, 32\), the layer has K=64"):
        QATLinear(nn.Linear(64, 40), QATConfig())(torch.zeros(3, 32))


@pytest.mark.parametrize("backward", ["int8", "float"])
def test_no_rows_and_autocast(backward: Literal["int8", "float"]) -> None:
    layer = QATLinear(nn.Linear(64, 40), QATConfig("w4a8", backward=backward))
    x = torch.zeros(2, 0, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("how", ["to_empty", "assign"])
@pytest.mark.parametrize("rotation", [32, None])
def test_a_layer_made_on_the_meta_device_rotates(rotation: int | None, how: str) -> None:
    config = QATConfig("w4a4", rotation)
    layer = QATLinear(nn.Linear(64, 40), config)
    with torch.device("meta"):
        twin = QATLinear(nn.Linear(64, 40), config)
    assert twin.h.is_meta
    if how == "to_empty":
        twin.to_empty(device="cpu")
        twin.h = torch.full_like(twin.h, torch.nan)  # what "uninitialised" may be
        twin.to_empty(device="cpu")
    twin.load_state_dict(layer.state_dict(), assign=how == "assign")
    x = torch.randn(3, 64)
    assert torch.equal(twin(x), layer(x))


# ------------------------------------------------------------------------------ a small transformer


class Block(nn.Module):
    """One causal transformer block between an embedding and a head."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(32, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        q, k, v = (
            t.unflatten(-1, (2, -1)).transpose(1, 2)
            for t in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(-2))
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        logits: Tensor = self.head(self.norms[2](x))
        return logits


def test_training_recovers_half_of_what_w4a4_costs() -> None:
    torch.manual_seed(0)
    # A language with memory: the next letter is decided by the last two, with some noise.
    table = torch.randint(0, 16, (16, 16))

    def text(batch: int) -> Tensor:
        ids = torch.randint(0, 16, (batch, 24))
        for i in range(2, 24):
            follow = table[ids[:, i - 2], ids[:, i - 1]]
            ids[:, i] = torch.where(torch.rand(batch) < 0.9, follow, ids[:, i])
        return ids

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def train(model: nn.Module, steps: int, rate: float) -> None:
        optimiser = torch.optim.Adam(model.parameters(), rate)
        for _ in range(steps):
            optimiser.zero_grad()
            loss(model, text(48)).backward()
            optimiser.step()

    model, held_out = Block(16, 32), text(128)
    inner = lambda module, path: path != "head"  # noqa: E731 - one use, as an argument
    train(model, 250, 1e-2)
    with torch.no_grad():
        whole = float(loss(model, held_out))
        # What W4A4 makes of it without training: the same integers, largest magnitudes as scales.
        ia.quantize_(model, QATConfig("w4a4", None, "abs_max"), inner)
        broken = float(loss(model, held_out))
    train(model, 40, 2e-3)
    convert_(model)
    with torch.no_grad():
        recovered = float(loss(model, held_out))
    assert broken - whole > 0.02, (whole, broken)
    assert recovered - whole < (broken - whole) / 2, (whole, broken, recovered)
