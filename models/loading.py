"""Every pretrained network comes from here: models by name, backbones, the evaluation classifier.

The weights of the tiny networks are in weights/DATA/: denoiser, backbone (TinyViT), cnn, eval_classifier, and
the results adt and add. They are fp16 safetensors with metadata in their headers.
Read next: train.py"""

from pathlib import Path

from models.backbones import EvalClassifier, JoinedBackbones, TinyCNN, TinyViT, load_dino
from models.efficientnet import EfficientNetLite0
from models.families import MODEL_FAMILIES, load_denoiser
from models.tiny import TinyDenoiser
from utils import distributed
from utils.checkpoint import load_state_dict_strict, load_weights
from utils.messages import print_message

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
    """A frozen TinyViT, TinyCNN or EvalClassifier from its file; `metadata` is what its header says."""
    state, metadata = load_weights(path)
    if "attributes" not in metadata:
        raise ValueError(f"{path} is not a {network_cls.__name__}: its header has no 'attributes'")
    network = load_state_dict_strict(network_cls(metadata["attributes"]), state, path)
    network.metadata = metadata
    return network.eval().requires_grad_(False)


def was_trained_on(network, fingerprint):
    """Whether a data set's fingerprint is that of the images which a network of load_frozen was trained on. A
    part of the glyphs counts as glyphs; a file that does not say what it was trained on is trusted."""
    found = network.metadata.get("fingerprint", network.metadata.get("data", fingerprint))
    return found.partition(":")[0] == fingerprint.partition(":")[0]


def load_backbone(model_name, dataset_name, kind="vit", source=None, weights_dir=None, fingerprint=None):
    """The backbone of a model's discriminator.

    sd15, sdxl, sd3: DINOv2 from `source` (a transformers folder or hub id), or with random weights.
    tiny: kind is vit (TinyViT) or cnn (TinyCNN), trained on this data set, vit+cnn (the maps of both) or
    random (TinyViT without training).
    Its file is looked for in `source` (a folder), else in `weights_dir`, else in the project's weights/. With
    the `fingerprint` of the data set, a line says if the file in weights_dir was trained on other images."""
    if model_name in MODEL_FAMILIES:
        return load_dino(kind, source)
    if kind not in ("vit", "cnn", "vit+cnn", "random"):
        raise ValueError(f"unknown backbone '{kind}': wanted vit, cnn, vit+cnn or random")
    if source and not (Path(source) / "backbone.safetensors").is_file():
        raise FileNotFoundError(f"--backbone {source}: wanted a folder with a backbone.safetensors")
    if kind == "vit+cnn":                                              # the last one's CLS token counts
        return JoinedBackbones(*(load_backbone("tiny", dataset_name, part, source, weights_dir, fingerprint)
                                 for part in ("cnn", "vit")))
    network_cls, file_name = (TinyCNN, "cnn") if kind == "cnn" else (TinyViT, "backbone")
    path = weights_path(file_name, dataset_name, source or weights_dir)
    network = load_frozen(network_cls, path)
    if kind == "random":
        return TinyViT([head.out_features for head in network.attribute_heads])
    is_other = fingerprint and not source and not was_trained_on(network, fingerprint)
    if is_other and distributed.get_rank() == 0:
        print_message(f"the discriminator's backbone {path} was trained on other images or captions than the "
                      "data set has now, or by an older version, which compared sizes only")
    return network


def load_eval_classifier(dataset_name, weights_dir=None, fingerprint=None):
    """The pretrained evaluation classifier of a data set. ValueError if it was trained on other images than
    those with this fingerprint: its classes would be other captions."""
    path = weights_path("eval_classifier", dataset_name, weights_dir)
    classifier = load_frozen(EvalClassifier, path)
    if fingerprint and not was_trained_on(classifier, fingerprint):
        raise ValueError(f"{path} was trained on other images or captions than '{dataset_name}' has now, or "
                         "by an older version, which compared sizes only: train the networks again with "
                         "python -m scripts.pretrain, or measure nothing (train.py --eval-samples 0)")
    return classifier


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
