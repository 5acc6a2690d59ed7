"""The networks of public Stable Diffusion models in full size, with new weights.

Under torch.device("meta") they take no memory: their tensors have shapes but no values.
Read next: scripts/memory_of_large_models.py"""

import torch

from models.backbones import load_dino


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
    """The full-size network of a model, and a function that calls it for n images."""
    network = full_size_network(model_name)

    def call(n=1):
        t = torch.ones(n)
        x = torch.randn(n, network.config.in_channels, latent_size, latent_size)
        if model_name == "sd15":
            return network(x, t, torch.randn(n, 77, 768)).sample
        if model_name == "sdxl":
            added = {"text_embeds": torch.randn(n, 1280), "time_ids": torch.randn(n, 6)}
            return network(x, t, torch.randn(n, 77, 2048), added_cond_kwargs=added).sample
        return network(x, torch.randn(n, 333, 4096), torch.randn(n, 2048), t).sample

    return network, call


def frozen_models(channels, resolution):
    """channels: of a latent -> VAE, backbone, and {part: function that calls it for one image}."""
    import diffusers
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
    calls = {"encode": lambda: vae.encoder(image.bfloat16()),
             "decode": lambda: vae.decode(z.requires_grad_().bfloat16()).sample,
             "backbone": lambda: backbone(image.requires_grad_())[0][-1]}
    return vae, backbone, calls
