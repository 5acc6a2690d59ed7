"""Several processes, one run:   torchrun --nproc-per-node 8 train.py …

Every process has its own micro-batches, with random numbers of their own, and all take the same step: the sum
of their gradients. Two processes do what one would with --set accumulate=2. With --shard each keeps only its
share of the weights (FSDP2), for what does not fit in one memory.
Read next: train.py"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def start():
    """Join the group that torchrun set up, where it did."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=2))


def device():
    """Where this process computes."""
    return torch.device(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Which of them this is; 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def sharded(tensor):
    return hasattr(tensor, "full_tensor")


def add_up(tensors):
    """Sum tensors over all processes, in place. After the backward pass, by plain all-reduce, and not by
    DistributedDataParallel: ADT calls its network again during that pass (recomputation), which DDP would
    take for the start of another. What is sharded has been summed already."""
    if world() > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors if not sharded(tensor)]:
            work.wait()


def agree(flag):
    """Whether any process says so, everywhere: clocks differ, and a signal may reach one alone."""
    said = torch.tensor(float(flag), device=device())
    add_up([said])
    return bool(said)


def shard(network):
    """FSDP2: from here on the weights of every block lie spread over all processes, and meet when it runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    torch.set_autocast_cache_enabled(False)                  # a weight that has moved on must be cast anew
    kind = next(network.parameters()).device.type
    mesh = init_device_mesh(kind, (world(),))
    blocks = {"BasicTransformerBlock", "ResnetBlock2D", "JointTransformerBlock", "Transformer", "Residual"}
    for module in [m for m in network.modules() if type(m).__name__ in blocks] + [network]:
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.)                # a sum: the loss is divided beforehand
        module.set_force_sum_reduction_for_comms(True)       # and gloo knows no other


def whole(tree, home=False):
    """Sharded tensors in nested dictionaries and lists -> complete ones. All processes must call it. home:
    for a file, in the main memory of process 0 alone, one after the other."""
    if isinstance(tree, dict):
        return {key: whole(value, home) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole(value, home) for value in tree)
    if not sharded(tree):
        return tree
    full = tree.full_tensor()
    return full if not home else full.cpu() if rank() == 0 else None


def mine(tensor):
    """This process' share of it."""
    return tensor.to_local() if sharded(tensor) else tensor


def moved(network):
    """Its weights have changed by other hands than an optimiser's: FSDP2 must gather them anew."""
    if hasattr(network, "reshard"):
        network.reshard()


def like(tensor, own):
    """A complete tensor -> spread as `own` is."""
    if not sharded(own) or tensor.shape != own.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)
