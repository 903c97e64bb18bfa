"""Triton kernels: searches and element-wise work. The GEMMs are CUDA's (cuda/)."""
