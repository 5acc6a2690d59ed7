"""Floating-point precision of a run: weights and optimiser stay fp32, network calls run under autocast.

    bf16   GPUs and CPUs with bf16 instructions
    fp16   other GPUs; gradients need a loss scale (torch.amp.GradScaler), or small ones would become zero
    fp32   everything else, and wherever --precision fp32 asks for it

Read next: train.py"""

import torch

from utils.distributed import get_device

PRECISIONS = ("bf16", "fp16", "fp32")
MIN_LOSS_SCALE = 2. ** -10             # gradients that overflow even at this loss scale are not finite


def default_precision():
    """The fastest precision that this process's device computes in itself, without emulation."""
    if get_device().type == "cpu":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16"


def check_precision(precision, is_sharded):
    """ValueError if a run cannot have this precision; None is the default of the hardware."""
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"--precision {precision}: wanted {', '.join(PRECISIONS)}")
    if is_sharded and (precision or default_precision()) == "fp16":
        raise ValueError("--fsdp with fp16 would need a loss scale shared by all processes: wanted "
                         "--precision bf16 or fp32")


def autocast(precision=None):
    """Context manager for network calls. precision: of PRECISIONS; None: default_precision."""
    precision = precision or default_precision()
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(get_device().type, dtype, enabled=precision != "fp32")


def compute_dtype(precision=None):
    """The type in which matrices are multiplied under autocast(precision)."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return dtypes[precision or default_precision()]


def without_tf32():
    """Context manager and decorator: a GPU computes convolutions in fp32, as a CPU does, for measurements."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def make_grad_scaler(precision=None):
    """The loss scale for fp16; for other precisions a GradScaler that does nothing."""
    precision = precision or default_precision()
    return torch.amp.GradScaler(get_device().type, enabled=precision == "fp16")
