# ruff: noqa: F821
"""Variants of ours for a harness that times a Llama-shaped model under torch.compile.

The harness runs this file inside its own namespace (EXTRA=this file), which brings `variant`: a
variant quantises the model in place and returns the keyword arguments of torch.compile. The
torchao variants show what a model quantised by that library gains from our backend, as it is, after
`prepare_` (PyTorch takes weights that are tensor subclasses apart at each call), and with our own
quantiser of activations in place of torchao's.
"""

import intlass_ops
from intlass_ops import lowering


def _ours(model, config):
    intlass_ops.quantize_(model, config)
    return {"backend": lowering.backend, "mode": "reduce-overhead"}


@variant("intlass_w4a16")
def _(model):
    return _ours(model, intlass_ops.Int4WeightOnly(group_size=128))


@variant("intlass_w8a8")
def _(model):
    return _ours(model, intlass_ops.Int8DynamicActivationInt8Weight())


@variant("intlass_w4a8")
def _(model):
    return _ours(model, intlass_ops.Int8DynamicActivationInt4Weight(group_size=128))


def _torchao(model, config, *, prepared, same_codes=True):
    from torchao.quantization import quantize_

    quantize_(model, config)
    if prepared:
        intlass_ops.prepare_(model, same_codes=same_codes)
    return {"backend": lowering.backend, "mode": "reduce-overhead"}


def _int8dyn():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _intx4():
    import torch
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128))


@variant("torchao_int8dyn_intlass")
def _(model):
    return _torchao(model, _int8dyn(), prepared=False)


@variant("torchao_int8dyn_prepared")
def _(model):
    return _torchao(model, _int8dyn(), prepared=True)


@variant("torchao_int8dyn_requantised")
def _(model):
    return _torchao(model, _int8dyn(), prepared=True, same_codes=False)


@variant("torchao_intx4_intlass")
def _(model):
    return _torchao(model, _intx4(), prepared=False)


@variant("torchao_intx4_prepared")
def _(model):
    return _torchao(model, _intx4(), prepared=True)
