"""Elementwise kernels and reductions: one op a file, each with its formula, reference, Triton kernel and launcher.

They take tensors and numbers, never modules, configs or plans. The reference has the signature of the op: it is what
runs where Triton does not, and what the tests compare with. No kernel multiplies matrices: Triton has no tensor cores
on a T4 (capability 7.5), so products go to cuBLAS.
"""
