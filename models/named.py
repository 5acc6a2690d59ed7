"""Models by the names that a command line uses: a pretrained one, a run folder, a weights file.

Read next: evaluate.py"""

from pathlib import Path
from typing import NamedTuple

from models.denoiser import Denoiser
from models.families import check_sampling_configs
from models.loading import load_model, weights_path
from utils.checkpoint import load_run_config
from utils.hub_data import folder_name, is_built_in


class LoadedModel(NamedTuple):
    """A model and what its files say about it."""
    group: str                                          # its label; runs that differ in the seed share one
    model: Denoiser
    path: str                                           # for messages
    dataset_name: str
    weights_dir: str | None                             # where its evaluation classifier is, if not weights/
    sampling_configs: list | None                       # [(num_steps, settings)] as stored, unchecked


def short_name(dataset_name):
    """The name under which weights/ knows a data set."""
    return dataset_name if is_built_in(dataset_name) else folder_name(dataset_name)


def load_pretrained(name, network_name, dataset_name, resolution=None):
    """The model in weights/DATA/NETWORK.safetensors."""
    path = weights_path(network_name, short_name(dataset_name))
    if not path.is_file():
        raise FileNotFoundError(f"no pretrained '{name}' for the data set '{dataset_name}': wanted {path}")
    model = load_model("tiny", dataset_name, path, resolution)
    return LoadedModel(name, model, str(path), dataset_name, None, model.metadata.get("sampling_configs"))


def load_run(name, dataset_name=None, resolution=None):
    """The model in a run folder or weights file. dataset_name: default, the one that it was trained on."""
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"{name}: wanted a pretrained model's name, a run folder or a weights file, "
                                "found nothing of that name")
    run = load_run_config(path / "config.json") if (path / "config.json").is_file() else {}
    model = load_model(run.get("model", "tiny"), dataset_name, name, resolution)
    dataset_name = dataset_name or run.get("data") or model.metadata.get("data")
    if not isinstance(dataset_name, str):
        raise ValueError(f"{name} does not name the data set that it was trained on: add --data")
    group = str(path)
    if run:
        options = [f"{key}={run[key]}" for key in
                   ("model", "pretrained", "backbone", "resolution", "lora_rank", "world_size")
                   if run[key] not in ("tiny", None, 0, 1)]
        group = " ".join([run["method"], *run["overrides"], f"({run['steps']} steps)", *options])
    configs = model.metadata.get("sampling_configs") or run.get("sampling_configs")
    weights_dir = None if model.is_large else run.get("pretrained")
    return LoadedModel(group, model, str(path), dataset_name, weights_dir, configs)


def base_guidance_scale(base, runs):
    """The guidance scale of a large base model: that of the runs [LoadedModel] which it is compared with, if
    they have one in common, else what it is usually sampled with. Few-step students are not asked: they have
    none."""
    scales = {settings.get("guidance_scale", 1.) for run in runs
              for _, settings in check_sampling_configs(run.sampling_configs, run.path)
              if not settings.get("stochasticity")}
    return scales.pop() if len(scales) == 1 else base.guidance_scale


def load_named_models(names, pretrained_names, dataset_name=None, model_name="tiny", pretrained=None,
                      resolution=None):
    """Models of one data set -> [LoadedModel], in the order of `names`, each once.

    names: keys of pretrained_names, run folders, weights files; if empty, all of pretrained_names that exist.
    pretrained_names: {name: file name in weights/DATA/}; their data set is that of the other models, else
    dataset_name, else glyphs. model_name, pretrained: what "base" is, if not the tiny model."""
    runs = {name: load_run(name, dataset_name, resolution) for name in names if name not in pretrained_names}
    dataset_name = next((run.dataset_name for run in runs.values()), dataset_name or "glyphs")
    if not names:
        names = [name for name, network_name in pretrained_names.items()
                 if name == "base" or weights_path(network_name, short_name(dataset_name)).is_file()]
    models = []
    for name in dict.fromkeys(names):
        if name in runs:
            models.append(runs[name])
        elif name == "base" and model_name != "tiny":
            model = load_model(model_name, dataset_name, pretrained, resolution)
            settings = {"guidance_scale": base_guidance_scale(model, runs.values())}
            configs = [(10, settings), (50, settings)]
            models.append(LoadedModel(name, model, model_name, dataset_name, None, configs))
        else:
            models.append(load_pretrained(name, pretrained_names[name], dataset_name, resolution))
    names = {item.dataset_name for item in models}
    if len(set(map(short_name, names))) > 1 or sum(Path(name).is_absolute() for name in names) > 1:
        raise ValueError("these models belong to different data sets: evaluate one data set at a time")
    return models
