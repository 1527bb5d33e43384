"""Triton kernels run on the GPU if there is one, else under Triton's interpreter; set TRITON_INTERPRET to choose."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read while triton is imported, by whoever imports it first
