"""The tokenizer of a GGUF file, with its special tokens and chat template.

Two kinds: byte-level BPE ("gpt2"), whose way to split text has a name in the file, and
SentencePiece ("llama"), whose merges follow from the scores of its tokens. Splits, and whether a
text begins with BOS where the file does not say, are llama.cpp's (src/llama-vocab.cpp), where they
agree with the models' original tokenizers. transformers' own conversion
(transformers.integrations.gguf) is not used: it takes GPT-2's split for each name that it does not
know, and knows nothing of ``ignore_merges``. Not here: the model's config (gguf_config.py).

Of transformers' inner functions `generate_merges` is used, checked on 5.23 (there since 5.0).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from ..formats import FormatError
from ..formats.gguf import GGUFFile
from .gguf_config import metadata, token_id

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
_SPACE = "▁"


class _Split(NamedTuple):
    """How text is cut before BPE: by one pattern after the other, what lies between is kept.

    ``whole_words``: a piece that is a token is taken as it is, whatever the merges would make of
    it. ``bos``: texts begin with BOS, if the file does not say otherwise.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False


_ENDINGS = r"'s|'t|'re|'ve|'m|'ll|'d"
_UNSPACED = _ENDINGS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_WORDS = rf"(?i:{_ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+ENDING"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*ENDING"
)
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = _Split((_UNSPACED + r"|\s+",))
_DEFAULT = _Split((r"[\p{P}\$\+<=>\^~\|]+", _UNSPACED, r"\p{N}+", "[0-9][0-9][0-9]"))
_DIGITS_APART = _Split((r"\p{N}", *_GPT2.patterns))
_LLAMA3 = _Split((_WORDS + r"\p{N}{1,3}" + _REST,), whole_words=True, bos=True)
_QWEN2 = _Split((_WORDS + r"\p{N}" + _REST,))
_TEKKEN = _Split(
    (_CASED.replace("ENDING", "") + r"|\p{N}" + _CASED_REST,), whole_words=True, bos=True
)
_GPT4O = _Split((_CASED.replace("ENDING", rf"(?i:{_ENDINGS})?") + r"|\p{N}{1,3}" + _CASED_REST,))
# tokenizer.ggml.pre
_SPLITS = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS_APART),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3._replace(whole_words=False, bos=False)),
    "qwen2": _QWEN2._replace(nfc=True),
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}


def tokenizer_of(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The file's tokenizer as transformers has them; FormatError for one of an unknown kind."""
    model = metadata(file, "tokenizer.ggml.model", str)
    pre = metadata(file, "tokenizer.ggml.pre", str, None)
    tokens = _list(file, "tokens", str)
    kinds = _list(file, "token_type", int, len(tokens)) or [_NORMAL] * len(tokens)
    if model == "llama":
        tokenizer, begins = _sentencepiece(file, tokens, kinds), True
    elif model == "gpt2" and pre in _SPLITS:
        tokenizer, begins = _byte_level(file, tokens, _SPLITS[pre]), _SPLITS[pre].bos
    else:
        raise FormatError(
            f"{file.path}: tokenizer {model!r} with pre-tokenizer {pre!r}; supported are 'llama' "
            f"and 'gpt2' with {', '.join(map(repr, _SPLITS))}"
        )
    for kind, add in (
        (_CONTROL, tokenizer.add_special_tokens),
        (_USER_DEFINED, tokenizer.add_tokens),
    ):
        whole = [t for t, each in zip(tokens, kinds, strict=True) if each == kind]
        # All at once: each call searches for all of them anew, and Gemma has thousands.
        add([AddedToken(t, normalized=False, special=kind == _CONTROL) for t in whole])

    def special(name: str) -> str | None:
        index = token_id(file, name, len(tokens))
        return None if index is None else tokens[index]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special("bos"),
        eos_token=special("eos"),
        unk_token=special("unknown"),
        pad_token=special("padding"),
        add_bos_token=metadata(file, "tokenizer.ggml.add_bos_token", bool, begins),
        add_eos_token=metadata(file, "tokenizer.ggml.add_eos_token", bool, False),
        chat_template=metadata(file, "tokenizer.chat_template", str, None),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_level(file: GGUFFile, tokens: list[str], split: _Split) -> Tokenizer:
    merges = [tuple(each.split(" ", 1)) for each in _list(file, "merges", str)]
    tokenizer = Tokenizer(_bpe(file, tokens, merges, ignore_merges=split.whole_words))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(each), behavior="isolated") for each in split.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GGUFFile, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """A space before the text, and before what follows a special token, unless told otherwise."""
    scores = _list(file, "scores", float, len(tokens))
    if not scores:
        raise FormatError(f"{file.path}: metadata 'tokenizer.ggml.scores' is missing")
    if metadata(file, "general.architecture", str).startswith("gemma"):
        # Their original tokenizers merge in the order of the vocabulary.
        scores = [-float(index) for index in range(len(tokens))]
    # Others than normal tokens are not made by merging.
    made = {t: s for t, s, kind in zip(tokens, scores, kinds, strict=True) if kind == _NORMAL}
    merges = generate_merges({t: i for i, t in enumerate(tokens)}, made)
    unknown = token_id(file, "unknown", len(tokens))
    name = None if unknown is None else tokens[unknown]
    tokenizer = Tokenizer(
        _bpe(file, tokens, merges, unk_token=name, fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata(file, "tokenizer.ggml.add_space_prefix", bool, True):
        steps.insert(0, normalizers.Prepend(_SPACE))
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _bpe(file: GGUFFile, tokens: list[str], merges: list[Any], **how: Any) -> models.BPE:
    try:
        return models.BPE({token: index for index, token in enumerate(tokens)}, merges, **how)
    except Exception as problem:  # tokenizers raises no type of its own
        raise FormatError(f"{file.path}: the tokenizer's merges are damaged ({problem})") from None


def _list(file: GGUFFile, name: str, kind: type, length: int | None = None) -> list[Any]:
    """A list of the tokenizer; empty where one that may be missing (with a length) is missing."""
    key = f"tokenizer.ggml.{name}"
    found: list[Any] = metadata(file, key, list, *([] if length is None else [[]]))
    wrong = [each for each in found if type(each) is not kind]
    if wrong or (found and length not in (None, len(found))):
        raise FormatError(
            f"{file.path}: metadata {key!r} is no list of {kind.__name__} for each token; it has "
            f"{len(found)} items"
        )
    return found
