"""Loading Stable Diffusion: which checkpoints there are, from a folder, a file, the hub or a run of train.py.

Read next: models/loading.py"""

from pathlib import Path

from models import hub, pipelines
from models.stable_diffusion import SD3, SD15, SDXL
from utils.broadcasting import build_on_rank0
from utils.checkpoint import load_run_config

# --model: the Denoiser, the pipeline's class in diffusers, the default hub id, that model's resolution. With
# --pretrained a name loads every checkpoint of that class: sd15 also SD 2.x and SD-Turbo, sdxl SDXL-Turbo.
MODEL_FAMILIES = {
    "sd15": (SD15, "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512),
    "sdxl": (SDXL, "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0", 1024),
    "sd3": (SD3, "StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3-medium-diffusers", 1024),
    "sd35": (SD3, "StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3.5-medium", 1024),
    "sd35-large": (SD3, "StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3.5-large", 1024)}
# classifier-free guidance with which each is usually sampled; checkpoints with such a name need none
GUIDANCE_SCALES = {"sd15": 7.5, "sdxl": 5., "sd3": 7., "sd35": 4.5, "sd35-large": 4.5}
FEW_STEP_NAMES = ("turbo", "lightning", "lcm", "hyper")
SAMPLING_SETTINGS = ("guidance_scale", "timestep_shift", "t_max", "stochasticity")


def check_sampling_configs(configs, path):
    """[(num_steps, settings)] as stored in the file `path`, [] where it stores none. ValueError if they are
    malformed."""
    try:
        for num_steps, settings in configs or []:
            numbers = all(isinstance(value, (int, float)) for value in settings.values())
            if not isinstance(num_steps, int) or not numbers or settings.keys() - set(SAMPLING_SETTINGS):
                raise TypeError
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"{path}: its sampling_configs are not [[steps, {{setting: number}}], …] with "
                         f"settings of {', '.join(SAMPLING_SETTINGS)}") from None
    return configs or []


def is_run_dir(source):
    """Whether a folder is a run of train.py; a diffusers folder has a model_index.json."""
    return (Path(source) / "config.json").is_file() and not (Path(source) / "model_index.json").is_file()


def local_weights(source):
    """The diffusers folder or file on this machine that --pretrained or a run folder stands for, or None if
    the weights come from the hub."""
    if source is None or not Path(source).exists():
        return None
    if not is_run_dir(source):
        return source
    if Path(source, "pipeline").is_dir():
        return Path(source, "pipeline")
    run_config = load_run_config(Path(source, "config.json"))          # LoRA: on the weights it started from
    is_circular = Path(run_config["pretrained"] or ".").resolve() == Path(source).resolve()
    return None if is_circular else local_weights(run_config["pretrained"])


def is_hub_id(source):
    """Whether a name has the form of a hub id, OWNER/NAME, and not of a path."""
    return source.count("/") == 1 and source[0] not in "./~"


def check_source(source, model_name, class_name):
    """ValueError or OSError unless `source` is a folder, file or hub repository of this pipeline class."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"--pretrained {source}: wanted a .safetensors file, a folder or a hub id")
        return
    is_folder = (path / "model_index.json").is_file()
    if path.exists() and not is_folder:
        raise ValueError(f"--pretrained {source}: wanted a diffusers folder, found no model_index.json in it")
    if not is_folder and not is_hub_id(source):
        raise FileNotFoundError(f"--pretrained {source}: no such folder, and no hub id either (OWNER/NAME)")
    index = pipelines.read_model_index(source) if is_folder else hub.remote_model_index(source)
    if index.get("_class_name") != class_name:
        raise ValueError(f"--pretrained {source} holds a {index.get('_class_name')}: --model {model_name} "
                         f"wants a {class_name}")


def load_denoiser(model_name, pretrained=None, resolution=None, vae_path=None, max_resolution=None):
    """-> the Denoiser of a family. ValueError or OSError with one sentence if that is not possible.

    model_name: a key of MODEL_FAMILIES. pretrained: a diffusers folder, a .safetensors file, a run folder or
    a hub id (default: the family's). resolution: side of the images in pixels (default: that of the run, else
    the checkpoint's own, but at most max_resolution). vae_path: folder or hub id of another VAE.
    Of several processes only the first one reads the weights."""
    denoiser_cls, class_name, default_hub_id, family_resolution = MODEL_FAMILIES[model_name]
    source = str(pretrained or default_hub_id)
    if is_run_dir(source):
        return load_run(model_name, Path(source), resolution, vae_path)
    check_source(source, model_name, class_name)
    pipelines.silence_libraries()
    import diffusers
    try:
        pipe = build_on_rank0(lambda: pipelines.load_pipeline(getattr(diffusers, class_name), source))
    except Exception as error:  # hub, disk, JSON and safetensors: each raises its own kind
        hint = "complete it, copy it again, or convert its .bin files to .safetensors"
        if not Path(source).exists():
            hint = "check the network and the space on the disk, or name a local folder with --pretrained"
        elif Path(source).is_file():
            hint = f"wanted a complete checkpoint of a {class_name}; its configuration comes from the hub"
        raise OSError(f"cannot load {source} ({hub.reason_of(error)}); {hint}") from None
    if vae_path:
        pipe.register_modules(vae=build_on_rank0(lambda: pipelines.load_vae(vae_path)))
    network_config = getattr(pipe, denoiser_cls.component_name).config
    if network_config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError(f"{source} takes {network_config.in_channels} channels, its VAE has "
                         f"{pipe.vae.config.latent_channels}: wanted a text-to-image model, not one for "
                         "inpainting or editing")
    if resolution is None:
        resolution = pipelines.checkpoint_resolution(network_config, pipe.vae.config) or family_resolution
        resolution = min(resolution, max_resolution or resolution)
    denoiser = denoiser_cls(pipe, resolution, source, vae_path)
    denoiser.guidance_scale = usual_guidance_scale(model_name, source, pipe.scheduler)
    return denoiser


def usual_guidance_scale(model_name, source, scheduler):
    """What a checkpoint is usually sampled with: 1 for a few-step model, known by its name or scheduler."""
    name = Path(source).name.lower()
    if any(part in name for part in FEW_STEP_NAMES) or "LCM" in type(scheduler).__name__:
        return 1.
    return GUIDANCE_SCALES[model_name]


def load_run(model_name, run_dir, resolution, vae_path=None):
    """The result of a run of train.py: its pipeline, or its LoRA on the model that it started from."""
    run_config = load_run_config(run_dir / "config.json")
    if run_config["model"] != model_name:
        raise ValueError(f"{run_dir} is a run of {run_config['model']}, not of --model {model_name}")
    if resolution is None:
        resolution = run_config["resolution"]
    configs = check_sampling_configs(run_config["sampling_configs"], run_dir / "config.json")
    if (run_dir / "pipeline").is_dir():
        denoiser = load_denoiser(model_name, run_dir / "pipeline", resolution, vae_path)
    else:
        denoiser = load_lora_run(model_name, run_dir, run_config, resolution, vae_path)
    if configs:                                                        # what it was trained for
        denoiser.guidance_scale = configs[-1][1].get("guidance_scale", 1.)
    return denoiser


def load_lora_run(model_name, run_dir, run_config, resolution, vae_path):
    """The LoRA of a run on the model that it started from."""
    lora_path = run_dir / "pytorch_lora_weights.safetensors"
    is_circular = Path(run_config["pretrained"] or ".").resolve() == run_dir.resolve()
    if not run_config["lora_rank"] or is_circular or not lora_path.is_file():
        raise FileNotFoundError(f"{run_dir} has no result yet: train.py --resume finishes the run")
    denoiser = load_denoiser(model_name, run_config["pretrained"], resolution, vae_path or run_config["vae"])
    denoiser.add_lora(run_config["lora_rank"], run_config["lora_targets"])
    denoiser.load_lora(lora_path)
    return denoiser
