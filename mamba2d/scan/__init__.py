"""The 2D selective scan: the equations in PyTorch, kernels in C++ and CUDA, and the operator over them."""
from .reference import random_problem, selective_scan_2d_naive, selective_scan_2d_ref
from .build import KernelError
from .cpu import cpu_kernel_status
from .cuda import cuda_kernel_status
from .operator import available_backends, scan_backend, selective_scan_2d
from .pieces import scan_step
from .decomposition import scan_decompositions
from .flops import count_scans, fvcore_handles, scan_flops
from .onnx import scan_translations

__all__ = [
    "available_backends", "count_scans", "cpu_kernel_status", "cuda_kernel_status", "fvcore_handles",
    "KernelError", "random_problem", "scan_backend", "scan_decompositions", "scan_flops",
    "scan_step", "scan_translations", "selective_scan_2d", "selective_scan_2d_naive", "selective_scan_2d_ref",
]
