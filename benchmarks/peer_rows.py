# ruff: noqa: F821
"""Rows of ours for a harness that times low-bit GEMMs of many libraries in one process.

The harness runs this file inside its own namespace, which brings `peer`, `Base` and `torch`: a row
says how to build the weights from the shared data of a shape (`ctx`) and how to call the kernel.
Each scheme has two rows: what `config.pick` chooses on this GPU, and, with names that end in
_sm80, the portable kernels (mma.sync), which a GPU of any age would run.
"""

import contextlib

import intlass_ops
from intlass_ops import config, packing
from intlass_ops.cuda import launch
from intlass_ops.ops.lanes import takes_lanes

ops = torch.ops.intlass
_portable_plans = {}


@contextlib.contextmanager
def _portable():
    """Calls pick for a GPU without wgmma, and keep their plans apart."""
    plans, device_of = launch._plans, launch.device_of
    launch._plans = _portable_plans
    launch.device_of = lambda index: config.without_wgmma(device_of(index))
    try:
        yield
    finally:
        launch._plans, launch.device_of = plans, device_of


def _both(name, **options):
    """The rows ``intlass_<name>`` and ``intlass_<name>_sm80``."""

    def register(row):
        peer(f"intlass_{name}", **options)(row)

        class Portable(row):
            portable = True

            def call(self, i, M):
                with _portable():
                    return super().call(i, M)

        Portable.__name__ = f"{row.__name__}Portable"
        peer(f"intlass_{name}_sm80", **options)(Portable)
        return row

    return register


class _Int4(Base):
    """Signed codes q - 8 with one scale per group of 128."""

    portable = False

    def build(self):
        codes = self.ctx.q4.to(torch.int8) - 8
        self.c = [(intlass_ops.pack_int4(codes), self.scales())]
        self.wbytes = sum(t.nbytes for t in self.c[0])

    def scales(self):
        return self.ctx.s4


@_both("w4a16", wbits=4, wref="w4")
class W4A16(_Int4):
    def call(self, i, M):
        return ops.matmul_int4_bf16_tn(self.ctx.x(M)["bf16"], *self.c[i])


@_both("w4a8_g128", act="xq", wbits=4, wref="w4", peak="int8")
class W4A8(_Int4):
    """INT8 activations as our quantiser leaves them for this product (intlass_ops.packing: as bytes
    or lanes), made outside the timing."""

    def prep_m(self, M):
        x = self.ctx.x(M)
        self.a, self.a_scale = x["xq"], x["sx"]
        w, scales = self.c[0]
        k = self.a.shape[-1]
        if not self.portable and takes_lanes(M, k, [w], scales, None, torch.bfloat16):
            self.a = packing.to_lanes(self.a.contiguous())

    def call(self, i, M):
        return ops.matmul_int4_bf16_tn(self.a, *self.c[i], a_scale=self.a_scale)


@_both("w4a8_chn", act="xq", wbits=4, wref="w4c", peak="int8")
class W4A8Channel(W4A8):
    def scales(self):
        return self.ctx.s1


@_both("w4a4", wbits=4, wref="w4", peak="int8", tol=0.4)
class W4A4(_Int4):
    """INT4 activations made outside the timing; compared with the unquantised product."""

    def prep_m(self, M):
        self.a, self.a_scale, _ = intlass_ops.quantize_int4(self.ctx.x(M)["bf16"])

    def call(self, i, M):
        return ops.matmul_int4_bf16_tn(self.a, *self.c[i], a_scale=self.a_scale)


class _Int8(Base):
    def build(self):
        self.c = [(self.ctx.q8,)]
        self.wbytes = self.ctx.q8.nbytes


@_both("w8a8", act="xq", wbits=8, wref="w8", peak="int8")
class W8A8(_Int8):
    def call(self, i, M):
        x = self.ctx.x(M)
        return ops.matmul_int8_bf16_tn(x["xq"], self.c[i][0], x["sx"], self.ctx.s8)


@_both("w8a8_pipe", kind="pipe", wbits=8, wref="w8", peak="int8", tol=2e-2)
class W8A8Pipe(_Int8):
    def call(self, i, M):
        q, scale, _ = ops.quantize_dynamic(self.ctx.x(M)["bf16"], 8, "token", None, True, None)
        return ops.matmul_int8_bf16_tn(
            q, self.c[i][0], scale, self.ctx.s8, out_dtype=torch.bfloat16
        )


@_both("w8a16", wbits=8, wref="w8")
class W8A16(_Int8):
    def call(self, i, M):
        return ops.matmul_int8_bf16_tn(self.ctx.x(M)["bf16"], self.c[i][0], None, self.ctx.s8)
