"""Stable Diffusion 1.5, XL and 3 in the training loop, and beside the plain diffusers pipelines: the real
classes with few and random weights. Nothing is downloaded."""

import hashlib
import itertools
import json

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from tiny_families import (
    CAPTIONS,
    FAMILIES,
    RESOLUTION,
    build_model,
    checked_train_step,
    initial_noise,
    sample_pipeline,
    saved_elements,
    setup_run,
    train_args,
    trainable,
    write_run_config,
)

import add
import adt
import data
import discriminator
import evaluate
import losses
import train
from models import families, loading, pipelines, preflight, stable_diffusion
from scripts import tiny_pipelines
from utils import checkpoint
from utils import config as settings

pytestmark = pytest.mark.usefixtures("cache_home")


def lora_args(rank):
    return ["--lora-rank", str(rank)] if rank else []


def weights_hash(module):
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------ beside the pipelines

@pytest.mark.parametrize("name", FAMILIES)
def test_our_path_samples_what_the_plain_pipeline_samples(pretrained, name):
    """The pipeline with diffusers' DDIM, trailing, or with a flow's sigmas at the same timesteps."""
    model = build_model(pretrained, name)
    pipe = DiffusionPipeline.from_pretrained(pretrained / name)
    path = {"sigmas": [1., .75, .5, .25]}
    if name != "sd3":
        path = {"num_inference_steps": 4}
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing",
                                                   set_alpha_to_one=True, clip_sample=False, steps_offset=0)
    theirs = sample_pipeline(pipe, CAPTIONS, initial_noise(model, 2, seed=5), guidance_scale=3., **path)
    ours = evaluate.sample(model, CAPTIONS, 4, guidance_scale=3., seed=5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    assert ours.std() > .05


@pytest.mark.parametrize("name", FAMILIES)
def test_encode_and_decode_apply_the_vaes_scale_and_shift(pretrained, name):
    model = build_model(pretrained, name)
    image = torch.rand(2, 3, RESOLUTION, RESOLUTION) * 2 - 1
    torch.manual_seed(0)
    z = model.encode(image)
    assert z.shape[1:] == model.latent_shape
    torch.manual_seed(0)
    raw = torch.cat([model.vae.encode(item).latent_dist.sample() for item in image.split(1)])
    config = model.vae.config
    torch.testing.assert_close(z, (raw - (config.shift_factor or 0)) * config.scaling_factor)
    torch.testing.assert_close(model.decode(z), model.vae.decode(raw).sample, rtol=1e-4, atol=1e-4)


def test_decode_keeps_the_inputs_of_the_blocks_and_has_the_right_gradient(pretrained):
    model = build_model(pretrained, "sd15")
    vae, z = model.vae, torch.randn(2, *model.latent_shape, requires_grad=True)
    small, image = saved_elements(lambda: model.decode(z))
    image.square().sum().backward()
    vae.disable_gradient_checkpointing()
    direct = z.detach().clone().requires_grad_()
    whole, image = saved_elements(lambda: vae.decode(direct / vae.config.scaling_factor).sample)
    image.square().sum().backward()
    assert small < .5 * whole
    torch.testing.assert_close(z.grad, direct.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction,prediction_type", [("epsilon", "eps"), ("v_prediction", "v"),
                                                        ("sample", "x0")])
def test_the_prediction_type_is_the_schedulers(tmp_path, prediction, prediction_type):
    source = tiny_pipelines.make_pipeline("sd15", tmp_path, prediction)
    model = loading.load_model("sd15", "", source, RESOLUTION)
    assert model.prediction_type == prediction_type
    assert model.T == 1000
    assert model.t_input.tolist() == list(range(1000))


def test_a_scheduler_without_tables_is_refused():
    from diffusers import EDMEulerScheduler
    with pytest.raises(ValueError, match="scheduler is a EDMEulerScheduler"):
        stable_diffusion.schedule_from_diffusers(EDMEulerScheduler())


def test_tables_run_from_clean_to_noisy_and_the_flows_shift_is_applied_once(pretrained):
    for name in FAMILIES:
        model = build_model(pretrained, name)
        assert (model.sigma.diff() > 0).all()
        assert (model.alpha.diff() < 0).all()
    u = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(model.sigma, 3 * u / (1 + 2 * u))
    torch.testing.assert_close(model.t_input, 1000 * model.sigma)
    assert model.alpha[-1] == 0


def test_sd15s_pooled_embedding_is_clips_own(pretrained):
    model = build_model(pretrained, "sd15")
    pipe = model._pipe[0]
    ids = pipe.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(model.encode_prompts(CAPTIONS)["pooled"], pipe.text_encoder(ids).pooler_output,
                               rtol=1e-3, atol=1e-3)                   # the cache has fp16


def test_sdxl_receives_the_size_of_the_original_image(pretrained):
    model, received = build_model(pretrained, "sdxl"), []
    model.network.register_forward_pre_hook(
        lambda _, args, kwargs: received.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True)
    x, t = torch.randn(2, *model.latent_shape), torch.tensor([10, 500])
    micro_cond = torch.tensor([[640, 480, 8, 0], [64, 64, 0, 0]])
    model.predict(x, t, model.encode_prompts(CAPTIONS, micro_cond), model.encode_prompts([""]), 3.)
    model.predict(x, t, model.encode_prompts(CAPTIONS))
    expected = [[640, 480, 8, 0, RESOLUTION, RESOLUTION], [64, 64, 0, 0, RESOLUTION, RESOLUTION]]
    assert received[0].tolist() == 2 * expected
    assert received[1].tolist() == 2 * [[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]]


@pytest.mark.parametrize("name,prediction", [("sd15", "epsilon"), ("sd15", "v_prediction"),
                                             ("sdxl", "epsilon"), ("sdxl", "v_prediction"), ("sd3", "flow")])
def test_the_diffusion_loss_is_that_of_diffusers_own_training(pretrained, tmp_path, name, prediction):
    """Written as its text-to-image examples write it, on the same latents, noise and timesteps."""
    source = pretrained / name
    if prediction == "v_prediction":
        source = tiny_pipelines.make_pipeline(name, tmp_path, prediction)
    model = loading.load_model(name, "", source, RESOLUTION)
    scheduler = DiffusionPipeline.from_pretrained(source).scheduler
    z, eps = torch.randn(2, *model.latent_shape), torch.randn(2, *model.latent_shape)
    cond, t = model.encode_prompts(CAPTIONS), torch.tensor([13, 700])
    if name == "sd3":                                                  # its tables run from noise to image
        rows = len(scheduler.sigmas) - 1 - t
        sigma = scheduler.sigmas[rows].view(-1, 1, 1, 1)
        noisy, target, t_input = (1 - sigma) * z + sigma * eps, eps - z, scheduler.timesteps[rows]
    else:
        scheduler = DDPMScheduler.from_config(scheduler.config)        # the scheduler of their training
        noisy, t_input = scheduler.add_noise(z, eps, t), t
        target = eps if prediction == "epsilon" else scheduler.get_velocity(z, eps, t)
    with torch.no_grad():
        theirs = (model.forward_network(noisy, t_input, cond) - target).square().mean()
        ours = losses.diffusion_loss(model, z, t, eps, cond)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------- the loop

@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("method", ["adt", "add"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_changes_what_is_trained_and_nothing_else(pretrained, name, method, rank):
    trainer = setup_run(pretrained, name, method, *lora_args(rank))
    model, disc = trainer.model, trainer.disc
    frozen_hashes = [weights_hash(module) for module in (model.vae, disc.backbone)]
    frozen = [param for param in model.network.parameters() if not param.requires_grad]
    frozen_before = [param.clone() for param in frozen]
    before = [[param.detach().clone() for param in group] for group in (trainer.g_params, trainer.d_params)]
    for _ in range(2 if rank else 1):                                  # LoRA's first step changes B alone
        logs = trainer.train_step()
    assert all(value == value for value in logs.values())
    assert logs["grad_norm"] > 0 < logs["grad_norm_d"]
    assert frozen_hashes == [weights_hash(module) for module in (model.vae, disc.backbone)]
    assert all(torch.equal(old, new) for old, new in zip(frozen_before, frozen))
    for old_group, new_group in zip(before, (trainer.g_params, trainer.d_params)):
        changed = [not torch.equal(old, new) for old, new in zip(old_group, new_group)]
        assert sum(changed) >= .9 * len(changed)
    assert bool(frozen) == (rank == 4)
    assert all(param.grad is None for param in model.vae.parameters())


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("method", ["adt", "add"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_half_leaves_gradients_only_in_what_it_trains(pretrained, name, method, rank):
    """With all weights the teacher has a network of its own, with adapters it has the student's."""
    trainer = setup_run(pretrained, name, method, *lora_args(rank))
    is_own = trainer.teacher is None or trainer.teacher.network is not trainer.model.network
    assert is_own == (rank == 0)
    checked_train_step(trainer)


@pytest.mark.parametrize("method", [adt, add])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_adversarial_loss_alone_reaches_every_adapter(pretrained, name, method):
    model = build_model(pretrained, name, rank=2)
    dataset = data.build_dataset(str(pretrained / "images"), RESOLUTION)
    config = settings.build_config(train.METHODS[method.__name__], ["batch_size=2"], name)
    if method is adt:
        config.num_inference_steps, config.num_grad_steps, config.rollout_start = 3, 3, "noise"
    batch = dataset.sample_batch(2, torch.Generator().manual_seed(0))
    network = loading.load_backbone(name, "", source=pretrained / "dino")
    text_dim = model.encode_prompts(CAPTIONS)["pooled"].shape[1]
    disc = config.build_discriminator(discriminator.FrozenBackbone(network), text_dim)
    disc.eval().requires_grad_(False)
    torch.manual_seed(0)
    losses_dict = method.generator_loss(model, model.frozen_copy(), disc, batch, config)[0]
    losses_dict["adv"].backward()
    silent = [param.shape for param in trainable(model) if param.grad is None or param.grad.abs().max() == 0]
    # SD3's last block drops its text stream, and with it the adapters that only change that stream
    assert len(silent) <= (2 if name == "sd3" else 0), silent


@pytest.mark.parametrize("name", FAMILIES)
def test_the_teacher_is_the_student_without_its_adapters(pretrained, name):
    base, model = build_model(pretrained, name), build_model(pretrained, name, rank=4)
    teacher = model.frozen_copy()
    x, t = torch.randn(2, *model.latent_shape), torch.tensor([900, 30])
    with torch.no_grad():
        y_base, y_teacher, y_model = (m.predict(x, t, m.encode_prompts(CAPTIONS))
                                      for m in (base, teacher, model))
    assert torch.equal(y_base, y_teacher)
    assert not torch.allclose(y_teacher, y_model, atol=1e-3)
    assert teacher.network is model.network
    assert all(param.requires_grad for param in trainable(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_of_the_teacher_leaves_gradients_and_graphs_of_the_student_alone(pretrained, name):
    """Also while the student's graph is alive; in the teacher's own call nothing is switched but a flag."""
    model = build_model(pretrained, name, rank=4)
    teacher, during = model.frozen_copy(), []
    x, t, cond = torch.randn(1, *model.latent_shape), torch.tensor([500]), model.encode_prompts(CAPTIONS[:1])
    params = list(model.network.parameters())
    requires_grad = [param.requires_grad for param in params]

    def gradients(call_teacher):
        for param in params:
            param.grad = None
        loss = model.predict(x, t, cond).square().mean()
        if call_teacher:
            with torch.no_grad():
                teacher.predict(x, t, cond)
        (loss + model.predict(x, t, cond).mean()).backward()
        return [param.grad.clone() for param in trainable(model)]

    model.output_layer.register_forward_hook(
        lambda *_: during.append([param.requires_grad for param in params]))
    for plain, interrupted in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, interrupted)
    assert len(during) == 5
    assert all(row == requires_grad for row in during)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_teacher_of_a_run_that_continues_adapters_has_them(pretrained, tmp_path, name):
    first = build_model(pretrained, name, rank=2)
    write_run_config(tmp_path, name, pretrained / name, lora_rank=2)
    first.save_pretrained(tmp_path, [(10, {})], steps=1)
    model = loading.load_model(name, "", tmp_path, RESOLUTION)
    model.add_lora(2)
    teacher = model.frozen_copy()
    x, t, cond = torch.randn(2, *model.latent_shape), torch.tensor([900, 30]), model.encode_prompts(CAPTIONS)
    with torch.no_grad():
        y_first = first.predict(x, t, cond)
        for param in trainable(model):
            param.zero_()
        assert torch.equal(teacher.predict(x, t, cond), y_first)
        assert not torch.allclose(model.predict(x, t, cond), y_first, atol=1e-3)
    assert not any(param.requires_grad for param in teacher.network.parameters())


def test_a_student_of_a_flow_model_can_have_an_earlier_time_at_pure_noise(pretrained, tmp_path, capsys):
    """The network of a flow model predicts the mean image at t = T: a sentence says so, and --set t_max
    trains and exports another time. (tests/test_export.py samples such a card.)"""
    run_dir = tmp_path / "run"
    args = train_args(pretrained, "sd3", "--method", "add", "--steps", "1", *lora_args(4))
    train.main([*args, "--set", "t_max=.9", "--output-dir", str(run_dir)])
    assert "t_max" not in capsys.readouterr().out.replace(str(run_dir), "")
    assert "sigmas=[0.9, 0.75, 0.5, 0.25], guidance_scale=1" in (run_dir / "README.md").read_text()
    train.main([*args, "--output-dir", str(tmp_path / "default")])
    assert capsys.readouterr().out.count("take --set t_max=.9") == 1


@pytest.mark.parametrize("setting", ["t_max=.9", "stochasticity=.5"])
def test_a_student_that_diffusers_could_not_sample_is_refused(pretrained, tmp_path, capsys, setting):
    key = setting.split("=")[0]
    with pytest.raises(SystemExit) as stop:
        train.main(train_args(pretrained, "sd15", "--method", "add", "--set", setting, "--output-dir",
                              str(tmp_path / "run")))
    assert stop.value.code == 2
    assert key in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("method", train.METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_command_a_user_types(pretrained, tmp_path, name, method, monkeypatch):
    """Two steps, the second of them resumed; then the model card's code, in plain diffusers."""
    combinations = list(itertools.product(FAMILIES, train.METHODS))
    rank = 4 * (combinations.index((name, method)) % 2)                # LoRA and whole networks by turns
    short = [] if method == "add" else ["--set", "num_inference_steps=2", "--set", "num_grad_steps=1"]
    run_dir = tmp_path / "run"
    train.main(train_args(pretrained, name, "--method", method, "--steps", "1", "--output-dir", str(run_dir),
                          *lora_args(rank), *short))
    assert (run_dir / "samples_000001.png").is_file()
    run_config = checkpoint.load_run_config(run_dir / "config.json")
    assert run_config["model"] == name
    assert run_config["lora_rank"] == rank
    train.main(["--resume", str(run_dir), "--steps", "2", "--eval-samples", "0"])
    assert len((run_dir / "log.jsonl").read_text().splitlines()) == 2

    monkeypatch.chdir(run_dir)
    code = (run_dir / "README.md").read_text().split("```python\n")[1].split("```")[0]
    usual = families.GUIDANCE_SCALES[name]
    guidance_scale = {"add": 1, "diffusion": usual, "adt": usual if name == "sd3" else 7.5}[method]
    assert f"guidance_scale={guidance_scale:g}," in code
    assert code.count("image = pipe(") == (3 if method == "add" else 1)
    scope = {}
    exec(code, scope)
    assert scope["image"].size == (RESOLUTION, RESOLUTION)
    network = getattr(scope["pipe"], families.MODEL_FAMILIES[name][0].component_name)
    result = loading.load_model(name, "", run_dir)
    x, t = torch.randn(1, *result.latent_shape), torch.tensor([400])
    with torch.no_grad():
        cond = result.encode_prompts(CAPTIONS[:1])
        ours = result.predict(x, t, cond)
        result.network = network
        torch.testing.assert_close(result.predict(x, t, cond), ours, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- resolution

def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("sample_size,resolution", [
    (32, 64), (48, 96), ([64, 40], 80), (None, 512), (30, 48), (7, 512), ("64", 512), ([], 512)])
def test_the_default_resolution_is_the_checkpoints(tmp_path, sample_size, resolution):
    """Stable Diffusion 2.1 has 768 pixels in the pipeline class of 1.5, which has 512."""
    source = tiny_pipelines.make_pipeline("sd15", tmp_path)
    edit_json(source / "unet" / "config.json", sample_size=sample_size)
    model = loading.load_model("sd15", "", source)
    assert model.resolution == resolution
    assert model.latent_shape == (4, resolution // 2, resolution // 2)
    assert loading.load_model("sd15", "", source, 128).resolution == 128


@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_resolution_of_a_run_is_the_runs(pretrained, tmp_path, name):
    for resolution, rank in ((128, 0), (None, 0), (128, 4), (None, 4)):
        run_dir = tmp_path / f"{resolution}-{rank}"
        run_dir.mkdir()
        model = build_model(pretrained, name, rank)
        model.save_pretrained(run_dir, [(10, {})])
        write_run_config(run_dir, name, pretrained / name, rank, resolution)
        expected = resolution or 64                                    # else the checkpoint's
        assert loading.load_model(name, "", run_dir).resolution == expected


@pytest.mark.parametrize("resolution", [30, 0, -64])
def test_an_impossible_resolution_is_refused(pretrained, resolution):
    with pytest.raises(ValueError, match="wanted a multiple of 16"):
        families.load_denoiser("sd15", pretrained / "sd15", resolution)


# ----------------------------------------------------------------------------------------------- bad input

def test_what_cannot_be_loaded_is_one_sentence(pretrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(preflight, "check_machine", lambda *_: None)   # it would want a GPU first
    empty, odd = tmp_path / "empty", tmp_path / "odd"
    empty.mkdir()
    odd.mkdir()
    (odd / "model_index.json").write_text("[1]")
    incomplete = tiny_pipelines.make_pipeline("sd15", tmp_path / "incomplete")
    (incomplete / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    cut = tiny_pipelines.make_pipeline("sd15", tmp_path / "cut")
    file = cut / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    for args, expected in ((["--pretrained", str(empty)], "wanted a diffusers folder"),
                           (["--pretrained", str(pretrained / "sdxl")], "holds a StableDiffusionXLPipeline"),
                           (["--pretrained", "./nowhere"], "no such folder, and no hub id either"),
                           (["--pretrained", "nobody/nothing-of-that-name"], "hf auth login"),
                           (["--pretrained", str(incomplete)], "complete it, copy it again"),
                           (["--pretrained", str(cut)], "complete it, copy it again"),
                           (["--pretrained", str(odd)], "model_index.json is damaged"),
                           (["--backbone", str(empty)], "wanted a folder or hub id of a Dinov2Model"),
                           (["--resolution", "30"], "wanted a multiple of"),
                           (["--set", "backbone=cnn"], "backbone=vit (DINOv2) or random"),
                           (["--lora-rank", "4", "--set", "init=random"], "exclude each other")):
        with pytest.raises(SystemExit) as stop:
            train.main(train_args(pretrained, "sd15", "--output-dir", str(tmp_path / "run"), *args))
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert stop.value.code == 2, (args, error)
        assert expected in error, (args, error)
        assert "Traceback" not in error
    with pytest.raises(SystemExit) as stop:
        train.main(["--lora-rank", "4", "--output-dir", str(tmp_path / "run"), "--eval-samples", "0"])
    assert stop.value.code == 2
    assert "--lora-rank is for" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_can_be_built_upon(pretrained, tmp_path):
    for name, rank in (("sd15", 0), ("sd3", 4)):
        model = build_model(pretrained, name, rank)
        run_dir = tmp_path / name
        run_dir.mkdir()
        model.save_pretrained(run_dir, [(10, {})])
        write_run_config(run_dir, name, pretrained / name, rank)
        again = loading.load_model(name, "", run_dir)
        torch.testing.assert_close(evaluate.sample(again, CAPTIONS, 2), evaluate.sample(model, CAPTIONS, 2),
                                   rtol=0, atol=1e-4)


def test_a_run_of_another_family_or_with_half_its_adapters_is_refused(pretrained, tmp_path):
    from safetensors.torch import load_file, save_file
    build_model(pretrained, "sd15", 4).save_pretrained(tmp_path, [(10, {})])
    write_run_config(tmp_path, "sd15", pretrained / "sd15", lora_rank=4)
    for name in ("sdxl", "sd3"):
        with pytest.raises(ValueError, match=f"a run of sd15, not of --model {name}"):
            loading.load_model(name, "", tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    layers = load_file(file)
    save_file(dict(list(layers.items())[1:]), file)
    with pytest.raises(ValueError, match="does not hold the adapters of this network"):
        loading.load_model("sd15", "", tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        loading.load_model("sd15", "", tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="has no result yet"):
        loading.load_model("sd15", "", tmp_path)


@pytest.mark.parametrize("disabled", [False, True])
def test_progress_bars_of_downloads_stay_as_the_user_has_them(pretrained, monkeypatch, disabled):
    """transformers switches them off together with its own."""
    hub = huggingface_hub.utils
    before = hub.are_progress_bars_disabled()
    during = []
    load_pipeline = pipelines.load_pipeline

    def recording_load_pipeline(*args, **kwargs):
        during.append(hub.are_progress_bars_disabled())
        return load_pipeline(*args, **kwargs)

    monkeypatch.setattr(pipelines, "load_pipeline", recording_load_pipeline)
    try:
        hub.disable_progress_bars() if disabled else hub.enable_progress_bars()
        build_model(pretrained, "sd15")
        assert during == [disabled]
        assert hub.are_progress_bars_disabled() == disabled
    finally:
        hub.disable_progress_bars() if before else hub.enable_progress_bars()
