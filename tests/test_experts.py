"""Fused mixtures of experts: the grouped product, and those of transformers quantised and saved."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import write_gpt_oss
from tolerance import assert_identical
from torch import Tensor, nn

from intlass_ops import (
    Fp4ExpertLinear,
    Int4WeightOnly,
    Int8DynamicActivationInt8Weight,
    IntExpertLinear,
    Scheme,
    dequantize,
    fp4,
    matmul_experts,
    pack_int4,
    quantize_,
)
from intlass_ops.nn import IntExpertPairLinear
from intlass_ops.ops.block_scaled_kernels import decode

PROMPT = torch.tensor([[1, 7, 23, 5], [3, 9, 9, 1]])


def stack(experts: int = 3, n: int = 5, k: int = 32, groups: int = 2) -> dict[str, Tensor]:
    """INT4 experts with small integers for scales: exact in fp32."""
    rng = torch.Generator().manual_seed(0)
    return {
        "w": pack_int4(torch.randint(0, 16, (experts, n, k), generator=rng)),
        "scales": torch.randint(1, 4, (experts, n, groups), generator=rng).float(),
        "zeros": torch.randint(0, 16, (experts, n, groups), generator=rng).to(torch.uint8),
    }


def dense_of(weights: dict[str, Tensor]) -> Tensor:
    return torch.stack([dequantize(*each) for each in zip(*weights.values(), strict=True)])


@pytest.mark.parametrize("ends", [[2, 2, 6], [0, 4, 6], [6, 6, 6], [1, 2, 3], [0, 0, 0]])
def test_each_run_of_tokens_meets_its_expert(ends: list[int], device: str) -> None:
    weights = {name: t.to(device) for name, t in stack().items()}
    x = torch.randint(-4, 5, (6, 32)).float().to(device)
    bias = torch.randint(-4, 5, (3, 5)).float().to(device)
    y = matmul_experts(x, **weights, ends=torch.tensor(ends, device=device), bias=bias)
    expected = torch.zeros(6, 5, device=device)
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        expected[start:end] = x[start:end] @ dense_of(weights)[e].T + bias[e]
    assert_identical(y, expected)


@pytest.mark.parametrize("k", [32, 31])
def test_two_halves_are_codes_of_eight_bits_with_zero_points(k: int, device: str) -> None:
    rng = torch.Generator().manual_seed(1)
    codes, zeros = (torch.randint(0, 256, shape, generator=rng) for shape in ((3, 5, k), (3, 5, 1)))
    scales = torch.randint(1, 4, (3, 5, 1), generator=rng).float()
    none = torch.zeros_like(zeros)
    layer = IntExpertPairLinear(
        pack_int4(torch.cat([codes & 15, codes >> 4], 1)),
        torch.cat([scales, 16 * scales], 1),
        torch.cat([zeros, none], 1).float(),
        in_features=k,
    ).to(device)
    w = ((codes - zeros) * scales).to(device)
    assert_identical(layer.dequantize(), w)
    x, bias = (torch.randint(-4, 5, shape).float().to(device) for shape in ((4, k), (3, 5)))
    rows, ends = torch.tensor([3, 0, 2, 1], device=device), torch.tensor([1, 1, 4], device=device)
    y = layer(x, ends, bias, rows)
    expert = [0, 2, 2, 2]
    expected = torch.einsum("tk,tnk->tn", x[rows], w[expert]) + bias[expert]
    assert_identical(y, expected)
    assert layer.half().scales.dtype == torch.float32


def test_two_halves_have_zero_points_and_as_many_rows() -> None:
    codes, scales = torch.zeros(1, 3, 4, dtype=torch.uint8), torch.ones(1, 3, 1)
    with pytest.raises(ValueError, match=r"uint8 \(1, 3, 4\); expected uint8 \[experts, 2\*N"):
        IntExpertPairLinear(codes, scales, scales)
    with pytest.raises(ValueError, match="and zeros"):
        IntExpertPairLinear(codes[:, :2], scales[:, :2], None)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", [None, "int8", "int4"])
def test_tokens_in_any_order_are_quantised_once(activation: Any, device: str) -> None:
    layer = IntExpertLinear(*stack().values(), activation=activation).to(device)
    x, ends = torch.randn(4, 32, device=device), torch.tensor([2, 2, 6], device=device)
    rows = torch.tensor([3, 0, 0, 1, 2, 3], device=device)
    assert_identical(layer(x, ends, rows=rows), layer(x[rows], ends))


def test_gradients_are_those_of_the_dense_experts() -> None:
    weights, ends = stack(), torch.tensor([2, 2, 5])
    x = torch.randn(6, 32, requires_grad=True)
    bias = torch.randn(3, 5, requires_grad=True)
    matmul_experts(x, **weights, ends=ends, bias=bias).square().sum().backward()
    other, shift = (t.detach().clone().requires_grad_() for t in (x, bias))
    of = torch.tensor([0, 0, 2, 2, 2])
    (
        torch.einsum("tk,tnk->tn", other[:5], dense_of(weights)[of]) + shift[of]
    ).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(bias.grad, shift.grad, rtol=1e-4, atol=1e-2)


def fp4_stack(group: int, experts: int = 3, n: int = 5, k: int = 64) -> dict[str, Tensor]:
    """FP4 experts: every code, scales that are powers of two."""
    rng = torch.Generator().manual_seed(group)
    scales = 2.0 ** torch.randint(-3, 4, (experts, n, k // group), generator=rng)
    format_ = torch.float8_e8m0fnu if group == 32 else torch.float8_e4m3fn
    return {
        "w": torch.randint(0, 256, (experts, n, k // 2), generator=rng, dtype=torch.uint8),
        "scales": scales.to(format_).view(torch.uint8),
    }


def dense_fp4(weights: dict[str, Tensor], group: int, alpha: Tensor) -> Tensor:
    format_ = torch.float8_e8m0fnu if group == 32 else torch.float8_e4m3fn
    pairs = zip(weights["w"], weights["scales"].view(format_), strict=True)
    dense = torch.stack([decode(w, s, False, torch.float64) for w, s in pairs])
    return (dense * alpha[:, None, None]).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group", [16, 32])
def test_experts_of_fp4(group: int, dtype: torch.dtype, device: str) -> None:
    weights = {name: t.to(device) for name, t in fp4_stack(group).items()}
    alpha = torch.tensor([0.5, 2.0, 4.0], device=device)
    x = torch.randint(-4, 5, (6, 64), device=device).to(dtype)
    ends = torch.tensor([2, 2, 5], device=device)
    y = matmul_experts(x, **weights, ends=ends, alpha=alpha, out_dtype=torch.float32)
    dense = dense_fp4(weights, group, alpha)[torch.tensor([0, 0, 2, 2, 2], device=device)]
    assert_identical(y[:5], torch.einsum("tk,tnk->tn", x[:5].float(), dense))
    assert not y[5].any()


@pytest.mark.parametrize("group", [16, 32])
def test_gradients_of_fp4_experts(group: int) -> None:
    weights, alpha = fp4_stack(group), torch.tensor([0.5, 2.0, 4.0])
    x, ends = torch.randn(5, 64, requires_grad=True), torch.tensor([2, 2, 5])
    matmul_experts(x, **weights, ends=ends, alpha=alpha).sum().backward()
    dense = dense_fp4(weights, group, alpha)[torch.tensor([0, 0, 2, 2, 2])]
    torch.testing.assert_close(x.grad, dense.sum(1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scales": torch.ones(3, 5, 3, dtype=torch.uint8)}, ValueError, "3 scales a row of K=64"),
        (
            {"scales": torch.ones(3, 4, 2, dtype=torch.uint8)},
            ValueError,
            r"scales has shape \(3, 4, 2\); expected \[experts, N=5, groups\]",
        ),
        ({"a": torch.ones(6, 64, dtype=torch.int8)}, TypeError, "a has dtype int8"),
        ({"zeros": torch.ones(3, 5, 2)}, ValueError, "zeros belong to INT4 .* w is FP4"),
        ({"alpha": torch.ones(2)}, ValueError, r"alpha has shape \(2,\); expected \[experts\]"),
        ({"w": torch.zeros(3, 5, 64, dtype=torch.int8)}, TypeError, "w has dtype int8"),
    ],
)
def test_what_fp4_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"a": torch.ones(6, 64), **fp4_stack(32), "ends": torch.tensor([2, 4, 6])}
    with pytest.raises(error, match=message):
        matmul_experts(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ends": torch.tensor([1, 2])}, r"ends has shape \(2,\); expected \(3,\)"),
        ({"ends": torch.tensor([3, 2, 6])}, r"ends\[1\]=2 is not in \[3, 6\]"),
        ({"ends": torch.tensor([1, 2, 7])}, r"ends\[2\]=7 is not in \[2, 6\]"),
        ({"scales": torch.ones(3, 5)}, r"scales has shape \(3, 5\); expected \[experts"),
        (
            {"w": torch.zeros(5, 16, dtype=torch.uint8)},
            r"w has shape \(5, 16\); expected \[experts",
        ),
        ({"w": torch.zeros(3, 5, 32, dtype=torch.int8)}, "zeros belong to INT4 weights"),
        ({"a": torch.ones(6, 30)}, "a has 30 columns; K=32 needs 32"),
        ({"a": torch.ones(2, 6, 32)}, r"a has shape \(2, 6, 32\); expected \[tokens, K\]"),
        ({"k": 40}, "needs"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"a": torch.ones(6, 32), **stack(), "ends": torch.tensor([2, 4, 6])}
    with pytest.raises(ValueError, match=message):
        matmul_experts(**{**arguments, **change})


# -------------------------------------------------------------------------------- transformers


def tiny(name: str) -> Any:
    """A random model with biases where it has any, and its class."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3,
        "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    few = {"num_experts_per_tok": 2, "head_dim": 16}
    own = {
        "Mixtral": {"num_local_experts": 4},
        "GptOss": {"num_local_experts": 4, **few, "layer_types": ["full_attention"]},
        "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, **few},
    }[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **own)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for path, parameter in model.named_parameters():
        if path.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def not_the_head(_: nn.Module, path: str) -> bool:
    return path != "lm_head"


@pytest.mark.parametrize("scheme", [Int4WeightOnly(16), Int8DynamicActivationInt8Weight()])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Qwen3Moe"])
def test_experts_are_quantised_saved_and_loaded(name: str, scheme: Scheme, tmp_path: Path) -> None:
    from intlass_ops.integrations import experts
    from intlass_ops.integrations.load_pretrained import load_pretrained
    from intlass_ops.integrations.transformers_quantizer import IntlassConfig, save_pretrained

    dense = tiny(name)
    model = copy.deepcopy(dense)
    quantize_(model, scheme, not_the_head)
    assert sum(isinstance(m, IntExpertLinear) for m in model.modules()) == 2
    assert experts.experts_left(model) is None
    logits = model(PROMPT).logits
    model.set_experts_implementation("eager")  # has nothing left to run on
    assert torch.equal(model(PROMPT).logits, logits)
    tokens = model.generate(PROMPT, max_new_tokens=4, do_sample=False)

    save_pretrained(model, tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    assert torch.equal(again(PROMPT).logits, logits)
    assert torch.equal(again.generate(PROMPT, max_new_tokens=4, do_sample=False), tokens)

    dense.save_pretrained(tmp_path / "dense")
    config = IntlassConfig("w4a16" if scheme.bits == 4 else "w8a8", group_size=16)
    loaded = type(dense).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert torch.equal(loaded(PROMPT).logits, logits)
    plain = loaded.dequantize()
    assert not any(isinstance(m, IntExpertLinear) for m in plain.modules())
    if scheme.activation is None:
        torch.testing.assert_close(plain(PROMPT).logits, logits, rtol=1e-3, atol=1e-3)


def test_a_graph_holds_the_experts_whole() -> None:
    model = tiny("GptOss")
    quantize_(model, Int4WeightOnly(16))
    mixture = model.model.layers[0].mlp.experts
    x, chosen = torch.randn(5, 32), torch.tensor([[0, 3], [3, 1], [1, 0], [3, 0], [1, 3]])
    given = torch.rand(5, 2)
    fast = torch.compile(mixture, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (5, 3):
            arguments = (x[:tokens], chosen[:tokens], given[:tokens])
            torch.testing.assert_close(fast(*arguments), mixture(*arguments))


def test_experts_stay_where_they_are_not_asked_for() -> None:
    model = tiny("Mixtral")
    with pytest.warns(UserWarning, match=r"quantize_: 2 fused expert weights stay .*left out"):
        quantize_(model, Int4WeightOnly(16), lambda module, _: type(module) is nn.Linear)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: K=32 is not a multiple of"):
        quantize_(tiny("Mixtral"), Int4WeightOnly(64), lambda _, path: path.endswith("experts"))


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 16, 32))


def test_experts_of_another_kind_are_reported() -> None:
    with pytest.warns(UserWarning, match=r"1 fused expert weights stay torch.float32 \(0\.w, …"):
        quantize_(nn.Sequential(Unknown()), Int4WeightOnly(16))


@torch.no_grad()
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Qwen3Moe"])
def test_experts_learn_from_what_reaches_them(name: str) -> None:
    """Their outputs' error, of rounding to nearest, without and with data."""
    from intlass_ops.integrations import experts

    dense = tiny(name)
    rng = torch.Generator().manual_seed(1)
    data = [torch.randint(0, 32, (8, 48), generator=rng) for _ in range(3)]
    expected = [dense(batch).logits for batch in data]

    def error(method: Any, calibration: Any) -> float:
        model = copy.deepcopy(dense)
        scheme = Int4WeightOnly(16, method=method)
        quantize_(model, scheme, only_experts, calibration=calibration, progress=False)
        (mixture,) = (m for m in model.modules() if experts.is_quantized(m))
        assert not hasattr(mixture, "intlass_multiply")
        outputs = [model(batch).logits for batch in data]
        return sum(float((y - e).square().sum()) for y, e in zip(outputs, expected, strict=True))

    without, with_data, gptq = error("mse", None), error("mse", data), error("gptq", data)
    assert gptq < 0.8 * with_data < 0.8 * without


def only_experts(module: nn.Module, _: str) -> bool:
    return not isinstance(module, nn.Linear)


def test_experts_that_no_data_reaches_are_quantised_without() -> None:
    from intlass_ops.integrations import experts

    model, plain = tiny("Mixtral"), tiny("Mixtral")
    one = [torch.tensor([[5]])]  # reaches two of four experts
    quantize_(model, Int4WeightOnly(16, method="gptq"), only_experts, calibration=one)
    quantize_(plain, Int4WeightOnly(16, method="mse"), only_experts)
    (of_data,) = (m for m in model.modules() if experts.is_quantized(m))
    (of_none,) = (m for m in plain.modules() if experts.is_quantized(m))
    for name in experts.projections(of_data):
        codes, others = (getattr(m, name + experts.SUFFIX).weight for m in (of_data, of_none))
        assert int((codes == others).flatten(1).all(1).sum()) >= 2


@torch.no_grad()
def test_gpt_oss_is_read_exactly(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from intlass_ops.integrations.load_pretrained import load_pretrained

    dense = write_gpt_oss(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    # transformers' own reader is exact for these scales; for all of them see the test below
    model = load_pretrained(tmp_path)
    for at, name in itertools.product((0, 1), ("gate_up_proj", "down_proj")):
        path = f"model.layers.{at}.mlp.experts.{name}"
        layer, stored = model.get_submodule(f"{path}_quantized"), theirs[f"{path}_blocks"]
        assert isinstance(layer, Fp4ExpertLinear)
        assert torch.equal(layer.weight, stored.flatten(2))
        assert torch.equal(layer.scales, theirs[f"{path}_scales"])
        assert torch.equal(layer.dequantize(), dense.get_parameter(path).transpose(1, 2))
    logits, options = model(PROMPT).logits, {"max_new_tokens": 4, "do_sample": False}
    torch.testing.assert_close(logits, dense(PROMPT).logits, rtol=1e-4, atol=1e-4)
    tokens = model.generate(PROMPT, **options)
    assert torch.equal(tokens, dense.generate(PROMPT, **options))
    model.save_pretrained(tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    assert torch.equal(again(PROMPT).logits, logits)
    assert torch.equal(again.generate(PROMPT, **options), tokens)
    plain = model.dequantize()
    for path in theirs:
        if path.endswith("_blocks"):
            path = path.removesuffix("_blocks")
            assert torch.equal(plain.get_parameter(path), dense.get_parameter(path))


def test_every_mxfp4_code_and_scale(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from intlass_ops.formats.checkpoint import Checkpoint
    from intlass_ops.formats.mxfp4 import Mxfp4

    blocks = torch.arange(256, dtype=torch.uint8).repeat(2).view(1, 1, 32, 16).expand(1, 8, 32, 16)
    scales = torch.arange(256, dtype=torch.uint8).clamp(max=254).view(1, 8, 32)
    save_file({"x.w_blocks": blocks.contiguous(), "x.w_scales": scales}, tmp_path / "a.safetensors")
    _, tensors = Mxfp4(Checkpoint(tmp_path)).experts("x.w")
    found = Fp4ExpertLinear(**{name: read() for name, read in tensors.items()}).dequantize()
    nibbles = torch.stack((blocks & 15, blocks >> 4), -1).flatten(3)[0]
    expected = fp4.decode_e2m1(nibbles, torch.float64) * 2.0 ** (
        scales[0, ..., None].double() - 127
    )
    assert torch.equal(found, expected.float().view(1, 8, 1024))


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("_scales", lambda t: t.fill_(255), "holds a NaN"),
        ("_scales", lambda t: t[:, :1].clone(), r"has shape \[4, 1, 2\]; expected \[4, 192, 2\]"),
        ("_blocks", lambda t: t[..., :8].clone(), "16 codes a block; expected 32"),
        ("_blocks", lambda t: t.float(), "is F32; expected uint8"),
        ("_scales", lambda t: None, "is missing"),
    ],
)
def test_damaged_mxfp4_is_refused(part: str, damage: Any, message: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from intlass_ops.formats import FormatError
    from intlass_ops.integrations.load_pretrained import load_pretrained

    write_gpt_oss(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.1.mlp.experts.gate_up_proj{part}"
    changed = damage(state.pop(name))
    save_file(
        state if changed is None else {**state, name: changed}, tmp_path / "model.safetensors"
    )
    with pytest.raises(FormatError, match=message):
        load_pretrained(tmp_path)
