"""Tokenizers of GGUF files against transformers' own, and against SentencePiece's rule by hand."""

from __future__ import annotations

import itertools
import json
import pydoc_data.topics
from functools import cache
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from tiny_gguf import TEMPLATE, finish  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import AutoTokenizer, Qwen2Tokenizer  # noqa: E402

from intlass_ops.formats import FormatError  # noqa: E402
from intlass_ops.formats.gguf import GGUFFile  # noqa: E402
from intlass_ops.integrations import gguf_tokenizers  # noqa: E402
from intlass_ops.integrations.gguf_tokenizers import tokenizer_of  # noqa: E402

TEXTS = (
    "Hello world",
    "  two  spaces, 3.14159 and 20261231 digits\n\n\nthen\ttabs   ",
    "I've CAN'T we'll it's HTMLParser camelCase snake_case",
    "naïve façade 日本語のテキスト Привет 🙂🏽 \u00a0nbsp",
    "for i in range(10):\n    print(i)  # ünïcode\r\n",
    "<|im_start|>user\nthe statement<|im_end|>\n",
    " ",
    "",
    "\n",
)
CORPUS = [*TEXTS, *list(pydoc_data.topics.topics.values())[:12]]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BOS, EOS = 1, 2


@cache
def byte_level(split: str | None) -> tuple[list[str], list[str]]:
    """Tokens and merges learned on a text that ``split`` cut."""
    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(split), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocabulary = tokenizer.get_vocab()
    merges = [" ".join(each) for each in learned(tokenizer)]
    return sorted(vocabulary, key=vocabulary.__getitem__), merges


def learned(tokenizer: Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())["model"]["merges"]


def known_splits() -> dict[str, str]:
    """transformers' own, by name."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    if not hasattr(mapping, "GGUF_PRE_TOKENIZER_SPLITS"):
        pytest.skip("this version of transformers does not name its splits")
    return mapping.GGUF_PRE_TOKENIZER_SPLITS


def write(
    path: Path,
    model: str,
    tokens: list[str],
    *,
    arch: str = "llama",
    pre: str | None = None,
    merges: list[str] | None = None,
    scores: list[float] | None = None,
    kinds: list[int] | None = None,
    **flags: bool,
) -> GGUFFile:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if scores is not None:
        writer.add_token_scores(scores)
    writer.add_token_types(kinds or [3 if token in SPECIAL else 1 for token in tokens])
    if merges is not None:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, value in flags.items():
        getattr(writer, f"add_{name}")(value)
    return GGUFFile(finish(writer, path))


def write_byte_level(path: Path, pre: str, **how: Any) -> GGUFFile:
    tokens, merges = byte_level(known_splits().get(pre))
    return write(path, "gpt2", tokens, pre=pre, merges=merges, **how)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("pre", gguf_tokenizers._SPLITS)
def test_byte_level_round_trips_and_agrees_with_transformers(tmp_path: Path, pre: str) -> None:
    """Where transformers knows the split; it never takes whole words, and adds no BOS by itself."""
    file = write_byte_level(tmp_path / "t.gguf", pre, add_bos_token=False)
    ours = tokenizer_of(file)
    for text in TEXTS:
        assert ours.decode(ids(ours, text)) == text
    if pre not in known_splits() and pre not in ("gpt-2", "phi-2"):
        assert pre == "default" or len(ids(ours, "2026")) == 4
        return
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in TEXTS:
        assert ids(ours, text) == ids(theirs, text), text


def test_splits_are_those_of_transformers() -> None:
    for pre, split in gguf_tokenizers._SPLITS.items():
        if pre in known_splits():
            assert split.patterns == (known_splits()[pre],), pre


def test_qwen2_is_its_original_tokenizer(tmp_path: Path) -> None:
    file = write_byte_level(tmp_path / "t.gguf", "qwen2")
    tokens, merges = byte_level(known_splits()["qwen2"])
    original = Qwen2Tokenizer(
        vocab={t: i for i, t in enumerate(tokens)},
        merges=[tuple(m.split(" ")) for m in merges],
        unk_token="<unk>",
        additional_special_tokens=SPECIAL,
    )
    for text in (*TEXTS, "cafe\u0301 decomposed"):
        assert ids(tokenizer_of(file), text) == ids(original, text), text


def test_llama_3_takes_whole_words_and_begins_with_bos(tmp_path: Path) -> None:
    tokens, merges = byte_level(known_splits()["llama-bpe"])
    word = "Ġstatement"
    unreachable = [merge for merge in merges if merge.replace(" ", "") != word]
    tokens = [*(t for t in tokens if t != word), word]
    for pre, whole in (("llama-bpe", True), ("dbrx", False)):
        file = write(tmp_path / f"{pre}.gguf", "gpt2", tokens, pre=pre, merges=unreachable)
        found = ids(tokenizer_of(file), " statement")
        assert found[0] == BOS or not whole
        assert (found[-1] == tokens.index(word)) == whole
    assert tokenizer_of(file).decode(found) == " statement"


@pytest.mark.parametrize("value", [True, False])
def test_the_file_says_whether_bos_and_eos_are_added(tmp_path: Path, value: bool) -> None:
    file = write_byte_level(
        tmp_path / "t.gguf", "llama-bpe", add_bos_token=value, add_eos_token=value
    )
    found = ids(tokenizer_of(file), "the")
    assert (found[0] == BOS, found[-1] == EOS) == (value, value)


def test_user_defined_tokens_stay_whole(tmp_path: Path) -> None:
    tokens, merges = byte_level(known_splits()["qwen2"])
    tokens = [*tokens, "<think>"]
    kinds = [*(3 if t in SPECIAL else 1 for t in tokens[:-1]), 4]
    file = write(tmp_path / "t.gguf", "gpt2", tokens, pre="qwen2", merges=merges, kinds=kinds)
    tokenizer = tokenizer_of(file)
    assert ids(tokenizer, "<think>") == [len(tokens) - 1]
    found = ids(tokenizer, "a<think>b<|im_end|>")
    assert tokenizer.decode(found, skip_special_tokens=True) == "a<think>b"


@cache
def pieces() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and kinds of a SentencePiece model: specials, bytes, pieces, best first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    tokenizer.train_from_iterator([*(each for each in CORPUS if each.isascii())], trainer)
    merged = ["".join(each) for each in learned(tokenizer)]
    single = [token for token in tokenizer.get_vocab() if len(token) == 1]
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    tokens = [*SPECIAL, *octets, *dict.fromkeys(merged), *sorted(single)]
    scores = [0.0] * (len(SPECIAL) + 256) + [-float(i) for i in range(len(tokens) - 261)]
    return tokens, scores, [2, 3, 3, 3, 3, *[6] * 256, *[1] * (len(tokens) - 261)]


def write_pieces(path: Path, **how: Any) -> GGUFFile:
    tokens, scores, kinds = pieces()
    return write(path, "llama", tokens, scores=scores, kinds=kinds, **how)


def by_scores(text: str) -> list[int]:
    """SentencePiece's rule: of all neighbours, those join first whose token has the best score."""
    tokens, scores, _ = pieces()
    index = {token: i for i, token in enumerate(tokens)}
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [
            (-scores[index[a + b]], at)
            for at, (a, b) in enumerate(itertools.pairwise(symbols))
            if a + b in index
        ]
        if not pairs:
            break
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found = []
    for symbol in symbols:
        octets = [f"<0x{octet:02X}>" for octet in symbol.encode()]
        found += [index[symbol]] if symbol in index else [index[each] for each in octets]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_by_score(tmp_path: Path, prefix: bool) -> None:
    tokenizer = tokenizer_of(write_pieces(tmp_path / "t.gguf", add_space_prefix=prefix))
    for text in (each for each in TEXTS if "<|" not in each):
        found = ids(tokenizer, text)
        assert found == [BOS, *by_scores(" " * (prefix and text != "") + text)], text
        assert tokenizer.decode(found, skip_special_tokens=True) == text


def test_sentencepiece_agrees_with_transformers(tmp_path: Path) -> None:
    """But for texts that begin with a space, to which its tokenizers add no other."""
    ours = tokenizer_of(write_pieces(tmp_path / "t.gguf"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in TEXTS:
        if "<|" not in text and not text.startswith(" "):
            assert ids(ours, text) == ids(theirs, text), text


def test_a_space_follows_special_tokens_of_sentencepiece(tmp_path: Path) -> None:
    """As in llama.cpp and in the tokenizer.json of Llama 2 (transformers' legacy=True)."""
    tokenizer = tokenizer_of(write_pieces(tmp_path / "t.gguf"))
    tokens = pieces()[0]
    user, end = tokens.index("<|im_start|>"), tokens.index("<|im_end|>")
    found = ids(tokenizer, "<|im_start|>the<|im_end|>")
    assert found == [BOS, user, *by_scores(" the"), end]


def test_gemma_has_no_prefix_and_keeps_runs_of_spaces(tmp_path: Path) -> None:
    tokens, scores, kinds = pieces()
    tokens, scores, kinds = [*tokens, "  ", "   "], [*scores, 0.0, 0.0], [*kinds, 4, 4]
    file = write(
        tmp_path / "t.gguf", "llama", tokens, arch="gemma3", scores=scores, kinds=kinds,
        add_space_prefix=False,
    )  # fmt: skip
    tokenizer = tokenizer_of(file)
    found = ids(tokenizer, "the   statement")
    assert found == [BOS, *by_scores("the"), len(tokens) - 1, *by_scores("statement")]
    assert tokenizer.decode(found, skip_special_tokens=True) == "the   statement"


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_saved_tokenizer_is_the_same(tmp_path: Path, model: str) -> None:
    path = tmp_path / "t.gguf"
    file = write_pieces(path) if model == "llama" else write_byte_level(path, "llama-bpe")
    tokenizer = tokenizer_of(file)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert ids(again, text) == ids(tokenizer, text)
    chat = [{"role": "user", "content": "the"}]
    prompt = again.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.pre", "odd", "with pre-tokenizer 'odd'; supported are 'llama' and 'gpt2'"),
        ("tokenizer.ggml.pre", None, "with pre-tokenizer None"),
        ("tokenizer.ggml.model", "bert", "tokenizer 'bert' with pre-tokenizer"),
        ("tokenizer.ggml.tokens", [1, 2], "'tokenizer.ggml.tokens' is no list of str"),
        ("tokenizer.ggml.tokens", None, "'tokenizer.ggml.tokens' is missing"),
        (
            "tokenizer.ggml.token_type",
            [1],
            "token_type' is no list of int for each token; it has 1",
        ),
        ("tokenizer.ggml.merges", None, "'tokenizer.ggml.merges' is missing"),
        ("tokenizer.ggml.merges", ["nothing here"], "the tokenizer's merges are damaged"),
        ("tokenizer.ggml.merges", ["one"], "the tokenizer's merges are damaged"),
        ("tokenizer.ggml.bos_token_id", 10**6, "bos_token_id' is 1000000; the vocabulary has"),
        ("tokenizer.ggml.bos_token_id", "1", "bos_token_id' is '1'; expected int"),
        ("tokenizer.ggml.add_bos_token", 1, "add_bos_token' is 1; expected bool"),
        ("tokenizer.chat_template", 1, "chat_template' is 1; expected str"),
    ],
)
def test_damaged_metadata_is_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    file = write_byte_level(tmp_path / "t.gguf", "llama-bpe")
    file.metadata.pop(key, None)
    if value is not None:
        file.metadata[key] = value
    with pytest.raises(FormatError, match=message):
        tokenizer_of(file)


def test_sentencepiece_without_scores_is_refused(tmp_path: Path) -> None:
    file = write_pieces(tmp_path / "t.gguf")
    del file.metadata["tokenizer.ggml.scores"]
    with pytest.raises(FormatError, match=r"'tokenizer\.ggml\.scores' is missing"):
        tokenizer_of(file)
