"""What surrounds a linear in a model, and must not be misled when codes take the linear's place.

Lives here: linears that models of transformers keep for themselves, tied weights, PyTorch's encoder
layers, hooks. Where other code reads `weight` instead of calling a layer, leave that out by
``filter_fn``.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


def kept_in_fp32(model: nn.Module) -> set[str]:
    """Paths of the linears that a model of transformers, or one inside ``model``, keeps in fp32.

    Its own quantizers leave them as they are, too: T5 casts what `wo` takes to the dtype of
    `wo.weight`.
    """
    return {
        f"{owner}.{path}" if owner else path
        for owner, part in model.named_modules()
        for name in getattr(part, "_keep_in_fp32_modules", None) or ()
        for path, module in part.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and f".{name}." in f".{path}.weight."
    }


def require_plain(path: str, weight: Tensor) -> None:
    """TypeError for tensor subclasses: the weights of other libraries, and distributed ones."""
    if hasattr(weight, "__tensor_flatten__"):
        raise TypeError(
            f"quantize_: {path}: the weight is a {type(weight).__name__}; intlass_ops.prepare_ "
            "converts what another library quantised, distribute a model afterwards"
        )


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def succeed(new: Layer, old: nn.Module) -> Layer:
    """``new``, with the mode and the hooks of ``old``; handles still remove them.

    Without any where one makes the weight (weight_norm, pruning): ``new`` has another.
    """
    before = old._forward_pre_hooks.values()
    if not any(type(hook).__module__.startswith("torch.nn.utils.") for hook in before):
        for name in _HOOKS:
            setattr(new, name, getattr(old, name))
    return new.train(old.training)


def announce(model: nn.Module) -> None:
    """Tell the parts of ``model`` that read weights which of its linears are none any more."""
    _tell_encoders(model)
    _untie(model)


def _tell_encoders(model: nn.Module) -> None:
    """In inference `nn.TransformerEncoderLayer` hands the weights of both linears to one operator,
    unless its activation is none of those that this operator knows; `nn.TransformerEncoder`
    prepares its input for it."""
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            linears: tuple[nn.Module, ...] = (layer.linear1, layer.linear2)
            if not all(isinstance(linear, nn.Linear) for linear in linears):
                layer.activation_relu_or_gelu = 0
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            known = (getattr(layer, "activation_relu_or_gelu", 1) for layer in encoder.layers)
            encoder.use_nested_tensor = encoder.use_nested_tensor and all(known)


def _untie(model: nn.Module) -> None:
    """transformers would put the embedding's weight in the place of an output head's codes."""
    codes = {
        f"{path}.weight"
        for path, module in model.named_modules(remove_duplicate=False)
        if "weight" in module._buffers
    }
    for path, part in model.named_modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            tied = getattr(part, attribute, None)
            if isinstance(tied, dict):
                prefix = f"{path}." if path else ""
                left = {k: v for k, v in tied.items() if prefix + k not in codes}
                if len(left) < len(tied):
                    setattr(part, attribute, left)
