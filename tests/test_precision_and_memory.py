"""What goes wrong only with large images, in half precision, in many processes, or with odd checkpoints."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, DiffusionPipeline
from tiny_families import (
    CAPTIONS,
    FAMILIES,
    RESOLUTION,
    build_model,
    saved_elements,
    setup_run,
    train_args,
    trainable,
)

import discriminator
import losses
import train
from models import loading, preflight
from scripts import tiny_pipelines
from utils import distributed

pytestmark = pytest.mark.usefixtures("cache_home")

CONFIGS = [(10, {})]
SHORT_PATH = ["--set", "num_inference_steps=2"]


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------- half precision

@pytest.mark.parametrize("resolution", [32, 512, 1024])
def test_augmentation_with_strength_zero_is_the_identity_in_half_precision(resolution):
    """bf16 has 8 bits: a grid of coordinates in it takes one of 512 columns for its neighbour."""
    image = (torch.rand(1, 3, resolution, resolution) * 2 - 1).requires_grad_()
    with bf16():
        augmented = discriminator.augment(image, discriminator.sample_aug_params(1), 0.)
    torch.testing.assert_close(augmented.detach(), image.detach(), rtol=0, atol=1e-5)
    augmented.sum().backward()
    assert (image.grad - 1).abs().max() < 1e-4


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_output_layer_is_exact_under_autocast(pretrained, name, rank):
    model = build_model(pretrained, name, rank)
    frozen = model.frozen_copy()
    for item in (model, frozen):
        x, cond = torch.randn(2, *item.latent_shape), item.encode_prompts(CAPTIONS)
        with torch.no_grad(), bf16():
            y = item.predict(x, torch.tensor([900, 30]), cond)
        assert y.dtype == torch.float32
        assert not torch.equal(y, y.bfloat16().float())
    if rank == 0:                                                      # each has an output layer of its own
        with torch.no_grad():
            list(model.network.parameters())[-1].add_(1)
            x, t = torch.randn(1, *model.latent_shape), torch.tensor([500])
            cond = model.encode_prompts(CAPTIONS[:1])
            assert not torch.allclose(frozen.predict(x, t, cond), model.predict(x, t, cond))


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_weights_in_bf16_change_nothing_under_autocast(pretrained, name):
    """To the last bit, at half the memory; adapters and the output layer keep their precision, and train."""
    plain, model = build_model(pretrained, name, 2), build_model(pretrained, name, 2)
    bytes_before = sum(param.nbytes for param in model.network.parameters())
    model.cast_frozen(torch.bfloat16)
    assert sum(param.nbytes for param in model.network.parameters()) < .7 * bytes_before
    assert all(param.dtype == torch.float32 for param in trainable(model))
    x, t, results = torch.randn(2, *model.latent_shape), torch.tensor([900, 30]), []
    for item in (plain, model):
        with bf16():
            y = item.predict(x, t, item.encode_prompts(CAPTIONS))
        results.append([y, *torch.autograd.grad(y.square().mean(), trainable(item))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with bf16(), torch.no_grad():                                      # the teacher: without the adapters
        y_plain, y = (item.frozen_copy().predict(x, t, item.encode_prompts(CAPTIONS))
                      for item in (plain, model))
    assert torch.equal(y_plain, y)


@pytest.mark.parametrize("half_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("force_upcast", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_vae_computes_in_the_type_that_diffusers_chooses(pretrained, name, force_upcast, half_dtype):
    """fp32 for SDXL's VAE in fp16, unless it is the one made for fp16; with its weights cast or not."""
    expected = half_dtype
    if name == "sdxl" and force_upcast and half_dtype == torch.float16:
        expected = torch.float32
    for is_cast in (False, True):
        model = build_model(pretrained, name)
        model.vae.register_to_config(force_upcast=force_upcast)
        if is_cast:
            model.cast_frozen(half_dtype)
            assert {param.dtype for param in model.vae.parameters()} == {expected}
        received = []
        def record_dtype(module, args, out, received=received):
            received.append(out.dtype)
        for layer in (model.vae.encoder.conv_out, model.vae.decoder.conv_out):
            layer.register_forward_hook(record_dtype)
        image = torch.rand(2, 3, RESOLUTION, RESOLUTION)
        with torch.no_grad(), torch.autocast("cpu", half_dtype):
            z = model.encode(image)
            decoded = model.decode(z)
        assert received == 4 * [expected]
        assert z.dtype == decoded.dtype == torch.float32
        torch.testing.assert_close(decoded, model.decode(z).detach(), rtol=0, atol=.1)


def test_a_vae_in_half_precision_passes_the_discriminators_gradient(pretrained):
    gradients = []
    for is_cast in (False, True):
        model = build_model(pretrained, "sdxl")
        if is_cast:
            model.cast_frozen(torch.bfloat16)
        torch.manual_seed(0)
        z = torch.randn(1, *model.latent_shape, requires_grad=True)
        with bf16():
            image = model.decode(z)
        image[:, 0].mean().backward()
        gradients.append(z.grad)
    assert torch.nn.functional.cosine_similarity(*(grad.flatten() for grad in gradients), dim=0) > .99


def test_logits_are_exact_under_autocast():
    backbone = discriminator.FrozenBackbone(loading.load_backbone("tiny", "glyphs"))
    disc = discriminator.ProjectedDiscriminator(backbone, 16).eval()
    with torch.no_grad(), bf16():
        logits = torch.cat(disc(None, torch.rand(2, 3, 32, 32), torch.randn(2, 16)), 1)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("name", FAMILIES)
def test_text_encoders_in_half_precision_give_fp32_encodings(tmp_path, name):
    source = tiny_pipelines.make_pipeline(name, tmp_path)
    model = loading.load_model(name, "", source, RESOLUTION)
    for component_name, component in model._pipe[0].components.items():
        if component_name.startswith("text_encoder"):
            component.half()
    with bf16():
        cond = model.encode_prompts(CAPTIONS)
        y = model.predict(torch.randn(2, *model.latent_shape), torch.tensor([900, 30]), cond)
    assert all(value.dtype == torch.float32 for value in cond.values())
    assert y.isfinite().all()


# ---------------------------------------------------------------------------------------------- recomputation

@pytest.mark.parametrize("name", FAMILIES)
def test_the_report_reads_the_initial_model_again_and_drops_the_optimisers(pretrained, name):
    """During ADT's training of all weights there is one network."""
    trainer = setup_run(pretrained, name, "adt", "--full")
    assert trainer.teacher is None
    trainer.train_step()
    model, plain = trainer.model, build_model(pretrained, name)
    before = trainer.initial_model()
    assert trainer.opt_g is trainer.opt_d is None
    assert all(param.grad is None for param in trainer.g_params)
    assert before.vae is model.vae
    x, t, cond = torch.randn(2, *model.latent_shape), torch.tensor([900, 30]), plain.encode_prompts(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(before.predict(x, t, cond), plain.predict(x, t, cond))
        assert not torch.equal(before.predict(x, t, cond), model.predict(x, t, cond))
    assert not any(param.requires_grad for param in before.network.parameters())


def test_a_run_of_all_weights_ends_with_images_from_before_and_after(pretrained, drawing, tmp_path):
    args = train_args(pretrained, "sd15", "--method", "adt", "--full", "--steps", "1", *SHORT_PATH)
    i = args.index("--eval-samples")
    del args[i:i + 2]
    train.main([*args, "--output-dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "before_after.png").stat().st_size > 0


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_diffusion_loss_can_keep_no_graph_and_has_the_same_gradient(pretrained, name, rank):
    model = build_model(pretrained, name, rank)
    x0, eps = torch.randn(2, 2, *model.latent_shape)
    cond, t = model.encode_prompts(CAPTIONS), torch.tensor([900, 30])
    kept_size, kept_loss = saved_elements(lambda: losses.diffusion_loss(model, x0, t, eps, cond))
    size, loss = saved_elements(lambda: losses.diffusion_loss(model, x0, t, eps, cond, recompute=True))
    assert size < 4 * x0.numel() < .2 * kept_size                      # what the loss itself saves
    results = [[item.detach(), *torch.autograd.grad(item, trainable(model), allow_unused=True)]
               for item in (kept_loss, loss)]
    for kept, recomputed in zip(*results, strict=True):
        assert kept is recomputed is None or torch.equal(kept, recomputed)


@pytest.mark.parametrize("options", [[], ["--gradient-checkpointing"]])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_call_is_recomputed_twice(pretrained, name, options):
    """By the path or by the blocks, but not by both."""
    trainer = setup_run(pretrained, name, "adt", "--lora-rank", "4", *options)
    assert trainer.config.checkpoint_rollout
    model, runs, calls = trainer.model, [], []
    model.lora_layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    call_network = model.call_network
    def recording_call_network(*args):
        calls.append(torch.is_grad_enabled())
        return call_network(*args)
    model.call_network = recording_call_network
    batch = trainer.next_batches()[0]
    losses_dict, _ = trainer.method.generator_loss(model, None, trainer.disc, batch, trainer.config)
    num_calls, num_graphs = len(calls), sum(calls)
    assert num_graphs >= 2
    sum(losses_dict.values()).backward()
    assert len(runs) == num_calls + num_graphs


def counted_calls(trainer, num_steps):
    """Network calls of a generator's loss and its gradient: one backward pass counts as two."""
    model, runs, calls, num_graphs = trainer.model, [], [], 0
    model.lora_layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    call_network = type(model).call_network
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(type(model), "call_network",
                        lambda *args: calls.append(torch.is_grad_enabled()) or call_network(*args))
        for step in range(num_steps):
            trainer.step = step
            batch = trainer.next_batches()[0]
            losses_dict, _ = trainer.method.generator_loss(model, trainer.teacher, trainer.disc, batch,
                                                           trainer.config)
            num_graphs += sum(calls)
            sum(losses_dict.values()).backward()
            calls.clear()                                              # with those of the backward pass
    return (len(runs) + 2 * num_graphs) / num_steps


@pytest.mark.thorough
@pytest.mark.parametrize("recompute", ["--gradient-checkpointing", "--no-gradient-checkpointing"])
@pytest.mark.parametrize("method, settings", [("add", []), ("diffusion", []), ("adt", ["batch_size=4"]),
                                              ("adt", ["batch_size=1"]),
                                              ("adt", ["batch_size=2", "rollout_start=noise"])])
def test_the_calls_of_a_step_are_those_that_its_time_is_estimated_from(pretrained, method, settings,
                                                                       recompute):
    """Mean over the starts of the first steps. A batch of ADT has more calls where whole calls are
    recomputed, one for each step at which some image keeps its graph, and one for the others."""
    overrides = [arg for setting in settings for arg in ("--set", setting)]
    trainer = setup_run(pretrained, "sd15", method, "--lora-rank", "2", recompute, *overrides)
    expected = preflight.count_calls(method, trainer.config, trainer.model.recomputes_blocks)
    is_lower_bound = settings == ["batch_size=4"] and recompute == "--no-gradient-checkpointing"
    counted = counted_calls(trainer, 16 if settings == ["batch_size=1"] else 6)
    assert expected * .9 <= counted <= expected * (2 if is_lower_bound else 1.1)


def test_the_time_of_a_step_is_estimated_from_its_network_calls_or_matrix_products(pretrained, monkeypatch):
    trainer = setup_run(pretrained, "sd15", "adt", "--lora-rank", "2")
    assert preflight.seconds_of_call(trainer.model, repeats=1) > 0
    run_config = {"method": "adt", "model": "sd15", "fsdp": False, "compile": False, "lora_rank": 128,
                  "gradient_checkpointing": True, "world_size": 1}
    monkeypatch.setattr(preflight, "family_of_size", lambda name, _: name)
    num_calls = preflight.count_calls("adt", trainer.config, trainer.model.recomputes_blocks)
    for seconds, bound in ((1e3, "a network call"), (0, "matrix products")):
        monkeypatch.setattr(preflight, "seconds_of_call", lambda _, seconds=seconds: seconds)
        text = preflight.expected_cost(run_config, trainer, torch.device("cpu"), "fp32")
        assert f"speed of {bound})" in text
        assert (f"GiB, {1e3 * num_calls:.2g} s a step" in text) == (seconds > 0)


# -------------------------------------------------------------------------------------- unusual checkpoints

def open_card(run_dir, monkeypatch):
    """Execute the Python of README.md up to the images, in its folder -> the pipeline."""
    code = (run_dir / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(run_dir)
    scope = {}
    exec("\n".join(line for line in code.splitlines() if not line.startswith("image = ")), scope)
    return scope["pipe"]


def save_whole_and_lora(name, source, folder):
    """-> run folders, one with a pipeline and one with LoRA adapters."""
    for rank in (0, 2):
        model = loading.load_model(name, "", source, RESOLUTION)
        if rank:
            model.add_lora(rank)
        run_dir = folder / f"rank {rank}"
        run_dir.mkdir()
        model.save_pretrained(run_dir, CONFIGS)
        yield run_dir


def test_a_missing_safety_checker_is_not_needed(tmp_path, monkeypatch):
    """The public Stable Diffusion 1.5 names one. A folder without it can be trained, and plain diffusers
    opens the result."""
    source = tiny_pipelines.make_pipeline("sd15", tmp_path)
    edit_json(source / "model_index.json", requires_safety_checker=True,
              safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
              feature_extractor=["transformers", "CLIPImageProcessor"])
    for run_dir in save_whole_and_lora("sd15", source, tmp_path):
        assert open_card(run_dir, monkeypatch).safety_checker is None
    assert loading.load_model("sd15", "", tmp_path / "rank 0" / "pipeline", RESOLUTION).T == 1000


def test_a_folder_with_half_precision_files_only_is_read(tmp_path, monkeypatch):
    source = tiny_pipelines.make_pipeline("sd15", tmp_path)
    plain = loading.load_model("sd15", "", source, RESOLUTION)
    for path in list(source.glob("*/*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    model = loading.load_model("sd15", "", source, RESOLUTION)
    assert torch.equal(model.network.conv_in.weight, plain.network.conv_in.weight)
    for run_dir in save_whole_and_lora("sd15", source, tmp_path):
        pipe = open_card(run_dir, monkeypatch)
        assert torch.equal(pipe.vae.encoder.conv_in.weight, plain.vae.encoder.conv_in.weight)


def test_sd3_without_t5_is_trained_and_saved_without_it(tmp_path, monkeypatch):
    source = tiny_pipelines.make_pipeline("sd3", tmp_path)
    edit_json(source / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    model = loading.load_model("sd3", "", source, RESOLUTION)
    cond = model.encode_prompts(CAPTIONS)
    assert cond["text"][:, 77:].abs().max() == 0 < cond["text"][:, :77].abs().max()
    for run_dir in save_whole_and_lora("sd3", source, tmp_path):
        assert open_card(run_dir, monkeypatch).text_encoder_3 is None
    again = loading.load_model("sd3", "", tmp_path / "rank 0" / "pipeline", RESOLUTION)
    assert torch.equal(again.encode_prompts(CAPTIONS)["text"], cond["text"])


@pytest.mark.parametrize("stochasticity", [0., 1.])
def test_a_schedule_with_zero_terminal_snr_is_exported_as_such(tmp_path, stochasticity):
    source = tiny_pipelines.make_pipeline("sd15", tmp_path, "v_prediction")
    DDIMScheduler(**tiny_pipelines.BETAS, prediction_type="v_prediction",
                  rescale_betas_zero_snr=True).save_pretrained(source / "scheduler")
    edit_json(source / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    model = loading.load_model("sd15", "", source, RESOLUTION)
    assert model.alpha[-1] == 0
    model.save_pretrained(tmp_path, [(4, {"stochasticity": stochasticity})])
    exported = DiffusionPipeline.from_pretrained(tmp_path / "pipeline").scheduler
    torch.testing.assert_close(exported.alphas_cumprod.sqrt().float(), model.alpha, rtol=0, atol=3e-4)


def test_the_adapters_are_on_again_after_an_error_in_the_teacher(pretrained):
    model = build_model(pretrained, "sd15", rank=2)
    x, t, cond = torch.randn(1, *model.latent_shape), torch.tensor([500]), model.encode_prompts(CAPTIONS[:1])
    with torch.no_grad():
        before = model.predict(x, t, cond)
        with pytest.raises(RuntimeError):
            model.frozen_copy().predict(x[:, :1], t, cond)
        assert torch.equal(model.predict(x, t, cond), before)


def test_gradient_checkpointing_survives_random_weights(pretrained):
    trainer = setup_run(pretrained, "sd15", "adt", "--gradient-checkpointing", "--set", "init=random")
    assert trainer.model.network.is_gradient_checkpointing


def test_the_lora_rank_of_the_initial_weights_is_remembered(pretrained, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    args = train_args(pretrained, "sd15", "--method", "diffusion", "--steps", "1", *SHORT_PATH,
                      "--lora-rank", "4")
    train.main([*args, "--output-dir", str(first)])
    args = [arg for arg in args if arg not in ("--lora-rank", "4")]
    train.main([*args, "--pretrained", str(first), "--output-dir", str(second)])
    assert json.loads((second / "config.json").read_text())["lora_rank"] == 4
    assert loading.load_model("sd15", "", second, RESOLUTION).lora_rank == 4


def test_a_finished_run_that_lost_its_result_writes_it_again(pretrained, tmp_path):
    run_dir = tmp_path / "run"
    train.main(train_args(pretrained, "sd15", "--method", "diffusion", "--steps", "1", *SHORT_PATH,
                          "--output-dir", str(run_dir)))
    shutil.rmtree(run_dir / "pipeline")
    train.main(["--resume", str(run_dir), "--eval-samples", "0"])
    assert (run_dir / "pipeline" / "model_index.json").is_file()


# ------------------------------------------------------------------------------------------ many processes

def test_sharded_weights_that_were_swapped_are_gathered_again():
    """FSDP2 keeps the outermost layers' weights gathered after a call without gradients."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        distributed.apply_fsdp(network)
        x, params = torch.ones(1, 2), list(network.parameters())
        with torch.no_grad():
            before = network(x)
            for param in params:
                param.zero_()
            distributed.reshard_(network)
            assert network(x).abs().max() == 0 < before.abs().max()
        full = distributed.gather_full({"a": params}, cpu_rank0=True)
        assert [param.shape for param in full["a"]] == [(2, 2), (2,), (2, 2), (2,)]
        assert not any(distributed.is_sharded(param) for param in full["a"])
    finally:
        torch.set_autocast_cache_enabled(True)
        dist.destroy_process_group()
