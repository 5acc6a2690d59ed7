"""`python train.py --method adt --model sd15` and its options, on tiny pipelines."""

import json
import sys
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pytest
import torch
from test_hub_data import hub as hub_double  # noqa: F401
from tiny_families import RESOLUTION, sample_pipeline

import data
import train
from models import backbones, families, hub, loading, pipelines, preflight
from scripts import tiny_pipelines
from utils import cli, config, precision

pytestmark = pytest.mark.usefixtures("cache_home")
SHORT = ["--set", "num_inference_steps=2", "--set", "num_grad_steps=1", "--set", "warmup_steps_d=0"]
GIB = 2 ** 30


def resolve(*args):
    """run_config of a new run with these arguments."""
    return cli.resolve_run_config(train.parse_args(list(args))[1], train.METHODS, train.MODELS,
                                  ("glyphs", "OWNER/NAME"))[0]


def default_run(pretrained, run_dir, *args):
    """Train a tiny Stable Diffusion 1.5 for two steps with the defaults of large models."""
    train.main(["--method", "adt", "--model", "sd15", "--pretrained", str(pretrained / "sd15"), "--backbone",
                str(pretrained / "dino"), "--data", str(pretrained / "images"), "--steps", "2",
                "--output-dir", str(run_dir), *SHORT, *args])
    return run_dir


# ---------------------------------------------------------------------------------- before anything is loaded

@pytest.fixture
def no_download(monkeypatch):
    """Whatever would be downloaded is an error."""
    def fail(*args, **kwargs):
        raise AssertionError("a download")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", fail)


@pytest.fixture
def gpu(monkeypatch):
    """-> a function that pretends there is a GPU with so many GiB."""
    def pretend(gib):
        card = SimpleNamespace(name="Test GPU", total_memory=gib * GIB)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    return pretend


@pytest.mark.parametrize("method", ["adt", "add"])
def test_without_a_gpu_the_command_names_one_that_works_here(method, no_download, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--method", method, "--model", "sd15"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert f"wants a GPU with CUDA, found none. On this machine the tiny model can be trained: python " \
           f"train.py --method {method}." in message
    assert len(message.strip().split("\n")) == 1


def test_an_apple_gpu_is_refused_by_name(no_download, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="found an Apple GPU, on which this code was never run"):
        preflight.check_machine(resolve("--model", "sd15"), None)


def check_memory(*args):
    run_config = resolve(*args)
    preflight.check_machine(run_config, config.build_config(
        train.METHODS[run_config["method"]], run_config["overrides"], run_config["model"],
        run_config["lora_rank"] > 0))


def test_too_little_memory_is_told_with_what_would_help(gpu):
    gpu(2)
    with pytest.raises(ValueError, match="wants about .* GiB of GPU memory .*, the Test GPU has 2: .*"
                                         "batch_size=1 --set gradient_accumulation_steps=4; a smaller "
                                         "--resolution; several GPUs"):
        check_memory("--model", "sd15")
    with pytest.raises(ValueError, match="leave out --no-gradient-checkpointing; train LoRA"):
        check_memory("--method", "add", "--model", "sd15", "--full", "--no-gradient-checkpointing")
    with pytest.raises(ValueError, match=r"has 2: train LoRA"):       # ADT recomputes whole calls without it
        check_memory("--model", "sd15", "--full", "--no-gradient-checkpointing")
    gpu(80)
    check_memory("--model", "sd15")


def test_a_smaller_batch_resolution_or_rank_needs_less(gpu):
    run_config = resolve("--model", "sd15")
    estimate = preflight.load_estimate(run_config)
    default_rank = estimate["lora_rank"]

    def gib(batch_size, resolution, **changes):
        return preflight.expected_gib(estimate, SimpleNamespace(batch_size=batch_size), resolution,
                                      {**run_config, **changes})

    assert run_config["lora_rank"] == default_rank
    assert gib(4, 512) > gib(1, 512) > gib(1, 256)
    assert gib(1, 512, fsdp=True, world_size=8) < gib(1, 512)
    assert gib(1, 512, lora_rank=4) < gib(1, 512) < gib(1, 512, lora_rank=4 * default_rank)


def test_every_run_has_an_estimate_and_checkpointing_saves_memory():
    estimates = json.loads(preflight.ESTIMATES.read_text())
    for method in train.METHODS:
        for model in families.MODEL_FAMILIES:
            for tuning in ("lora", "full"):
                plain = estimates[f"{method} {model} {tuning}"]
                saving = estimates[f"{method} {model} {tuning} checkpointing"]
                if method != "adt":        # without it ADT recomputes whole calls, which costs as much
                    assert saving["activations_gib"] < plain["activations_gib"]
                    assert saving["tflop"] > plain["tflop"]
                own = families.MODEL_FAMILIES[model][3]
                assert plain["resolution"] == min(own, train.METHODS[method].max_resolution.get(model, own))


def test_a_missing_tracker_or_login_is_told_at_the_start(monkeypatch, pretrained, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        preflight.check_run(resolve("--report-to", "wandb"), None)
    monkeypatch.undo()

    class NoLogin:
        def whoami(self):
            raise OSError("401 Client Error")
    monkeypatch.setattr(huggingface_hub, "HfApi", NoLogin)
    with pytest.raises(ValueError, match="not logged in to the hub .*401.*hf auth login"):
        preflight.check_run(resolve("--push-to-hub", "me/model"), None)


# ------------------------------------------------------------------------------------------- the defaults

def test_defaults_of_large_models():
    adt_run, add_run = resolve("--model", "sd15"), resolve("--method", "add", "--model", "sdxl")
    assert adt_run["lora_rank"] == 128
    assert add_run["lora_rank"] == 64
    assert adt_run["gradient_checkpointing"]
    assert adt_run["data"] == "OWNER/NAME"
    assert (adt_run["steps"], add_run["steps"]) == (2000, 10000)
    assert adt_run["eval_every"] == 100
    full = resolve("--model", "sd15", "--full", "--no-gradient-checkpointing")
    assert full["lora_rank"] == 0
    assert not full["gradient_checkpointing"]
    tiny = resolve()
    assert (tiny["lora_rank"], tiny["gradient_checkpointing"], tiny["data"]) == (0, False, "glyphs")


@pytest.mark.parametrize("model", families.MODEL_FAMILIES)
@pytest.mark.parametrize("method", train.METHODS)
def test_adapters_learn_faster_than_all_weights(method, model):
    lora, full = (config.build_config(train.METHODS[method], [], model, is_lora) for is_lora in (True, False))
    assert lora.lr >= 4 * full.lr
    assert lora.lr_schedule == full.lr_schedule == "constant"
    assert not method.startswith("ad") or not lora.whiten_features


def test_add_has_the_papers_settings_on_large_models():
    built = config.build_config(train.METHODS["add"], [], "sd15", True)
    notes = config.provenance(train.METHODS["add"], built, "sd15", True)
    published = {"lambda_distill": 2.5, "r1_gamma": 1e-5, "t_max": 1.,
                 "pure_noise_prob": 0., "backward_simulation_prob": 0., "relativistic": False,
                 "student_steps": 4, "disc_conditioning": "text+image", "distill_weighting": "exponential"}
    for name, value in published.items():
        assert notes[name][0] == value
        assert notes[name][1].startswith("paper")


@pytest.mark.parametrize("method", ["adt", "add", "diffusion"])
@pytest.mark.parametrize("model", families.MODEL_FAMILIES)
def test_the_batch_of_a_preset_is_divided_among_processes(method, model):
    """In ADT and ADD alike a step takes as many images with several processes as with one, but for rounding:
    to the nearest number of micro-batches, or, with one of them, of images in it."""
    one = config.build_config(train.METHODS[method], [], model, True, 1)
    wanted = one.batch_size * one.gradient_accumulation_steps
    for n in (1, 2, 3, 8, 100):
        c = config.build_config(train.METHODS[method], [], model, True, n)
        found = c.batch_size * c.gradient_accumulation_steps * n
        unit = n * c.batch_size if c.gradient_accumulation_steps > 1 else n
        assert abs(found - wanted) <= unit / 2 or found == n
        note = config.batch_note(train.METHODS[method], c, model, True, n)
        assert (note is None) == (found == wanted)
        assert note is None or f"the preset {wanted}, for which its lr and lr_d are meant" in note
        notes = config.provenance(train.METHODS[method], c, model, True, n)
        assert not any(notes[key][1].startswith("user") for key in notes)


def test_a_chosen_batch_is_that_of_each_process_and_a_sentence_names_the_presets():
    add_method = train.METHODS["add"]
    sizes = [config.build_config(add_method, [], "sd15", True, n) for n in (1, 8, 64)]
    assert [(c.batch_size, c.gradient_accumulation_steps) for c in sizes] == [(4, 32), (4, 4), (2, 1)]
    chosen = config.build_config(add_method, ["batch_size=2"], "sd15", True, 8)
    assert (chosen.batch_size, chosen.gradient_accumulation_steps) == (2, 4)
    note = config.batch_note(add_method, chosen, "sd15", True, 8)
    assert note.startswith("a step takes 64 images, the preset 128")
    assert note.endswith("--set gradient_accumulation_steps=8 takes as many")
    repaired = config.build_config(add_method, ["batch_size=2", "gradient_accumulation_steps=8"], "sd15",
                                   True, 8)
    assert config.batch_note(add_method, repaired, "sd15", True, 8) is None
    assert config.provenance(add_method, repaired, "sd15", True, 8)["batch_size"][1].startswith("user")
    assert config.batch_note(add_method, config.build_config(add_method, []), "tiny", False, 8) is None


def test_every_model_is_fine_tuned_with_its_usual_guidance_in_its_samples():
    scales = {model: config.build_config(train.METHODS["diffusion"], [], model, True).guidance_scale
              for model in families.MODEL_FAMILIES}
    assert scales == {"sd15": 7.5, "sdxl": 5., "sd3": 7., "sd35": 4.5, "sd35-large": 4.5}


@pytest.mark.parametrize("args,message", [
    (["--full", "--model", "sd15", "--lora-rank", "4"], "leave out one of them"),
    (["--full"], "--full is for Stable Diffusion"), (["--vae", "x"], "--vae is for Stable Diffusion"),
    (["--eval-every", "0"], "--eval-every 0: wanted 1 or more"),
    (["--keep-checkpoints", "-1"], "--keep-checkpoints -1: wanted 0 or more"),
    (["--push-to-hub", "name"], "wanted OWNER/NAME"), (["--prompts", "nowhere.txt"], "wanted a text file"),
    (["--validation-prompt", "x"] * 65, "wanted 64 at most")])
def test_options_that_no_run_can_have(args, message):
    with pytest.raises(ValueError, match=message):
        resolve(*args)


def test_prompts_come_from_the_command_line_and_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dög \n", encoding="utf-8")
    assert resolve("--validation-prompt", "x", "--prompts", str(path))["prompts"] == ["x", "a cat", "a dög"]
    path.write_text("a cat\n", encoding="utf-8-sig")                   # with the mark that Windows writes
    assert resolve("--prompts", str(path))["prompts"] == ["a cat"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="wanted a caption a line, found none"):
        resolve("--prompts", str(path))


def test_the_rank_of_a_runs_adapters_is_kept(tmp_path):
    run = {"method": "adt", "model": "sd15", "data": "x", "seed": 0, "steps": 1, "overrides": [],
           "lora_rank": 6}
    (tmp_path / "config.json").write_text(json.dumps(run))
    assert resolve("--model", "sd15", "--pretrained", str(tmp_path))["lora_rank"] == 6
    (tmp_path / "config.json").write_text(json.dumps(run | {"lora_rank": 0}))
    assert resolve("--model", "sd15", "--pretrained", str(tmp_path))["lora_rank"] == 128


# ------------------------------------------------------------------------------------------- a whole run

@pytest.fixture(scope="module")
def finished(pretrained, tmp_path_factory):
    """A run with the defaults of large models and most options -> run folder, what it printed."""
    import io
    from contextlib import redirect_stdout
    run_dir, printed = tmp_path_factory.mktemp("run") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patches, redirect_stdout(printed):
        patches.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patches.setattr(precision, "default_precision", lambda: "fp32")
        default_run(pretrained, run_dir, "--eval-every", "1", "--keep-checkpoints", "1", "--report-to",
                    "tensorboard", "--validation-prompt", "a red fox", "--set", "batch_size=1",
                    "--lora-rank", "4")
    return run_dir, printed.getvalue()


def test_a_run_says_what_it_will_do(finished, pretrained):
    run_dir, printed = finished
    block = printed.split("\n")[:7]
    assert [line.split()[0] for line in block] == ["model", "data", "steps", "machine", "cost", "writes",
                                                   "note"]
    assert f"{RESOLUTION} px, LoRA adapters of rank 4" in block[0]
    assert ("images: 3 images; 1 image a step (batch_size 1 x 1 micro-batch x 1 process), 0.667 epochs in all"
            in block[1])
    assert block[2] == "steps    2; a checkpoint every 15 minutes"
    assert "CPU, fp32" in block[3]
    assert "2 steps" in block[4]
    assert f"{run_dir}: samples every 1 steps, a LoRA file" in block[5]
    assert "a step takes 1 image, the preset 4, for which its lr and lr_d are meant" in block[6]


def test_the_last_checkpoints_are_kept_and_load(finished, pretrained):
    run_dir, _ = finished
    assert [path.name for path in sorted(run_dir.glob("step_*"))] == ["step_000002"]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pretrained / "sd15")
    pipe.load_lora_weights(run_dir / "step_000002")
    assert (run_dir / "step_000002" / "README.md").is_file()


def test_losses_and_samples_are_in_tensorboard(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run_dir, _ = finished
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    logged = events.Scalars("loss_diffusion")
    assert [event.step for event in logged] == [0, 1]
    assert [event.value for event in logged] == pytest.approx([row["loss_diffusion"] for row in rows])
    assert [event.step for event in events.Images("samples")] == [0, 1, 2]


def test_samples_show_the_validation_prompt(finished, monkeypatch, pretrained):
    run_dir, _ = finished
    assert json.loads((run_dir / "config.json").read_text())["prompts"] == ["a red fox"]
    shown = []
    monkeypatch.setattr(train.report.Reporter, "add_samples",
                        lambda self, step, rows, captions: shown.append((len(rows[0][1]), captions)))
    monkeypatch.setattr(train, "final_evaluation", lambda *_: None)
    train.main(["--resume", str(run_dir), "--steps", "3"])
    assert shown == [(1, ["a red fox"])]


def test_lora_files_in_both_formats_give_the_same_image(finished, pretrained):
    run_dir, _ = finished
    images = []
    for name in ("pytorch_lora_weights.safetensors", "lora_for_comfyui.safetensors"):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(pretrained / "sd15")
        pipe.load_lora_weights(run_dir, weight_name=name)
        noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
        images.append(sample_pipeline(pipe, ["a red fox"], noise, num_inference_steps=2))
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-5)
    from safetensors.torch import load_file
    state = load_file(run_dir / "lora_for_comfyui.safetensors")
    assert all(name.startswith("lora_unet_") for name in state)
    assert {name.rsplit(".", 1)[1] for name in state} == {"weight", "alpha"}
    assert all(value == 4 for name, value in state.items() if name.endswith("alpha"))


def test_the_command_as_its_user_types_it(hub_double, pretrained, tmp_path, monkeypatch,  # noqa: F811
                                          capsys):
    """`python train.py --method adt --model sd15`, with stand-ins for the GPU and for what is downloaded: the
    pipeline, DINOv2 and the default data set. Nothing else is said but the length of the run and its path."""
    load_pipeline, asked = pipelines.load_pipeline, []

    def from_hub(pipeline_cls, source, **options):
        asked.append(source)
        return load_pipeline(pipeline_cls, pretrained / "sd15", **options)
    load_network = backbones.load_transformers

    def network_from_hub(class_name, source, *args, **options):
        asked.append(source)
        return load_network(class_name, str(pretrained / "dino"), *args, **options)
    monkeypatch.setattr(preflight, "check_machine", lambda *_: None)
    monkeypatch.setattr(hub, "remote_model_index", lambda _: {"_class_name": "StableDiffusionPipeline"})
    monkeypatch.setattr(pipelines, "load_pipeline", from_hub)
    monkeypatch.setattr(backbones, "load_transformers", network_from_hub)
    monkeypatch.chdir(tmp_path)
    train.main(["--method", "adt", "--model", "sd15", "--steps", "2", *SHORT])
    assert asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5", "facebook/dinov2-small"]
    assert [call[0] for call in hub_double["calls"]] == [data.DEFAULT_HUB_DATASET]
    printed = capsys.readouterr().out
    assert data.default_dataset_message() in printed
    assert "LoRA adapters of rank 128" in printed
    run_dir, = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("adt-sd15-naruto-blip-captions")
    card = (run_dir / "README.md").read_text()
    assert "base_model: stable-diffusion-v1-5/stable-diffusion-v1-5" in card
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pretrained / "sd15")
    pipe.load_lora_weights(run_dir)
    train.main(["--resume", str(run_dir), "--steps", "3"])
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] == 3


def test_wandb_gets_losses_and_samples(monkeypatch, tmp_path):
    logged = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    double = SimpleNamespace(init=lambda **options: run, Image=lambda image, caption: (image.size, caption))
    monkeypatch.setitem(sys.modules, "wandb", double)
    tracker = train.report.WandB(tmp_path, {})
    tracker.add_scalars(3, {"loss": 1.})
    tracker.add_images(3, torch.zeros(1, 3, 8, 8), ["a cat"])
    tracker.close()
    assert logged == [(3, {"loss": 1.}), (3, {"samples": [((8, 8), "a cat")]})]


def test_a_result_is_uploaded(monkeypatch, tmp_path, capsys):
    calls = []

    class Api:
        def create_repo(self, repository, exist_ok):
            calls.append((repository, exist_ok))

        def upload_folder(self, repo_id, folder_path, allow_patterns, ignore_patterns):
            calls.append((repo_id, folder_path, allow_patterns, ignore_patterns))
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    hub.push("me/model", tmp_path)
    assert calls == [("me/model", True), ("me/model", str(tmp_path), hub.RESULT_FILES, ["step_*"])]
    assert "checkpoint.pt" not in hub.RESULT_FILES
    assert "https://huggingface.co/me/model" in capsys.readouterr().out
    monkeypatch.setattr(Api, "upload_folder", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(OSError, match=f"hf upload me/model {tmp_path}"):
        hub.push("me/model", tmp_path)


@pytest.mark.thorough
def test_a_compiled_network_trains_and_keeps_its_names(monkeypatch, pretrained, tmp_path):
    """The compiler itself is torch's; here its slow back end is replaced."""
    compiled, compile_module = [], torch.nn.Module.compile

    def compile_eagerly(module):
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    args = ["--method", "diffusion", "--set", "batch_size=1", "--validation-prompt", "a red fox",
            "--no-gradient-checkpointing", "--lora-rank", "4", "--eval-samples", "0"]
    run_dir = default_run(pretrained, tmp_path / "run", "--compile", *args)
    assert compiled == ["UNet2DConditionModel"]
    plain = default_run(pretrained, tmp_path / "plain", *args)
    rows = [[json.loads(line)["loss_diffusion"] for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (run_dir, plain)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)
    diffusers.StableDiffusionPipeline.from_pretrained(pretrained / "sd15").load_lora_weights(run_dir)


# ------------------------------------------------------------------------------------ which checkpoints

def test_another_vae_is_used_saved_and_named_in_the_card(pretrained, tmp_path):
    torch.manual_seed(7)
    vae = tiny_pipelines.make_vae()
    vae.save_pretrained(tmp_path / "vae")
    plain = loading.load_model("sd15", "", pretrained / "sd15", RESOLUTION)
    model = loading.load_model("sd15", "", pretrained / "sd15", RESOLUTION, str(tmp_path / "vae"))
    z = torch.randn(1, *model.latent_shape)
    torch.testing.assert_close(model.decode(z), vae.decode(z / vae.config.scaling_factor).sample)
    assert not torch.allclose(model.decode(z), plain.decode(z))
    (tmp_path / "full").mkdir()
    model.save_pretrained(tmp_path / "full", [(2, {})])
    saved = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "full" / "pipeline")
    assert torch.equal(saved.vae.decoder.conv_out.weight, vae.decoder.conv_out.weight)
    model.add_lora(2)
    (tmp_path / "lora").mkdir()
    model.save_pretrained(tmp_path / "lora", [(2, {})])
    assert f"AutoencoderKL.from_pretrained('{tmp_path / 'vae'}')" in (tmp_path / "lora/README.md").read_text()
    with pytest.raises(OSError, match="--vae .*nowhere: wanted a folder or hub id of an AutoencoderKL"):
        loading.load_model("sd15", "", pretrained / "sd15", RESOLUTION, str(tmp_path / "nowhere"))


def test_a_single_file_is_a_checkpoint(pretrained, tmp_path, monkeypatch):
    """diffusers reads such files itself; their configuration comes from the hub, so it is replaced here."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    opened = []

    def from_single_file(source):
        opened.append(source)
        return diffusers.StableDiffusionPipeline.from_pretrained(pretrained / "sd15")
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", from_single_file)
    model = loading.load_model("sd15", "", str(path), RESOLUTION)
    model.save_pretrained(tmp_path, [(2, {})])
    assert opened == [str(path)] * 2
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
    model.add_lora(2)
    model.save_pretrained(tmp_path, [(2, {})])
    assert f"StableDiffusionPipeline.from_single_file('{path}')" in (tmp_path / "README.md").read_text()
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"wanted a \.safetensors file"):
        loading.load_model("sd15", "", str(tmp_path / "model.ckpt"))


def test_other_pipelines_on_the_hub_are_refused_before_they_are_downloaded(monkeypatch, tmp_path):
    """model_index.json is read first: a refiner or an inpainting model is known from it."""
    index = tmp_path / "model_index.json"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: index)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: 1 / 0)
    for name, class_name in (("sdxl", "StableDiffusionXLImg2ImgPipeline"),
                             ("sd15", "StableDiffusionInpaintPipeline")):
        index.write_text(json.dumps({"_class_name": class_name}))
        with pytest.raises(ValueError, match=f"OWNER/NAME holds a {class_name}: --model {name} wants a"):
            loading.load_model(name, "", "OWNER/NAME")


def test_an_inpainting_network_is_refused(pretrained, tmp_path):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pretrained / "sd15")
    pipe.register_modules(unet=diffusers.UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9))
    pipe.save_pretrained(tmp_path / "inpainting")
    with pytest.raises(ValueError, match="takes 9 channels, its VAE has 4: wanted a text-to-image model"):
        loading.load_model("sd15", "", tmp_path / "inpainting")


@pytest.mark.parametrize("scheduler,prediction", [
    # of SD-Turbo and of SD 2.1
    (diffusers.EulerDiscreteScheduler(**tiny_pipelines.BETAS, timestep_spacing="trailing"), "eps"),
    (diffusers.DDIMScheduler(**tiny_pipelines.BETAS, prediction_type="v_prediction"), "v")])
def test_sd_turbo_and_sd_2_train_under_the_name_of_their_class(scheduler, prediction, pretrained, tmp_path):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pretrained / "sd15", scheduler=scheduler)
    pipe.save_pretrained(tmp_path / "other")
    assert loading.load_model("sd15", "", tmp_path / "other").prediction_type == prediction
    train.main(["--method", "add", "--model", "sd15", "--pretrained", str(tmp_path / "other"), "--backbone",
                str(pretrained / "dino"), "--data", str(pretrained / "images"), "--steps", "1", "--set",
                "batch_size=2", "--set", "gradient_accumulation_steps=1", "--lora-rank", "2",
                "--eval-samples", "0", "--output-dir", str(tmp_path / "run")])
    diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "other").load_lora_weights(tmp_path / "run")


def test_sd_35_trains_and_its_lora_loads(pretrained, tmp_path):
    source = tiny_pipelines.make_pipeline("sd35", tmp_path)
    train.main(["--model", "sd35", "--pretrained", str(source), "--backbone", str(pretrained / "dino"),
                "--data", str(pretrained / "images"), "--steps", "1", "--lora-rank", "2", "--eval-samples",
                "0", "--output-dir", str(tmp_path / "run"), *SHORT])
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(source)
    pipe.load_lora_weights(tmp_path / "run")
    adapted = {name.split(".lora_")[0] for name, _ in pipe.transformer.named_parameters() if "lora_A" in name}
    assert "transformer_blocks.0.attn2.to_q" in adapted                # the second attention of SD 3.5 medium


def test_large_checkpoints_are_trained_at_512_pixels_where_the_method_says_so(pretrained):
    assert loading.load_model("sd15", "", pretrained / "sd15", max_resolution=32).resolution == 32
    assert loading.load_model("sd15", "", pretrained / "sd15", max_resolution=512).resolution == RESOLUTION
    assert loading.load_model("sd15", "", pretrained / "sd15", 128, max_resolution=32).resolution == 128


def test_the_command_at_the_end_of_a_run_names_the_model():
    tiny = cli.evaluation_command({"model": "tiny"}, "runs/a b")
    assert tiny == "python evaluate.py base 'runs/a b'"
    run_config = {"model": "sdxl", "resolution": 512, "pretrained": None, "sampling_configs": [(50, {})]}
    large = cli.evaluation_command(run_config, "runs/x")
    start = "python evaluate.py base runs/x --model sdxl --resolution 512"
    assert large.startswith(f"{start} --steps 10,50 --data ")
    student = {**run_config, "pretrained": "my model", "sampling_configs": [(1, {"stochasticity": 1.})]}
    large = cli.evaluation_command(student, "runs/x")                  # each of the two has its own steps
    assert large.startswith(f"{start} --pretrained 'my model' --data ")


@pytest.mark.parametrize("option,value", [("--method", "nope"), ("--model", "nope")])
def test_help_on_the_settings_of_something_unknown_is_one_sentence(option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main([option, value, "--set", "help"])
    assert ended.value.code == 2
    assert f"unknown {option[2:]} 'nope'" in capsys.readouterr().err
