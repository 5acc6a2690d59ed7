"""The command a user types: what it writes, that it goes on where it stopped,
and what it says to bad input."""

import json

import pytest
import torch
from test_data import folder

import evaluate
import models
import train

SMALL = ["--set", "batch=2", "--set", "warmup_d=0", "--samples", "0"]
QUICK = [*SMALL, "--set", "path_steps=2", "--set", "train_steps=1"]


def run_of(*arguments):
    small = SMALL if "add" in arguments else QUICK
    return train.prepare(train.parse([*small, "--steps", "4", *arguments])[1])[2]


def go(out, *arguments):
    train.main([*(SMALL if "add" in arguments else QUICK), "--out", str(out), *arguments])
    return out


@pytest.mark.parametrize("method,dataset,last", [("adt", "glyphs", "2 steps"), ("add", "glyphs", "4 steps"),
                                                 ("diffusion", "fashion", "2 steps")])
def test_a_run_leaves_everything_a_reader_wants(tmp_path, method, dataset, last, capsys):
    out = go(tmp_path / "run", "--method", method, "--data", dataset, "--steps", "3", "--samples", "200")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 1, 2]
    config = json.loads((out / "config.json").read_text())
    assert config["config"]["batch"][0] == 2 and config["config"]["lr"][1].startswith("ours")
    for name in ("samples_000003.png", "curves.png", "before_after.png", "table.md", "checkpoint.pt"):
        assert (out / name).stat().st_size > 0
    result = json.loads((out / "result.json").read_text())
    assert result[f"before, {last}"]["fd"] > 0 < result[f"after, {last}"]["fd"] and "real pictures" in result
    assert not list(out.glob("*.part*"))
    again = models.build("tiny", dataset, out)
    shipped = models.build("tiny", dataset)
    moved = [not torch.equal(a, b) for a, b in zip(again.network.parameters(), shipped.network.parameters())]
    assert sum(moved) > .8 * len(moved)
    assert all(torch.equal(a, b) for a, b in zip(again.text.parameters(), shipped.text.parameters()))
    assert f"| after, {last} |" in capsys.readouterr().out


def test_the_two_halves_leave_each_other_alone(glyphs):
    """After a whole step: the critic's gradients come from its own half, the generator's from its own."""
    run = run_of("--set", "steps_d=2")
    frozen = {n: v.clone() for n, v in run.critic.features.named_buffers()}
    text = {n: v.clone() for n, v in run.model.text.state_dict().items()}
    calls = []
    critic_forward = run.critic.forward
    def forward(*inputs):
        calls.append((any(p.requires_grad for p in run.critic_weights), inputs[1].requires_grad))
        return critic_forward(*inputs)
    run.critic.forward = forward
    run.step()
    # watches the picture; learns, twice, from data alone
    assert calls == [(False, True)] + 2 * [(True, False), (True, False)]
    assert all(torch.equal(v, frozen[n]) for n, v in run.critic.features.named_buffers())
    assert all(torch.equal(v, text[n]) for n, v in run.model.text.state_dict().items())


@pytest.mark.parametrize("method", ["adt", "add"])
def test_each_half_starts_and_ends_with_its_own_gradients_alone(method):
    """When a half begins, its player holds no gradient, of the other's half or of the step before; when D's
    ends, the generator's are what they were."""
    run = run_of("--method", method)
    generate, judge, looks = run.generate, run.judge, []
    def ask(*half):
        assert not any(w.grad is not None and w.grad.any() for w in run.weights)
        return generate(*half)
    def look(*half):
        assert not any(w.grad is not None and w.grad.any() for w in run.critic_weights)
        held = [w.grad.clone() for w in run.weights]
        seen = judge(*half)
        assert all(torch.equal(a, w.grad) for a, w in zip(held, run.weights))
        looks.append(any(w.grad is not None and w.grad.any() for w in run.critic_weights))
        return seen
    run.generate, run.judge = ask, look
    run.step(), run.step()
    assert looks == [True, True]


@pytest.mark.parametrize("init", ["base", "random"])
def test_the_student_starts_as_the_base_or_from_nothing_and_the_teacher_stays_the_base(init):
    run = run_of("--method", "add", "--set", f"init={init}")
    base = [*models.build("tiny", "glyphs").network.parameters()]
    teacher = [*run.teacher.network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(run.weights, base)) == (init == "base")
    begun = [w.detach().clone() for w in run.weights]
    run.step()
    assert all(torch.equal(a, b) for a, b in zip(teacher, base)) and not any(w.requires_grad for w in teacher)
    assert not all(torch.equal(a, b) for a, b in zip(begun, run.weights))


def test_micro_batches_are_averaged_and_the_log_says_who_is_right():
    run = run_of("--method", "add", "--set", "accumulate=2", "--set", "clip=0", "--set", "clip_d=0")
    class Game:                                              # the gradient of either player is one
        def generator_loss(*_):
            return {"adv": run.weights[0].sum()}, torch.zeros(2, 3, 32, 32), None
        def discriminator_loss(*_):
            wrong_once = torch.tensor([[-1.], [-1.], [-1.], [1.]])
            return {"D": run.critic_weights[0].sum()}, [torch.ones(2, 1)], [wrong_once]
    run.module = Game
    for run.done in (0, 1):                                  # measured term by term, and not
        seen, run.coming = run.step(), None
        assert (run.weights[0].grad == 1).all() and (run.critic_weights[0].grad == 1).all()
        assert (seen["D right on real"], seen["D right on fake"]) == (1., .75)


def test_every_step_and_every_turn_draws_anew():
    run, luck = run_of("--method", "add", "--set", "steps_d=2"), []
    plain = run.module
    class Watched:
        def generator_loss(*inputs):
            luck.append(torch.initial_seed())
            return plain.generator_loss(*inputs)
        def discriminator_loss(*inputs):
            luck.append(torch.initial_seed())
            return plain.discriminator_loss(*inputs)
    run.module = Watched
    run.step(), run.step()
    assert len(set(luck)) == len(luck) == 6


def test_spectral_norms_follow_their_weights_in_a_run():
    run = run_of("--method", "add")
    norm = run.critic.heads[0].mix.parametrizations.weight[0]
    before = norm._u.clone()
    run.step()
    assert not torch.equal(norm._u, before)


def test_no_weight_decays_and_the_moments_are_those_that_were_set():
    run = run_of("--method", "add", "--set", "beta1=0.2", "--set", "beta1_d=0.3")
    said = [(o.defaults["betas"], o.defaults["weight_decay"]) for o in (run.opt_g, run.opt_d)]
    assert said == [((.2, .999), 0.), ((.3, .99), 0.)]


def test_the_average_and_the_rates_follow_their_schedules():
    run = run_of()
    average = [w.detach().clone() for w in run.weights]
    for decay, lr in ((1 / 10, 1e-4), (2 / 11, 7.5e-5)):     # young averages forget; the rate falls to zero
        run.step()
        average = [decay * a + (1 - decay) * w.detach() for a, w in zip(average, run.weights)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(run.average, average))
        assert run.opt_g.param_groups[0]["lr"] == pytest.approx(lr)
        assert run.opt_d.param_groups[0]["lr"] == pytest.approx(5e-3)         # the heads' stays
    before = [w.detach().clone() for w in run.weights]
    with run.averaged():
        assert all(torch.allclose(w, a, atol=1e-6) for w, a in zip(run.weights, average))
    assert all(torch.equal(w, b) for w, b in zip(run.weights, before))


def test_gradients_are_as_long_as_they_may_be():
    """clip=0: whatever they are; a limit above their norm changes no bit; below it, it is their norm, and
    only their length changes."""
    run = run_of()
    seen = {w: torch.randn_like(w) for w in run.weights}
    norm = torch.stack([g.norm() for g in seen.values()]).norm().item()
    optimiser = torch.optim.SGD(run.weights, 0.)
    for clip in (0., 2 * norm, norm / 3):
        for w, g in seen.items():
            w.grad = g.clone()
        assert run.improve(optimiser, run.weights, clip, "|grad|", {})["|grad|"] == pytest.approx(norm)
        if clip < norm and clip:
            assert all(torch.allclose(w.grad, g / 3, rtol=1e-4) for w, g in seen.items())
        else:
            assert all(torch.equal(w.grad, g) for w, g in seen.items())


def test_a_discriminator_in_warm_up_learns_and_does_not_teach():
    run = run_of("--set", "warmup_d=1")
    weights = [[p.detach().clone() for p in group] for group in (run.weights, run.critic_weights)]
    def moved():
        return [any(not torch.equal(a, b) for a, b in zip(group, now))
                for group, now in zip(weights, (run.weights, run.critic_weights))]
    assert "|grad|" not in run.step() and moved() == [False, True]
    assert "|grad|" in run.step() and moved() == [True, True]


def test_warm_up_takes_a_quarter_of_the_run_at_most():
    for steps, warmup in ((4, 1), (100, 25), (400, 60)):
        assert run_of("--set", "warmup_d=60", "--steps", str(steps)).warmup == warmup


def test_measuring_each_terms_gradient_changes_nothing(monkeypatch):
    """Taken one by one or as a sum, the terms leave the same gradient, and the parts are told apart."""
    found = []
    for measure in (1, 10 ** 9):
        run = run_of()
        monkeypatch.setattr(train, "MEASURE", measure)
        run.done = 1
        seen = run.step()
        found.append((seen, [p.detach() for p in run.weights]))
    (measured, one), (plain, two) = found
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one, two))
    assert {"|grad diff|", "|grad adv|"} <= measured.keys() and "|grad adv|" not in plain
    assert measured["|grad diff|"] > 0 and measured["|grad adv|"] > 0


@pytest.mark.parametrize("arguments,sentence", [
    (["--method", "gan"], "unknown method 'gan': wanted adt, add, diffusion"),
    (["--model", "dalle"], "unknown model 'dalle'"),
    (["--data", "cats"], "no data set 'cats'"),
    (["--set", "lambda=1"], "wanted key=value with a key of path_steps"),
    (["--set", "batch"], "wanted key=value"),
    (["--set", "batch=many"], "batch is a whole number"),
    (["--set", "variant=triplet"], "one of similarity"),
    (["--set", "pick=first"], "one of even"),
    (["--set", "start=middle"], "one of image, text"),
    (["--set", "times=sometimes"], "one of uniform, lognormal"),
    (["--set", "path_steps=0"], "1 or more"),
    (["--set", "path_steps=1001"], "1 to 1000"),
    (["--set", "lr=nan"], "a number"),
    (["--method", "add", "--set", "path_steps=4"], "with a key of student_steps"),
    (["--method", "add", "--set", "student_steps=1001"], "1 to 1000"),
    (["--method", "add", "--set", "last=0"], "last is a share of T"),
    (["--method", "add", "--set", "last=0.9", "--set", "student_steps=16"], "last is a share of T"),
    (["--method", "add", "--set", "weighting=dmd"], "one of exponential, sds, nfsd"),
    (["--method", "add", "--set", "negative=a blurry zebra"], "'blurry'"),
    (["--method", "add", "--set", "lambda_adv=0", "--set", "lambda_distill=0"], "nothing is left to learn"),
    (["--set", "lambda_adv=0", "--set", "lambda_diff=0"], "nothing is left to learn"),
    (["--method", "diffusion", "--set", "lambda_diff=0"], "nothing is left to learn"),
    (["--set", "lr=-1"], "a number"),
    (["--set", "ema=1.5"], "a share, 0 to 1"),
    (["--method", "diffusion", "--set", "lambda_adv=1"], "means lambda_adv=0"),
    (["--data", "fashion", "--samples", "6000"], "5000 at most"),
    (["--set", "checkpoint=maybe"], "true, false"),
    (["--set", "batch=0"], "batch"),
    (["--steps", "0"], "at least one step"),
    (["--samples", "10"], "200 samples"),
    (["--weights", "nowhere"], "no such file"),
    (["--resume", "nowhere"], "wanted a run folder"),
])
def test_bad_input_gets_one_sentence_and_writes_nothing(arguments, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path / "run"), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") <= 2
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_without_being_told(tmp_path, capsys):
    out = go(tmp_path / "run", "--steps", "1")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(SystemExit) as stop:
        go(out, "--steps", "1")
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    go(out, "--steps", "2", "--overwrite")
    assert len((out / "log.jsonl").read_text().splitlines()) == 2


def test_words_the_model_does_not_know_stop_a_run_before_it_starts(tmp_path, capsys):
    mine = folder(tmp_path / "glyphs")               # captions say 'picture', the shipped glyphs model cannot
    with pytest.raises(SystemExit) as stop:
        train.main(["--data", str(mine), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "'picture'" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_own_folder_from_nothing_to_a_tuned_model(tmp_path):
    """pretrain.py makes the networks for a folder, train.py tunes them."""
    import pretrain
    mine, weights = folder(tmp_path / "mine", n=400), tmp_path / "weights"
    pretrain.main(["--data", str(mine), "--steps", "2", "--out", str(weights)])
    go(tmp_path / "run", "--data", str(mine), "--weights", str(weights), "--steps", "1", "--samples", "200")
    evaluate.main([str(tmp_path / "run"), "--steps=1", "--samples=200", f"--out={tmp_path}/x.png"])
    assert (tmp_path / "run" / "before_after.png").exists()


def test_settings_of_a_resumed_run_are_its_own(tmp_path):
    out = go(tmp_path / "run", "--steps", "1", "--seed", "3")
    train.main(["--resume", str(out), "--steps", "2", "--samples", "0"])
    plan = json.loads((out / "config.json").read_text())
    assert plan["seed"] == 3 and plan["steps"] == 2 and plan["config"]["batch"][0] == 2
    assert torch.load(out / "checkpoint.pt", weights_only=True)["done"] == 2


@pytest.mark.parametrize("method", ["adt", "add", "diffusion"])
def test_a_resumed_run_keeps_what_a_default_was_when_it_began(tmp_path, monkeypatch, method):
    out = go(tmp_path / "run", "--method", method, "--steps", "1")
    begun = json.loads((out / "config.json").read_text())["config"]
    module, defaults = train.METHODS[method][0], {"lr": 7., "whiten": False, "features": "cnn"}
    for name, value in defaults.items():
        fresh = [value if field == name else default for field, default in
                 zip(module.Config.__dataclass_fields__, module.Config.__init__.__defaults__)]
        monkeypatch.setattr(module.Config.__init__, "__defaults__", tuple(fresh))
    assert train.settle(method, []).lr == 7. and train.settle(method, []).features == "cnn"
    train.main(["--resume", str(out), "--steps", "2", "--samples", "0"])
    assert json.loads((out / "config.json").read_text())["config"] == begun


def test_a_resume_that_cannot_be_is_a_sentence(tmp_path, capsys):
    out = go(tmp_path / "run", "--steps", "2")
    def complaint(*arguments):
        with pytest.raises(SystemExit) as stop:
            train.main(["--resume", str(out), "--samples", "0", *arguments])
        assert stop.value.code == 2
        return capsys.readouterr().err
    assert "lies behind" in complaint("--steps", "1")
    assert "own settings" in complaint("--set", "lr=1")
    whole = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    assert "damaged" in complaint()
    (out / "config.json").write_text("{}")
    assert "not the config.json" in complaint()


def test_overwriting_leaves_nothing_of_the_old_run(tmp_path, monkeypatch, capsys):
    out = go(tmp_path / "run", "--steps", "1", "--samples", "200")
    for name in ("pipeline/unet", "scheduler"):
        (out / name).mkdir(parents=True)
    (out / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(SystemExit):                          # it would pull the ground from under itself
        go(out, "--steps", "1", "--overwrite", "--weights", str(out / "denoiser.safetensors"))
    assert (out / "denoiser.safetensors").exists() and "would be replaced" in capsys.readouterr().err
    monkeypatch.setattr(train, "loop", lambda *rest: None)   # dies before its first step
    with pytest.raises(SystemExit):
        go(out, "--steps", "1", "--overwrite")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "log.jsonl"]


def test_a_folder_that_is_no_run_is_never_written_to(tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(SystemExit) as stop:
        go(tmp_path / "letters", "--overwrite")
    assert stop.value.code == 2 and "something else than a run" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "letters").iterdir()] == ["dear.txt"]
