"""What plain diffusers needs to sample a trained model as training did: a scheduler and a model card.

The pipeline's own scheduler takes another path than sampler.py (PNDM of Stable Diffusion 1.5 is of higher
order and has another spacing), so the path that was trained is saved instead:
    stochasticity 0   DDIM on trailing timesteps, or Euler for a flow model
    stochasticity 1   the few-step path of a distilled student: predict x0, add new noise, repeat
Read next: sampler.py"""

import json
from pathlib import Path

import torch

import sampler
from models.pipelines import required_options
from utils.checkpoint import atomic_write

KOHYA_FILE = "lora_for_comfyui.safetensors"  # also for AUTOMATIC1111's and Forge's web UIs
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # our names and diffusers'


def is_few_step(sampling_configs):
    """Whether every step of the path draws new noise. ValueError for what no diffusers scheduler does."""
    values = {settings.get("stochasticity", 0) for _, settings in sampling_configs}
    if not (values <= {0} or values == {1}):
        found = ", ".join(f"{value:g}" for value in sorted(values))
        raise ValueError(f"no scheduler of diffusers samples with stochasticity {found}: wanted 0 or 1, the "
                         "same for all numbers of steps")
    return values == {1}


def make_scheduler(model, few_step):
    """The diffusers scheduler of the path that was trained; it reproduces sampler.rollout. few_step: see
    `is_few_step`. model: a LatentDenoiser."""
    import diffusers
    config = model.scheduler_config
    if model.prediction_type == "flow":
        # with dynamic shifting the tables, and so the trained path, are not shifted
        shift = 1. if config.get("use_dynamic_shifting") else config.get("shift", 1.)
        cls = diffusers.FlowMatchLCMScheduler if few_step else diffusers.FlowMatchEulerDiscreteScheduler
        return cls(num_train_timesteps=model.T, shift=shift)
    # steps_offset is for "leading" spacing; StableDiffusionPipeline warns if it is not 1
    common = dict(num_train_timesteps=model.T, prediction_type=PREDICTION_TYPES[model.prediction_type],
                  timestep_spacing="trailing", steps_offset=1)
    if few_step:
        # LCM takes its timesteps from original_inference_steps equally spaced ones: all T here
        return with_noise_schedule(model, diffusers.LCMScheduler, original_inference_steps=model.T, **common)
    # DPM-Solver of order 1 is DDIM. The class DDIMScheduler is exact only if the number of steps divides T:
    # it takes T // num_steps for the distance to the next timestep.
    return with_noise_schedule(model, diffusers.DPMSolverMultistepScheduler, solver_order=1,
                               final_sigmas_type="zero", **common)


def with_noise_schedule(model, scheduler_cls, **settings):
    """A scheduler with the betas of model.scheduler_config; where the class does not know that schedule, or
    computes another one from it, with the betas that follow from the model's table."""
    config, alphas_cumprod = model.scheduler_config, model.alpha.double().cpu() ** 2
    names = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
    schedule = {name: config[name] for name in names if config.get(name) is not None}
    rescale = bool(config.get("rescale_betas_zero_snr")) and bool(model.alpha[-1] < 1e-3)
    try:
        scheduler = scheduler_cls(**schedule, rescale_betas_zero_snr=rescale, **settings)
        if torch.allclose(scheduler.alphas_cumprod.double(), alphas_cumprod, rtol=1e-4, atol=1e-6):
            return scheduler
    except NotImplementedError:
        pass
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    # some classes divide by the last alpha: not quite 0, which is the value that diffusers takes itself
    betas = 1 - (alphas_cumprod / previous).clamp(min=2 ** -24)
    return scheduler_cls(trained_betas=betas.tolist(), **settings)


def save_kohya_lora(peft_state, path):
    """LoRA adapters of a U-Net in the format of ComfyUI and the web UIs. peft_state: peft's names -> tensors.
    SD 3's need no other format: these programs read diffusers' file."""
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file
    state = convert_state_dict_to_kohya({f"unet.{name}": value for name, value in peft_state.items()})
    with atomic_write(path) as tmp_path:
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path)


def path_argument(model, scheduler, num_steps, settings):
    """The argument of a pipeline's call that makes `scheduler` visit the timesteps of the trained path."""
    timesteps = sampler.make_timesteps(model.T, num_steps, settings.get("timestep_shift", 1.),
                                       settings.get("t_max", 1.))
    if model.prediction_type == "flow":
        # diffusers shifts these; its own spacing would shift its smallest sigma twice
        sigmas = [f"{sigma:g}" for sigma in ((timesteps + 1).double() / model.T).tolist()]
        return f"sigmas=[{', '.join(sigmas)}]"
    scheduler.set_timesteps(num_steps)
    if scheduler.timesteps.tolist() == timesteps.tolist():
        return f"num_inference_steps={num_steps}"
    return f"timesteps={timesteps.tolist()}"


def usage_code(model, run_dir, scheduler, sampling_configs):
    """Python that opens the result in run_dir with diffusers and samples it, to be run there -> lines."""
    size = f"height={model.resolution}, width={model.resolution}"
    source, folder = "pipeline", run_dir / "pipeline"
    if model.lora_rank:
        source = folder = model.pretrained_path
        if Path(source).exists():
            source = str(Path(source).resolve())
    loader = "from_single_file" if Path(folder).is_file() else "from_pretrained"
    options = {} if Path(folder).is_file() else required_options(model.pipeline_cls, folder)
    arguments = ", ".join([repr(source), *(f"{name}={value!r}" for name, value in options.items())])
    lines = ["import diffusers", "",
             f"pipe = diffusers.{model.pipeline_cls.__name__}.{loader}({arguments})"]
    if model.lora_rank and model.vae_path:
        lines += [f"pipe.vae = diffusers.AutoencoderKL.from_pretrained({model.vae_path!r})"]
    if model.lora_rank:
        lines += ['pipe.load_lora_weights(".")',
                  f'pipe.scheduler = diffusers.{type(scheduler).__name__}.from_pretrained("scheduler")']
    lines += ['prompt = "a red fox in the snow"']
    for num_steps, settings in sampling_configs:
        path = path_argument(model, scheduler, num_steps, settings)
        scale = settings.get("guidance_scale", 1.)
        lines += [f"image = pipe(prompt, {path}, guidance_scale={scale:g}, {size}).images[0]"]
    return lines


def model_card(model, run_dir, scheduler, sampling_configs, metadata):
    """README.md of a run folder, Markdown with the header of a model card, to be written after the weights.
    metadata: JSON values."""
    header = ["library_name: diffusers", "pipeline_tag: text-to-image"]
    if not Path(model.pretrained_path).exists():
        header += [f"base_model: {model.pretrained_path}"]  # a hub id
    trained = f"all weights of the {model.component_name}"
    if model.lora_rank:
        header += ["tags: [lora]"]
        trained = f"LoRA adapters of rank {model.lora_rank}"
    size = f"{model.resolution} x {model.resolution} pixels"
    sizes = "Scheduler, steps, guidance scale, height and width are those of the training; "
    if "buckets" in metadata:
        size = f"about {size}, in the shapes (width x height) of `buckets` below"
        sizes = "Scheduler, steps, guidance scale are those of the training, height and width of a bucket; "
    lines = ["---", *header, "---", "", f"# Fine-tuned {model.pipeline_cls.__name__}", "",
             f"Trained from {model.pretrained_path!r}: {trained}, on images of {size}. In this folder "
             "it is opened and sampled like this:", "",
             "```python", *usage_code(model, run_dir, scheduler, sampling_configs), "```", "",
             f"{sizes}the model was trained for no others.", ""]
    lines += [f"- {name}: `{json.dumps(value)}`" for name, value in metadata.items()]
    return "\n".join(lines).rstrip() + "\n"
