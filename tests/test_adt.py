"""The ADT algorithm: what starts where, who gets which gradient, and that the adversary alone can teach."""

import itertools
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch

import adt
import data
import discriminator
import models
from conftest import build_critic, clear, overheard

EXACT = adt.Config(path_steps=2, augment=0., instance_noise=0.)            # what is shown is what there is


@pytest.fixture(scope="module")
def world(glyphs):
    torch.manual_seed(0)
    model = models.build("tiny", "glyphs")
    critic = build_critic("similarity", discriminator.Features(models.features("tiny", "glyphs")), 128)
    return model, critic, glyphs.batch(4, torch.Generator().manual_seed(0))


@pytest.mark.equation("ADT L_G")
@pytest.mark.parametrize("variant", ["similarity", "twin", "difference", "relative", "projected"])
def test_after_the_generator_half_only_the_network_holds_gradients(world, variant):
    model, critic, batch = world
    critic = build_critic(variant, critic.features, 128).requires_grad_(False)
    clear(model, critic)
    terms, fake, _ = adt.generator_loss(model, None, critic, batch, adt.Config(path_steps=4, variant=variant))
    sum(terms.values()).backward()
    assert fake.shape == batch.image.shape and set(terms) == {"diff", "adv"}
    assert all(p.grad is None for p in critic.parameters())
    assert all(p.grad is None for p in model.text.parameters())
    assert all(p.grad is not None for p in model.network.parameters())


@pytest.mark.equation("ADT L_D")
def test_after_the_discriminator_half_only_the_heads_hold_gradients(world):
    model, critic, batch = world
    config = adt.Config(path_steps=4)
    critic.requires_grad_(False)
    _, fake, known = adt.generator_loss(model, None, critic, batch, config)
    clear(model, critic)
    critic.requires_grad_(True)
    losses, real, made = adt.discriminator_loss(critic, batch, fake, known, config)
    losses["D"].backward()
    assert [d.shape for d in real] == [d.shape for d in made]
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in critic.parameters())


@pytest.mark.equation("ADT L_G")
def test_the_adversarial_term_alone_reaches_every_tensor_of_the_network(world):
    model, critic, batch = world
    model = deepcopy(model)
    for p in model.network.parameters():                     # a zero-initialised layer would hide a dead path
        torch.nn.init.normal_(p, std=.05)
    critic.requires_grad_(False)
    terms, _, _ = adt.generator_loss(model, None, critic, batch, adt.Config(path_steps=3))
    terms["adv"].backward()
    silent = [n for n, p in model.network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@pytest.mark.equation("ADT start")
def test_image_start_is_uniform_over_the_path_and_text_start_is_pure_noise(toy, monkeypatch):
    """What the sampler is handed, recorded: its first time is uniform over the path's steps, its input is
    alpha x_0 + sigma eps of the real picture, and from the last row nothing of the picture is left."""
    model, seen = toy(), []
    def record(model, x, times, cond, uncond, guidance, chosen, leak, checkpoint):
        seen.append((x, times))
        assert len(chosen) == min(3, len(times)) and chosen <= set(range(len(times)))
        assert (guidance, leak, checkpoint) == (2., .3, True)
        return x
    monkeypatch.setattr(adt.sampler, "rollout", record)
    Config = partial(adt.Config, path_steps=5, train_steps=3, guidance=2., leak=.3, checkpoint=True)
    real = torch.full((1, 2, 64, 64), 3., dtype=torch.float64)
    cond = model.condition(["a"])
    for _ in range(400):
        adt.simulate(model, real, cond, cond, Config(start="image"))
    counts = torch.bincount(torch.tensor([len(times) for _, times in seen]), minlength=6)[1:]
    assert counts.min() > 50 and counts.max() < 115         # 80 expected, five standard deviations either way
    for x, times in seen[:40]:
        alpha, sigma = model.at(times[:1])
        assert abs(x.mean() - 3 * alpha) < 6 * sigma / 64 / 2 ** .5 + 1e-9
        assert abs(x.std() - sigma) < .05
    seen.clear()
    for _ in range(60):
        adt.simulate(model, real, cond, cond, Config(start="image", starts=2))
    assert {len(times) for _, times in seen} == {4, 5}      # the two noisiest of the path
    seen.clear()
    for _ in range(10):
        adt.simulate(model, real, cond, cond, Config(start="text"))
    assert all(len(times) == 5 and abs(x.mean()) < .08 for x, times in seen)


def test_lambda_zero_is_plain_diffusion_training(world):
    model, critic, batch = world
    terms, fake, _ = adt.generator_loss(model, None, critic, batch, adt.Config(lambda_adv=0.))
    assert set(terms) == {"diff"} and fake is None


def test_dropped_captions_are_empty_ones(world):
    model, critic, batch = world
    def loss(captions, share):
        torch.manual_seed(0)
        asked = data.Batch(batch.image, captions, batch.truth, batch.named)
        config = adt.Config(lambda_adv=0., drop_caption=share)
        with torch.no_grad():
            return adt.generator_loss(model, None, critic, asked, config)[0]["diff"].item()
    empty = loss([""] * 4, 0.)
    assert loss(batch.caption, 1.) == empty != loss(batch.caption, 0.)


def test_the_real_picture_may_wear_the_decoders_traces(world):
    """decode(encode(x_0)) in place of x_0, in both halves, as data."""
    model, critic, batch = world
    model = deepcopy(model)
    plain = model.decode
    model.decode = lambda z: plain(z) * (.5 if fades else 2.)
    for real, fades in itertools.product(("photo", "decoded"), (True, False)):          # or oversteps
        asked, shown = data.Batch(batch.image, batch.caption, batch.truth, batch.named), Recorder(0., 0., 0.)
        config = replace(EXACT, real=real)
        _, fake, known = adt.generator_loss(model, None, shown, asked, config)
        adt.discriminator_loss(shown, asked, fake, known, config)
        meant = (batch.image * (1. if real == "photo" else .5 if fades else 2.)).clamp(-1, 1)
        for first, _ in shown.pairs:
            torch.testing.assert_close(first, meant, atol=1e-5, rtol=0)
            assert not first.requires_grad


class Recorder(torch.nn.Module):
    """A critic that remembers what it was shown and answers with given logits."""

    def __init__(self, *answers):
        super().__init__()
        self.answers, self.pairs = list(answers), []

    def forward(self, real, other, text):
        self.pairs.append((real, other))
        return [torch.full((len(real), 1), self.answers.pop(0)) + 0 * other.mean()]


@pytest.mark.equation("ADT L_D")
@pytest.mark.parametrize("real,made,loss", [(1., -1., 0.), (0., -1., 1.), (1., 3., 4.), (-2., .5, 4.5)])
def test_discriminator_loss_is_the_hinge_of_the_right_pairs(world, real, made, loss):
    batch, fake = world[2], torch.zeros_like(world[2].image)
    critic = Recorder(real, made)
    found, _, _ = adt.discriminator_loss(critic, batch, fake, None, EXACT)
    assert found["D"].item() == pytest.approx(loss)
    for shown, meant in zip(critic.pairs, ((batch.image, batch.image), (batch.image, fake))):
        torch.testing.assert_close(shown, meant)


@pytest.mark.equation("ADT L_G")
def test_generator_loss_is_the_weighted_sum_with_the_right_signs(world):
    model, _, batch = world
    found = []
    for weight in (.5, 2.):
        torch.manual_seed(4)
        config = adt.Config(lambda_adv=weight, lambda_diff=3 * weight, path_steps=2)
        found.append(adt.generator_loss(model, None, Recorder(7.), batch, config)[0])
    assert [terms["adv"].item() for terms in found] == pytest.approx([-3.5, -14.])
    assert found[1]["diff"].item() == pytest.approx(4 * found[0]["diff"].item(), rel=1e-3)


def test_noise_is_on_both_pictures_of_a_pair_and_its_own_on_each():
    flat = torch.zeros(64, 3, 32, 32)
    one, two = adt.pair(flat, flat, adt.Config(augment=0., instance_noise=.1))
    for seen, strength in ((one, .1), (two, .1), (one - two, .1 * 2 ** .5)):
        assert seen.std().item() == pytest.approx(strength, rel=.02)


@pytest.mark.parametrize("geometry", ["shared", "apart"])
def test_pairs_differ_in_colour_and_share_their_geometry_if_told(geometry):
    image = torch.full((32, 3, 32, 32), -1.)
    image[:, :, 12:20, 12:20] = 1.
    one, two = adt.pair(image, image, adt.Config(geometry=geometry))
    def silhouette(x):
        return x.mean(1) > x.mean(1).amin((1, 2))[:, None, None] + .5
    same = (silhouette(one) == silhouette(two)).flatten(1).all(1).float().mean()
    assert same > .9 if geometry == "shared" else same < .5
    assert (one - two).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("n", [1, 3])
def test_batches_of_any_size_work(world, n):
    model, critic, batch = world
    small = data.Batch(batch.image[:n], batch.caption[:n], batch.truth[:n], batch.named[:n])
    terms, fake, known = adt.generator_loss(model, None, critic, small, adt.Config(path_steps=2, guidance=2.))
    found, _, _ = adt.discriminator_loss(critic, small, fake, known, adt.Config())
    assert all(v.isfinite() for v in (*terms.values(), *found.values()))


def test_everybody_hears_the_caption_of_their_own_picture(world, monkeypatch):
    """The network, off and on its path, and the discriminator: row by row."""
    model, _, batch = world
    heard, told = overheard(monkeypatch, model), []
    class Listener(Recorder):
        def forward(self, real, other, text):
            told.append(text)
            return super().forward(real, other, text)
    config, said = adt.Config(path_steps=3, drop_caption=0.), model.condition(batch.caption)["pooled"]
    _, _, known = adt.generator_loss(model, None, Listener(0.), batch, config)
    assert len(heard) == 4 and len(told) == 1
    for rows in (*heard, *told, known):
        torch.testing.assert_close(rows, said)


def test_the_discriminator_is_shown_pictures_in_range(world, monkeypatch):
    model, _, batch = world
    decode, shown = model.decode, Recorder(0.)
    monkeypatch.setattr(model, "decode", lambda z: 5 * decode(z))
    _, fake, _ = adt.generator_loss(model, None, shown, batch, EXACT)
    assert fake.abs().max() <= 1
    torch.testing.assert_close(shown.pairs[0][1], fake)
