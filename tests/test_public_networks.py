"""DINOv2 as a backbone, and the metrics that need public networks: tiny CLIP, DINOv2 and aesthetics models in
their places."""

import pytest
import torch
from tiny_families import RESOLUTION, make_images

import data
import discriminator
import evaluate
import train
from models import loading
from scripts import tiny_pipelines
from utils import metrics

pytestmark = pytest.mark.usefixtures("cache_home")

# --------------------------------------------------------------------------------------------------- DINOv2

def test_dinov2_takes_images_of_any_size_and_passes_gradients(pretrained):
    backbone = discriminator.FrozenBackbone(loading.load_backbone("sd15", "", source=pretrained / "dino"))
    for resolution, tokens in ((14, 1), (40, 3), (64, 5)):             # 64 pixels: nearly five patches of 14
        image = torch.rand(2, 3, resolution, resolution, requires_grad=True)
        maps = backbone(image)
        assert all(m.shape == (2, 32, tokens, tokens) for m in maps)
        assert len(maps) == len(backbone.layers)
        sum(m.square().sum() for m in maps).backward()
        assert image.grad.abs().min() > 0
    assert backbone.global_embedding(image).shape == (2, 32)
    assert not list(backbone.parameters())


def test_images_above_the_size_of_dinov2s_training_are_reduced_without_aliasing(pretrained):
    """The tiny one was made for 70 pixels. A pattern of single pixels disappears, a coarse one stays."""
    backbone, received = loading.load_backbone("sd15", "", source=pretrained / "dino"), []
    backbone.model.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    fine = torch.ones(1, 3, 168, 280)
    fine[..., ::2] = -1
    coarse = torch.ones(1, 3, 168, 280)
    coarse[..., :140] = -1
    with torch.no_grad():
        maps = [backbone(image)[0][-1] for image in (fine, coarse)]
        backbone(torch.ones(1, 3, 70, 70))
    assert [image.shape[2:] for image in received] == [(42, 70), (42, 70), (70, 70)]
    assert [m.shape[2:] for m in maps] == 2 * [(3, 5)]
    inner_std = [(image * backbone.std)[..., 5:-5].std(-1).mean() for image in received[:2]]
    assert inner_std[0] < .02 < .4 < inner_std[1]


def test_dinov2_is_transformers_own(pretrained):
    from transformers import Dinov2Model
    reference = Dinov2Model.from_pretrained(pretrained / "dino").eval()
    image = torch.rand(2, 3, 28, 28) * 2 - 1
    maps, cls = loading.load_backbone("sd15", "", source=pretrained / "dino").eval()(image)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))
    with torch.no_grad():
        expected = reference(((image + 1) / 2 - mean) / std).last_hidden_state
        tokens = torch.cat([cls[-1][:, None], maps[-1].flatten(2).transpose(1, 2)], 1)
        found = reference.layernorm(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- metrics

@pytest.fixture(scope="module")
def metric_models(pretrained):
    """{metric: file or folder}, networks with random weights."""
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(0)
    tokenizer = tiny_pipelines.make_clip_tokenizer(pretrained / "tokenizer")
    text = dict(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=37, num_hidden_layers=2,
                num_attention_heads=4, eos_token_id=tokenizer.eos_token_id,
                bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
    vision = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
                  image_size=32, patch_size=8)
    clip_dir = pretrained / "clip"
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(clip_dir)
    tokenizer.save_pretrained(clip_dir)
    shapes = {"layers.0.weight": (8, 16), "layers.0.bias": (8,), "layers.2.weight": (1, 8),
              "layers.2.bias": (1,)}
    torch.save({name: torch.randn(*shape) for name, shape in shapes.items()}, pretrained / "aesthetic.pth")
    return {"dinov2": pretrained / "dino", "clip": clip_dir, "pickscore": clip_dir,
            "aesthetic_predictor": pretrained / "aesthetic.pth"}


def test_the_metrics_rank_good_and_bad_images(metric_models, tmp_path):
    dataset = data.build_dataset(str(make_images(tmp_path / "many", n=40)), RESOLUTION)
    suite = metrics.MetricSuite(dataset, 20, metric_models)
    real = dataset.sample_batch(40, torch.Generator().manual_seed(1234))[20:]
    assert real.caption == suite.captions
    in_parts = suite.compute_metrics(real.image.split(7))
    assert in_parts["cmmd"] == pytest.approx(suite.real_metrics["cmmd"], rel=1e-4)
    noise = suite.compute_metrics([torch.rand_like(real.image) * 2 - 1])
    assert noise["fd_dinov2"] > 1.2 * suite.real_metrics["fd_dinov2"]
    assert noise["cmmd"] > suite.real_metrics["cmmd"]
    assert noise.keys() == suite.real_metrics.keys() >= {"clip", "pickscore", "aesthetic", "precision",
                                                         "recall"}


def test_the_clip_score_is_transformers_own(metric_models, tmp_path):
    dataset = data.build_dataset(str(make_images(tmp_path / "many", n=40)), RESOLUTION)
    suite = metrics.MetricSuite(dataset, 20, metric_models)
    images = dataset.sample_batch(40, torch.Generator().manual_seed(1234))[20:].image
    clip = suite.clips["clip"].model
    tokens = suite.clips["clip"].tokenizer(suite.captions, padding=True, return_tensors="pt")
    pixels = metrics.preprocess(images, 32, (.4815, .4578, .4082), (.2686, .2613, .2758))
    with torch.no_grad():
        scale = clip.logit_scale.exp()
        expected = clip(**tokens, pixel_values=pixels).logits_per_image.diagonal() / scale
    assert suite.real_metrics["clip"] == pytest.approx(expected.mean().item(), abs=1e-4)
    scaled = suite.real_metrics["clip"] * scale.item()
    assert suite.real_metrics["pickscore"] == pytest.approx(scaled, rel=1e-4)


def test_what_cannot_be_measured_is_one_sentence(metric_models, tmp_path):
    dataset = data.build_dataset(str(make_images(tmp_path / "many", n=8)), RESOLUTION)
    with pytest.raises(ValueError, match="4 images or more"):
        metrics.MetricSuite(dataset, 3, metric_models)
    path = tmp_path / "aesthetic.pth"
    torch.save({"layers.0.weight": torch.randn(1, 768), "layers.0.bias": torch.randn(1)}, path)
    with pytest.raises(ValueError, match="embeddings of 768 numbers, but --clip gives 16"):
        metrics.MetricSuite(dataset, 4, {**metric_models, "aesthetic_predictor": path})


def test_evaluate_measures_base_and_run_and_writes_images(pretrained, metric_models, tmp_path, capsys):
    images, run_dir = make_images(tmp_path / "many", n=12), tmp_path / "run"
    args = ["--model", "sd15", "--pretrained", str(pretrained / "sd15"), "--resolution", str(RESOLUTION),
            "--data", str(images)]
    train.main([*args, "--method", "diffusion", "--lora-rank", "4", "--steps", "1", "--eval-samples", "0",
                "--output-dir", str(run_dir), "--backbone", str(pretrained / "dino"), "--set", "batch_size=2",
                "--set", "num_inference_steps=2"])
    evaluate.main(["base", str(run_dir), *args, "--steps", "2", "--eval-samples", "6", "--dinov2",
                   str(metric_models["dinov2"]), "--clip", str(metric_models["clip"]), "--output",
                   str(tmp_path / "grid.png"), "--save-images", str(tmp_path / "images")])
    output = capsys.readouterr().out
    assert "| base, 2 steps, guidance 7.5 |" in output
    assert "| real images |" in output
    saved = data.build_dataset(str(tmp_path / "images" / "base, 2 steps, guidance 7.5"), 32)
    assert len(saved.captions) == 6
    assert len(data.build_dataset(str(tmp_path / "images" / "real images"), 32).captions) == 6
    assert (tmp_path / "grid.png").is_file()
