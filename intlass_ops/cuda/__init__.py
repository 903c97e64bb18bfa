"""The CUDA kernels and what turns them into something torch can call.

    *.cu, *.cuh   the kernels; ../config/ says with which parameters they may be built
    source.py     a kernel's file + a frozen Config -> the text NVRTC compiles
    compiler.py   text -> cubin: the only file that calls NVRTC
    cache.py      cubins on disk, shared by processes
    cubin.py      what a cubin says about itself
    jit.py        cubin -> loaded kernel -> launch, warm-up: the only file that calls CUDA's driver
    launch.py     tensors -> grid and parameters of each kernel family
    toolkit.py    what is on this machine, and what to install when something is missing

Importing this package needs neither CuPy nor a GPU.
"""
