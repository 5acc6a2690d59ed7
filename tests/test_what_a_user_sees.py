"""What a user of Stable Diffusion reads and sees: guidance of the base, grids of samples, sentences during
the run, the memory check of local weights, names of run folders. On tiny pipelines, without training."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import RESOLUTION, build_model, write_run_config

import add
import adt
import evaluate
import train
from conftest import make_trainer
from models import families, named, pipelines, preflight
from utils import cli, plotting, report
from utils.messages import format_duration

pytestmark = pytest.mark.usefixtures("cache_home")


def resolve(*args):
    """run_config and run folder of a new run with these arguments."""
    return cli.resolve_run_config(train.parse_args(list(args))[1], train.METHODS, train.MODELS,
                                  ("glyphs", "OWNER/NAME"))


# ------------------------------------------------------------------------------------ guidance of the base

@pytest.mark.parametrize("model_name,source,scale", [
    ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", 7.5),
    ("sd15", "stabilityai/stable-diffusion-2-1", 7.5),
    ("sd15", "stabilityai/sd-turbo", 1.), ("sdxl", "stabilityai/sdxl-turbo", 1.), ("sdxl", "me/mine", 5.),
    ("sd3", "stabilityai/stable-diffusion-3-medium-diffusers", 7.), ("sd35", "/weights/sd35", 4.5),
    ("sd35-large", "stabilityai/stable-diffusion-3.5-large-turbo", 1.)])
def test_a_checkpoint_is_sampled_with_its_familys_guidance(model_name, source, scale):
    scheduler = SimpleNamespace()
    assert families.usual_guidance_scale(model_name, source, scheduler) == scale
    scheduler = type("LCMScheduler", (), {})()
    assert families.usual_guidance_scale(model_name, source, scheduler) == 1.


def test_every_family_has_a_guidance_scale_and_adt_trains_with_that_of_sd15_and_flows():
    assert families.GUIDANCE_SCALES.keys() == families.MODEL_FAMILIES.keys()
    for name in ("sd15", "sd3", "sd35", "sd35-large"):
        assert adt.PRESETS[name]["guidance_scale"][0] == families.GUIDANCE_SCALES[name]
    for name, scale in families.GUIDANCE_SCALES.items():
        assert adt.DIFFUSION_PRESETS[name]["guidance_scale"][0] == scale


def test_only_the_base_of_an_add_run_has_guidance():
    rows = add.Config(t_max=1.).eval_sampling_configs(7.5)
    assert {settings["guidance_scale"] for label, _, settings in rows if label == "before"} == {7.5}
    assert all("guidance_scale" not in settings for label, _, settings in rows if label == "after")
    tiny = make_trainer("--method", "add")
    assert tiny.model.guidance_scale == 1.                             # as it was: no guidance in the tables


def test_the_label_of_a_row_names_the_guidance_of_a_large_model(pretrained):
    model = build_model(pretrained, "sd15")
    assert model.guidance_scale == 7.5
    assert model.frozen_copy().guidance_scale == 7.5
    rows = evaluate.evaluate_models([("before", model, 2, {"guidance_scale": 7.5}), ("after", model, 1, {})],
                                    ["a red fox"])[1]
    assert [label for label, _ in rows] == ["before, 2 steps, guidance 7.5", "after, 1 step"]
    plain, guided = (evaluate.sample(model, ["a red fox"], 2, seed=1, guidance_scale=w) for w in (1., 7.5))
    assert torch.equal(rows[0][1], guided)
    assert not torch.allclose(plain, guided, atol=.01)


@pytest.mark.parametrize("configs,scale", [
    ([[10, {"guidance_scale": 3.}]], 3.), ([[1, {"stochasticity": 1., "t_max": 1.}]], 7.5), (None, 7.5),
    ([[10, {"guidance_scale": 3.}], [50, {"guidance_scale": 5.}]], 7.5)])
def test_evaluate_samples_the_base_with_the_guidance_of_a_run_beside_it(pretrained, tmp_path, configs, scale):
    """That of an ADT run; a student has none, so its base is sampled as its users do."""
    build_model(pretrained, "sd15", rank=2).save_pretrained(tmp_path, [(1, {})])
    write_run_config(tmp_path, "sd15", pretrained / "sd15", lora_rank=2)
    run_config = json.loads((tmp_path / "config.json").read_text()) | {"sampling_configs": configs}
    (tmp_path / "config.json").write_text(json.dumps(run_config))
    base, run = named.load_named_models(["base", str(tmp_path)], {"base": "denoiser"}, "glyphs", "sd15",
                                        str(pretrained / "sd15"))
    assert {settings["guidance_scale"] for _, settings in base.sampling_configs} == {scale}
    if configs:                                                        # a run that starts from this run
        assert run.model.guidance_scale == configs[-1][1].get("guidance_scale", 1.)


# ------------------------------------------------------------------------------------------ grids, sentences

class ReporterDouble:
    def add_samples(self, step, image_rows, captions):
        self.step, self.rows, self.captions = step, image_rows, captions


def test_a_grid_shows_the_fewest_and_the_most_steps():
    trainer, reporter = make_trainer("--method", "add"), ReporterDouble()
    trainer.warmup_steps_d, captions = 2, ["a yellow umbrella", "a white circle"]
    settings = {"stochasticity": 1., "t_max": .9}
    run_config = {"sampling_configs": [(1, settings), (2, settings), (4, settings)]}
    labels = []
    for trainer.step in (0, 2, 3):
        train.show_samples(trainer, run_config, captions, reporter)
        labels.append([label for label, _ in reporter.rows])
        assert reporter.step == trainer.step
    warmup = "training step 2, discriminator's warm-up"
    assert labels == [["training step 0, 1 step", "training step 0, 4 steps"],
                      [f"{warmup}, 1 step", f"{warmup}, 4 steps"],
                      ["training step 3, 1 step", "training step 3, 4 steps"]]
    for (_, images), num_steps in zip(reporter.rows, (1, 4), strict=True):
        with trainer.ema_weights() as model:                           # from the noise of seed 1, as before
            assert torch.equal(images, evaluate.sample(model, captions, num_steps, seed=1, **settings))
    train.show_samples(trainer, {"sampling_configs": [(2, {})]}, captions, reporter)
    assert [label for label, _ in reporter.rows] == ["training step 3, 2 steps"]


def test_a_grid_before_the_first_step_needs_no_log(tmp_path):
    reporter = report.Reporter(tmp_path, 0, {"report_to": None})
    reporter.add_samples(0, [("training step 0, 1 step", torch.zeros(1, 3, 8, 8))], ["a"])
    assert (tmp_path / "samples_000000.png").is_file()
    assert not (tmp_path / "curves.png").exists()


def progress(is_large=True, total_steps=2000, warmup=0, first_step=0, seconds=lambda step: 6. * step):
    """{step: sentences} of a run whose log says when each step ended."""
    trainer = make_trainer("--method", "adt")
    trainer.model.is_large = is_large
    trainer.total_steps, trainer.warmup_steps_d, trainer.first_step = total_steps, warmup, first_step
    rows, notes = [], {}
    for step in range(first_step, min(total_steps, first_step + 150)):
        rows.append({"step": step, "seconds": seconds(step + 1), "acc_d_real": .7, "acc_d_fake": .7})
        trainer.step = step + 1
        notes[step + 1] = trainer.progress_notes(rows[-100:])
    return {step: sentences for step, sentences in notes.items() if sentences}


def test_a_large_run_says_how_long_it_will_take():
    """The first step, which compiles and fills caches, does not count."""
    slow_start = progress(seconds=lambda step: 6. * step + 300)
    assert slow_start == {11: ["6 s a step, about 3.3 hours left without samples and checkpoints"]}
    assert list(progress(first_step=500)) == [511]                     # a resumed run says it again
    warm = progress(warmup=100)
    assert list(warm) == [11, 100, 111]
    assert warm[11][0].endswith("after the discriminator's warm-up a step takes longer")
    assert warm[100] == ["the discriminator's warm-up is over; from here on the generator is trained, too"]
    assert "takes longer" not in warm[111][0]
    assert progress(is_large=False, warmup=100) == {}
    assert progress(total_steps=11) == {}                              # nothing is left


@pytest.mark.parametrize("seconds,words", [(50, "50 seconds"), (120, "2 minutes"), (3 * 3600, "3 hours"),
                                           (7.46 * 3600, "7.5 hours"), (80 * 3600, "3.3 days")])
def test_durations_are_in_words(seconds, words):
    assert format_duration(seconds) == words


@pytest.mark.parametrize("num_images,size,seen", [(24, "24 images", "100 epochs in all"),
                                                  (None, "streamed", "2,400 in all")])
def test_the_start_block_counts_epochs(num_images, size, seen):
    trainer = SimpleNamespace(
        config=SimpleNamespace(batch_size=2, gradient_accumulation_steps=2), num_micro_batches=4,
        dataset=SimpleNamespace(name="cats", split_sizes={"train": num_images}), total_steps=300)
    assert preflight.describe_data({"world_size": 2}, trainer) == (
        f"cats: {size}; 8 images a step (batch_size 2 x 2 micro-batches x 2 processes), {seen}")


# --------------------------------------------------------------------------------- memory, names, options

@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_weights_are_counted_from_the_headers_of_local_files(pretrained, tmp_path, name):
    model = build_model(pretrained, name)
    component = model.component_name
    num_params = sum(param.numel() for param in model.network.parameters())
    assert pipelines.count_network_params(pretrained / name, component) == num_params
    state = load_file(pretrained / name / component / "diffusion_pytorch_model.safetensors")
    state = {f"model.diffusion_model.{key}": value for key, value in state.items()}
    save_file({**state, "first_stage_model.x": torch.zeros(7)}, tmp_path / "single.safetensors")
    assert pipelines.count_network_params(tmp_path / "single.safetensors", component) == num_params
    (tmp_path / "damaged.safetensors").write_bytes(b"x")
    assert pipelines.count_network_params(tmp_path / "damaged.safetensors", component) == 0


def test_a_network_is_recognised_by_class_and_size():
    assert preflight.family_of_size("sd35", 8.06e9) == "sd35-large"    # --model sd35 --pretrained 3.5-large
    assert preflight.family_of_size("sd15", 866e6) == "sd15"           # SD 2.1
    assert preflight.family_of_size("sd15", 2.5e9) is None             # SDXL's size, but another class
    assert preflight.family_of_size("sd3", 1e6) is None


@pytest.mark.parametrize("kind", ["folder", "LoRA run"])
def test_too_little_memory_for_local_weights_is_told_at_the_start(pretrained, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(name="Test GPU", total_memory=2 ** 31))
    source = pretrained / "sd15"
    if kind == "LoRA run":
        write_run_config(tmp_path, "sd15", source, lora_rank=2)
        source = tmp_path
    run_config = resolve("--model", "sd15", "--pretrained", str(source))[0]
    config = SimpleNamespace(batch_size=4, gradient_accumulation_steps=1)
    preflight.check_machine(run_config, config)                        # a tiny network fits
    num_params = pipelines.count_network_params(pretrained / "sd15", "unet")
    monkeypatch.setattr(preflight, "NETWORK_SIZES", {"sd15": num_params / 1e6})
    estimate, resolution = preflight.estimate_before_loading(run_config)
    assert resolution == RESOLUTION                                    # of the folder's config
    assert estimate == preflight.load_estimate({**run_config, "pretrained": None})
    monkeypatch.setattr(preflight, "load_estimate", lambda _: estimate | {"resolution": RESOLUTION})
    with pytest.raises(ValueError, match="wants about 12 GiB of GPU memory .*, the Test GPU has 2"):
        preflight.check_machine(run_config, config)


def test_the_folder_of_a_run_says_whether_it_has_adapters():
    lora = resolve("--model", "sd15", "--data", "cats", "--set", "lr=1e-5")[1]
    full = resolve("--model", "sd15", "--data", "cats", "--set", "lr=1e-5", "--full")[1]
    assert lora.name == "adt-sd15-cats-lr=1e-5-seed0"
    assert full.name == "adt-sd15-full-cats-lr=1e-5-seed0"
    assert resolve()[1].name == "adt-glyphs-seed0"


def test_the_checkpoint_interval_is_an_option():
    assert cli.save_interval_s(resolve()[0]) == 60
    assert cli.save_interval_s(resolve("--model", "sd15")[0]) == 900
    assert cli.save_interval_s(resolve("--model", "sd15", "--save-every", "2.5")[0]) == 150
    for value in ("0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match=f"--save-every {value}: wanted a number of minutes"):
            resolve("--save-every", value)


def test_a_table_for_stable_diffusion_is_refused_with_a_reason():
    with pytest.raises(ValueError, match=r"--eval-samples 400: .*has no table; evaluate\.py measures"):
        resolve("--model", "sd15", "--eval-samples", "400")
    resolve("--model", "sd15", "--eval-samples", "0")


def test_the_end_of_a_long_label_tells_rows_apart():
    """Steps and guidance stay, whatever the settings before them."""
    settings = "add batch_size=2 gradient_accumulation_steps=2 warmup_steps_d=3 lr=1e-4 lr_d=1e-3 (14 steps)"
    labels = [f"{settings}, {n} steps, guidance 7.5" for n in (10, 50)]
    wrapped = [" ".join(plotting.wrap(label, 20, 6, num_last=2)) for label in labels]
    assert [text.split("…")[1].split()[-4:] for text in wrapped] == [["10", "steps,", "guidance", "7.5"],
                                                                     ["50", "steps,", "guidance", "7.5"]]
