"""The benchmark's arithmetic: operations and bytes of a layer, the calls of a step, the recipes."""

import json
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from tiny_families import setup_run

from scripts import benchmark, memory_of_large_models

pytestmark = pytest.mark.usefixtures("cache_home")


def test_a_matrix_product_has_the_operations_and_bytes_of_the_textbook():
    """2 N K M operations forward, and as many backward for each of its two gradients."""
    with torch.device("meta"):
        layer, x = torch.nn.Linear(256, 512, bias=False), torch.empty(8, 256)
        gib, forward, backward = memory_of_large_models.measure_call(lambda: layer(x), layer.parameters())
    assert forward == backward == pytest.approx(2 * 8 * 256 * 512 / 1e12)
    assert 0 < gib * 2 ** 30 - 256 * 512 * 4 < 4 * 8 * 512 * 4         # the gradient, and not the weight


@pytest.mark.parametrize("method", ["diffusion", "adt", "add"])
def test_the_benchmark_counts_every_call_of_a_step(pretrained, method):
    """Also the teacher's, if there is one: it shares the VAE. A missed call would count as overhead."""
    trainer = setup_run(pretrained, "sd15", method)
    trainer.train_step()
    parts = {"network": trainer.model.network, "VAE decoder": trainer.model.vae.decoder,
             "VAE encoder": trainer.model.vae.encoder}
    if trainer.teacher:
        parts["teacher"] = trainer.teacher.network
    num_images = dict.fromkeys(parts, 0)

    def count_images(name):
        def hook(module, inputs):
            num_images[name] += len(inputs[0])
        return hook

    with ExitStack() as hooks:
        for name, part in parts.items():
            hooks.callback(part.register_forward_pre_hook(count_images(name)).remove)
        call_counts = benchmark.CallRecorder(trainer).call_counts
    for name, expected in num_images.items():
        found = sum(size * times for (part, size, _), times in call_counts.items() if part == name)
        assert found == expected, name


def test_recipes_are_read_off_the_names_that_a_study_gives(tmp_path, monkeypatch):
    """Also where a value has a hyphen. Of two seeds the mean and the deviation count: who leads by less than
    that may lead by chance; who leads in one step and trails in four, does not lead."""
    requested = []

    def make_trainer(*args):
        requested.append(args)
        return SimpleNamespace(train_step=None)

    monkeypatch.setattr(benchmark.make_figures, "RESULTS_DIR", tmp_path)
    monkeypatch.setattr(benchmark, "make_trainer", make_trainer)
    monkeypatch.setattr(benchmark, "time_interleaved", lambda jobs, rounds: dict.fromkeys(jobs, 6.))
    (tmp_path / "runs").mkdir()
    fast = "lr=5e-5 pure_noise_prob=.75, 40"
    for name, *seeds in [("lr=5e-5-pure_noise_prob=.75-40steps", (1., 5.), (2., 5.)),
                         ("600steps", (1., 6.), (2., 6.)), ("50steps", (1.7, 5.)), ("70steps", (1.6, 4.)),
                         ("80steps", (3., 5.))]:
        for seed, (fd_1, fd_4) in enumerate(seeds):
            metrics = {"1 step (2000 images)": {"fd": fd_1}, "4 steps (2000 images)": {"fd": fd_4}}
            path = tmp_path / "runs" / f"add-glyphs-{name}-seed{seed}.json"
            path.write_text(json.dumps(metrics))
    rows = {row[2]: row[3:] for row in benchmark.time_to_quality()[1]}
    assert sorted(requested) == [("add",), ("add", "--set", "lr=5e-5", "--set", "pure_noise_prob=.75")]
    assert rows[fast] == ("2", "4.0", "1.50 ± 0.71 / 5.00 ± 0.00", "none: on the Pareto front")
    assert rows["default, 50"][-1] == f"≈ {fast}"                      # faster, and better by less than .71
    assert rows["default, 70"][-1] == "none: on the Pareto front"      # slower and worse, except in 4 steps
    assert rows["default, 80"][-1] == f"default, 70; {fast}"
    assert rows["default, 600"][-1] == fast
