"""Tiny Stable Diffusion 1.5, XL, 3 and 3.5 and DINOv2: the real classes of diffusers and transformers with
few and random weights, saved like the real ones. Tests and the benchmark train them; nothing is downloaded.

    python -m scripts.tiny_pipelines FOLDER      writes FOLDER/sd15, sdxl, sd3, sd35 and dino
    python train.py --model sd15 --pretrained FOLDER/sd15 --backbone FOLDER/dino --data IMAGES"""

import argparse
import json
from pathlib import Path

import torch

RESOLUTION = 64                        # pixels; the VAE halves it once, so latents have 32 x 32
BETAS = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1)


def make_clip_tokenizer(folder):
    """CLIP's tokenizer with a vocabulary of single characters; its files are written into `folder`."""
    from transformers import CLIPTokenizer
    characters = [chr(code) for code in range(33, 127)]
    words = characters + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def make_t5_tokenizer():
    """T5's tokenizer with a vocabulary of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    pieces = [("<pad>", 0.), ("</s>", 0.), ("<unk>", 0.), ("▁", -2.),
              *((chr(code), -3.) for code in range(33, 127))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>", model_max_length=77)


def make_clip(tokenizer, dim=32, projection_dim=None):
    """CLIP's text encoder with two layers; with projection_dim the class that also projects."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    config = CLIPTextConfig(vocab_size=tokenizer.vocab_size, hidden_size=dim, intermediate_size=37,
                            num_hidden_layers=2, num_attention_heads=4, projection_dim=projection_dim or dim,
                            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                            pad_token_id=tokenizer.pad_token_id)
    cls = CLIPTextModelWithProjection if projection_dim else CLIPTextModel
    return cls(config).eval()


def make_t5(dim=32):
    from transformers import T5Config, T5EncoderModel
    config = T5Config(vocab_size=99, d_model=dim, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    return T5EncoderModel(config).eval()


def make_vae(latent_channels=4, shift_factor=None):
    from diffusers import AutoencoderKL
    vae = AutoencoderKL(block_out_channels=[8, 16], latent_channels=latent_channels, norm_num_groups=8,
                        down_block_types=["DownEncoderBlock2D"] * 2, sample_size=RESOLUTION,
                        up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=.18215,
                        shift_factor=shift_factor, mid_block_add_attention=False)
    return vae.eval()


def make_unet(cross_attention_dim, **config):
    """config: further arguments of UNet2DConditionModel."""
    from diffusers import UNet2DConditionModel
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=cross_attention_dim, **config)
    return unet.eval()


def make_sd15(tokenizer, prediction):
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    return StableDiffusionPipeline(
        vae=make_vae(), text_encoder=make_clip(tokenizer), tokenizer=tokenizer,
        unet=make_unet(32, attention_head_dim=8),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, prediction_type=prediction),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def make_sdxl(tokenizer, prediction):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    return StableDiffusionXLPipeline(
        vae=make_vae(), text_encoder=make_clip(tokenizer),
        text_encoder_2=make_clip(tokenizer, projection_dim=32), tokenizer=tokenizer, tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(**BETAS, prediction_type=prediction),
        unet=make_unet(64, attention_head_dim=(4, 8), use_linear_projection=True,
                       addition_embed_type="text_time", addition_time_embed_dim=8,
                       transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=6 * 8 + 32))


def make_sd3(tokenizer, prediction, **config):
    """prediction is not used: SD 3 always predicts a flow. config: further arguments of its transformer."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    return StableDiffusion3Pipeline(
        vae=make_vae(16, shift_factor=.06), text_encoder=make_clip(tokenizer, projection_dim=32),
        tokenizer=tokenizer, text_encoder_2=make_clip(tokenizer, projection_dim=32), tokenizer_2=tokenizer,
        tokenizer_3=make_t5_tokenizer(), text_encoder_3=make_t5(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.),
        transformer=SD3Transformer2DModel(
            sample_size=32, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
            pooled_projection_dim=64, pos_embed_max_size=32, **config).eval())


def make_sd35(tokenizer, prediction):
    """SD 3.5 medium: normalised queries and keys, and in its first blocks a second attention layer."""
    return make_sd3(tokenizer, prediction, qk_norm="rms_norm", dual_attention_layers=(0,))


FAMILIES = {"sd15": make_sd15, "sdxl": make_sdxl, "sd3": make_sd3, "sd35": make_sd35}


def make_pipeline(family, folder, prediction="epsilon"):
    """Write a pipeline of the family -> its path, folder/family. Always the same weights.

    prediction: epsilon, v_prediction or sample, as in the config of a diffusers scheduler."""
    torch.manual_seed(0)
    pipe = FAMILIES[family](make_clip_tokenizer(folder / "tokenizer"), prediction)
    pipe.save_pretrained(folder / family)
    return folder / family


def make_dino(folder):
    """Write a DINOv2 with two blocks -> folder."""
    from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=70)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    for family in FAMILIES:
        print(make_pipeline(family, folder))
    print(make_dino(folder / "dino"))


if __name__ == "__main__":
    main()
