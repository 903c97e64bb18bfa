# ruff: noqa: F821
"""Variants of ours for a harness that times a Llama-shaped model under torch.compile.

The harness runs this file inside its own namespace (EXTRA=this file), which brings `variant`: a
variant quantises the model in place and returns the keyword arguments of torch.compile. The
torchao variants show what a model quantised by that library gains from our backend.
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


@variant("torchao_int8dyn_intlass")
def _(model):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return {"backend": lowering.backend, "mode": "reduce-overhead"}


@variant("torchao_intx4_intlass")
def _(model):
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128)))
    return {"backend": lowering.backend, "mode": "reduce-overhead"}
