"""Memory and time of training Stable Diffusion, computed and not measured: no GPU and no weights needed.

The networks are built in full size on PyTorch's meta device, where tensors have shapes but no values. A call
and its backward pass are run there; what they allocate and how many operations they take is counted.

    python -m scripts.memory_of_large_models      writes models/estimates.json and prints the table

Read next: models/preflight.py, which shows a run's estimate before it starts"""

import argparse
import itertools
import json
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train
from models.backbones import load_dino
from models.families import MODEL_FAMILIES
from models.half_precision import cast_frozen_weights
from models.preflight import ESTIMATES
from models.stable_diffusion import LatentDenoiser
from utils import config as settings
from utils.checkpoint import atomic_write_text
from utils.plotting import markdown_table

PLAIN_FUNCTIONS = {name: getattr(F, name) for name in ("conv2d", "linear", "group_norm", "layer_norm")}
GPU_TFLOPS = 400                       # an H100 in bf16, at a usual utilisation
LORA_RANK = 64                         # that is measured; the number of adapter weights is proportional to it


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

    def flash_attention(q, k, v, *_, **__):
        return FlashAttentionCost.apply(q, k, v)

    dtypes = {"conv2d": torch.bfloat16, "linear": torch.bfloat16, "group_norm": torch.float32,
              "layer_norm": torch.float32}
    patches = {name: autocast_fn(getattr(F, name), dtype) for name, dtype in dtypes.items()}
    patches["scaled_dot_product_attention"] = autocast_fn(flash_attention, torch.bfloat16)
    with patch.multiple(F, **patches):
        yield


def sd3_transformer(model_name):
    """SD 3 medium, 3.5 medium or 3.5 large on the meta device."""
    import diffusers
    width = 38 if model_name == "sd35-large" else 24                   # heads of 64 channels, and blocks
    variants = {"sd3": {"pos_embed_max_size": 192},
                "sd35": {"pos_embed_max_size": 384, "qk_norm": "rms_norm",
                         "dual_attention_layers": tuple(range(13))},
                "sd35-large": {"pos_embed_max_size": 192, "qk_norm": "rms_norm"}}
    return diffusers.SD3Transformer2DModel(
        128, 2, 16, width, num_attention_heads=width, caption_projection_dim=64 * width,
        pooled_projection_dim=2048, **variants[model_name])


def full_size_network(model_name):
    """The U-Net or transformer of a public model, with new weights."""
    import diffusers
    if model_name == "sd15":
        return diffusers.UNet2DConditionModel(64, cross_attention_dim=768)
    if model_name == "sdxl":
        return diffusers.UNet2DConditionModel(
            128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)
    return sd3_transformer(model_name)


def denoising_network(model_name, latent_size):
    """The full-size network of a model, and a function that calls it for one image."""
    network = full_size_network(model_name)
    t = torch.ones(1)
    x = torch.randn(1, network.config.in_channels, latent_size, latent_size)
    if model_name == "sd15":
        text = torch.randn(1, 77, 768)
        return network, lambda: network(x, t, text).sample
    if model_name == "sdxl":
        text = torch.randn(1, 77, 2048)
        added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.randn(1, 6)}
        return network, lambda: network(x, t, text, added_cond_kwargs=added).sample
    text, pooled = torch.randn(1, 333, 4096), torch.randn(1, 2048)
    return network, lambda: network(x, text, pooled, t).sample


def full_size_models(model_name, resolution):
    """-> network, VAE, backbone on the meta device, and {part: function that calls it for one image}."""
    import diffusers
    network, call_network = denoising_network(model_name, resolution // 8)
    channels = network.config.in_channels
    vae = diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512),
                                  down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
                                  latent_channels=channels).requires_grad_(False).train()
    vae.enable_gradient_checkpointing()
    for param in vae.parameters():
        param.data = param.data.bfloat16()
    backbone = load_dino("random").requires_grad_(False)
    z = torch.randn(1, channels, resolution // 8, resolution // 8)
    image = torch.randn(1, 3, resolution, resolution)
    calls = {"network": call_network, "encode": lambda: vae.encoder(image.bfloat16()),
             "decode": lambda: vae.decode(z.requires_grad_().bfloat16()).sample,
             "backbone": lambda: backbone(image.requires_grad_())[0][-1]}
    return network, vae, backbone, calls


def measure_parts(calls, params):
    """-> {part: result of measure_call}, and "network graph": GiB of the graph of one call. The VAE computes
    without autocast."""
    costs = {}
    for part, call in calls.items():
        is_vae = part in ("encode", "decode")
        with patch.multiple(F, **PLAIN_FUNCTIONS) if is_vae else nullcontext():
            costs[part] = measure_call(call, params)
    with AllocationTracker(params) as tracker:
        y = calls["network"]()
        costs["network graph"] = tracker.live_bytes / 2 ** 30
        del y
    return costs


def measure_call(call, params):
    """-> GiB that a call and its backward pass allocate at most, TFLOP of the call, TFLOP of the backward
    pass. params: what exists already and does not count."""
    from torch.utils.flop_counter import FlopCounterMode

    def backward(y):
        if y.requires_grad:
            y.sum().backward()

    with AllocationTracker(params) as tracker:
        backward(call())
    FlashAttentionCost.flops = 0
    with FlopCounterMode(display=False) as counter:                    # apart, since it keeps tensors alive
        y = call()
        forward_flops = counter.get_total_flops() + FlashAttentionCost.flops
        backward(y)
    all_flops = counter.get_total_flops() + FlashAttentionCost.flops
    return tracker.peak_bytes / 2 ** 30, forward_flops / 1e12, (all_flops - forward_flops) / 1e12


def step_cost(method, config, costs, recomputes_blocks, is_eps_model):
    """costs: result of measure_parts -> GiB of activations as a function of the batch size, TFLOP of a
    training step per image. network_gib: peak of one call and its backward pass; with recomputed blocks the
    graphs of all calls of ADT are kept, which hold the blocks' inputs only."""
    network_gib, network_fwd, network_bwd = costs["network"]
    graph_gib = costs["network graph"]
    encoder_fwd = costs["encode"][1]
    decoder_gib, decoder_fwd, decoder_bwd = costs["decode"]
    backbone_gib, backbone_fwd, backbone_bwd = costs["backbone"]
    diffusion_tflop = encoder_fwd + network_fwd + network_bwd
    if method == "diffusion":
        return (lambda n: n * network_gib), diffusion_tflop
    if method == "add":                                                # the teacher's target is decoded, too
        teacher_tflop = config.teacher_steps * network_fwd
        image_tflop = 2 * decoder_fwd + decoder_bwd + 4 * backbone_fwd + backbone_bwd
        fp32_factor = 2 if is_eps_model else 1                         # models/denoiser.py, precision_for
        return (lambda n: n * fp32_factor * network_gib + decoder_gib + n * backbone_gib), (
            diffusion_tflop + teacher_tflop + image_tflop)
    mean_steps = (config.num_inference_steps + 1) / 2                  # the start is uniform over the path
    cfg_factor = 2 if config.guidance_scale != 1 else 1
    # without recomputed blocks whole calls are recomputed, also that of the diffusion loss
    recomputed_fwd = 0 if recomputes_blocks else network_fwd
    path_tflop = recomputed_fwd + cfg_factor * (mean_steps * network_fwd + config.num_grad_steps
                                                * (recomputed_fwd + network_bwd))
    image_tflop = 2 * decoder_fwd + decoder_bwd + 6 * backbone_fwd + backbone_bwd

    num_graphs = 1 + config.num_grad_steps * cfg_factor if recomputes_blocks else 0

    def activations_gib(n):
        return n * num_graphs * graph_gib + max(decoder_gib + n * backbone_gib, n * cfg_factor * network_gib)

    return activations_gib, diffusion_tflop + path_tflop + image_tflop


def measure_model(model_name, tuning, resolution):
    """tuning: "lora" or "full" -> parameters of the network, of its adapters, of the frozen parts; and the
    costs of all parts without and with gradient checkpointing."""
    network, vae, backbone, calls = full_size_models(model_name, resolution)
    frozen_params = [*vae.parameters(), *backbone.parameters()]
    model = SimpleNamespace(lora_rank=0, network=network, vae=vae, output_layer=None)
    num_params = sum(param.numel() for param in network.parameters())
    network.requires_grad_(False)
    cast_frozen_weights(network, torch.bfloat16, None)                 # trained weights have a bf16 copy, too
    if tuning == "full":
        network.requires_grad_(True)
    else:
        LatentDenoiser.add_lora(model, LORA_RANK)
    num_adapter_params = sum(param.numel() for param in network.parameters()) - num_params

    def free_grad(param):
        param.grad = None

    for param in network.parameters():                                 # gradients are counted per weight
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(free_grad)
    params = [*network.parameters(), *frozen_params]
    costs = [measure_parts(calls, params)]
    network.train()
    LatentDenoiser.enable_gradient_checkpointing(model)
    costs.append(measure_parts(calls, params))
    return num_params, num_adapter_params, sum(param.numel() for param in frozen_params), costs


def fixed_bytes(method_name, tuning, rank, num_params, num_adapter_params, num_frozen):
    """Weights, gradients, optimiser, EMA. A trained weight: fp32 weight, gradient, two AdamW moments and EMA
    (20 bytes), and a bf16 copy (2)."""
    if tuning == "lora":
        return 4 * num_frozen + 2 * num_params + 22 * num_adapter_params * rank / LORA_RANK
    teacher = 4 * num_params if method_name == "add" else 0
    return 4 * num_frozen + 22 * num_params + teacher


def estimate_all():
    """-> the content of models/estimates.json: what a training step takes, for every method, model, tuning,
    without and with gradient checkpointing; batch size and resolution as in the preset."""
    estimates = {}
    with torch.device("meta"), cuda_autocast():
        for model_name, tuning in itertools.product(MODEL_FAMILIES, ("lora", "full")):
            measured = {}
            for method_name, method in train.METHODS.items():
                own_resolution = MODEL_FAMILIES[model_name][3]
                resolution = min(own_resolution, method.max_resolution.get(model_name, own_resolution))
                if resolution not in measured:
                    measured[resolution] = measure_model(model_name, tuning, resolution)
                *sizes, costs = measured[resolution]
                gib = fixed_bytes(method_name, tuning, method.lora_rank, *sizes) / 2 ** 30
                config = settings.build_config(train.METHODS[method_name], [], model_name, tuning == "lora")
                for suffix, costs_of_parts in zip(("", " checkpointing"), costs):
                    activations_gib, tflop = step_cost(method_name, config, costs_of_parts, bool(suffix),
                                                       not model_name.startswith("sd3"))
                    per_image = (activations_gib(9) - activations_gib(1)) / 8
                    estimates[f"{method_name} {model_name} {tuning}{suffix}"] = {
                        "resolution": resolution, "batch_size": config.batch_size,
                        "fixed_gib": round(gib + activations_gib(1) - per_image, 2),
                        "activations_gib": round(per_image, 3), "tflop": round(tflop, 2)}
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
    return ["run", "px", "batch", "GiB", "s", "`--no-gradient-checkpointing`, GiB", "s "], rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.parse_args(argv)
    estimates = estimate_all()
    lines = (f" {json.dumps(key)}: {json.dumps(entry)}" for key, entry in estimates.items())
    atomic_write_text(ESTIMATES, "{\n" + ",\n".join(lines) + "\n}\n")
    print(markdown_table(*estimates_table(estimates)))


if __name__ == "__main__":
    main()
