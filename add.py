"""ADD, Adversarial Diffusion Distillation (Sauer et al. 2023, arXiv 2311.17042): 1 to 4 sampling steps.

A student starts as a copy of the diffusion model. From a noised real image x_s, at one of a few timesteps of
which the last is pure noise, it predicts the clean image x0_hat in one call. A projected discriminator rates
x0_hat. The frozen teacher denoises x0_hat after it was noised again: that is the target of the distillation
loss (score distillation).

    L = L_adv(x0_hat) + lambda E_{t,eps'} c(t) || x0_hat - x0_psi(sg[alpha_t x0_hat + sigma_t eps'], t) ||^2

The same names as in adt.py: Config, RECIPES, generator_loss, discriminator_loss. Read next: train.py
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

import discriminator
import losses
import sampler
from discriminator import DiscriminatorInputs, augment_alike
from utils import config as settings

# At t = T a flow model has alpha = 0 and predicts the mean image of the caption; a student that starts there
# ignores its noise for hundreds of steps. Stable Diffusion has alpha / sigma = .068 at T, so the tiny model
# is given the time at which a flow has that: (1 - u) / u = .068.
T_MAX_FLOW = 0.936
NEGATIVE_PROMPT = "blurry, low quality, distorted"  # of nfsd with large models


@dataclass(kw_only=True)
class Config(settings.DiscriminatorConfig, settings.TrainConfig):
    """Settings of ADD. Provenance: paper, secondary (public code and summaries), ours."""

    has_teacher = True
    needs_images = True                # beside their latents, for the discriminator
    # the first ones to change
    lambda_distill: Annotated[float, "paper: weight of the distillation loss"] = 2.5
    lambda_adv: Annotated[float, "paper: weight of the adversarial loss; 0 = distillation only"] = 1.0
    student_steps: Annotated[int, "paper: n, number of student timesteps; the noisiest is pure noise"] = 4
    r1_gamma: Annotated[float, "paper: weight of R1 on the heads' inputs"] = 1e-5
    relativistic: Annotated[bool, "paper: false, a hinge of each image; true (ours): of D(real) - "
                            "D(fake)"] = False
    # student
    t_max: Annotated[float, "ours: timestep, alpha and sigma at pure noise, fraction of T"] = T_MAX_FLOW
    pure_noise_prob: Annotated[float, "paper: fraction of the batch at pure noise; 0 = 1/n"] = 0.0
    backward_simulation_prob: Annotated[float, "paper: 0, all other inputs are noised real images; above 0 "
                                        "(ours, as DMD2): this fraction are noised student samples"] = 0.0
    # teacher
    distill_weighting: Annotated[Literal["exponential", "sds", "nfsd"],
                                 "paper: c(t); exponential in the ablations, nfsd in the released models"
                                 ] = "exponential"
    distill_loss: Annotated[Literal["l2", "l1", "huber"], "paper: distance to the teacher's target"] = "l2"
    distill_space: Annotated[Literal["pixel", "latent"], "paper: where that distance is taken"] = "pixel"
    teacher_steps: Annotated[int, "paper: sampler steps of the teacher's prediction"] = 1
    teacher_guidance_scale: Annotated[float, "ours: classifier-free guidance of the teacher"] = 1.0
    # discriminator
    disc_conditioning: Annotated[Literal["text+image", "text", "image", "none"],
                                 "paper: what D is conditioned on"] = "text+image"

    def __post_init__(self):
        settings.check_shared(self)
        settings.require_positive(self, "student_steps", "teacher_steps")
        settings.require_fraction(self, "pure_noise_prob", "backward_simulation_prob")
        is_plain_teacher = self.teacher_steps == 1 and self.teacher_guidance_scale == 1
        if self.distill_weighting == "nfsd" and not is_plain_teacher:
            raise ValueError("distill_weighting=nfsd calls the teacher once and has its own guidance: leave "
                             "teacher_steps and teacher_guidance_scale at 1")
        if self.lambda_adv == self.lambda_distill == 0:
            raise ValueError("lambda_adv and lambda_distill are both 0: there is no loss left")

    def timesteps(self, T):
        """The student's timesteps tau_n, ..., tau_1 -> (student_steps,), decreasing."""
        return sampler.make_timesteps(T, self.student_steps, t_max=self.t_max)

    def eval_sampling_configs(self, base_guidance_scale=1.0):
        """What is measured after training: (before or after, number of steps, sampling settings). The teacher
        samples deterministically with its usual guidance scale; the student predicts x0, without guidance,
        and noises it to the next timestep."""
        student_steps = [n for n in sorted({1, 2, 4, self.student_steps}) if self.student_steps % n == 0]
        return ([("before", n, {"guidance_scale": base_guidance_scale}) for n in (1, 4, 25)]
                + [("after", n, {"stochasticity": 1.0, "t_max": self.t_max}) for n in student_steps])

    def check_model(self, model, is_sharded):
        """ValueError if the model cannot be trained with these settings."""
        if is_sharded:
            settings.check_sharded(self)
        for _, num_steps, sampling in self.eval_sampling_configs():
            sampler.make_timesteps(model.T, num_steps, t_max=sampling.get("t_max", 1.))
        self.timesteps(model.T)
        if model.is_large and self.t_max != 1 and model.prediction_type != "flow":
            raise ValueError(f"t_max={self.t_max:g}: wanted 1 for Stable Diffusion 1.x, 2.x and XL, since "
                             "diffusers' LCMScheduler, which samples their students, knows no other; SD 3 "
                             "and 3.5 may have less")
        if model.is_large and self.distill_weighting == "nfsd" and self.distill_space == "pixel":
            raise ValueError("distill_weighting=nfsd wants distill_space=latent for Stable Diffusion: its "
                             "target is no latent of an image, so the VAE decodes nothing sensible from it")
        if is_sharded and self.backward_simulation_prob:
            raise ValueError("--fsdp wants backward_simulation_prob=0: all processes must call the network "
                             "equally often")

    def warnings(self, model):
        """Sentences to print before a large model is trained."""
        if self.t_max == 1 and model.prediction_type == "flow":
            return ["with t_max=1 the student's first prediction from pure noise is the mean image of its "
                    "caption, since alpha is 0 there; if one-step samples stay alike, take --set t_max=.936"]
        return []

    def extra_prompts(self, model):
        """Prompts that training needs besides the captions."""
        needs_negative = model.is_large and self.distill_weighting == "nfsd"
        return ["", NEGATIVE_PROMPT] if needs_negative else [""]

    def build_discriminator(self, backbone, text_dim):
        """backbone: FrozenBackbone; text_dim: length of the captions' pooled embeddings."""
        cond_dims = {"text": text_dim, "image": backbone.embed_dim, "none": 0}
        cond_dim = sum(cond_dims[name] for name in self.disc_conditioning.split("+"))
        return discriminator.ProjectedDiscriminator(backbone, cond_dim)


# The default is "paper": the settings above. "tuned": the hinge is taken of D(real) - D(fake); half of the
# batch starts at pure noise, as sampling does, and half of the rest from the student's own samples (backward
# simulation); the backbone's features are whitened. Gains: docs/results.md.
RECIPES = {"paper": {}, "tuned": {
    "relativistic": True, "pure_noise_prob": .5, "backward_simulation_prob": .5, "whiten_features": True}}

# Presets of large models, {setting: (value, source)}; "sd15 lora" and "sd15 full" are added to "sd15".
# The paper states no rates and no length. The batch of a step is batch_size times
# gradient_accumulation_steps; several processes divide it (utils/config.py, divide_batch).
LARGE = {
    "t_max": (1., "paper"), "augment_strength": (1., "secondary"),
    "lr_schedule": ("constant", "secondary"),
    "batch_size": (4, "ours"), "gradient_accumulation_steps": (32, "ours"), "lr_d": (1e-4, "ours"),
    "ema_decay": (.999, "ours")}
LORA = {"lr": (5e-5, "ours")}
FULL = {"lr": (5e-7, "secondary")}
PRESETS = {"sd15": LARGE, "sd15 lora": {"lr": (1e-4, "ours")}, "sd15 full": {"lr": (1e-6, "secondary")},
           "sdxl": LARGE, "sdxl lora": LORA, "sdxl full": FULL,
           "sd3": LARGE, "sd3 lora": LORA, "sd3 full": FULL,
           "sd35": LARGE, "sd35 lora": LORA, "sd35 full": FULL,
           "sd35-large": LARGE, "sd35-large lora": LORA, "sd35-large full": FULL}


def student_prediction(model, x0, cond, config):
    """The student's prediction at a random student timestep -> x0_hat (B, C, h, w) with its graph;
    hide_image (B,), True where x_s holds nothing of the real x0: at pure noise, with backward simulation."""
    timesteps = config.timesteps(model.T).to(x0.device)                # tau_n, ..., tau_1
    n = len(timesteps)
    p_pure_noise = config.pure_noise_prob or 1 / n
    step_probs = torch.tensor([p_pure_noise] + (n - 1) * [(1 - p_pure_noise) / max(n - 1, 1)])
    step_index = torch.multinomial(step_probs, len(x0), replacement=True).to(x0.device)
    t_student = timesteps[step_index]
    is_pure_noise = step_index == 0
    eps = torch.randn_like(x0)
    is_simulated = ~is_pure_noise & (torch.rand(len(x0), device=x0.device) < config.backward_simulation_prob)
    if is_simulated.any():
        x0 = simulate_backward(model, x0, cond, timesteps, step_index, is_simulated.nonzero().flatten())
    # zero terminal SNR: at tau_n the input is eps, whatever alpha_T the schedule has
    x_s = torch.where(is_pure_noise.view(-1, 1, 1, 1), eps, model.add_noise(x0, t_student, eps))
    with model.precision_for(t_student):
        y = model.predict(x_s, t_student, cond)
    x0_hat = model.to_x0_eps(x_s, y, t_student)[0]
    return x0_hat, is_pure_noise | is_simulated


@torch.no_grad()
def simulate_backward(model, x0, cond, timesteps, step_index, rows):
    """x0 (B, C, h, w) with the student's own prediction at the timestep before step_index (B,) in these rows,
    as in few-step sampling (DMD2's backward simulation)."""
    x0_by_step = []
    sampler.rollout(model, torch.randn_like(x0[rows]), timesteps[:-1], {k: v[rows] for k, v in cond.items()},
                    stochasticity=1., callback=lambda i, x0_hat: x0_by_step.append(x0_hat))
    own_x0 = torch.stack(x0_by_step)[step_index[rows] - 1, torch.arange(len(rows), device=rows.device)]
    return x0.index_copy(0, rows, own_x0)


@torch.no_grad()
def distillation_target(teacher, x0_hat, cond, config):
    """Noise the student's prediction and let the teacher denoise it -> target (B, C, h, w), c(t) (B,)."""
    t_limit = teacher.T - 1 if config.distill_weighting == "nfsd" else teacher.T  # nfsd divides by alpha_t
    t = torch.randint(t_limit, (len(x0_hat),), device=x0_hat.device)
    eps = torch.randn_like(x0_hat)
    x_t = teacher.add_noise(x0_hat, t, eps)                            # ADD eq. 4: of x0_hat, not of x0
    uncond = teacher.encode_prompts([""])
    alpha, sigma = teacher.alpha_sigma(t)
    weight = losses.distillation_weight(config.distill_weighting, alpha, sigma).flatten()
    if config.distill_weighting == "nfsd":
        return nfsd_teacher_target(teacher, x0_hat, x_t, t, cond, uncond, config), weight
    n = config.teacher_steps
    timesteps = torch.stack([t * (n - i) // n for i in range(n)])      # (n, B): evenly spaced from t down
    target = sampler.rollout(teacher, x_t, timesteps, cond, uncond, config.teacher_guidance_scale)
    return target, weight


def nfsd_teacher_target(teacher, x0_hat, x_t, t, cond, uncond, config):
    """losses.nfsd_target from the teacher's eps for the empty, the real and the negative caption. Tiny models
    do not know the words of the negative caption and get the empty one: delta_D = 0 for t >= T / 5."""
    def predict_eps(c):
        c = {**cond, **{k: v.expand_as(cond[k]) for k, v in c.items()}}
        with teacher.precision_for(t):
            return teacher.to_x0_eps(x_t, teacher.predict(x_t, t, c), t)[1]

    alpha, sigma = teacher.alpha_sigma(t)
    eps_uncond = predict_eps(uncond)
    eps_negative = eps_uncond
    if teacher.is_large:
        eps_negative = predict_eps(teacher.encode_prompts([NEGATIVE_PROMPT]))
    is_small_t = (t < teacher.T // 5).view(-1, 1, 1, 1)                # 200 of 1000
    return losses.nfsd_target(x0_hat, alpha, sigma, eps_uncond, predict_eps(cond), eps_negative, is_small_t)


def discriminator_condition(disc, batch, cond, hide_image, config):
    """c = (c_text, c_img), the same for the real and the generated image -> (B, cond_dim) or None.

    c_img is the backbone's embedding of the real image (the paper: DINOv2 ViT-L). Where the student has seen
    nothing of it (hide_image, (B,)), c_img is zero, for both images: otherwise its presence would give the
    answer away."""
    names, cond_parts = config.disc_conditioning.split("+"), []
    if "text" in names:
        cond_parts.append(F.layer_norm(cond["pooled"].float(), cond["pooled"].shape[1:]))
    if "image" in names:
        cond_parts.append(disc.backbone.global_embedding(batch.image) * ~hide_image[:, None])
    return torch.cat(cond_parts, 1) if cond_parts else None


def generator_loss(model, teacher, disc, batch, config):
    """-> {"adv": loss, "distill": loss}, weighted; and DiscriminatorInputs, whose `fake` has its graph."""
    with torch.no_grad():
        x0 = model.encode_batch(batch)
        cond = model.encode_prompts(batch.caption, batch.micro_cond)
    x0_hat, hide_image = student_prediction(model, x0, cond, config)
    image = model.decode(x0_hat)                                       # (B, 3, H, W)
    fake = discriminator.clamp_straight_through(image)
    disc_cond = discriminator_condition(disc, batch, cond, hide_image, config)
    losses_dict = {}
    if config.lambda_adv:
        logits_fake = disc(None, *augment_alike([fake], config), disc_cond)
        losses_dict["adv"] = config.lambda_adv * losses.hinge_generator(logits_fake, "sum")  # ADD eq. 2
    if config.lambda_distill:
        target, weight = distillation_target(teacher, x0_hat.detach(), cond, config)
        pred = x0_hat
        if config.distill_space == "pixel":
            pred = image
            target = teacher.decode(target)
        dist = losses.distillation_distance(config.distill_loss, pred, target)
        losses_dict["distill"] = config.lambda_distill * (weight * dist).mean()  # ADD eq. 4
    return losses_dict, DiscriminatorInputs(batch.image, fake, disc_cond)  # ADD eq. 1: the sum of both


def discriminator_loss(disc, inputs, config):
    """-> {"d": loss, "r1": loss}, logits_real, logits_fake; inputs: DiscriminatorInputs. Both images share
    their conditioning. relativistic: the logits are D(real) - D(fake) and its negative, so both hinges and
    both accuracies are equal; for the generator D(real) is a constant and its loss stays -D(fake)."""
    features = disc.backbone(*augment_alike([inputs.real], config))    # one (B, D, h, w) per layer
    features = [f.detach().requires_grad_() for f in features]         # for R1: the heads' inputs
    logits_real = disc.logits(features, inputs.cond)
    penalty = losses.r1_penalty(logits_real, features) if config.r1_gamma else None
    logits_fake = disc(None, *augment_alike([inputs.fake.detach()], config), inputs.cond)
    if config.relativistic:
        differences = [d_real - d_fake for d_real, d_fake in zip(logits_real, logits_fake)]
        logits_real = differences
        logits_fake = [-d for d in differences]
    hinge = losses.hinge_real(logits_real, "sum") + losses.hinge_fake(logits_fake, "sum")
    losses_dict = {"d": hinge}                                         # ADD eq. 3, the hinge losses
    if config.r1_gamma:
        losses_dict["r1"] = config.r1_gamma * penalty                  # ADD eq. 3, R1
    return losses_dict, logits_real, logits_fake
