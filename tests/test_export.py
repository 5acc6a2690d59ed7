"""What a run leaves: a pipeline or LoRA file, a scheduler and a model card with which plain diffusers samples
the same images as this project."""

import json
import os
import stat

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_families import (
    CAPTIONS,
    FAMILIES,
    RESOLUTION,
    build_model,
    initial_noise,
)

import evaluate
import sampler
from conftest import family_schedule
from models import export, loading
from models.denoiser import Denoiser
from models.stable_diffusion import schedule_from_diffusers
from scripts import tiny_pipelines

pytestmark = pytest.mark.usefixtures("cache_home")

SCALED_LINEAR = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear")
ADT, ADD = [(10, {"guidance_scale": 7.5})], [(1, {"stochasticity": 1.}), (4, {"stochasticity": 1.})]


class TableModel(Denoiser):
    """What export needs of a model, from a diffusers scheduler; its network is a fixed nonlinear function."""

    def __init__(self, scheduler):
        super().__init__(*schedule_from_diffusers(scheduler))
        self.scheduler_config = dict(scheduler.config)

    def forward_network(self, x, t_input, cond):
        t = (t_input / self.T).view(-1, 1, 1, 1)
        return torch.tanh(x.roll(1, -1) * (1 + t) + .3 * torch.sin(5 * t))


def scheduler_loop(scheduler, model, x, argument):
    """What a diffusers pipeline does with a scheduler, from x at its first timestep to the end. argument: of
    the pipeline's call, as the model card gives it."""
    name, value = argument.split("=", 1)
    scheduler.set_timesteps(**{name: json.loads(value)})
    x = x * getattr(scheduler, "init_noise_sigma", 1.)
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        y = model.forward_network(x_in, t.float().expand(len(x)), None)
        x = scheduler.step(y, t, x, return_dict=False)[0]
    return x


def reload(scheduler, folder):
    """The scheduler as plain diffusers reads it from its file."""
    scheduler.save_pretrained(folder)
    return type(scheduler).from_pretrained(folder)


SCHEDULES = {
    "pndm": diffusers.PNDMScheduler(**SCALED_LINEAR, steps_offset=1, skip_prk_steps=True),
    "euler": diffusers.EulerDiscreteScheduler(**SCALED_LINEAR, steps_offset=1, use_karras_sigmas=True),
    "v": diffusers.DDIMScheduler(**SCALED_LINEAR, prediction_type="v_prediction"),
    "v, zero SNR": diffusers.DDIMScheduler(**SCALED_LINEAR, prediction_type="v_prediction",
                                           rescale_betas_zero_snr=True),
    "v, zero SNR of Euler": diffusers.EulerDiscreteScheduler(**SCALED_LINEAR, prediction_type="v_prediction",
                                                             rescale_betas_zero_snr=True),
    "x0": diffusers.DDPMScheduler(**SCALED_LINEAR, prediction_type="sample"),
    "zero SNR that PNDM ignores": diffusers.PNDMScheduler.from_config(
        dict(SCALED_LINEAR, rescale_betas_zero_snr=True)),
    "sigmoid betas": diffusers.DDPMScheduler(beta_schedule="sigmoid"),
    "cosine": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    "given betas": diffusers.DDPMScheduler(trained_betas=torch.linspace(1e-4, .02, 1000).tolist()),
    "thresholding": diffusers.DDIMScheduler(**SCALED_LINEAR, thresholding=True, clip_sample=True,
                                            prediction_type="v_prediction"),
    "500 timesteps": diffusers.DDIMScheduler(500, .001, .02),
    "lcm": diffusers.LCMScheduler(**SCALED_LINEAR, original_inference_steps=4),
    "dpm of order 2": diffusers.DPMSolverMultistepScheduler(**SCALED_LINEAR, use_lu_lambdas=True),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.),
    "flow without shift": diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow with dynamic shift": diffusers.FlowMatchEulerDiscreteScheduler(shift=3., use_dynamic_shifting=True),
    "flow with Karras sigmas": diffusers.FlowMatchEulerDiscreteScheduler(shift=2., use_karras_sigmas=True),
    "flow of a student": diffusers.FlowMatchLCMScheduler(shift=3.),
}


@pytest.mark.parametrize("num_steps", [1, 7, 28, 48])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_exported_scheduler_takes_the_path_of_training(tmp_path, kind, num_steps):
    """Also where the number of steps does not divide T, whatever the pipeline's own scheduler was."""
    model = TableModel(SCHEDULES[kind])
    scheduler = reload(export.make_scheduler(model, few_step=False), tmp_path)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = sampler.rollout(model, noise, sampler.make_timesteps(model.T, num_steps), {})
    theirs = scheduler_loop(scheduler, model, noise, export.path_argument(model, scheduler, num_steps, {}))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_steps", [1, 3, 4])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_exported_few_step_scheduler_takes_the_path_of_training(tmp_path, kind, num_steps):
    model = TableModel(SCHEDULES[kind])
    scheduler = reload(export.make_scheduler(model, few_step=True), tmp_path)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    ours = sampler.rollout(model, noise, sampler.make_timesteps(model.T, num_steps), {}, stochasticity=1.)
    torch.manual_seed(5)
    theirs = scheduler_loop(scheduler, model, noise, export.path_argument(model, scheduler, num_steps, {}))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [{"timestep_shift": 3.}, {"t_max": .9}])
@pytest.mark.parametrize("kind", ["pndm", "flow"])
def test_other_timesteps_are_written_out(kind, settings):
    model = TableModel(SCHEDULES[kind])
    scheduler = export.make_scheduler(model, few_step=False)
    timesteps = sampler.make_timesteps(model.T, 4, settings.get("timestep_shift", 1.),
                                       settings.get("t_max", 1.))
    noise = torch.randn(2, 3, 8, 8)
    theirs = scheduler_loop(scheduler, model, noise, export.path_argument(model, scheduler, 4, settings))
    ours = sampler.rollout(model, noise, timesteps, {})
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    visited = scheduler.timesteps if kind == "pndm" else scheduler.sigmas[:-1]
    wanted = timesteps if kind == "pndm" else model.sigma[timesteps]
    torch.testing.assert_close(visited.float(), wanted.float())


@pytest.mark.parametrize("name", ["sd15", "sd2-v-zero-snr", "sd3"])
def test_a_reloaded_scheduler_has_the_same_tables(tmp_path, name):
    """A model that goes on from the exported pipeline has the noise schedule that it was trained with."""
    source = SCHEDULES[{"sd15": "pndm", "sd2-v-zero-snr": "v, zero SNR", "sd3": "flow"}[name]]
    prediction_type, alpha, sigma = family_schedule(name)
    for few_step in (False, True):
        scheduler = reload(export.make_scheduler(TableModel(source), few_step), tmp_path)
        again = schedule_from_diffusers(scheduler)
        assert again[0] == prediction_type
        torch.testing.assert_close(again[1], alpha, rtol=0, atol=3e-4)
        torch.testing.assert_close(again[2], sigma, rtol=0, atol=3e-4)


@pytest.mark.parametrize("configs,few_step", [
    (ADT, False), (ADD, True), ([(4, {})], False), ([(4, {"stochasticity": 0.})], False), ([], False),
    ([(4, {"stochasticity": .5})], None), ([(4, {}), (1, {"stochasticity": 1.})], None)])
def test_the_settings_choose_the_scheduler(configs, few_step):
    if few_step is None:
        with pytest.raises(ValueError, match="no scheduler of diffusers samples with stochasticity"):
            export.is_few_step(configs)
    else:
        assert export.is_few_step(configs) == few_step


# ----------------------------------------------------------------------------------------- whole pipelines

def run_card(run_dir, noise, monkeypatch):
    """Execute the Python of a run's README.md in its folder -> pipeline, images of its calls in [-1, 1]."""
    monkeypatch.chdir(run_dir)
    code = (run_dir / "README.md").read_text().split("```python\n")[1].split("```")[0]
    opening = "\n".join(line for line in code.splitlines() if not line.startswith("image = "))
    scope = {}
    exec(opening, scope)
    pipe = scope["pipe"]
    pipe.set_progress_bar_config(disable=True)
    images = []
    for line in code.splitlines():
        if line.startswith("image = "):
            call = line.removeprefix("image = ").removesuffix(".images[0]")
            call = call.replace("pipe(prompt,", "pipe(captions, latents=noise.clone(), output_type='pt',")
            torch.manual_seed(5)
            images.append(eval(call, {"pipe": pipe, "captions": CAPTIONS, "noise": noise}).images * 2 - 1)
    return pipe, images


@pytest.mark.parametrize("name,rank,prediction", [
    ("sd15", 0, "epsilon"), ("sd15", 4, "epsilon"), ("sd15", 4, "v_prediction"), ("sdxl", 0, "v_prediction"),
    ("sdxl", 0, "epsilon"), ("sdxl", 4, "epsilon"), ("sd3", 0, "flow"), ("sd3", 4, "flow")])
def test_the_model_card_samples_our_images(pretrained, tmp_path, name, rank, prediction, monkeypatch):
    """As it stands: pipeline or LoRA, scheduler, steps, guidance scale and size. 7 does not divide 1000."""
    source = pretrained
    if prediction == "v_prediction":
        source = tmp_path
        tiny_pipelines.make_pipeline(name, tmp_path, prediction)
    model = build_model(source, name, rank)
    if not rank:
        with torch.no_grad():
            for param in model.network.parameters():
                param.mul_(1.1)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    model.save_pretrained(run_dir, [(4, {"guidance_scale": 2.}), (7, {})], method="adt", steps=1)
    pipe, images = run_card(run_dir, initial_noise(model, 2, seed=5), monkeypatch)
    for image, (num_steps, guidance_scale) in zip(images, [(4, 2.), (7, 1.)], strict=True):
        ours = evaluate.sample(model, CAPTIONS, num_steps, guidance_scale=guidance_scale, seed=5)
        torch.testing.assert_close(ours, image, rtol=0, atol=2e-3)
    untrained = evaluate.sample(build_model(source, name), CAPTIONS, 4, guidance_scale=2., seed=5)
    assert (images[0] - untrained).abs().max() > .01


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name,t_max", [*((name, 1.) for name in FAMILIES), ("sd3", .9)])
def test_the_model_card_samples_a_students_images(pretrained, tmp_path, name, t_max, rank, monkeypatch):
    """Also of a flow model that was given an earlier time than T at pure noise."""
    model = build_model(pretrained, name, rank)
    model.save_pretrained(tmp_path, [(n, {"stochasticity": 1., "t_max": t_max}) for n in (1, 2, 3, 4)])
    noise = initial_noise(model, 2, seed=5)
    pipe, images = run_card(tmp_path, noise, monkeypatch)
    assert "LCM" in type(pipe.scheduler).__name__
    for num_steps, image in zip((1, 2, 3, 4), images, strict=True):
        torch.manual_seed(5)                                           # the pipelines draw from this as well
        with torch.no_grad():
            timesteps = sampler.make_timesteps(model.T, num_steps, t_max=t_max)
            x0 = sampler.rollout(model, noise, timesteps, model.encode_prompts(CAPTIONS), stochasticity=1.)
            ours = model.decode(x0).clamp(-1, 1)
        torch.testing.assert_close(ours, image, rtol=0, atol=2e-3)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("configs", [ADT, ADD], ids=["adt", "add"])
def test_no_method_leaves_the_pipelines_own_scheduler(pretrained, tmp_path, configs, rank):
    model = build_model(pretrained, "sd15", rank)
    model.save_pretrained(tmp_path, configs)
    folder = tmp_path / "scheduler" if rank else tmp_path / "pipeline" / "scheduler"
    found = json.loads((folder / "scheduler_config.json").read_text())
    assert "skip_prk_steps" in model.scheduler_config                  # PNDM's
    assert found["_class_name"] == ("LCMScheduler" if configs is ADD else "DPMSolverMultistepScheduler")
    assert found["timestep_spacing"] == "trailing"


def test_the_model_card_tells_what_training_fixed(pretrained, tmp_path):
    model = loading.load_model("sdxl", "", pretrained / "sdxl", 128)
    model.add_lora(4)
    model.pretrained_path = "stabilityai/stable-diffusion-xl-base-1.0"
    model.save_pretrained(tmp_path, ADT, method="adt", data="it's `data`", overrides=["lr=1"], steps=7)
    card = (tmp_path / "README.md").read_text()
    header, text = card.removeprefix("---\n").split("---\n", 1)
    assert "library_name: diffusers" in header
    assert "base_model: stabilityai/stable-diffusion-xl-base-1.0" in header
    for wanted in ("num_inference_steps=10", "guidance_scale=7.5", "height=128, width=128",
                   "128 x 128 pixels", "LoRA adapters of rank 4", '- method: `"adt"`', "- steps: `7`",
                   'from_pretrained("scheduler")'):
        assert wanted in text, wanted


def test_the_card_of_a_local_base_names_an_absolute_path(pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(pretrained)
    model = loading.load_model("sd15", "", "sd15", RESOLUTION)
    model.add_lora(4)
    model.save_pretrained(tmp_path, ADD)
    pipe, _ = run_card(tmp_path, initial_noise(model, 2, seed=5), monkeypatch)
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    assert pipe.get_list_adapters() == {"unet": ["default_0"]}


@pytest.mark.parametrize("umask,mode", [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_umasks_mode(pretrained, tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        for rank in (0, 2):
            run_dir = tmp_path / str(rank)
            run_dir.mkdir()
            build_model(pretrained, "sd15", rank).save_pretrained(run_dir, ADT)
    finally:
        os.umask(old)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts]
    assert len(files) > 10
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_a_result_is_replaced_as_a_whole(pretrained, tmp_path, monkeypatch):
    """A second save replaces the first; one that fails leaves it."""
    model = build_model(pretrained, "sd15")
    model.save_pretrained(tmp_path, ADT)
    model.save_pretrained(tmp_path, ADD)
    config = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    before = config.read_text()
    assert "LCMScheduler" in before

    def fail(self, folder, **kwargs):
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("no space left")

    monkeypatch.setattr(DiffusionPipeline, "save_pretrained", fail)
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path, ADT)
    assert config.read_text() == before
    assert not list(tmp_path.glob("*.part"))
