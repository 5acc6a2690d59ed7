"""A GPU for machines that have none: tensors that say that they are on another device and compute on the CPU.

CUDA refuses operations on tensors of two devices, and a CPU generator for a tensor of the GPU. So does this,
so that a forgotten `.to(device)` shows without a GPU. Kernels, memory and speed it cannot show."""

import sys
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from models import loading
from utils import distributed

DEVICE = torch.device("meta")                           # the one other device of a CPU build of PyTorch
# module.to(DEVICE) replaces the parameters, as a GpuTensor cannot be the data of a CPU tensor
OVERWRITE_PARAMS = torch.__future__, "_overwrite_module_params_on_conversion"
aten = torch.ops.aten
# CUDA takes tensors of both devices for these, too: indices on the CPU, and copies
TAKES_BOTH = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index,
              aten.copy_, aten._to_copy}


class GpuTensor(torch.Tensor):
    """A CPU tensor, `values`, that says it is on DEVICE."""

    @staticmethod
    def __new__(cls, values):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, layout=values.layout, device=DEVICE)
        tensor.values = values
        return tensor

    def tolist(self):
        return self.values.tolist()

    def __repr__(self):
        return f"GpuTensor({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run_op(op, args, kwargs or {})


def run_op(op, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    has_gpu = any(isinstance(x, GpuTensor) for x in tensors)
    on_cpu = [tuple(x.shape) for x in tensors if not isinstance(x, GpuTensor) and x.dim()]
    if has_gpu and on_cpu and op.overloadpacket not in TAKES_BOTH:
        raise RuntimeError(f"{op} of tensors on the GPU and tensors of shape {on_cpu} on the CPU")
    device = kwargs.get("device")
    makes_gpu = has_gpu if device is None else torch.device(device).type == DEVICE.type
    generator = kwargs.get("generator")
    if makes_gpu and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{op} on the GPU with a generator of the CPU")

    def on_the_cpu(x):
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return x.values if isinstance(x, GpuTensor) else x
    out = op(*tree_map(on_the_cpu, args), **tree_map(on_the_cpu, kwargs))
    if op._schema.name.endswith("_") and isinstance(out, torch.Tensor):  # in place
        return args[0]
    return tree_map(lambda x: GpuTensor(x) if isinstance(x, torch.Tensor) else x, out) if makes_gpu else out


class OnGpu(TorchDispatchMode):
    """Tensors created with device=DEVICE are GpuTensors."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run_op(op, args, kwargs or {})


@contextmanager
def pretended_gpu():
    """Within it the device of a run is DEVICE. Files are read onto the CPU, as always."""
    def on_cpu(load):
        def load_on_cpu(*args, **kwargs):
            with _disable_current_modes(), pytest.MonkeyPatch.context() as loading_patches:
                loading_patches.setattr(torch, "tensor", make_tensor)
                loading_patches.setattr(*OVERWRITE_PARAMS, False)
                return load(*args, **kwargs)
        return load_on_cpu

    def of_the_cpu(ask):
        return lambda device="cpu", *args: ask("cpu" if device == DEVICE.type else device, *args)

    class Autocast(torch.autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    class AdamW(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "fused": None, "foreach": False})

    make_tensor, get_device = torch.tensor, distributed.get_device

    def tensor(values, *args, device=None, **kwargs):
        cpu_tensor = make_tensor(values, *args, **kwargs)
        return cpu_tensor if device is None else cpu_tensor.to(device)

    def new_tensor(self, values):
        return make_tensor(values, dtype=self.dtype).to(self.device)

    with pytest.MonkeyPatch.context() as patches:
        for module in list(sys.modules.values()):
            if getattr(module, "get_device", None) is get_device:
                patches.setattr(module, "get_device", lambda: DEVICE)
        for name in ("load_model", "load_backbone"):
            patches.setattr(loading, name, on_cpu(getattr(loading, name)))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            patches.setattr(torch, name, of_the_cpu(getattr(torch, name)))
        patches.setattr(torch, "autocast", Autocast)
        patches.setattr(torch.optim, "AdamW", AdamW)
        patches.setattr(torch, "tensor", tensor)
        patches.setattr(torch.Tensor, "new_tensor", new_tensor)
        patches.setattr(*OVERWRITE_PARAMS, True)
        with OnGpu():
            yield
