"""PTX on a CPU: what the CUDA kernels compute, thread by thread, where there is no GPU.

    text.py        the text of a kernel becomes a Program: instructions, parameters, variables
    machine.py     registers, branches, whose turn it is: all threads of a grid at once
    memory.py      tensors, at their own addresses; loads, stores, atomics
    threads.py     what threads do together: barriers, votes, shuffles
    arithmetic.py  what an instruction makes of its operands' values
    matrices.py    ldmatrix, stmatrix, mma and wgmma, on fragments of whole warps
    copies.py      asynchronous copies and what waits for them: cp.async, mbarrier, TMA, clusters
    gpu.py         `emulated`: the ops launch their kernels here

It is a model of the PTX ISA, not of a GPU: sums of tensor cores are exact and rounded once, and
threads take turns in an order of their own. An access outside the tensors and unaligned ones are
errors, as is a wait that nothing ends.
"""

from .gpu import emulated as emulated
