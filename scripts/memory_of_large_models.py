"""Memory and time of training Stable Diffusion, computed and not measured: no GPU and no weights needed.

The networks are built in full size on PyTorch's meta device, where tensors have shapes but no values. A call
and its backward pass are run there; what they allocate and how many operations they take is counted.
`python -m scripts.benchmark large` prints the table. Read next: scripts/benchmark.py"""

import itertools
import weakref
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train
from models.backbones import load_dino
from models.stable_diffusion import MODEL_FAMILIES, LatentDenoiser

GPU_TFLOPS = 400                       # an H100 in bf16, at a usual utilisation
LORA_RANK = 64


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


def denoising_network(model_name):
    """The U-Net or transformer of a public model on the meta device, and a function that calls it for one
    image."""
    import diffusers
    t = torch.ones(1)
    if model_name == "sd15":
        network = diffusers.UNet2DConditionModel(64, cross_attention_dim=768)
        x, text = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768)
        return network, lambda: network(x, t, text).sample
    if model_name == "sdxl":
        network = diffusers.UNet2DConditionModel(
            128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)
        x, text = torch.randn(1, 4, 128, 128), torch.randn(1, 77, 2048)
        added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.randn(1, 6)}
        return network, lambda: network(x, t, text, added_cond_kwargs=added).sample
    network = diffusers.SD3Transformer2DModel(
        128, 2, 16, 24, num_attention_heads=24, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=192)
    x, text, pooled = torch.randn(1, 16, 128, 128), torch.randn(1, 333, 4096), torch.randn(1, 2048)
    return network, lambda: network(x, text, pooled, t).sample


def full_size_models(model_name):
    """-> network, VAE, backbone on the meta device, and {part: function that calls it for one image}."""
    import diffusers
    resolution = MODEL_FAMILIES[model_name][3]
    network, call_network = denoising_network(model_name)
    channels = network.config.in_channels
    vae = diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512),
                                  down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
                                  latent_channels=channels).requires_grad_(False)
    backbone = load_dino("random").requires_grad_(False)
    z = torch.randn(1, channels, resolution // 8, resolution // 8)
    image = torch.randn(1, 3, resolution, resolution)
    calls = {"network": call_network, "encode": lambda: vae.encoder(image),
             "decode": lambda: vae.decode(z.requires_grad_()).sample,
             "backbone": lambda: backbone(image.requires_grad_())[0][-1]}
    return network, vae, backbone, calls


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


def step_cost(method, config, costs):
    """costs: {part: result of measure_call} -> GiB of activations as a function of the batch size, TFLOP of a
    training step per image."""
    graph_gib, network_fwd, network_bwd = costs["network"]
    encoder_fwd = costs["encode"][1]
    decoder_gib, decoder_fwd, decoder_bwd = costs["decode"]
    backbone_gib, backbone_fwd, backbone_bwd = costs["backbone"]
    decoder_bwd += decoder_fwd                                         # one image at a time, recomputed
    diffusion_tflop = encoder_fwd + network_fwd + network_bwd
    if method == "diffusion":
        return (lambda n: n * graph_gib), diffusion_tflop
    if method == "add":                                                # the teacher's target is decoded, too
        teacher_tflop = config.teacher_steps * network_fwd
        image_tflop = 2 * decoder_fwd + decoder_bwd + 4 * backbone_fwd + backbone_bwd
        return (lambda n: n * graph_gib + decoder_gib + n * backbone_gib), (
            diffusion_tflop + teacher_tflop + image_tflop)
    mean_steps = (config.num_inference_steps + 1) / 2                  # the start is uniform over the path
    cfg_factor = 2 if config.guidance_scale != 1 else 1
    path_tflop = cfg_factor * (mean_steps * network_fwd
                               + config.num_grad_steps * (network_fwd + network_bwd))   # recomputed
    image_tflop = 2 * decoder_fwd + decoder_bwd + 6 * backbone_fwd + backbone_bwd

    def activations_gib(n):
        return n * graph_gib + max(decoder_gib + n * backbone_gib, n * cfg_factor * graph_gib)

    return activations_gib, diffusion_tflop + path_tflop + image_tflop


def measure_model(model_name, trained):
    """trained: "LoRA" or "all" -> parameters of the network, of its adapters, of the frozen parts; and the
    costs of all parts without and with gradient checkpointing."""
    network, vae, backbone, calls = full_size_models(model_name)
    frozen_params = [*vae.parameters(), *backbone.parameters()]
    model = SimpleNamespace(lora_rank=0, network=network, vae=vae, output_layer=None)
    num_params = sum(param.numel() for param in network.parameters())
    network.requires_grad_(False)
    LatentDenoiser.cast_frozen_to_bf16(model)                          # trained weights have a bf16 copy, too
    if trained == "all":
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
    costs = [{part: measure_call(call, params) for part, call in calls.items()}]
    network.train()
    vae.train()
    LatentDenoiser.enable_gradient_checkpointing(model)
    costs.append({part: measure_call(call, params) for part, call in calls.items()})
    return num_params, num_adapter_params, sum(param.numel() for param in frozen_params), costs


def large_model_estimates():
    """Large models, computed: GiB, and seconds of a step at 400 TFLOP/s, for batches of 1 / 4.
    The networks have their full size and no values; the seconds are a lower bound."""
    rows = []
    with torch.device("meta"), cuda_autocast():
        for model_name, trained in itertools.product(MODEL_FAMILIES, (f"LoRA {LORA_RANK}", "all")):
            num_params, num_adapter_params, num_frozen, costs = measure_model(model_name, trained)
            for method in train.METHODS:
                # trained: fp32 weight, gradient, two AdamW moments, EMA (20 bytes), and a bf16 copy (2)
                resident_bytes = 4 * num_frozen
                if trained == "all":
                    resident_bytes += 22 * num_params
                    if method == "add":
                        resident_bytes += 4 * num_params               # the teacher
                else:
                    resident_bytes += 2 * num_params + 22 * num_adapter_params
                config = train.build_config(method, [], model_name)
                cells = [model_name, method, trained, f"{resident_bytes / 2 ** 30:.1f}"]
                for costs_of_parts in costs:
                    activations_gib, tflop = step_cost(method, config, costs_of_parts)
                    gib = [resident_bytes / 2 ** 30 + activations_gib(n) for n in (1, 4)]
                    seconds = [n * tflop / GPU_TFLOPS for n in (1, 4)]
                    cells += [" / ".join(f"{x:.0f}" for x in gib), " / ".join(f"{x:.2g}" for x in seconds)]
                rows.append(tuple(cells))
    return ["model", "method", "trained", "weights and optimiser, GiB", "with activations, GiB", "s",
            "`--gradient-checkpointing`, GiB", "s"], rows
