"""Memory and time of training Stable Diffusion, computed and not measured: no GPU and no weights needed.

The networks are built in full size on PyTorch's meta device, where tensors have shapes but no values. A call
and its backward pass are run there; what they allocate and how many operations they take is counted.

    python -m scripts.memory_of_large_models      writes models/estimates.json and prints the table

Read next: scripts/full_size_networks.py; models/preflight.py, which shows an estimate before a run"""

import argparse
import itertools
import json
import weakref
from contextlib import contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import train
from models.denoiser import MAX_AMPLIFICATION
from models.families import MODEL_FAMILIES
from models.half_precision import accept_fp32_inputs, cast_frozen_weights
from models.preflight import ESTIMATES
from models.stable_diffusion import LatentDenoiser
from scripts.full_size_networks import denoising_network, frozen_models
from utils import config as settings
from utils.checkpoint import atomic_write_text
from utils.plotting import markdown_table

PLAIN_FUNCTIONS = {name: getattr(F, name) for name in ("conv2d", "linear", "group_norm", "layer_norm")}
FP32_BATCH_SIZE = 4                    # of ADD's presets
TRAINED_BYTES = 22                     # a trained weight: fp32, gradient, two moments, EMA; a bf16 copy
GPU_TFLOPS = 400                       # an H100 in bf16, at a usual utilisation


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of tensors that are created inside, the backward pass and its recomputations
    included: live_bytes now, peak_bytes at most. Views of `params` do not count."""

    def __init__(self, params=()):
        super().__init__()
        self.param_storages = [param.untyped_storage() for param in params]
        self.storages = {id(storage): None for storage in self.param_storages}
        self.live_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key, num_bytes = id(storage), storage.nbytes()                 # PyTorch has one object per storage
        if key in self.storages:
            return

        def on_free(_):
            self.live_bytes -= num_bytes
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, on_free)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


class CostTracker(AllocationTracker):
    """Counts floating point operations as well, by PyTorch's own formulas."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


class FlashAttentionCost(torch.autograd.Function):
    """Attention with the costs of a GPU's fused kernel: it stores q, k, v and the output, not the matrix of
    scores. The output has no values; `flops` counts the operations."""

    flops = 0

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        FlashAttentionCost.flops += 4 * q.numel() * k.shape[2]
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _ = ctx.saved_tensors
        FlashAttentionCost.flops += 10 * q.numel() * k.shape[2]        # the scores again, and four products
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def flash_attention(q, k, v, *_, **__):
    return FlashAttentionCost.apply(q, k, v)


@contextmanager
def without_autocast():
    """The context of a call in fp32, inside cuda_autocast. Attention in fp32 has a fused kernel, too. The
    meta device does not know whether autocast is enabled."""
    with (patch.multiple(F, **PLAIN_FUNCTIONS, scaled_dot_product_attention=flash_attention),
          patch.object(torch, "is_autocast_enabled", lambda *_: False)):
        yield


@contextmanager
def cuda_autocast():
    """CUDA's autocast for the meta device, which has none: matrix products in bf16, norms in fp32."""
    def autocast_fn(function, dtype):
        def convert(value):
            is_float = torch.is_tensor(value) and value.is_floating_point()
            return value.to(dtype) if is_float else value

        def wrapper(*args, **kwargs):
            return function(*map(convert, args), **{name: convert(value) for name, value in kwargs.items()})

        return wrapper

    dtypes = {"conv2d": torch.bfloat16, "linear": torch.bfloat16, "group_norm": torch.float32,
              "layer_norm": torch.float32}
    patches = {name: autocast_fn(getattr(F, name), dtype) for name, dtype in dtypes.items()}
    patches["scaled_dot_product_attention"] = autocast_fn(flash_attention, torch.bfloat16)
    with patch.multiple(F, **patches):
        yield


@cache
def measure_frozen_models(channels, resolution):
    """-> number of weights; {part: result of measure_call}. The VAE computes without autocast."""
    vae, backbone, calls = frozen_models(channels, resolution)
    params = [*vae.parameters(), *backbone.parameters()]
    costs = {}
    for part, call in calls.items():
        with nullcontext() if part == "backbone" else patch.multiple(F, **PLAIN_FUNCTIONS):
            costs[part] = measure_call(call, params)
    return sum(param.numel() for param in params), costs


def measure_network(call, params, is_fp32):
    """call: of n images -> "network": result of measure_call for one image; "network graph": GiB of its
    graph; "network copies": GiB that a call takes whatever n is, not in "network". In fp32 these are the
    weights in half precision that the call copies to fp32."""
    with without_autocast() if is_fp32 else nullcontext():
        gib, *tflop = measure_call(lambda: call(1), params)
        with AllocationTracker(params) as tracker:
            y = call(1)
            graph_gib = tracker.live_bytes / 2 ** 30
            del y
        per_image = gib
        if is_fp32:
            per_image = (measure_peak(lambda: call(FP32_BATCH_SIZE), params) - gib) / (FP32_BATCH_SIZE - 1)
    return {"network": (per_image, *tflop), "network graph": graph_gib, "network copies": gib - per_image}


def backward(y):
    if y.requires_grad:
        y.sum().backward()


def measure_peak(call, params):
    """-> GiB that a call and its backward pass allocate at most. params: what exists already and does not
    count."""
    with AllocationTracker(params) as tracker:
        backward(call())
    return tracker.peak_bytes / 2 ** 30


def measure_call(call, params):
    """-> result of measure_peak, TFLOP of the call, TFLOP of the backward pass."""
    FlashAttentionCost.flops = 0
    with CostTracker(params) as tracker:
        y = call()
        forward_flops = tracker.flops + FlashAttentionCost.flops
        backward(y)
    all_flops = tracker.flops + FlashAttentionCost.flops
    return tracker.peak_bytes / 2 ** 30, forward_flops / 1e12, (all_flops - forward_flops) / 1e12


def fp32_shares(config):
    """The shares of the student's and of the teacher's calls that ADD on an eps-model computes in fp32: those
    where any image of the batch has a timestep at which errors are amplified (models/denoiser.py,
    precision_for)."""
    alphas_cumprod = schedule_of_sd().alphas_cumprod
    is_amplified = (((1 - alphas_cumprod) / alphas_cumprod).sqrt() > MAX_AMPLIFICATION).float()
    at_timesteps = is_amplified[config.timesteps(len(alphas_cumprod))]
    p_pure_noise = config.pure_noise_prob or 1 / len(at_timesteps)
    student = p_pure_noise * at_timesteps[0]
    if len(at_timesteps) > 1:
        student += (1 - p_pure_noise) * at_timesteps[1:].mean()
    return [1 - (1 - float(share)) ** config.batch_size for share in (student, is_amplified.mean())]


def schedule_of_sd():
    """The noise schedule of Stable Diffusion 1.5 and XL."""
    from diffusers import DDPMScheduler
    return DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear")


def step_cost(method, config, costs, recomputes_blocks, is_fp32):
    """costs: of a model's parts, from measure_model -> GiB of activations as a function of the batch size,
    TFLOP of a training step per image. network_gib: peak of one call and its backward pass; with recomputed
    blocks the graphs of all calls of ADT are kept, which hold the blocks' inputs only. is_fp32: some calls of
    ADD are computed in fp32, as costs holds them. They count twice: TF32 has half the speed of bf16."""
    network_gib, network_fwd, network_bwd = costs["network"]
    graph_gib = costs["network graph"]
    encoder_fwd = costs["encode"][1]
    decoder_gib, decoder_fwd, decoder_bwd = costs["decode"]
    backbone_gib, backbone_fwd, backbone_bwd = costs["backbone"]
    diffusion_tflop = encoder_fwd + network_fwd + network_bwd
    if method == "diffusion":
        return (lambda n: n * network_gib), diffusion_tflop
    if method == "add":                                                # the teacher's target is decoded, too
        student_share, teacher_share = fp32_shares(config) if is_fp32 else (0., 0.)
        student_tflop = (1 + student_share) * (network_fwd + network_bwd)
        teacher_tflop = config.teacher_steps * (1 + teacher_share) * network_fwd
        image_tflop = encoder_fwd + 2 * decoder_fwd + decoder_bwd + 4 * backbone_fwd + backbone_bwd
        return (lambda n: costs["network copies"] + n * network_gib + decoder_gib + n * backbone_gib), (
            student_tflop + teacher_tflop + image_tflop)
    mean_steps = (config.num_inference_steps + 1) / 2                  # the start is uniform over the path
    cfg_factor = 2 if config.guidance_scale != 1 else 1
    # without recomputed blocks whole calls are recomputed, also that of the diffusion loss
    recomputed_fwd = 0 if recomputes_blocks else network_fwd
    # with them a batch of images repeats the calls that keep their graph (adt.py, rollout_from_batch)
    repeated_fwd = network_fwd if recomputes_blocks and config.batch_size > 1 else recomputed_fwd
    path_tflop = recomputed_fwd + cfg_factor * (mean_steps * network_fwd + config.num_grad_steps
                                                * (repeated_fwd + network_bwd))
    image_tflop = 2 * decoder_fwd + decoder_bwd + 6 * backbone_fwd + backbone_bwd

    num_graphs = 1 + config.num_grad_steps * cfg_factor if recomputes_blocks else 0

    def activations_gib(n):
        return n * num_graphs * graph_gib + max(decoder_gib + n * backbone_gib, n * cfg_factor * network_gib)

    return activations_gib, diffusion_tflop + path_tflop + image_tflop


def measure_model(model_name, resolution, rank, targets, is_fp32):
    """rank: of the adapters, 0: all weights are trained. is_fp32: the network computes in fp32 and its frozen
    weights are fp16 -> parameters of the network, of its adapters, of the frozen parts; and the costs of all
    parts without and with gradient checkpointing."""
    network, call = denoising_network(model_name, resolution // 8)
    num_frozen, frozen_costs = measure_frozen_models(network.config.in_channels, resolution)
    model = SimpleNamespace(lora_rank=0, network=network, output_layer=None)
    num_params = sum(param.numel() for param in network.parameters())
    network.requires_grad_(False)
    if rank or not is_fp32:                                            # trained weights have a bf16 copy, too
        cast_frozen_weights(network, torch.float16 if is_fp32 else torch.bfloat16, None)
    if rank:
        LatentDenoiser.add_lora(model, rank, targets)
    else:
        network.requires_grad_(True)
    if is_fp32:
        accept_fp32_inputs(network, None)
    num_adapter_params = sum(param.numel() for param in network.parameters()) - num_params

    def free_grad(param):
        param.grad = None

    for param in network.parameters():                                 # gradients are counted per weight
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(free_grad)
    params = list(network.parameters())
    costs = [frozen_costs | measure_network(call, params, is_fp32)]
    network.train()
    LatentDenoiser.enable_gradient_checkpointing(model)
    costs.append(frozen_costs | measure_network(call, params, is_fp32))
    return num_params, num_adapter_params, num_frozen, costs


def fixed_bytes(method_name, rank, num_params, num_adapter_params, num_frozen):
    """Weights, gradients, optimiser, EMA. Calls in fp32 do without the bf16 copy of a trained weight. A
    teacher of its own is in half precision."""
    if rank:
        return 4 * num_frozen + 2 * num_params + TRAINED_BYTES * num_adapter_params
    teacher = 2 * num_params if method_name == "add" else 0
    return 4 * num_frozen + TRAINED_BYTES * num_params + teacher


def estimate_all():
    """-> the content of models/estimates.json: what a training step takes, for every method, model, tuning,
    without and with gradient checkpointing; batch size and resolution as in the preset."""
    estimates = {}
    for model_name, tuning in itertools.product(MODEL_FAMILIES, ("lora", "full")):
        estimates |= estimate_model(model_name, tuning)
    return estimates


def estimate_model(model_name, tuning):
    """The entries of one model. tuning: "lora" or "full"."""
    estimates, measured = {}, {}
    for method_name, method in train.METHODS.items():
        own_resolution = MODEL_FAMILIES[model_name][3]
        resolution = min(own_resolution, method.max_resolution.get(model_name, own_resolution))
        rank, targets = (method.lora_rank, method.lora_targets) if tuning == "lora" else (0, None)
        is_fp32 = method_name == "add" and not model_name.startswith("sd3")    # that is an eps-model
        key = resolution, rank, targets, is_fp32
        if key not in measured:
            with torch.device("meta"), cuda_autocast():
                measured[key] = measure_model(model_name, *key)
        *sizes, costs = measured[key]
        gib = fixed_bytes(method_name, rank, *sizes) / 2 ** 30
        adapters = {}
        if rank:
            gib_per_rank = TRAINED_BYTES * sizes[1] / rank / 2 ** 30
            adapters = {"lora_rank": rank, "gib_per_rank": round(gib_per_rank, 5)}
        config = settings.build_config(method, [], model_name, tuning == "lora")
        for suffix, costs_of_parts in zip(("", " checkpointing"), costs):
            activations_gib, tflop = step_cost(method_name, config, costs_of_parts, bool(suffix), is_fp32)
            per_image = (activations_gib(9) - activations_gib(1)) / 8
            estimates[f"{method_name} {model_name} {tuning}{suffix}"] = {
                "resolution": resolution, "batch_size": config.batch_size,
                "fixed_gib": round(gib + activations_gib(1) - per_image, 2),
                "activations_gib": round(per_image, 3), "tflop": round(tflop, 2), **adapters}
    return estimates


def estimates_table(estimates):
    """Columns and rows for docs/stable_diffusion.md: GiB at the preset's batch size, and a lower bound of the
    seconds of a micro-batch at GPU_TFLOPS."""
    rows = []
    for key in [key for key in estimates if not key.endswith("checkpointing")]:
        method_name, model_name, tuning = key.split()
        cells = []
        for entry in (estimates[f"{key} checkpointing"], estimates[key]):
            gib = entry["fixed_gib"] + entry["batch_size"] * entry["activations_gib"]
            cells += [f"{gib:.0f}", f"{entry['batch_size'] * entry['tflop'] / GPU_TFLOPS:.2g}"]
        entry = estimates[key]
        rows.append((f"{method_name}, {model_name}, {'LoRA' if tuning == 'lora' else 'all weights'}",
                     entry["resolution"], entry["batch_size"], *cells))
    return ["run", "px", "batch", "GiB", "s", "`--no-gradient-checkpointing`: GiB", "s"], rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.parse_args(argv)
    estimates = estimate_all()
    lines = (f" {json.dumps(key)}: {json.dumps(entry)}" for key, entry in estimates.items())
    atomic_write_text(ESTIMATES, "{\n" + ",\n".join(lines) + "\n}\n")
    print(markdown_table(*estimates_table(estimates)))


if __name__ == "__main__":
    main()
