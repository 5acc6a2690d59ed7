"""Stable Diffusion 1.5, XL and 3 in the same loop: the real classes with a few random weights, beside the
plain diffusers pipelines. Nothing is downloaded."""

import hashlib
import itertools
import json
import math

import pipelines
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from test_data import folder
from test_fuzz import WEIRD

import add
import adt
import data
import discriminator
import evaluate
import losses
import metrics
import models
import sampler
import survival
import train

FAMILIES = "sd15", "sdxl", "sd3"
CAPTIONS = ["a red fox", "two blue boats"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with the three pipelines, DINOv2 and some captioned pictures."""
    home = tmp_path_factory.mktemp("world")
    for name in FAMILIES:
        pipelines.make(name, home)
    pipelines.dino(home / "dino")
    folder(home / "pictures")
    return home


@pytest.fixture(autouse=True)
def shelf(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "half_precision", lambda: torch.autocast("cpu", enabled=False))


def build(world, name, rank=0):
    model = models.build(name, "", world / name, pipelines.SIZE)
    if rank:
        torch.manual_seed(1)
        model.adapt(rank)
        with torch.no_grad():
            for weight in adapters(model):
                weight.normal_(0, .1)                        # B starts at zero: such adapters change nothing
    return model


def adapters(model):
    return [weight for weight in model.network.parameters() if weight.requires_grad]


def command(world, name, *arguments):
    return ["--model", name, "--weights", str(world / name), "--features", str(world / "dino"), "--data",
            str(world / "pictures"), "--size", str(pipelines.SIZE), "--samples", "0", "--set", "batch=2",
            *arguments]


def prepared(world, name, method, out, *arguments):
    short = [] if method == "add" else ["--set", "path_steps=3", "--set", "train_steps=2"]
    return train.prepare(train.parse(command(world, name, "--method", method, "--steps", "4", "--out",
                                             str(out), "--set", "warmup_d=0", *short, *arguments))[1])[2]


def fingerprint(module):
    content = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        content.update(name.encode() + tensor.detach().float().numpy().tobytes())
    return content.hexdigest()


# --------------------------------------------------------------------------------------- beside the pipelines

def plain(pipe, captions, noise, steps, guidance):
    """What the plain pipeline draws, from our noise, along the same times -> (B, 3, H, W) in [-1, 1]."""
    extra = {}
    if hasattr(pipe, "transformer"):
        extra = {"sigmas": [1 - i / steps for i in range(steps)]}
    else:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing",
                                                   set_alpha_to_one=True, clip_sample=False, steps_offset=0)
        extra = {"num_inference_steps": steps}
    pipe.set_progress_bar_config(disable=True)
    side = pipelines.SIZE
    return pipe(captions, latents=noise.clone(), guidance_scale=guidance, output_type="pt", height=side,
                width=side, **extra).images * 2 - 1


@pytest.mark.parametrize("name", FAMILIES)
def test_our_path_draws_what_the_plain_pipeline_draws(world, name):
    model = build(world, name)
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(5))
    theirs = plain(DiffusionPipeline.from_pretrained(world / name), CAPTIONS, noise, 4, 3.)
    ours = evaluate.sample(model, CAPTIONS, 4, guidance=3., seed=5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    assert ours.std() > .05


@pytest.mark.parametrize("name", FAMILIES)
def test_encode_and_decode_carry_the_vaes_scale_and_shift(world, name):
    model = build(world, name)
    picture = torch.rand(2, 3, pipelines.SIZE, pipelines.SIZE) * 2 - 1
    torch.manual_seed(0)
    z = model.encode(picture)
    assert z.shape[1:] == model.shape
    torch.manual_seed(0)
    raw = torch.cat([model.vae.encode(one).latent_dist.sample() for one in picture.split(1)])
    config = model.vae.config
    torch.testing.assert_close(z, (raw - (config.shift_factor or 0)) * config.scaling_factor)
    torch.testing.assert_close(model.decode(z), model.vae.decode(raw).sample, rtol=1e-4, atol=1e-4)


def test_decoding_keeps_one_pictures_graph_and_the_right_gradient(world):
    model = build(world, "sd15")
    z = torch.randn(3, *model.shape, requires_grad=True)
    alive = []
    def size(batch):
        held = 0
        def pack(tensor):
            nonlocal held
            held += tensor.numel()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            picture = model.decode(z[:batch])
        return held, picture
    for batch in (1, 3):
        held, picture = size(batch)
        alive.append(held)
    assert alive[1] < 4 * alive[0] < 1e5                     # latents alone, not the decoder's maps
    picture.square().sum().backward()
    direct = z.detach().clone().requires_grad_()
    model.vae.decode(direct / model.vae.config.scaling_factor).sample.square().sum().backward()
    torch.testing.assert_close(z.grad, direct.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction,target", [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")])
def test_the_prediction_type_is_the_schedulers(tmp_path, prediction, target):
    model = models.build("sd15", "", pipelines.make("sd15", tmp_path, prediction), pipelines.SIZE)
    assert model.target == target and model.T == 1000 and model.time.tolist() == list(range(1000))


def test_tables_run_from_clean_to_noisy_and_the_flows_shift_is_in_once(world):
    for name in FAMILIES:
        model = build(world, name)
        assert (model.sigma.diff() > 0).all() and (model.alpha.diff() < 0).all()
    u = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(model.sigma, 3 * u / (1 + 2 * u))
    torch.testing.assert_close(model.time, 1000 * model.sigma)
    assert model.alpha[-1] == 0


# ------------------------------------------------------------------------------------------------- captions

@pytest.mark.parametrize("name", FAMILIES)
def test_captions_are_read_once_kept_on_disk_and_the_encoders_may_go(world, name, monkeypatch):
    model = build(world, name)
    asked = []
    ask = model.ask
    monkeypatch.setattr(model, "ask", lambda captions: asked.extend(captions) or ask(captions))
    first = model.condition([*CAPTIONS, CAPTIONS[0]])
    assert asked == CAPTIONS and torch.equal(first["text"][0], first["text"][2])
    assert not torch.equal(first["pooled"][0], first["pooled"][1])
    again = build(world, name)                               # another process, the same disk
    monkeypatch.setattr(again, "ask", None)
    again.close()
    for key, value in again.condition(CAPTIONS).items():
        assert torch.equal(value, first[key][:2])
    with pytest.raises(ValueError, match="never read 'a green hat'"):
        again.condition(["a green hat"])
    assert all(part not in type(module).__name__.lower() for module in again.modules()
               for part in ("clip", "t5"))                   # no text encoder is part of the model


@pytest.mark.parametrize("name", FAMILIES)
def test_any_caption_is_read(world, name):
    """Ten thousand characters, emoji, control characters, right to left: the tokenizers cut and cope."""
    model = build(world, name)
    words = [text for text in WEIRD.values() if text.isprintable() or "\x00" in text]
    read = model.condition([*words, "a red fox"])
    plain = model.condition(["a red fox"])
    assert len(words) >= 8 and all(v.isfinite().all() for v in read.values())
    assert all(v.shape[1:] == plain[k].shape[1:] for k, v in read.items())
    with pytest.raises(ValueError, match="half a character"):
        model.condition([WEIRD["half a character"]])


def test_sd15s_pooled_caption_is_clips_own(world):
    model = build(world, "sd15")
    pipe = model.outside[0]
    ids = pipe.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(model.condition(CAPTIONS)["pooled"], pipe.text_encoder(ids).pooler_output)


def test_sdxl_is_told_what_size_a_photograph_had(world):
    model, seen = build(world, "sdxl"), []
    model.network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True)
    x, t = torch.randn(2, *model.shape), torch.tensor([10, 500])
    frame = torch.tensor([[640, 480, 8, 0], [64, 64, 0, 0]])
    model.predict(x, t, model.condition(CAPTIONS, frame), model.condition([""]), 3.)
    model.predict(x, t, model.condition(CAPTIONS))
    side = pipelines.SIZE
    told = [[640, 480, 8, 0, side, side], [64, 64, 0, 0, side, side]]
    assert seen[0].tolist() == 2 * told and seen[1].tolist() == 2 * [[side, side, 0, 0, side, side]]


# ------------------------------------------------------------------------------------------------- DINOv2

def test_dino_sees_pictures_of_any_size_and_passes_gradients(world):
    eyes = discriminator.Features(models.features("sd15", "", folder=world / "dino"))
    for side, tokens in ((14, 1), (64, 5), (100, 7)):        # 64 pixels are nearly five patches of 14
        image = torch.rand(2, 3, side, side, requires_grad=True)
        maps = eyes(image)
        assert all(m.shape == (2, 32, tokens, tokens) for m in maps) and len(maps) == len(eyes.layers)
        sum(m.square().sum() for m in maps).backward()
        assert image.grad.abs().min() > 0
    assert eyes.summary(image).shape == (2, 32) and not list(eyes.parameters())


def test_dino_is_transformers_own(world):
    from transformers import Dinov2Model
    body = Dinov2Model.from_pretrained(world / "dino").eval()
    image = torch.rand(2, 3, 28, 28) * 2 - 1
    maps, cls = models.features("sd15", "", folder=world / "dino").eval()(image)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))
    with torch.no_grad():
        theirs = body(((image + 1) / 2 - mean) / std).last_hidden_state
        ours = body.layernorm(torch.cat([cls[-1][:, None], maps[-1].flatten(2).transpose(1, 2)], 1))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ the loop

@pytest.mark.parametrize("rank", ["0", "4"])
@pytest.mark.parametrize("method", ["adt", "add"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_moves_what_learns_and_nothing_else(world, tmp_path, name, method, rank):
    run = prepared(world, name, method, tmp_path / "run", "--lora", rank)
    frozen = [fingerprint(m) for m in (run.model.vae, run.critic.features)]
    still = [w.clone() for w in run.model.network.parameters() if not w.requires_grad]
    before = [[w.detach().clone() for w in group] for group in (run.weights, run.critic_weights)]
    for _ in range(2):                                       # LoRA's first step moves its zero half alone
        seen = run.step()
    assert all(v == v for v in seen.values()) and seen["|grad|"] > 0 < seen["|grad D|"]
    assert frozen == [fingerprint(m) for m in (run.model.vae, run.critic.features)]
    assert all(torch.equal(a, b) for a, b in zip(still, (w for w in run.model.network.parameters()
                                                         if not w.requires_grad)))
    for group, now in zip(before, (run.weights, run.critic_weights)):
        moved = [not torch.equal(a, b) for a, b in zip(group, now)]
        assert sum(moved) >= .9 * len(moved)
    assert bool(still) == (rank == "4") and all(w.grad is None for w in run.model.vae.parameters())


@pytest.mark.parametrize("method", [adt, add])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_adversary_alone_reaches_every_adapter(world, name, method):
    model = build(world, name, rank=2)
    source = data.build(world / "pictures", pipelines.SIZE)
    config = train.settle("add" if method is add else "adt", ["batch=2"], name)
    if method is adt:
        config.path_steps, config.train_steps, config.start = 3, 3, "text"
    batch = source.batch(2, torch.Generator().manual_seed(0))
    eyes = discriminator.Features(models.features(name, "", folder=world / "dino"))
    critic = config.critic(eyes, model.condition(CAPTIONS)["pooled"].shape[1]).eval().requires_grad_(False)
    torch.manual_seed(0)
    terms, _, _ = method.generator_loss(model, model.twin(), critic, batch, config)
    terms["adv"].backward()
    silent = [w.shape for w in adapters(model) if w.grad is None or w.grad.abs().max() == 0]
    # SD 3's last block drops its text stream, and with it what only that stream could say
    assert len(silent) <= (2 if name == "sd3" else 0), silent


@pytest.mark.parametrize("name", FAMILIES)
def test_adds_teacher_is_the_student_with_its_adapters_off(world, name):
    base, model = build(world, name), build(world, name, rank=4)
    teacher = model.twin()
    x, t = torch.randn(2, *model.shape), torch.tensor([900, 30])
    with torch.no_grad():
        said = [m.predict(x, t, m.condition(CAPTIONS)) for m in (base, teacher, model)]
    assert torch.equal(said[0], said[1]) and not torch.allclose(said[1], said[2], atol=1e-3)
    assert teacher.network is model.network and all(w.requires_grad for w in adapters(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_teacher_of_a_run_that_goes_on_from_adapters_wears_them(world, tmp_path, name):
    first = build(world, name, rank=2)
    with torch.no_grad():
        for weight in adapters(first):
            weight.normal_(0, .1)
    (tmp_path / "config.json").write_text(json.dumps(
        {**vars(train.parse([])[1]), "model": name, "data": "x", "size": pipelines.SIZE, "steps": 1,
         "lora": 2, "weights": str(world / name), "on_nan": "stop", "world": 1}))
    first.keep(tmp_path, steps=1, rows=[(10, {})])
    model = models.build(name, "", tmp_path, pipelines.SIZE)
    model.adapt(2)
    teacher = model.twin()
    x, t, cond = torch.randn(2, *model.shape), torch.tensor([900, 30]), model.condition(CAPTIONS)
    with torch.no_grad():
        began = first.predict(x, t, cond)
        for weight in adapters(model):
            weight.zero_()
        assert torch.equal(teacher.predict(x, t, cond), began)
        assert not torch.allclose(model.predict(x, t, cond), began, atol=1e-3)
    assert not any(w.requires_grad for w in teacher.network.parameters())
    assert all(w.requires_grad for w in adapters(model))


# ---------------------------------------------------------------------------------- results others can load

@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_run_leaves_is_a_pipeline_or_lora_that_draws_the_same(world, tmp_path, name):
    noise = torch.randn(2, *build(world, name).shape, generator=torch.Generator().manual_seed(5))
    for rank in (0, 4):
        model = build(world, name, rank)
        if not rank:
            with torch.no_grad():
                for weight in model.network.parameters():
                    weight.mul_(1.1)
        out = tmp_path / f"{rank}"
        out.mkdir()
        model.keep(out, steps=1, rows=[(10, {})])
        pipe = DiffusionPipeline.from_pretrained(world / name if rank else out / "pipeline")
        if rank:
            pipe.load_lora_weights(out)
        ours = evaluate.sample(model, CAPTIONS, 4, guidance=2., seed=5)
        torch.testing.assert_close(ours, plain(pipe, CAPTIONS, noise, 4, 2.), rtol=0, atol=1e-4)
        untouched = evaluate.sample(build(world, name), CAPTIONS, 4, guidance=2., seed=5)
        assert (ours - untouched).abs().max() > .01


@pytest.mark.parametrize("name", FAMILIES)
def test_the_students_leaps_are_the_saved_schedulers(world, tmp_path, name):
    model = build(world, name)
    model.keep(tmp_path, steps=1, rows=[(n, {"fresh": 1., "last": 1.}) for n in (1, 2, 4)])
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert "LCM" in type(pipe.scheduler).__name__
    for steps in (1, 2, 4):
        noise, side = torch.randn(2, *model.shape), pipelines.SIZE
        extra = ({"sigmas": [1 - i / steps for i in range(steps)]} if name == "sd3" else
                 {"num_inference_steps": steps})
        with torch.no_grad():
            torch.manual_seed(5)                             # SD 3's pipeline has no other
            ours = model.decode(sampler.few_step(model, noise, sampler.timeline(model.T, steps),
                                                 model.condition(CAPTIONS))).clamp(-1, 1)
        torch.manual_seed(5)
        theirs = pipe(CAPTIONS, latents=noise, guidance_scale=1., output_type="pt", height=side, width=side,
                      **extra).images * 2 - 1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_use_md_works_in_the_folder_it_lies_in(world, tmp_path, monkeypatch):
    """Also where the pipeline was named by a relative path."""
    monkeypatch.chdir(world)
    model = models.build("sd15", "", "sd15", pipelines.SIZE)
    model.adapt(4)
    model.keep(tmp_path, steps=1, rows=[(1, {"fresh": 1., "last": 1.})])
    monkeypatch.chdir(tmp_path)
    lines = (tmp_path / "use.md").read_text().split("```")[1].removeprefix("python\n").splitlines()
    scope = {}
    exec("\n".join(line for line in lines if not line.startswith("image")), scope)
    assert type(scope["pipe"].scheduler).__name__ == "LCMScheduler"
    assert scope["pipe"].get_list_adapters() == {"unet": ["default_0"]}


@pytest.mark.parametrize("setting", ["last=.9", "fresh=.5"])
def test_a_student_that_diffusers_could_not_sample_is_refused(world, tmp_path, capsys, setting):
    with pytest.raises(SystemExit) as stop:
        train.main(command(world, "sd15", "--method", "add", "--set", setting, "--out", str(tmp_path / "r")))
    assert stop.value.code == 2 and "last and fresh are 1 for real models" in capsys.readouterr().err


@pytest.mark.parametrize("method", train.METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_command_a_user_types(world, tmp_path, name, method, monkeypatch):
    """Three steps, the last of them resumed; then what the run says of its use, in plain diffusers."""
    pairs = itertools.product(FAMILIES, train.METHODS)       # LoRA and whole networks by turns
    rank = 4 * (list(pairs).index((name, method)) % 2)
    short = [] if method == "add" else ["--set", "path_steps=2", "--set", "train_steps=1"]
    out = tmp_path / "run"
    train.main(command(world, name, "--method", method, "--steps", "2", "--out", str(out),
                       "--lora", str(rank), *short))
    assert (out / "samples_000002.png").stat().st_size > 0
    plan = survival.read_plan(out / "config.json")
    assert plan["model"] == name and plan["lora"] == rank
    train.main(["--resume", str(out), "--steps", "3", "--samples", "0"])
    assert len((out / "log.jsonl").read_text().splitlines()) == 3
    monkeypatch.chdir(out)
    code = (out / "use.md").read_text().split("```")[1].removeprefix("python\n")
    assert "guidance_scale=1)" in code if method == "add" else "guidance_scale=7.5)" in code
    code, images = code.replace("image = pipe(", "images.append(draw(").replace(".images[0]", ")"), []
    def draw(*words, **how):                                 # the pipelines' own size is not the tests'
        scope["pipe"].set_progress_bar_config(disable=True)
        return scope["pipe"](*words, height=pipelines.SIZE, width=pipelines.SIZE, output_type="pt",
                             **how).images
    scope = {"draw": draw, "images": images, "prompt": "a red cat"}
    exec(code, scope)
    assert len(images) == (3 if method == "add" else 1) and all(image.isfinite().all() for image in images)
    used = getattr(scope["pipe"], "unet", None) or scope["pipe"].transformer
    kept = models.build(name, "", out)
    x, t = torch.randn(1, *kept.shape), torch.tensor([400])
    with torch.no_grad():
        ours, kept.network = kept.predict(x, t, kept.condition(CAPTIONS[:1])), used
        torch.testing.assert_close(kept.predict(x, t, kept.condition(CAPTIONS[:1])), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_diffusion_loss_is_that_of_diffusers_own_training(world, tmp_path, name, prediction):
    """Written as its text-to-image examples write it, on the same latents, noise and times."""
    if name == "sd3" and prediction != "epsilon":
        pytest.skip("a flow predicts a flow")
    made = pipelines.make(name, tmp_path, prediction) if prediction != "epsilon" else world / name
    model = models.build(name, "", made, pipelines.SIZE)
    scheduler = DiffusionPipeline.from_pretrained(made).scheduler
    z, eps, cond = torch.randn(2, *model.shape), torch.randn(2, *model.shape), model.condition(CAPTIONS)
    t = torch.tensor([13, 700])
    if name == "sd3":                                        # its tables run from noise to picture
        rows = len(scheduler.sigmas) - 1 - t
        sigma = scheduler.sigmas[rows].view(-1, 1, 1, 1)
        noisy, target, time = (1 - sigma) * z + sigma * eps, eps - z, scheduler.timesteps[rows]
    else:
        scheduler = DDPMScheduler.from_config(scheduler.config)              # what they train with
        noisy, time = scheduler.add_noise(z, eps, t), t
        target = eps if prediction == "epsilon" else scheduler.get_velocity(z, eps, t)
    with torch.no_grad():
        theirs = (model.output(noisy, time, cond) - target).square().mean()
        ours = losses.diffusion_loss(model, z, t, eps, cond)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


# -------------------------------------------------------------------------------------------------- bad input

def test_what_cannot_be_loaded_is_one_sentence(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    empty, half = tmp_path / "empty", tmp_path / "half"
    empty.mkdir()
    pipelines.make("sd15", tmp_path / "other")
    (tmp_path / "other" / "sd15").rename(half)
    (half / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "model_index.json").write_text("[1]")
    cut = tmp_path / "cut"
    pipelines.make("sd15", tmp_path / "more")
    (tmp_path / "more" / "sd15").rename(cut)
    file = cut / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    for change, wanted in ((["--weights", str(empty)], "wanted a diffusers folder"),
                           (["--weights", str(world / "sdxl")], "holds a StableDiffusionXLPipeline"),
                           (["--weights", "./nowhere"], "no such folder, and no hub id either"),
                           (["--weights", "nobody/nothing-of-that-name"], "hf auth login"),
                           (["--weights", str(half)], "complete it, copy it again"),
                           (["--weights", str(cut)], "complete it, copy it again"),
                           (["--weights", str(odd)], "model_index.json is damaged"),
                           (["--features", str(empty)], "cannot load Dinov2Model"),
                           (["--size", "30"], "wanted a multiple of"),
                           (["--set", "features=cnn"], "features=vit (DINOv2) or random"),
                           (["--lora", "4", "--set", "init=random"], "exclude each other")):
        with pytest.raises(SystemExit) as stop:
            train.main(command(world, "sd15", "--out", str(tmp_path / "run"), *change))
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert stop.value.code == 2 and wanted in error and "Traceback" not in error, (change, error)
    with pytest.raises(SystemExit) as stop:
        train.main(["--lora", "4", "--out", str(tmp_path / "run"), "--samples", "0"])
    assert stop.value.code == 2 and "--lora is for sd15" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_config_names_the_source_of_every_preset():
    for method in ("adt", "add"):
        for name in FAMILIES:
            config, module = train.settle(method, [], name), train.METHODS[method][0]
            sources = train.provenance(config, module, name)
            said = {key: note.split(":")[0] for key, (_, note) in sources.items()}
            assert set(said.values()) <= {"paper", "secondary", "ours"} and config.batch <= 4
            if method == "add":
                assert said["gamma"] == said["last"] == "paper" and said["lr"] == "ours"
            else:
                assert said["guidance"] == said["clip"] == "secondary" and said["start"] == "paper"
                assert said["lr"] == ("ours" if name == "sd3" else "secondary") and said["ema"] == "ours"
    changed = train.settle("add", ["gamma=1e-3"], "sd15")
    assert train.provenance(changed, add, "sd15")["gamma"][1].startswith("ours")


# -------------------------------------------------------------------------------------------------- measuring

@pytest.fixture(scope="session")
def judges(world):
    """Tiny CLIP, DINOv2 and an aesthetics head, where real ones would be."""
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(0)
    words = pipelines.tokenizer(world / "words")
    text = dict(vocab_size=words.vocab_size, hidden_size=32, intermediate_size=37, num_hidden_layers=2,
                num_attention_heads=4, eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id,
                pad_token_id=words.pad_token_id)
    vision = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
                  image_size=32, patch_size=8)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(world / "clip")
    words.save_pretrained(world / "clip")
    torch.save({f"layers.{i}.{kind}": torch.randn(*shape) for i, (o, n) in ((0, (8, 16)), (2, (1, 8)))
                for kind, shape in (("weight", (o, n)), ("bias", (o,)))}, world / "taste.pth")
    return {"dino": world / "dino", "clip": world / "clip", "pickscore": world / "clip",
            "aesthetics": world / "taste.pth"}


def test_the_panel_tells_good_pictures_from_bad(world, judges, tmp_path):
    source = data.build(folder(tmp_path / "many", n=40), pipelines.SIZE)
    panel = metrics.Panel(source, 20, judges)
    photographs = source.batch(40, torch.Generator().manual_seed(1234))[20:]  # a few at a time, or at once
    assert photographs.caption == panel.captions
    noisy = panel.score([torch.rand_like(photographs.image) * 2 - 1])
    assert panel.score(photographs.image.split(7))["cmmd"] == pytest.approx(panel.floor["cmmd"], rel=1e-4)
    assert noisy["fd-dinov2"] > 1.2 * panel.floor["fd-dinov2"] and noisy["cmmd"] > panel.floor["cmmd"]
    assert noisy.keys() == panel.floor.keys() >= {"clip", "pickscore", "aesthetics", "precision", "recall"}
    body = panel.clips["clip"].model
    tokens = panel.clips["clip"].words(panel.captions, padding=True, return_tensors="pt")
    pixels = metrics.prepared(photographs.image, 32, (.4815, .4578, .4082), (.2686, .2613, .2758))
    theirs = body(**tokens, pixel_values=pixels).logits_per_image.diagonal() / body.logit_scale.exp()
    assert panel.floor["clip"] == pytest.approx(theirs.mean().item(), abs=1e-4)
    scale = body.logit_scale.exp().item()
    assert panel.floor["pickscore"] == pytest.approx(panel.floor["clip"] * scale, rel=1e-4)


def test_a_panel_says_what_it_cannot_measure(world, judges, tmp_path):
    source = data.build(folder(tmp_path / "many", n=8), pipelines.SIZE)
    with pytest.raises(ValueError, match="4 pictures or more"):
        metrics.Panel(source, 3, judges)
    torch.save({"layers.0.weight": torch.randn(1, 768), "layers.0.bias": torch.randn(1)},
               tmp_path / "taste.pth")
    with pytest.raises(ValueError, match="embeddings of 768 numbers, --clip gives 16"):
        metrics.Panel(source, 4, {**judges, "aesthetics": tmp_path / "taste.pth"})


def test_cmmd_is_zero_for_the_same_and_known_for_two_points():
    a = torch.nn.functional.normalize(torch.randn(50, 8))
    assert metrics.cmmd(a, a) == pytest.approx(0, abs=1e-9)
    one, two = torch.tensor([[1., 0.]]), torch.tensor([[0., 1.]])
    assert metrics.cmmd(one, two) == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)), rel=1e-6)


def test_evaluate_measures_base_and_runs_and_writes_pictures_any_tool_reads(world, judges, tmp_path, capsys):
    pictures = folder(tmp_path / "many", n=12)
    typed = ["--model", "sd15", "--weights", str(world / "sd15"), "--size", str(pipelines.SIZE),
             "--data", str(pictures)]
    run = tmp_path / "run"
    train.main([*typed, "--method", "diffusion", "--lora", "4", "--steps", "1", "--samples", "0", "--out",
                str(run), "--features", str(world / "dino"), "--set", "batch=2", "--set", "path_steps=2"])
    evaluate.main(["base", str(run), *typed, "--steps", "2", "--samples", "6", "--dino", str(judges["dino"]),
                   "--clip", str(judges["clip"]), "--out", str(tmp_path / "p.png"),
                   "--images", str(tmp_path / "images")])
    said = capsys.readouterr().out
    assert "| fd-dinov2 |" in said and "| base, 2 steps |" in said and "| real pictures |" in said
    kept = data.build(tmp_path / "images" / "base, 2 steps", 32)
    assert len(data.build(tmp_path / "images" / "real pictures", 32).paths) == len(kept.paths)
    assert len(kept.paths) == 6 and (tmp_path / "p.png").stat().st_size > 0


def test_a_run_can_be_built_upon(world, tmp_path):
    for name, rank in (("sd15", 0), ("sd3", 4)):
        model = build(world, name, rank)
        out = tmp_path / name
        out.mkdir()
        model.keep(out, rows=[(10, {})])
        plan = {"method": "adt", "model": name, "data": "cats", "weights": str(world / name), "seed": 0,
                "steps": 1, "set": [], "size": pipelines.SIZE, "lora": rank}
        (out / "config.json").write_text(json.dumps(plan))
        again = models.build(name, "", out)
        torch.testing.assert_close(evaluate.sample(again, CAPTIONS, 2), evaluate.sample(model, CAPTIONS, 2),
                                   rtol=0, atol=1e-4)


def test_a_run_of_another_family_or_with_half_its_adapters_is_refused(world, tmp_path):
    from safetensors.torch import load_file, save_file
    model = build(world, "sd15", 4)
    model.keep(tmp_path, rows=[(10, {})])
    plan = {"method": "adt", "model": "sd15", "data": "cats", "weights": str(world / "sd15"), "seed": 0,
            "steps": 1, "set": [], "size": pipelines.SIZE, "lora": 4}
    (tmp_path / "config.json").write_text(json.dumps(plan))
    for name in ("sdxl", "sd3"):
        with pytest.raises(ValueError, match=f"a run of sd15, not of --model {name}"):
            models.build(name, "", tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    layers = load_file(file)
    save_file(dict(list(layers.items())[1:]), file)
    with pytest.raises(ValueError, match="does not hold the adapters of this network"):
        models.build("sd15", "", tmp_path)
