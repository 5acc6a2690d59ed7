"""train.py: what a run writes, the gradients of each half of a step, and what is said about bad input."""

import io
import json
import sys

import pytest
import torch
from test_data import make_image_folder

import add
import evaluate
import train
from conftest import copy_run, make_trainer, train_run
from discriminator import DiscriminatorInputs
from models.loading import load_model, weights_path
from utils import checkpoint, training_state
from utils import config as settings


@pytest.mark.parametrize("method,dataset,after", [("adt", "glyphs", "2 steps"), ("add", "glyphs", "4 steps"),
                                                  ("diffusion", "fashion", "2 steps")])
def test_a_run_writes_all_its_files(tmp_path, method, dataset, after, drawing, monkeypatch, capsys):
    all_configs = add.Config.eval_sampling_configs           # 25 steps take as long as all others together
    monkeypatch.setattr(add.Config, "eval_sampling_configs",
                        lambda config, *scale: [row for row in all_configs(config, *scale) if row[1] < 25])
    run_dir = train_run(tmp_path / "run", "--method", method, "--data", dataset, "--steps", "3",
                        "--eval-samples", "200")
    log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 1, 2]
    run_config = json.loads((run_dir / "config.json").read_text())
    assert run_config["config"]["batch_size"][0] == 2
    assert run_config["config"]["lr"][1].startswith("ours:")
    for name in ("samples_000003.png", "curves.png", "before_after.png", "table.md", "checkpoint.pt"):
        assert (run_dir / name).stat().st_size > 0
    result = json.loads((run_dir / "result.json").read_text())
    assert result[f"before, {after}"]["fd"] > 0 < result[f"after, {after}"]["fd"]
    assert "real images" in result
    assert not list(run_dir.glob("*.part*"))
    trained, pretrained = load_model("tiny", dataset, run_dir), load_model("tiny", dataset)
    changed = [not torch.equal(a, b) for a, b in zip(trained.network.parameters(),
                                                     pretrained.network.parameters())]
    assert sum(changed) > .8 * len(changed)
    assert all(torch.equal(a, b) for a, b in zip(trained.text_encoder.parameters(),
                                                 pretrained.text_encoder.parameters()))
    assert f"| after, {after} |" in capsys.readouterr().out


def test_in_each_half_only_its_own_network_requires_gradients(glyphs):
    trainer = make_trainer("--set", "n_critic=2")
    backbone = {name: buffer.clone() for name, buffer in trainer.disc.backbone.named_buffers()}
    text_encoder = {name: value.clone() for name, value in trainer.model.text_encoder.state_dict().items()}
    calls, forward = [], trainer.disc.forward

    def record(*inputs):
        calls.append((any(param.requires_grad for param in trainer.d_params), inputs[1].requires_grad))
        return forward(*inputs)

    trainer.disc.forward = record
    trainer.train_step()
    # once frozen, with a graph to the generator; then trained on a constant pair in two updates (the other
    # order of the pair has the opposite logits, without another call)
    assert calls == [(False, True)] + 2 * [(True, False)]
    assert all(torch.equal(v, backbone[name]) for name, v in trainer.disc.backbone.named_buffers())
    for name, value in trainer.model.text_encoder.state_dict().items():
        assert torch.equal(value, text_encoder[name])


@pytest.mark.parametrize("method", ["adt", "add", "diffusion"])
def test_no_gradient_leaks_from_one_half_into_the_other(method):
    """When a half begins, its network has no gradient, neither of the other half nor of the previous step;
    the discriminator half leaves the generator's gradients as they were."""
    trainer = make_trainer("--method", method)
    method, d_grads = trainer.method, []

    class Watched:
        @staticmethod
        def generator_loss(*args):
            assert not any(param.grad is not None and param.grad.any() for param in trainer.g_params)
            return method.generator_loss(*args)

        @staticmethod
        def discriminator_loss(*args):
            assert not any(param.grad is not None and param.grad.any() for param in trainer.d_params)
            g_grads.append([param.grad.clone() for param in trainer.g_params])
            return method.discriminator_loss(*args)

    trainer.method = Watched
    for _ in range(2):
        g_grads = []
        trainer.train_step()
        for grads in g_grads:
            assert all(torch.equal(a, param.grad) for a, param in zip(grads, trainer.g_params))
        d_grads.append(any(param.grad is not None and param.grad.any() for param in trainer.d_params))
    assert d_grads == 2 * [trainer.config.lambda_adv > 0]


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_the_student_starts_as_configured_and_the_teacher_stays_the_pretrained_model(init):
    trainer = make_trainer("--method", "add", "--set", f"init={init}")
    pretrained = [*load_model("tiny", "glyphs").network.parameters()]
    teacher = [*trainer.teacher.network.parameters()]
    is_equal = all(torch.equal(a, b) for a, b in zip(trainer.g_params, pretrained))
    assert is_equal == (init == "pretrained")
    initial = [param.detach().clone() for param in trainer.g_params]
    trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(teacher, pretrained))
    assert not any(param.requires_grad for param in teacher)
    assert not all(torch.equal(a, b) for a, b in zip(initial, trainer.g_params))


def test_micro_batches_are_averaged_and_accuracies_count_both_sides():
    trainer = make_trainer("--method", "add", "--set", "gradient_accumulation_steps=2",
                           "--set", "max_grad_norm=0", "--set", "max_grad_norm_d=0")

    class UnitGradients:
        @staticmethod
        def generator_loss(*_):
            image = torch.zeros(2, 3, 32, 32)
            return {"adv": trainer.g_params[0].sum()}, DiscriminatorInputs(image, image, None)

        @staticmethod
        def discriminator_loss(*_):
            logits_fake = torch.tensor([[-1.], [-1.], [-1.], [1.]])
            return {"d": trainer.d_params[0].sum()}, [torch.ones(2, 1)], [logits_fake]

    trainer.method = UnitGradients
    for trainer.step in (0, 1):                              # with and without gradient norms of each term
        logs = trainer.train_step()
        trainer.next_batch_future = None
        assert (trainer.g_params[0].grad == 1).all()
        assert (trainer.d_params[0].grad == 1).all()
        assert (logs["acc_d_real"], logs["acc_d_fake"]) == (1., .75)


def test_every_step_and_every_discriminator_update_has_its_own_seed():
    trainer, seeds = make_trainer("--method", "add", "--set", "n_critic=2"), []
    method = trainer.method

    class Watched:
        @staticmethod
        def generator_loss(*args):
            seeds.append(torch.initial_seed())
            return method.generator_loss(*args)

        @staticmethod
        def discriminator_loss(*args):
            seeds.append(torch.initial_seed())
            return method.discriminator_loss(*args)

    trainer.method = Watched
    trainer.train_step()
    trainer.train_step()
    assert len(set(seeds)) == len(seeds) == 6


def test_seeds_are_what_they_were():
    """Every published number depends on them."""
    trainer = make_trainer()
    assert trainer.derive_seed(0, "data", step=3) == int.from_bytes(
        __import__("hashlib").sha256(b"(0, 3, 0, 'data')").digest()[:8])


def test_spectral_norms_follow_their_weights():
    trainer = make_trainer("--method", "add")
    norm = trainer.disc.heads[0].conv.parametrizations.weight[0]
    before = norm._u.clone()
    trainer.train_step()
    assert not torch.equal(norm._u, before)


def test_the_optimisers_have_the_configured_betas_and_no_weight_decay():
    trainer = make_trainer("--method", "add", "--set", "beta1=0.2", "--set", "beta1_d=0.3")
    found = [(o.defaults["betas"], o.defaults["weight_decay"]) for o in (trainer.opt_g, trainer.opt_d)]
    assert found == [((.2, .999), 0.), ((.3, .99), 0.)]


def test_ema_and_learning_rates_follow_their_schedules():
    trainer = make_trainer()
    ema = [param.detach().clone() for param in trainer.g_params]
    for decay, lr in ((1 / 10, 2e-4), (2 / 11, 1.5e-4)):     # the EMA's ramp; linear decay to zero
        trainer.train_step()
        ema = [decay * a + (1 - decay) * param.detach() for a, param in zip(ema, trainer.g_params)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trainer.ema_params, ema))
        assert trainer.opt_g.param_groups[0]["lr"] == pytest.approx(lr)
        assert trainer.opt_d.param_groups[0]["lr"] == pytest.approx(1e-3)     # constant
    before = [param.detach().clone() for param in trainer.g_params]
    with trainer.ema_weights():
        assert all(torch.allclose(param, a, atol=1e-6) for param, a in zip(trainer.g_params, ema))
    assert all(torch.equal(param, b) for param, b in zip(trainer.g_params, before))


def test_gradient_clipping():
    """max_norm 0 and a limit above the norm change no bit; a limit below it changes only the length."""
    from utils.distributed import clip_grad_norm
    trainer = make_trainer()
    grads = [torch.randn_like(param) for param in trainer.g_params]
    norm = torch.stack([grad.norm() for grad in grads]).norm().item()
    for max_norm in (0., 2 * norm, norm / 3):
        for param, grad in zip(trainer.g_params, grads):
            param.grad = grad.clone()
        assert clip_grad_norm(trainer.g_params, max_norm) == pytest.approx(norm)
        for param, grad in zip(trainer.g_params, grads):
            if 0 < max_norm < norm:
                assert torch.allclose(param.grad, grad / 3, rtol=1e-4)
            else:
                assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("method", ["adt", "add"])
def test_each_half_clips_with_its_own_limit(method):
    """With limits far below the norms, the gradients that the optimisers see have exactly these norms."""
    trainer = make_trainer("--method", method, "--set", "max_grad_norm=1e-3", "--set", "max_grad_norm_d=2e-3")
    trainer.train_step()
    for params, limit in ((trainer.g_params, 1e-3), (trainer.d_params, 2e-3)):
        norm = torch.stack([param.grad.norm() for param in params if param.grad is not None]).norm()
        assert norm.item() == pytest.approx(limit, rel=1e-3)


def test_during_warm_up_only_the_discriminator_is_trained():
    trainer = make_trainer("--set", "warmup_steps_d=1")
    initial = [[param.detach().clone() for param in group] for group in (trainer.g_params, trainer.d_params)]

    def changed():
        return [any(not torch.equal(a, b) for a, b in zip(group, now))
                for group, now in zip(initial, (trainer.g_params, trainer.d_params))]

    assert "grad_norm" not in trainer.train_step()
    assert changed() == [False, True]
    assert "grad_norm" in trainer.train_step()
    assert changed() == [True, True]


def test_warm_up_takes_a_quarter_of_the_run_at_most():
    for steps, warmup in ((4, 1), (100, 25), (400, 60)):
        assert make_trainer("--set", "warmup_steps_d=60", "--steps", str(steps)).warmup_steps_d == warmup
    assert make_trainer("--method", "diffusion", "--set", "warmup_steps_d=60").warmup_steps_d == 0


def test_measuring_each_terms_gradient_norm_changes_nothing(monkeypatch):
    results = []
    for every in (1, 10 ** 9):
        trainer = make_trainer()
        monkeypatch.setattr(training_state, "GRAD_NORM_EVERY", every)
        trainer.step = 1
        logs = trainer.train_step()
        results.append((logs, [param.detach() for param in trainer.g_params]))
    (measured, params_a), (plain, params_b) = results
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(params_a, params_b))
    assert {"grad_norm/diffusion", "grad_norm/adv"} <= measured.keys()
    assert "grad_norm/adv" not in plain
    assert measured["grad_norm/diffusion"] > 0
    assert measured["grad_norm/adv"] > 0


@pytest.mark.parametrize("method", ["adt", "add"])
def test_set_help_lists_every_setting_of_the_method(method, capsys):
    train.main(["--method", method, "--set", "help"])
    text = capsys.readouterr().out
    for name in train.METHODS[method].module.Config.__dataclass_fields__:
        assert len([line for line in text.splitlines() if line.split()[:1] == [name]]) == 1
    assert "TrainConfig" in text
    assert "DiscriminatorConfig" in text


BAD_ARGUMENTS = [
    ("--method gan", "unknown method 'gan': wanted adt, add, diffusion"),
    ("--model dalle", "unknown model 'dalle'"),
    ("--data cats", "no data set 'cats'"),
    ("--set lambda=1", "wanted KEY=VALUE with a KEY of"),
    ("--set batch_size", "wanted KEY=VALUE"),
    ("--set batch_size=many", "batch_size is a whole number"),
    ("--set discriminator=triplet", "one of similarity"),
    ("--set grad_step_selection=first", "one of strided"),
    ("--set rollout_start=middle", "one of image, noise"),
    ("--set timestep_sampling=sometimes", "one of uniform, logit_normal"),
    ("--set num_inference_steps=0", "1 or more"),
    ("--set num_inference_steps=1001", "1 to 1000"),
    ("--set lr=nan", "a number"),
    ("--method add --set num_inference_steps=4", "with a KEY of"),
    ("--method add --set student_steps=1001", "1 to 1000"),
    ("--method add --set t_max=0", "t_max is a fraction of T"),
    ("--method add --set t_max=0.9 --set student_steps=16", "t_max is a fraction of T"),
    ("--method add --set distill_weighting=dmd", "one of exponential, sds, nfsd"),
    ("--method add --set lambda_adv=0 --set lambda_distill=0", "there is no loss left"),
    ("--set lambda_adv=0 --set lambda_diff=0", "there is no loss left"),
    ("--method diffusion --set lambda_diff=0", "there is no loss left"),
    ("--set lr=-1", "a number"),
    ("--set ema_decay=1.5", "a fraction, 0 to 1"),
    ("--set ema_decay=1", "below 1"),
    ("--set beta1=1", "below 1"),
    ("--method diffusion --set lambda_adv=1", "means lambda_adv=0"),
    ("--data fashion --eval-samples 6000", "5000 at most"),
    ("--set checkpoint_rollout=maybe", "true or false"),
    ("--set batch_size=0", "batch_size"),
    ("--steps 0", "wanted 1 or more"),
    ("--eval-samples 10", "needs 200"),
    ("--resolution -64", "number of pixels"),
    ("--lora-rank 8", "for Stable Diffusion"),
    ("--gradient-checkpointing", "for Stable Diffusion"),
    ("--fsdp --processes 1", "start them with torchrun"),
    ("--pretrained nowhere", "no such file"),
    ("--resume nowhere", "wanted a run folder"),
    ("--allow-data-change", "is for a run that goes on with --resume"),
]


@pytest.mark.parametrize("arguments,sentence", BAD_ARGUMENTS)
def test_bad_input_gets_one_sentence_and_writes_nothing(arguments, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--output-dir", str(tmp_path / "run"), *arguments.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert sentence in error
    assert error.count("\n") <= 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [
    "--steps 0", "--lora-rank 8", "--set lr=x", "--resolution -1", "--resolution 64", "--pretrained nowhere",
    "--backbone nowhere", "--data cats", "--data glyphs:gothic", "--data fashion --random-flip",
    "--random-flip", "--report-to wandb", "--compile --fsdp", "--data fashion --eval-samples 6000"])
def test_a_mistake_is_reported_before_an_existing_run(arguments, adt_run, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--output-dir", str(adt_run), *arguments.split()])
    assert stop.value.code == 2
    assert "already holds a run" not in capsys.readouterr().err


def test_a_run_is_only_replaced_with_overwrite(tmp_path, adt_run, capsys):
    run_dir = copy_run(adt_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(SystemExit) as stop:
        train_run(run_dir, "--steps", "1")
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
    train_run(run_dir, "--steps", "1", "--overwrite")
    assert len((run_dir / "log.jsonl").read_text().splitlines()) == 1


def test_unknown_words_in_captions_stop_a_run_before_it_starts(tmp_path, capsys):
    images = make_image_folder(tmp_path / "mine")            # its captions hold a word that glyphs do not
    with pytest.raises(SystemExit) as stop:
        train.main(["--data", str(images), "--pretrained", str(weights_path("denoiser", "glyphs").parent),
                    "--output-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "'picture'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_folder_of_images_from_pretraining_to_evaluation(tmp_path):
    from scripts import pretrain
    images, weights = make_image_folder(tmp_path / "mine", n=400), tmp_path / "weights"
    pretrain.main(["--data", str(images), "--steps", "2", "--output-dir", str(weights)])
    train_run(tmp_path / "run", "--data", str(images), "--pretrained", str(weights), "--steps", "1",
              "--eval-samples", "200")
    evaluate.main([str(tmp_path / "run"), "--steps=1", "--eval-samples=200", f"--output={tmp_path}/x.png"])
    assert (tmp_path / "run" / "before_after.png").exists()


@pytest.mark.parametrize("method", ["adt", "add", "diffusion"])
def test_a_resumed_run_keeps_settings_whose_defaults_changed(tmp_path, monkeypatch, method):
    run_dir = train_run(tmp_path / "run", "--method", method, "--steps", "1", "--seed", "3")
    config = json.loads((run_dir / "config.json").read_text())["config"]
    module = train.METHODS[method].module
    new_defaults = {"weight_decay": 7., "whiten_features": True, "backbone": "cnn"}
    monkeypatch.setattr(module.Config.__init__, "__kwdefaults__",
                        {**module.Config.__init__.__kwdefaults__, **new_defaults})
    assert settings.build_config(train.METHODS[method], []).weight_decay == 7.
    assert settings.build_config(train.METHODS[method], []).backbone == "cnn"
    train.main(["--resume", str(run_dir), "--steps", "2", "--eval-samples", "0"])
    run_config = json.loads((run_dir / "config.json").read_text())
    assert run_config["config"] == config
    assert (run_config["seed"], run_config["steps"]) == (3, 2)
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] == 2


def test_an_impossible_resume_is_one_sentence(tmp_path, adt_run, capsys):
    run_dir = copy_run(adt_run, tmp_path / "run")

    def complaint(*arguments):
        with pytest.raises(SystemExit) as stop:
            train.main(["--resume", str(run_dir), "--eval-samples", "0", *arguments])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "past --steps 1" in complaint("--steps", "1")
    assert "own settings" in complaint("--set", "lr=1")
    complete = (run_dir / "checkpoint.pt").read_bytes()
    (run_dir / "checkpoint.pt").write_bytes(complete[:len(complete) // 2])
    assert "damaged" in complaint()
    (run_dir / "config.json").write_text("{}")
    assert "not the config.json" in complaint()


def test_overwriting_leaves_nothing_of_the_old_run(tmp_path, adt_run, monkeypatch, capsys):
    run_dir = copy_run(adt_run, tmp_path / "run")
    for name in ("result.json", "table.md", "before_after.png"):
        (run_dir / name).touch()
    for name in ("pipeline/unet", "scheduler"):
        (run_dir / name).mkdir(parents=True)
    (run_dir / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(SystemExit):                          # its own initial weights would be deleted
        train_run(run_dir, "--steps", "1", "--overwrite", "--pretrained",
                  str(run_dir / "denoiser.safetensors"))
    assert (run_dir / "denoiser.safetensors").exists()
    assert "would replace" in capsys.readouterr().err

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_loop", interrupted)
    with pytest.raises(SystemExit):
        train_run(run_dir, "--steps", "1", "--overwrite")
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.json", "log.jsonl"]


def test_a_run_folder_named_like_its_data_set_can_be_overwritten(tmp_path, adt_run, monkeypatch):
    run_dir = copy_run(adt_run, tmp_path / "glyphs")
    monkeypatch.chdir(tmp_path)
    run_config = checkpoint.load_run_config(run_dir / "config.json")
    assert run_config["data"] == "glyphs"
    checkpoint.check_run_dir(run_dir, run_config, overwrite=True)


def test_a_folder_that_is_no_run_is_never_written_to(tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(SystemExit) as stop:
        train_run(tmp_path / "letters", "--overwrite")
    assert stop.value.code == 2
    assert "is not a run of train.py" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["dear.txt"]


def test_a_run_folder_with_any_name_can_be_printed(tmp_path, monkeypatch):
    """stdout's encoding may lack its characters, as with PYTHONIOENCODING=cp1252."""
    stdout = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, encoding="cp1252", errors="strict"))
    train_run(tmp_path / "\u56fe", "--steps", "1")
    sys.stdout.flush()
    assert r"\u56fe    measure it" in stdout.getvalue().decode("cp1252")


def test_run_folder_names_are_short_and_have_no_slashes():
    from utils.cli import default_run_dir
    run_config = {"method": "add", "recipe": "paper", "model": "tiny", "data": "glyphs", "seed": 0,
                  "overrides": ["backbone=a/b\\c " + "x" * 500]}
    name = str(default_run_dir(run_config).relative_to("runs"))
    assert "/" not in name
    assert "\\" not in name
    assert len(name) <= 200
    names = []
    for seed in (0, 2 ** 63 - 1):
        for last_override in ("lr=1", "lr=2"):
            run_config |= {"data": "图" * 80, "overrides": ["lr=3"] * 60 + [last_override], "seed": seed}
            names.append(default_run_dir(run_config).name)
            assert len(names[-1].encode()) <= 200
            assert names[-1].endswith(f"-seed{seed}")
    assert len(set(names)) == 4
    run_config |= {"data": "glyphs", "overrides": ["lr=5e-5"], "seed": 0}
    assert default_run_dir(run_config).name == "add-glyphs-lr=5e-5-seed0"
    run_config["recipe"] = "tuned"
    assert default_run_dir(run_config).name == "add-tuned-glyphs-lr=5e-5-seed0"
