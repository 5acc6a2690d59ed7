"""Every pretrained network comes from here: models by name, backbones, the evaluation classifier.

The weights of the tiny networks are in weights/DATA/: denoiser, backbone (TinyViT), cnn, eval_classifier, and
the results adt and add. They are fp16 safetensors with metadata in their headers.
Read next: train.py"""

from pathlib import Path

from models.backbones import EvalClassifier, TinyCNN, TinyViT, load_dino
from models.efficientnet import EfficientNetLite0
from models.families import MODEL_FAMILIES, load_denoiser
from models.tiny import TinyDenoiser
from utils.checkpoint import load_state_dict_strict, load_weights

WEIGHTS_DIR = Path(__file__).parent.parent / "weights"


def weights_path(network_name, dataset_name, weights_dir=None):
    """The file of a network: in weights_dir if it is there, else in the project's weights/DATA. A part of the
    glyphs (glyphs:FAMILIES) has the networks of all glyphs."""
    if weights_dir:
        candidate = Path(weights_dir) / f"{network_name}.safetensors"
        if candidate.is_file():
            return candidate
    return WEIGHTS_DIR / dataset_name.partition(":")[0] / f"{network_name}.safetensors"


def load_frozen(network_cls, path):
    """A frozen TinyViT, TinyCNN or EvalClassifier from its file."""
    state, metadata = load_weights(path)
    if "attributes" not in metadata:
        raise ValueError(f"{path} is not a {network_cls.__name__}: its header has no 'attributes'")
    network = load_state_dict_strict(network_cls(metadata["attributes"]), state, path)
    return network.eval().requires_grad_(False)


def load_backbone(model_name, dataset_name, kind="vit", source=None, weights_dir=None):
    """The backbone of a model's discriminator.

    sd15, sdxl, sd3: DINOv2 from `source` (a transformers folder or hub id), or with random weights.
    tiny: kind is vit (TinyViT), cnn (TinyCNN) or random (TinyViT without training), trained on this data set.
    Its file is looked for in `source` (a folder), else in `weights_dir`, else in the project's weights/."""
    if model_name in MODEL_FAMILIES:
        return load_dino(kind, source)
    if kind not in ("vit", "cnn", "random"):
        raise ValueError(f"unknown backbone '{kind}': wanted vit, cnn or random")
    if source and not (Path(source) / "backbone.safetensors").is_file():
        raise FileNotFoundError(f"--backbone {source}: wanted a folder with a backbone.safetensors")
    if kind == "cnn":
        return load_frozen(TinyCNN, weights_path("cnn", dataset_name, source or weights_dir))
    vit = load_frozen(TinyViT, weights_path("backbone", dataset_name, source or weights_dir))
    if kind == "random":
        return TinyViT([head.out_features for head in vit.attribute_heads])
    return vit


def load_eval_classifier(dataset_name, weights_dir=None):
    """The pretrained evaluation classifier of a data set."""
    return load_frozen(EvalClassifier, weights_path("eval_classifier", dataset_name, weights_dir))


def load_efficientnet():
    """The network of the panel, trained on ImageNet, frozen."""
    path = WEIGHTS_DIR / "panel" / "efficientnet_lite0.safetensors"
    network = load_state_dict_strict(EfficientNetLite0(), load_weights(path)[0], path)
    return network.eval().requires_grad_(False)


def load_model(model_name, dataset_name, pretrained=None, resolution=None, vae_path=None,
               max_resolution=None):
    """-> a Denoiser whose `network` is trainable and everything else frozen, with its file's `metadata`.

    tiny: `pretrained` is a weights file, a run folder or a weights folder (default: weights/DATA).
    sd15, sdxl, sd3: a diffusers folder, a run folder or a hub id (default: the model's public one)."""
    if model_name in MODEL_FAMILIES:
        return load_denoiser(model_name, pretrained, resolution, vae_path, max_resolution)
    if model_name != "tiny":
        raise ValueError(f"unknown model '{model_name}': wanted tiny, {', '.join(MODEL_FAMILIES)}")
    if (resolution or TinyDenoiser.resolution) != TinyDenoiser.resolution:
        raise ValueError(f"--resolution {resolution}: the tiny model's images have {TinyDenoiser.resolution} "
                         "pixels a side")
    if pretrained and not Path(pretrained).exists():
        raise FileNotFoundError(f"--pretrained {pretrained}: no such file or folder")
    path = Path(pretrained or weights_path("denoiser", dataset_name))
    if pretrained and not path.is_file():
        path = path / "denoiser.safetensors"
    state, metadata = load_weights(path)
    vocab = metadata.get("vocab")
    has_vocab = isinstance(vocab, list) and all(isinstance(word, str) for word in vocab)
    if "prediction_type" not in metadata or not has_vocab:
        raise ValueError(f"{path} is not a tiny denoiser: its header has no 'vocab' or no 'prediction_type'")
    model = TinyDenoiser(vocab, metadata["prediction_type"], metadata.get("image_channels", 3))
    model = load_state_dict_strict(model, state, path)
    model.requires_grad_(False)
    model.network.requires_grad_(True)
    model.metadata = metadata
    return model
