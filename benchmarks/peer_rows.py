# ruff: noqa: F821
"""Rows of ours for a harness that times low-bit GEMMs of many libraries in one process.

The harness runs this file inside its own namespace, which brings `peer`, `Base` and `torch`: a row
says how to build the weights from the shared data of a shape (`ctx`) and how to call the kernel.
Names end in _sm80 because these rows run the portable path (mma.sync), on any GPU.
"""

import intlass_ops

ops = torch.ops.intlass


class _Int4(Base):
    """Signed codes q - 8 with one scale per group of 128."""

    def build(self):
        codes = self.ctx.q4.to(torch.int8) - 8
        self.c = [(intlass_ops.pack_int4(codes), self.scales())]
        self.wbytes = sum(t.nbytes for t in self.c[0])

    def scales(self):
        return self.ctx.s4


@peer("intlass_w4a16_sm80", wbits=4, wref="w4")
class W4A16(_Int4):
    def call(self, i, M):
        return ops.matmul_int4_bf16_tn(self.ctx.x(M)["bf16"], *self.c[i])


@peer("intlass_w4a8_g128_sm80", act="xq", wbits=4, wref="w4", peak="int8")
class W4A8(_Int4):
    def call(self, i, M):
        x = self.ctx.x(M)
        return ops.matmul_int4_bf16_tn(x["xq"], *self.c[i], a_scale=x["sx"])


@peer("intlass_w4a8_chn_sm80", act="xq", wbits=4, wref="w4c", peak="int8")
class W4A8Channel(W4A8):
    def scales(self):
        return self.ctx.s1


@peer("intlass_w4a4_sm80", wbits=4, wref="w4", peak="int8", tol=0.4)
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


@peer("intlass_w8a8_sm80", act="xq", wbits=8, wref="w8", peak="int8")
class W8A8(_Int8):
    def call(self, i, M):
        x = self.ctx.x(M)
        return ops.matmul_int8_bf16_tn(x["xq"], self.c[i][0], x["sx"], self.ctx.s8)


@peer("intlass_w8a8_pipe_sm80", kind="pipe", wbits=8, wref="w8", peak="int8", tol=2e-2)
class W8A8Pipe(_Int8):
    def call(self, i, M):
        q, scale, _ = ops.quantize_dynamic(self.ctx.x(M)["bf16"], 8, "token", None, True, None)
        return ops.matmul_int8_bf16_tn(
            q, self.c[i][0], scale, self.ctx.s8, out_dtype=torch.bfloat16
        )


@peer("intlass_w8a16_sm80", wbits=8, wref="w8")
class W8A16(_Int8):
    def call(self, i, M):
        return ops.matmul_int8_bf16_tn(self.ctx.x(M)["bf16"], self.c[i][0], None, self.ctx.s8)
