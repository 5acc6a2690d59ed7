"""What goes wrong only with large pictures, in half precision, in many processes, or with odd checkpoints."""

import json
import shutil
from contextlib import ExitStack
from types import SimpleNamespace

import pipelines
import pytest
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler
from test_latent import CAPTIONS, FAMILIES, build, command, prepared, shelf, world  # noqa: F401

import benchmark
import discriminator
import models
import parallel
import train

bf16 = torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("side", [32, 512, 1024])
def test_augmentation_is_the_identity_at_strength_zero_in_half_precision_too(side):
    """bf16 has eight bits: a grid of coordinates in it takes one column of 512 for its neighbour."""
    picture = (torch.rand(1, 3, side, side) * 2 - 1).requires_grad_()
    with bf16:
        seen = discriminator.augment(picture, discriminator.geometry(1), 0.)
    torch.testing.assert_close(seen.detach(), picture.detach(), rtol=0, atol=1e-5)
    seen.sum().backward()
    assert (picture.grad - 1).abs().max() < 1e-4


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layer_is_exact_under_autocast(world, name, rank):
    model = build(world, name, rank)
    twin = model.twin()
    for one in (model, twin):
        with torch.no_grad(), bf16:
            y = one.predict(torch.randn(2, *one.shape), torch.tensor([900, 30]), one.condition(CAPTIONS))
        assert y.dtype == torch.float32 and not torch.equal(y, y.bfloat16().float())
    if not rank:                                             # each has its own last layer
        with torch.no_grad():
            list(model.network.parameters())[-1].add_(1)
            x, t, cond = torch.randn(1, *model.shape), torch.tensor([500]), model.condition(CAPTIONS[:1])
            before = twin.predict(x, t, cond)
            assert not torch.allclose(before, model.predict(x, t, cond))


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_weights_in_half_the_memory_say_the_same(world, name):
    """Under autocast, to the last bit; adapters and the last layer keep their precision, and still learn."""
    plain, model = build(world, name, 2), build(world, name, 2)
    before = sum(w.nbytes for w in model.network.parameters())
    model.halve()
    assert sum(w.nbytes for w in model.network.parameters()) < .7 * before
    assert all(w.dtype == torch.float32 for w in model.network.parameters() if w.requires_grad)
    x, t, found = torch.randn(2, *model.shape), torch.tensor([900, 30]), []
    for one in (plain, model):
        with bf16:
            y = one.predict(x, t, one.condition(CAPTIONS))
        learn = [w for w in one.network.parameters() if w.requires_grad]
        found.append([y, *torch.autograd.grad(y.square().mean(), learn)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with bf16, torch.no_grad():                              # the teacher is the same network, adapters off
        assert torch.equal(*(one.twin().predict(x, t, one.condition(CAPTIONS)) for one in (plain, model)))


def test_logits_are_exact_under_autocast():
    eyes = discriminator.Features(models.features("tiny", "glyphs"))
    critic = discriminator.Projected(eyes, 16).eval()
    with torch.no_grad(), bf16:
        logits = torch.cat(critic(None, torch.rand(2, 3, 32, 32), torch.randn(2, 16)), 1)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("name", FAMILIES)
def test_text_encoders_in_half_precision_give_full_precision(tmp_path, name):
    model = models.build(name, "", pipelines.make(name, tmp_path), pipelines.SIZE)
    for part, module in model.outside[0].components.items():
        if part.startswith("text_encoder"):
            module.half()
    with bf16:
        cond = model.condition(CAPTIONS)
        y = model.predict(torch.randn(2, *model.shape), torch.tensor([900, 30]), cond)
    assert all(value.dtype == torch.float32 for value in cond.values()) and y.isfinite().all()


def test_a_censor_that_is_not_there_is_not_missed(tmp_path):
    """The public Stable Diffusion 1.5 names a safety checker; a folder without it trains, and is kept."""
    home = pipelines.make("sd15", tmp_path)
    index = json.loads((home / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["requires_safety_checker"] = True
    (home / "model_index.json").write_text(json.dumps(index))
    model = models.build("sd15", "", home, pipelines.SIZE)
    model.keep(tmp_path, steps=1, rows=[(10, {})])
    assert models.build("sd15", "", tmp_path / "pipeline", pipelines.SIZE).T == 1000


def test_a_folder_in_half_precision_alone_is_read(tmp_path):
    home = pipelines.make("sd15", tmp_path)
    plain = models.build("sd15", "", home, pipelines.SIZE)
    for path in list(home.glob("*/*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    model = models.build("sd15", "", home, pipelines.SIZE)
    assert torch.equal(model.network.conv_in.weight, plain.network.conv_in.weight)
    model.keep(tmp_path, steps=1, rows=[(10, {})])


def test_a_student_of_a_schedule_with_pure_noise_keeps_that_schedule(tmp_path):
    home = pipelines.make("sd15", tmp_path, "v_prediction")
    DDIMScheduler(**pipelines.BETAS, prediction_type="v_prediction",
                  rescale_betas_zero_snr=True).save_pretrained(home / "scheduler")
    index = json.loads((home / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (home / "model_index.json").write_text(json.dumps(index))
    model = models.build("sd15", "", home, pipelines.SIZE)
    theirs = model.few_step_scheduler(4).alphas_cumprod
    torch.testing.assert_close(theirs.sqrt().float(), model.alpha, rtol=0, atol=1e-5)


def test_the_teacher_leaves_the_adapters_on_whatever_happens(world):
    model = build(world, "sd15", rank=2)
    x, t, cond = torch.randn(1, *model.shape), torch.tensor([500]), model.condition(CAPTIONS[:1])
    with torch.no_grad():
        before = model.predict(x, t, cond)
        with pytest.raises(Exception):                       # noqa: B017
            model.twin().predict(x[:, :1], t, cond)
        assert torch.equal(model.predict(x, t, cond), before)


def test_lean_survives_random_weights_and_lora_is_remembered(world, tmp_path):
    run = prepared(world, "sd15", "adt", tmp_path / "a", "--lean", "--set", "init=random")
    assert run.model.network.is_gradient_checkpointing
    out = tmp_path / "first"
    typed = command(world, "sd15", "--method", "diffusion", "--steps", "1")
    train.main([*typed, "--lora", "4", "--out", str(out)])
    train.main([*typed, "--weights", str(out), "--out", str(tmp_path / "second")])
    assert json.loads((tmp_path / "second" / "config.json").read_text())["lora"] == 4
    assert models.build("sd15", "", tmp_path / "second", pipelines.SIZE).rank == 4


def test_a_finished_run_that_lost_its_result_makes_it_again(world, tmp_path):
    out = tmp_path / "run"
    train.main(command(world, "sd15", "--method", "diffusion", "--steps", "1", "--out", str(out)))
    shutil.rmtree(out / "pipeline")
    train.main(["--resume", str(out), "--samples", "0"])
    assert (out / "pipeline" / "model_index.json").is_file()


def test_sharded_weights_that_were_exchanged_are_gathered_anew():
    """FSDP2 keeps the outermost layers' weights gathered after a call without gradient."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        parallel.shard(network)
        x, weights = torch.ones(1, 2), list(network.parameters())
        with torch.no_grad():
            before = network(x)
            for weight in weights:
                weight.zero_()
            parallel.moved(network)
            assert network(x).abs().max() == 0 < before.abs().max()
        full = parallel.whole({"a": weights}, home=True)
        assert [w.shape for w in full["a"]] == [(2, 2), (2,), (2, 2), (2,)]
        assert not any(map(parallel.sharded, full["a"]))
    finally:
        torch.set_autocast_cache_enabled(True)
        dist.destroy_process_group()


def test_arithmetic_of_large_models_counts_what_a_layer_does():
    """A matrix product is 2 N K M operations forward, as many backward for each of its two gradients."""
    with torch.device("meta"):
        layer, x = torch.nn.Linear(256, 512, bias=False), torch.empty(8, 256)
        kept, forward, backward = benchmark.weigh(lambda: layer(x), layer.parameters())
    assert forward == backward == pytest.approx(2 * 8 * 256 * 512 / 1e12)
    assert 0 < kept * 2 ** 30 - 256 * 512 * 4 < 4 * 8 * 512 * 4              # its gradient; not its weight


@pytest.mark.parametrize("method", ["diffusion", "adt", "add"])
def test_the_floor_of_a_step_knows_every_call(world, tmp_path, method):
    """Also those of the teacher, who has the same VAE: whoever forgets one takes network for overhead."""
    run = prepared(world, "sd15", method, tmp_path)
    run.step()
    parts = {"network": run.model.network, "teacher": run.teacher.network,
             "VAE decoder": run.model.vae.decoder, "VAE encoder": run.model.vae.encoder}
    seen = dict.fromkeys(parts, 0)
    def heard(name):
        return lambda _, given: seen.update({name: seen[name] + len(given[0])})
    with ExitStack() as hooks:
        for name, part in parts.items():
            hooks.callback(part.register_forward_pre_hook(heard(name)).remove)
        counts = benchmark.Calls(run).counts
    for name, pictures in seen.items():
        assert pictures == sum(n * times for (part, n, _), times in counts.items() if part == name)


def test_the_bench_reads_a_recipe_off_every_name_a_study_gives(tmp_path, monkeypatch):
    """Also where a setting has a hyphen; and of two seeds it gives mean and scatter. Who is ahead by less
    than the scatter may be so by chance; who is ahead in one step and behind in four, is not."""
    asked = []
    monkeypatch.setattr(benchmark.figures, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "run_of", lambda *words: asked.append(words) or SimpleNamespace(step=None))
    monkeypatch.setattr(benchmark, "alternate", lambda jobs, rounds: dict.fromkeys(jobs, 6.))
    quick = "lr=5e-5 terminal=.75, 40"
    for name, *seeds in [("lr=5e-5-terminal=.75-40steps", (1., 5.), (2., 5.)),
                         ("600steps", (1., 6.), (2., 6.)), ("50steps", (1.7, 5.)), ("70steps", (1.6, 4.)),
                         ("80steps", (3., 5.))]:
        for seed, (one, four) in enumerate(seeds):
            found = {"1 step (2000 pictures)": {"fd": one}, "4 steps (2000 pictures)": {"fd": four}}
            (tmp_path / f"add-glyphs-{name}-seed{seed}.json").write_text(json.dumps(found))
    rows = {row[2]: row[3:] for row in benchmark.quality()[1]}
    assert sorted(asked) == [("add",), ("add", "--set", "lr=5e-5", "--set", "terminal=.75")]
    assert rows[quick] == ("2", "4.0", "1.50 ± 0.71 / 5.00 ± 0.00", "none: on the front")
    assert rows["default, 50"][-1] == f"≈ {quick}"           # quicker, and better by less than .71
    assert rows["default, 70"][-1] == "none: on the front"   # slower and worse, but for four steps
    assert rows["default, 80"][-1] == f"default, 70; {quick}"
    assert rows["default, 600"][-1] == quick
