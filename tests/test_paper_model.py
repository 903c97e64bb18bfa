"""benchmarks/paper_model.py: loops are found, units add up, a fit finds what it was made from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import paper_model
import sass_counts

LOOPS = """
.L_x_0:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDSM.16.M88.4 R8, [R2] ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/              @!P1 LOP3.LUT R8, R8, 0xf0f0f0f, R9, 0x6a, !PT ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
        /*0080*/                   EXIT ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
"""


def test_the_main_loop_is_the_smallest_with_most_of_the_products() -> None:
    names = [name for name, _ in sass_counts.main_loop(LOOPS)]
    assert names == ["HMMA.16816.F32.BF16", "LOP3.LUT", "HMMA.16816.F32.BF16", "BRA"]


def test_a_fit_finds_the_parameters_that_made_the_times() -> None:
    kernel = sass_counts.Kernel(16, {"issue": 5.0, "alu": 2.0, "bytes": 200.0}, 128)
    gpu = paper_model.GPUS["H200"]
    problems = []
    for m in (1, 8, 16, 64, 200, 1000, 3000):
        for n, k in ((4096, 4096), (28672, 4096), (1024, 8192)):
            c = paper_model.config.pick(gpu.device, paper_model.SCHEMES["w4a16"].shape(m, n, k))
            problems.append(paper_model.problem_of(gpu, c, kernel, m, n, k))
    times = [paper_model.predict((3.0, 2.0, 4.0, 2.0, 0.5), each)[0] for each in problems]
    parameters, errors = paper_model.fit(problems, times)
    assert max(map(abs, errors)) < 0.01
    assert parameters[1:] == pytest.approx([2.0, 4.0, 2.0, 0.5], rel=0.05)
