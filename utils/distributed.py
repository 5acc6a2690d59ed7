"""Training in several processes, started by torchrun --nproc-per-node 8 train.py … or by utils/launch.py.

Every process has its own micro-batches and random numbers, and all take the same optimiser step, with the sum
of their gradients. Two processes compute what one computes with --set gradient_accumulation_steps=2.
With --fsdp each process stores only its share of the weights (FSDP2), for networks that do not fit into the
memory of one device.
Read next: train.py"""

import os
import socket
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

LAUNCHED = "LAUNCHED_BY_TRAIN"         # set in the environment of processes that utils/launch.py has started
START_TIMEOUT_S = 300                  # for all processes to start
CONNECT_TIMEOUT = timedelta(seconds=10)  # of one attempt to reach process 0; others follow
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # process 0 may write large files while the others wait
WATCH_INTERVAL_S, GRACE_S = 2, 10      # of watch_for_failures
BUCKET_BYTES = 2 ** 25                 # small tensors are summed together, 32 MB in one all-reduce
# class names of the blocks that apply_fsdp shards one by one
FSDP_BLOCKS = {"BasicTransformerBlock", "ResnetBlock2D", "JointTransformerBlock", "TransformerBlock",
               "ResBlock"}


def init_distributed(check_start=lambda: None):
    """Join the process group of torchrun or of utils/launch.py; without one this does nothing. ValueError if
    the environment is incomplete or impossible, or if the other processes do not start in time; Ctrl-C and
    SIGTERM work meanwhile. check_start(): called again and again until all have started."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    has_cuda = torch.cuda.is_available()
    required = ["RANK", "MASTER_ADDR", "MASTER_PORT"] + (["LOCAL_RANK"] if has_cuda else [])
    missing = [name for name in required if not os.environ.get(name)]
    if missing:
        raise ValueError(f"WORLD_SIZE is set but {' and '.join(missing)} not: start several processes with "
                         "torchrun, or unset WORLD_SIZE for one")
    world_size = read_integer("WORLD_SIZE", 1)
    rank = read_integer("RANK", 0, world_size - 1)
    read_integer("MASTER_PORT", 1, 65535)
    if has_cuda:
        torch.cuda.set_device(read_integer("LOCAL_RANK", 0, torch.cuda.device_count() - 1,
                                           "start one process for each GPU of this machine"))
    store = wait_for_processes(rank, world_size, check_start)
    dist.init_process_group("nccl" if has_cuda else "gloo", store=store, rank=rank, world_size=world_size,
                            timeout=COLLECTIVE_TIMEOUT)
    watch_for_failures()


def read_integer(name, low, high=None, hint="start the processes with torchrun, which sets it"):
    """An environment variable as an integer from low to high; ValueError if it is none."""
    text = os.environ[name]
    with suppress(ValueError):
        value = int(text)
        if low <= value and (high is None or value <= high):
            return value
    wanted = f"{low} or more" if high is None else f"{low} to {high}"
    raise ValueError(f"{name}={text}: wanted a whole number, {wanted}: {hint}")


def default_store():
    return dist.distributed_c10d._get_default_store()


def watch_for_failures():
    """End this process, from a thread, some seconds after another one has failed: a collective operation
    would wait for it until COLLECTIVE_TIMEOUT, and no signal arrives there. The seconds are for a process
    that fails by itself, with a sentence of its own. leave_group ends the watch."""
    # a client of the store that waits for a key blocks other threads
    own_store = default_store().clone()
    has_left = watch_for_failures.has_left = threading.Event()

    def watch():
        with suppress(RuntimeError):                       # the host of the store has ended
            while not own_store.check(["failed"]):
                if has_left.wait(WATCH_INTERVAL_S):
                    return
            rank = own_store.get("failed").decode()
            if has_left.wait(GRACE_S):
                return
            print(f"process {get_rank()} stops: process {rank} has failed", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_group():
    """This process is alone again: what happened to the others concerns it no longer."""
    if dist.is_initialized():
        watch_for_failures.has_left.set()
        dist.destroy_process_group()


def abort(code):
    """End this process at once, without waiting for others or for threads, and let the others know."""
    with suppress(RuntimeError):
        default_store().set("failed", str(get_rank()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_processes(rank, world_size, check_start):
    """A key-value store that all processes have joined. It is polled from Python: torch's own start-up waits
    in C++, where no signal arrives."""
    uses_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun hosts the store
    is_host = rank == 0 and not uses_agent_store
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if is_host:
        check_port(port)
    deadline, attempt, store, num_ready = time.monotonic() + START_TIMEOUT_S, None, None, 0
    while num_ready < world_size:
        check_start()
        if time.monotonic() > deadline:
            raise ValueError(f"only {num_ready} of {world_size} processes started in {START_TIMEOUT_S} s: "
                             f"start all of them with MASTER_ADDR={host} and MASTER_PORT={port}, a port that "
                             "no other program uses")
        if store is not None:
            num_ready = store.add("num_ready", 0)
        elif attempt is None and (is_host or is_listening(host, port)):
            attempt = open_store(host, port, world_size, is_host)
        elif attempt is not None and attempt.done():
            if attempt.exception() is None:
                store = join_store(attempt.result(), rank, uses_agent_store)
            attempt = None                                             # a failed one is repeated
        time.sleep(.05)
    store.set_timeout(COLLECTIVE_TIMEOUT)
    return store


def check_port(port):
    """ValueError if process 0 cannot listen there."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        reason = os.strerror(error.errno)
        raise ValueError(f"RANK=0 cannot open MASTER_PORT={port} ({reason}): choose another port for all "
                         "processes, and give only one of them RANK=0") from None


def open_store(host, port, world_size, is_host):
    """A Future of the store. A thread waits for it: what listens there may be a program that never answers,
    and torch would wait for that without end."""
    attempt = Future()

    def connect():
        try:
            attempt.set_result(dist.TCPStore(host, port, world_size, is_host, wait_for_workers=False,
                                             timeout=CONNECT_TIMEOUT))
        except RuntimeError as error:
            attempt.set_exception(error)

    threading.Thread(target=connect, daemon=True).start()
    return attempt


def join_store(store, rank, uses_agent_store):
    """The part of the store for this start, in which this process counts as ready. ValueError if another one
    has its rank. torchrun numbers its processes itself, and may start them again in the same store."""
    store = dist.PrefixStore(f"run{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    if not uses_agent_store and store.add(f"rank{rank}", 1) > 1:
        raise ValueError(f"RANK={rank}: another process has it, too: give every process its own, and start "
                         "all of them again")
    store.add("num_ready", 1)
    return store


def is_listening(host, port):
    try:
        socket.create_connection((host, port), timeout=1).close()
        return True
    except OSError:
        return False


def get_device():
    """The device of this process."""
    return torch.device(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")


def get_world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_torchrun_size():
    """The number of processes that torchrun has started; 1 where train.py has started them itself, to share
    the batches of one (utils/launch.py)."""
    return 1 if LAUNCHED in os.environ else get_world_size()


def get_rank():
    """The number of this process. Rank 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_sharded(t):
    """Whether a tensor is a DTensor, of which this process holds a share only."""
    return hasattr(t, "full_tensor")


def all_reduce_sum_(tensors):
    """Sum tensors over all processes, in place. FSDP has summed the gradients of sharded tensors already;
    they are skipped.

    Gradients are summed here, after the backward pass, and not by DistributedDataParallel: gradient
    checkpointing calls the network again during the backward pass, and DDP would take that for the start of
    the next forward pass."""
    if get_world_size() == 1:
        return
    for bucket in make_buckets([tensor for tensor in tensors if not is_sharded(tensor)]):
        if len(bucket) == 1:
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
            tensor.copy_(total.view_as(tensor))


def make_buckets(tensors):
    """Lists of consecutive tensors of one type, BUCKET_BYTES at most unless it is a single tensor: a call for
    each of SDXL's 1,120 adapter matrices would take longer than their bytes."""
    buckets, num_bytes = [], 0
    for tensor in tensors:
        is_same_type = bool(buckets) and buckets[-1][0].dtype == tensor.dtype
        if is_same_type and num_bytes + tensor.nbytes <= BUCKET_BYTES:
            buckets[-1].append(tensor)
            num_bytes += tensor.nbytes
        else:
            buckets.append([tensor])
            num_bytes = tensor.nbytes
    return buckets


def any_rank(flag):
    """Whether the flag is true in any process; the same answer in all of them. Decisions that depend on a
    clock or a signal differ between processes, and must be made together."""
    flag = torch.tensor(float(flag), device=get_device())
    all_reduce_sum_([flag])
    return bool(flag)


def alternate(items, compute, skip=None):
    """Yield the tensor compute(*item) for every item, in all processes. The processes take turns: of as many
    items as there are processes each computes one, and calls skip(*item), which returns zeros of the same
    shape, for the others. Without skip every process computes all."""
    items, num_processes = list(items), get_world_size() if skip else 1
    for first in range(0, len(items), num_processes):
        tensors = []
        for turn, item in enumerate(items[first:first + num_processes]):
            is_own = num_processes == 1 or turn == get_rank()
            tensors.append(compute(*item) if is_own else skip(*item))
        if num_processes > 1:
            all_reduce_sum_(tensors)
        yield from tensors


def barrier():
    """Wait until every process is here."""
    any_rank(False)


def apply_fsdp(network, gather_dtype=None, fp32_modules=()):
    """Shard a network with FSDP2: the weights of every block are spread over all processes and gathered when
    the block runs.

    gather_dtype: type of the gathered weights (default: their own); gradients are summed in fp32 all the
    same. Inputs are not cast: bf16 has no timestep 999. fp32_modules: layers whose weights keep fp32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    torch.set_autocast_cache_enabled(False)  # a cached bf16 copy would outlive its weight
    device_type = next(network.parameters()).device.type
    mesh = init_device_mesh(device_type, (get_world_size(),))
    policy = MixedPrecisionPolicy()
    if gather_dtype not in (None, torch.float32):
        policy = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
    blocks = [module for module in network.modules() if type(module).__name__ in FSDP_BLOCKS]
    for module in [*fp32_modules, *blocks, network]:
        is_fp32 = any(module is fp32_module for fp32_module in fp32_modules)
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy() if is_fp32 else policy)
        module.set_gradient_divide_factor(1.)  # sum, not mean: the loss is divided beforehand
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction


def gather_full(tree, cpu_rank0=False):
    """Sharded tensors in nested dicts and lists -> complete tensors. All processes must call it together.
    cpu_rank0: for a file; each tensor moves to the CPU of rank 0 and is None elsewhere, so that the device
    holds one complete tensor at a time."""
    if isinstance(tree, dict):
        return {key: gather_full(value, cpu_rank0) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gather_full(value, cpu_rank0) for value in tree)
    if not is_sharded(tree):
        return tree
    full = tree.full_tensor()
    if not cpu_rank0:
        return full
    return full.cpu() if get_rank() == 0 else None


def to_local(t):
    """The share of a sharded tensor that this process holds; any other tensor as it is."""
    return t.to_local() if is_sharded(t) else t


def reshard_(network):
    """Drop FSDP2's gathered copies of the weights. Needed after the weights have been changed by anything but
    an optimiser (for example a swap to the EMA weights)."""
    if hasattr(network, "reshard"):
        network.reshard()


def distribute_like(tensor, ref):
    """A complete tensor -> sharded as `ref` is. Returned as it is if `ref` is not sharded, or has another
    shape (an optimiser's step counter)."""
    if not is_sharded(ref) or tensor.shape != ref.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(ref.device), ref.device_mesh, ref.placements)


def grad_norm_since(params, grads_before):
    """Norm of what was added to the parameters' gradients since they were grads_before (None: there was none)
    -> float. One tensor at a time, to save memory."""
    norms = []
    for param, grad_before in zip(params, grads_before):
        if param.grad is not None:
            difference = param.grad if grad_before is None else param.grad - grad_before
            norms.append(gather_full(difference.norm()))
    return float(torch.stack(norms).norm())


def clip_grad_norm(params, max_norm):
    """Scale the gradients down to a norm of max_norm (0: leave them) -> their norm before, a float."""
    grads = [param.grad for param in params if param.grad is not None]
    total_norm = torch.nn.utils.get_total_norm(grads)
    norm = float(gather_full(total_norm))
    if 0 < max_norm < norm:
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, total_norm)
    return norm
