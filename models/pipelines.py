"""Reading pretrained diffusers pipelines: a folder, or a hub id.

Used by models/stable_diffusion.py, which takes the pipeline apart."""

import json
import math
from pathlib import Path

LATENT_MULTIPLE = 8                    # the sides of latents must be multiples of this
UNUSED_COMPONENTS = ("safety_checker", "feature_extractor")            # of Stable Diffusion 1.5


def read_model_index(source):
    """model_index.json of a diffusers folder as a dict; {} for a hub id. ValueError if it is damaged."""
    path = Path(source) / "model_index.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged: copy the folder again") from None


def read_config(source, component_name):
    """config.json of a component of a diffusers folder as a dict; {} if there is none that can be read."""
    try:
        return dict(json.loads(Path(source, component_name, "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def count_network_params(source, component_name):
    """The number of weights of the U-Net or transformer in a diffusers folder or a .safetensors file, without
    SD3's table of positions, which is no weight. Only the headers of the files are read; 0 if there are none
    that can be read."""
    from safetensors import SafetensorError, safe_open
    is_file = Path(source).is_file()
    paths = [Path(source)] if is_file else Path(source, component_name).glob("*.safetensors")
    sizes = {}                                                         # a name may be in two variants' files
    try:
        for path in paths:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118, not a dict
                    is_part = not is_file or name.startswith("model.diffusion_model.")
                    if is_part and not name.endswith("pos_embed"):
                        sizes[name] = math.prod(file.get_slice(name).get_shape())
    except (OSError, SafetensorError):                                 # the loader explains it
        return 0
    return sum(sizes.values())


def required_options(pipeline_cls, source):
    """The arguments that from_pretrained needs for this folder: the variant if it has half precision files
    only, and None for components that it leaves out (SD3's T5) or that are missing and not needed. {} for a
    hub id."""
    options = {}
    component_dirs = {path.parent for path in Path(source).glob("*/*.safetensors")}
    if any(all(".fp16." in path.name for path in component_dir.glob("*.safetensors"))
           for component_dir in component_dirs):
        options["variant"] = "fp16"
    for name, value in read_model_index(source).items():
        is_optional = name in pipeline_cls._optional_components
        left_out = value == [None, None] and not is_optional           # an optional one needs no argument
        missing = name in UNUSED_COMPONENTS and value != [None, None] and not (Path(source) / name).is_dir()
        if left_out or missing:
            options[name] = None
    return options


def load_pipeline(pipeline_cls, source, scheduler=None):
    """A diffusers pipeline from a folder, a single .safetensors file or the hub, in fp32. scheduler: in place
    of the pipeline's own.

    Stable Diffusion 1.5 is loaded without its safety checker."""
    if Path(source).is_file():
        pipe = pipeline_cls.from_single_file(str(source))
        if scheduler is not None:
            pipe.register_modules(scheduler=scheduler)
        return pipe
    options = required_options(pipeline_cls, source)
    if pipeline_cls.__name__ == "StableDiffusionPipeline":
        options |= dict.fromkeys(UNUSED_COMPONENTS) | {"requires_safety_checker": False}
    if scheduler is not None:
        options["scheduler"] = scheduler
    return pipeline_cls.from_pretrained(source, use_safetensors=True, **options)


def load_vae(source):
    """Another VAE from a folder or hub id, in fp32. OSError with one sentence."""
    from diffusers import AutoencoderKL
    try:
        return AutoencoderKL.from_pretrained(source, use_safetensors=True)
    except Exception as error:
        raise OSError(f"--vae {source}: wanted a folder or hub id of an AutoencoderKL, could not load it "
                      f"({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})") from None


def silence_libraries():
    """No warnings of transformers (it misses torchvision, which nothing here needs) and no progress bars for
    reading files. Bars of downloads stay: transformers would switch them off with its own."""
    import diffusers
    import huggingface_hub
    import transformers
    transformers.logging.set_verbosity_error()
    downloads_silent = huggingface_hub.utils.are_progress_bars_disabled()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    if not downloads_silent:
        huggingface_hub.utils.enable_progress_bars()


def checkpoint_resolution(network_config, vae_config):
    """The resolution that a checkpoint was trained at, from the configs of its network and VAE; None if they
    do not tell. The smaller side if it is not square, rounded down to what the network can take."""
    sample_size = network_config.get("sample_size")
    block_out_channels = vae_config.get("block_out_channels")
    sides = sample_size if isinstance(sample_size, (list, tuple)) else [sample_size]
    if not sides or not all(isinstance(side, int) for side in sides) or not block_out_channels:
        return None
    latent_side = min(sides) // LATENT_MULTIPLE * LATENT_MULTIPLE
    return latent_side * 2 ** (len(block_out_channels) - 1) or None
