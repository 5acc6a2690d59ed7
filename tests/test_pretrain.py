"""scripts/pretrain.py: interrupted runs continue exactly, finished networks are replaced on request only."""

import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from test_data import make_image_folder

from conftest import ROOT
from models.backbones import TinyCNN
from models.loading import load_frozen
from scripts import pretrain

ARGS = ["--data", "glyphs", "--network", "cnn"]


def run(output_dir, *args):
    pretrain.main([*ARGS, "--output-dir", str(output_dir), *args])


@pytest.fixture
def small(monkeypatch, glyphs):
    """Six steps of two images."""
    recipe = pretrain.Recipe(steps=6, batch_size=2, lr=1e-3)
    for name in ("cnn", "denoiser"):
        monkeypatch.setitem(pretrain.RECIPES, name, {"glyphs": recipe, "fashion": recipe})
    monkeypatch.setattr(pretrain.data, "build_dataset", lambda name: glyphs)


def test_sigterm_ends_with_a_sentence_and_its_exit_code(tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "scripts.pretrain", *ARGS, "--output-dir",
                                str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    while not (tmp_path / "cnn.jsonl").exists() and process.poll() is None:
        time.sleep(.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in stderr and "continue with: python -m scripts.pretrain" in stderr
    assert (tmp_path / "cnn.state").is_file() and (tmp_path / "cnn.safetensors").is_file()


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, small, monkeypatch, capsys):
    run(tmp_path / "whole")
    sample_batch, calls = pretrain.data.Glyphs.sample_batch, []

    def stop_at_third_step(dataset, *args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return sample_batch(dataset, *args)

    monkeypatch.setattr(pretrain.data.Glyphs, "sample_batch", stop_at_third_step)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "stopped")
    assert stop.value.code == 130 and len(calls) == 3
    assert "continue with: python -m scripts.pretrain" in capsys.readouterr().err
    run(tmp_path / "stopped")
    assert len(calls) == 6
    whole, stopped = (load_file(tmp_path / name / "cnn.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)


def test_a_signal_before_the_first_step_ends_at_once(tmp_path, monkeypatch, capsys):
    def interrupted(name):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the signal was deferred")

    monkeypatch.setattr(pretrain.data, "build_dataset", interrupted)
    old_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            run(tmp_path)
    finally:
        signal.signal(signal.SIGINT, old_handler)
    assert stop.value.code == 130 and "pretrain.py: stopped" in capsys.readouterr().err


def test_a_finished_network_is_replaced_on_request_only(tmp_path, small, capsys):
    run(tmp_path)
    before = (tmp_path / "cnn.safetensors").stat().st_mtime_ns
    run(tmp_path)                                # all of its steps are done
    (tmp_path / "cnn.state").unlink()            # as in weights/
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert stop.value.code == 2 and "--overwrite replaces it" in capsys.readouterr().err
    assert (tmp_path / "cnn.safetensors").stat().st_mtime_ns == before
    run(tmp_path, "--overwrite")
    assert (tmp_path / "cnn.safetensors").stat().st_mtime_ns > before


def test_a_state_of_another_prediction_type_is_refused(tmp_path, small, capsys):
    args = ["--network", "denoiser", "--output-dir", str(tmp_path)]
    pretrain.main(args)
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*args, "--prediction-type", "v"])
    assert stop.value.code == 2 and "another data set or prediction type" in capsys.readouterr().err


def test_networks_of_another_folder_with_the_same_name_are_not_continued(tmp_path, monkeypatch, capsys):
    """Both have the same default folder of results."""
    monkeypatch.chdir(tmp_path)
    folders = []
    for name, n in (("a", 8), ("b", 9)):
        (tmp_path / name).mkdir()
        folders.append(str(make_image_folder(tmp_path / name / "pics", n)))
    args = ["--steps", "1", "--data"]
    pretrain.main([*args, folders[0], "--network", "cnn"])
    weights = tmp_path / "runs" / "pretrain-pics" / "cnn.safetensors"
    before = weights.read_bytes()
    for more in (["--network", "cnn"], ["--network", "backbone"], ["--network", "backbone", "--overwrite"]):
        with pytest.raises(SystemExit) as stop:
            pretrain.main([*args, folders[1], *more])
        assert stop.value.code == 2
        assert f"{weights.relative_to(tmp_path)} was trained on other images" in capsys.readouterr().err
    assert weights.read_bytes() == before
    pretrain.main([*args, folders[0], "--network", "cnn"])             # its own data: nothing left to do
    assert weights.read_bytes() == before
    pretrain.main([*args, folders[1], "--network", "cnn", "--overwrite"])
    assert weights.read_bytes() != before


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    recipe = pretrain.Recipe(steps=1000, batch_size=1, lr=1., decay_fraction=.25, warmup_steps=100)
    factor = partial(pretrain.lr_factor, recipe=recipe)
    assert factor(0) == pytest.approx(.01) and factor(99) == factor(500) == factor(750) == 1
    assert factor(875) == pytest.approx(.5) and 0 < factor(999) < 1e-4


def test_attributes_that_an_image_does_not_have_do_not_count():
    logits = [torch.randn(3, 4), torch.randn(3, 2)]
    attributes = torch.tensor([[1, -1], [2, -1], [-1, -1]])
    expected = torch.nn.functional.cross_entropy(logits[0][:2], attributes[:2, 0]) / 2
    assert pretrain.attribute_loss(logits, attributes) == pytest.approx(expected.item())


def test_the_file_loads_as_the_network(tmp_path, small):
    run(tmp_path)
    network = load_frozen(TinyCNN, tmp_path / "cnn.safetensors")
    assert not any(param.requires_grad for param in network.parameters())
