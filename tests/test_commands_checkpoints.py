"""`intlass quantize`, `convert` and `explain`: files, reports, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

from tiny_checkpoints import FORMS, linears, tiny_llama, write

import intlass_ops
from intlass_ops.__main__ import main

PROMPT = torch.tensor([[1, 7, 23, 42, 5]])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(path)
    words = {chr(33 + i): i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def quantised(path: Path) -> int:
    model = intlass_ops.load_pretrained(path)
    assert torch.isfinite(model(PROMPT).logits).all()
    return sum(isinstance(m, intlass_ops.IntLinear) for m in model.modules())


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_quantize_writes_what_load_pretrained_reads(
    dense: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["quantize", str(dense), str(out), "--method", method, "--group-size", "16"]
    if method != "rtn":
        text = tmp_path / "text.txt"
        text.write_text(" ".join("".join(map(chr, range(33, 97))) for _ in range(40)))
        command += ["--calibration", str(text), "--samples", "4", "--window", "16"]
    assert main([*command, "--keep", "model.layers.0.mlp.down_proj"]) == 0
    assert quantised(out) == len(linears(tiny_llama())) - 1
    assert (out / "tokenizer.json").is_file()
    report = capsys.readouterr().out
    assert "quantised linears" in report
    assert "peak memory" in report


def test_convert_keeps_codes_and_explain_names_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = write(tmp_path / "theirs", FORMS["gptq v1"])
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    model = intlass_ops.load_pretrained(tmp_path / "ours")
    torch.testing.assert_close(model(PROMPT).logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert main(["explain", str(tmp_path / "ours")]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["model.layers.1.mlp.down_proj", "matmul_int4_bf16_tn", "w4a16"] in rows


def test_explain_feeds_a_decoder_and_names_what_takes_no_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=32, decoder_start_token_id=0, **sizes)
    model = transformers.T5ForConditionalGeneration(config)
    images = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    seer = transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=32, intermediate_size=32, **images)
    )
    for name, each in (("text", model), ("images", seer)):
        intlass_ops.quantize_(each, intlass_ops.Int8WeightOnly())
        intlass_ops.save_pretrained(each, tmp_path / name)
    capsys.readouterr()
    assert main(["explain", str(tmp_path / "text")]) == 0
    assert "decoder.block.0.layer.1.EncDecAttention.o" in capsys.readouterr().out
    assert main(["explain", str(tmp_path / "images")]) == 2
    assert "ViTForImageClassification takes no tokens" in capsys.readouterr().err


def test_what_cannot_start_says_why(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def problem(*arguments: str | Path) -> str:
        assert main(["quantize", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "exists and is not an empty directory" in problem(dense, dense)
    assert "K=32 is not a multiple of group_size=128" in problem(dense, out)
    assert "no such directory" in problem(tmp_path / "nothing", out)
    assert "'hqq' makes INT4" in problem(dense, out, "--scheme", "w8a8", "--method", "hqq")
    text = tmp_path / "short.txt"
    text.write_text("ab")
    short = ("--method", "gptq", "--group-size", "16", "--calibration", text)
    assert "fewer than one window of 512" in problem(dense, out, *short)
    assert not out.exists()
    write(tmp_path / "theirs", FORMS["awq"])
    assert "to keep its codes: intlass convert" in problem(tmp_path / "theirs", out)
    config = json.loads((dense / "config.json").read_text())
    assert "quantization_config" not in config
