"""Stable Diffusion 1.5, XL and 3, and DINOv2: the real classes of diffusers and transformers with few and
random weights, saved like the real ones. Nothing is downloaded."""

import json

import torch
from diffusers import (AutoencoderKL, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler,
                       SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline,
                       StableDiffusionXLPipeline, UNet2DConditionModel)
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer,
                          Dinov2Config, Dinov2Model, T5Config, T5EncoderModel)

BETAS = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1)
SIZE = 64                                                    # pixels: the VAE makes 32x32 of it


def tokenizer(folder):
    """CLIP's, with a vocabulary of single letters."""
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def t5_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    pieces = [("<pad>", 0.), ("</s>", 0.), ("<unk>", 0.), ("▁", -2.),
              *((chr(c), -3.) for c in range(33, 127))]
    fast = Tokenizer(models.Unigram(pieces, unk_id=2))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>", model_max_length=77)


def clip(words, width=32, projection=None):
    config = CLIPTextConfig(vocab_size=words.vocab_size, hidden_size=width, intermediate_size=37,
                            num_hidden_layers=2, num_attention_heads=4, projection_dim=projection or width,
                            bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
                            pad_token_id=words.pad_token_id)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def vae(channels=4, shift=None):
    return AutoencoderKL(block_out_channels=[32, 64], latent_channels=channels, norm_num_groups=8,
                         down_block_types=["DownEncoderBlock2D"] * 2, sample_size=SIZE,
                         up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=.18215,
                         shift_factor=shift).eval()


def unet(cross, **more):
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=cross, **more).eval()


def make(family, folder, prediction="epsilon"):
    """A pipeline folder of the family, as `from_pretrained` reads it -> its path."""
    torch.manual_seed(0)
    words = tokenizer(folder / "words")
    if family == "sd15":
        pipe = StableDiffusionPipeline(
            vae=vae(), text_encoder=clip(words), tokenizer=words, unet=unet(32, attention_head_dim=8),
            scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, prediction_type=prediction),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    elif family == "sdxl":
        pipe = StableDiffusionXLPipeline(
            vae=vae(), text_encoder=clip(words), text_encoder_2=clip(words, projection=32), tokenizer=words,
            tokenizer_2=words, scheduler=EulerDiscreteScheduler(**BETAS, prediction_type=prediction),
            unet=unet(64, attention_head_dim=(4, 8), use_linear_projection=True,
                      addition_embed_type="text_time",
                      addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
                      projection_class_embeddings_input_dim=6 * 8 + 32))
    else:
        pipe = StableDiffusion3Pipeline(
            vae=vae(16, shift=.06), text_encoder=clip(words, projection=32), tokenizer=words,
            text_encoder_2=clip(words, projection=32), tokenizer_2=words, tokenizer_3=t5_tokenizer(),
            text_encoder_3=T5EncoderModel(T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=1,
                                                   num_heads=4)).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.),
            transformer=SD3Transformer2DModel(
                sample_size=32, patch_size=2, in_channels=16, out_channels=16, num_layers=2,
                attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
                caption_projection_dim=32,
                pooled_projection_dim=64, pos_embed_max_size=32).eval())
    pipe.save_pretrained(folder / family)
    return folder / family


def dino(folder):
    """DINOv2 with two blocks -> its path."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28)
    Dinov2Model(config).save_pretrained(folder)
    return folder
