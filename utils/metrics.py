"""Distances between sets of images, and the public networks that measure large models.

The tiny models are measured by a classifier of their own (evaluate.Evaluator). Large models are measured by
public networks: DINOv2, CLIP and networks derived from CLIP. The user names a folder or hub id of each, and
transformers loads it.

If a discriminator used DINOv2 as its backbone, its generator was trained to match DINOv2 features. FD-DINOv2
is then too optimistic; prefer CMMD.
Read next: evaluate.py"""

import torch
import torch.nn.functional as F

METRIC_MODELS = {                                       # argument of MetricSuite and evaluate.py: help
    "dinov2": "FD-DINOv2, precision and recall (folder or hub id of a Dinov2Model)",
    "clip": "CLIP score and CMMD (a CLIPModel)",
    "pickscore": "PickScore (a CLIPModel)",
    "hpsv2": "HPSv2 (a CLIPModel)",
    "aesthetic_predictor": "the LAION aesthetic predictor (its state dict; needs --clip with ViT-L/14)",
}
CLIP_MEAN, CLIP_STD = (.4815, .4578, .4082), (.2686, .2613, .2758)      # of RGB in [0, 1]
IMAGENET_MEAN, IMAGENET_STD = (.485, .456, .406), (.229, .224, .225)


def flag_of(name):
    """The command line's flag for a name of METRIC_MODELS."""
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------------------------------------- distances

def frechet_distance(a, b):
    """Fréchet distance of the Gaussians fitted to a (N, D) and b (M, D), in fp64:

        |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2),   A, B: covariances.

    (A B)^1/2 has the trace of (A^1/2 B A^1/2)^1/2, which is symmetric: its eigenvalues are real."""
    a = a.double()
    b = b.double()
    cov_a = torch.cov(a.T)
    cov_b = torch.cov(b.T)
    eigvals, eigvecs = torch.linalg.eigh(cov_a)
    sqrt_cov = eigvecs * eigvals.clamp(min=0).sqrt() @ eigvecs.T
    tr_sqrt = torch.linalg.eigvalsh(sqrt_cov @ cov_b @ sqrt_cov).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * tr_sqrt)


def precision_recall(real, fake, k=3):
    """Precision and recall of features real (N, D) and fake (M, D) (Kynkäänniemi et al. 2019). The manifold
    of a set is the union of the balls around its points that reach to the k-th nearest neighbour. Precision:
    share of fake points in the real manifold. Recall: share of real points in the fake manifold."""
    def share_in_manifold(points, support):
        # k + 1: each point is its own nearest neighbour
        knn_radius = torch.cdist(support, support).kthvalue(k + 1, dim=1).values
        in_manifold = (torch.cdist(points, support) <= knn_radius).any(1)
        return in_manifold.float().mean().item()
    return share_in_manifold(fake, real), share_in_manifold(real, fake)


def cmmd(a, b, bandwidth=10.):
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024), times 1000, between unit embeddings a (N, D)
    and b (M, D), with a Gaussian kernel. It assumes no distribution and is stable with few images."""
    def mean_kernel(x, y):
        squared = torch.cdist(x.double(), y.double()).square()
        return torch.exp(-squared / (2 * bandwidth ** 2)).mean()
    return 1000 * float(mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))


# ----------------------------------------------------------------------------------------- public networks

def load_transformers(class_name, source, flag, **kwargs):
    """Load a transformers class from a folder or hub id; networks are frozen and in eval mode.
    OSError, with the command line's `flag` in its message, if that fails."""
    import transformers
    try:
        loaded = getattr(transformers, class_name).from_pretrained(source, **kwargs)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        raise OSError(f"{flag} {source}: wanted a folder or hub id of a {class_name}, "
                      f"could not load it ({reason})") from None
    if isinstance(loaded, torch.nn.Module):
        return loaded.eval().requires_grad_(False)
    return loaded


def preprocess(images, size, mean, std):
    """(B, 3, H, W) in [-1, 1] -> (B, 3, size, size), normalised to the mean and std (RGB) of a network."""
    x = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1) * .5 + .5
    mean = torch.tensor(mean, device=x.device).view(3, 1, 1)
    std = torch.tensor(std, device=x.device).view(3, 1, 1)
    return (x - mean) / std


class ClipScorer:
    """CLIP, or a network derived from it (PickScore and HPSv2 are CLIPs fine-tuned on human preferences).
    source: folder or hub id. flag: its name on the command line, for error messages."""

    def __init__(self, source, flag, device="cpu"):
        self.model = load_transformers("CLIPModel", source, flag, use_safetensors=True).to(device)
        self.tokenizer = load_transformers("AutoTokenizer", source, flag)
        self.image_size = self.model.config.vision_config.image_size

    @torch.no_grad()
    def embed_images(self, images):
        """(B, 3, H, W) in [-1, 1] -> unit embeddings (B, D), on the CPU."""
        x = preprocess(images.to(self.model.device), self.image_size, CLIP_MEAN, CLIP_STD)
        pooled = self.model.vision_model(pixel_values=x).pooler_output
        return F.normalize(self.model.visual_projection(pooled)).cpu()

    @torch.no_grad()
    def embed_texts(self, captions):
        """B strings -> unit embeddings (B, D), on the CPU."""
        tokens = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        pooled = self.model.text_model(**tokens).pooler_output
        return F.normalize(self.model.text_projection(pooled)).cpu()


def load_aesthetic_predictor(path, embed_dim):
    """The LAION predictor, linear layers on unit embeddings of CLIP ViT-L/14 -> a function (B, embed_dim) ->
    scores (B,). OSError if `path` is no such file, ValueError if its input is not embed_dim wide."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        layer_ids = sorted({int(key.split(".")[1]) for key in state})
        layers = [(state[f"layers.{i}.weight"].float(), state[f"layers.{i}.bias"].float()) for i in layer_ids]
        in_dim = layers[0][0].shape[1]
    except Exception as error:
        raise OSError(f"--aesthetic-predictor {path}: wanted the state dict of the LAION predictor, "
                      f"could not read it ({type(error).__name__})") from None
    if in_dim != embed_dim:
        raise ValueError(f"--aesthetic-predictor {path} takes embeddings of {in_dim} numbers, but --clip "
                         f"gives {embed_dim}: use the CLIP that it was trained on, ViT-L/14")

    def predict(x):
        for weight, bias in layers:
            x = F.linear(x, weight, bias)
        return x.squeeze(1)
    return predict


# ------------------------------------------------------------------------------------- a suite of metrics

class MetricSuite:
    """Real images, their captions and public networks: what evaluate.Evaluator is for tiny models, with the
    same names: captions, real_metrics, compute_metrics, reference_images.

    2n images of the data set are embedded once. The first n are the reference; the models get the captions of
    the other n, whose images give real_metrics. Only embeddings stay in memory."""

    def __init__(self, dataset, n, metric_models, device="cpu", seed=1234):
        """metric_models: {name of METRIC_MODELS: folder, file or hub id}, any subset of the names."""
        check_num_images(dataset, n)
        if "aesthetic_predictor" in metric_models and "clip" not in metric_models:
            raise ValueError("--aesthetic-predictor needs embeddings of CLIP ViT-L/14: add --clip")
        self.dataset = dataset
        self.seed = seed
        self.dino = None
        if "dinov2" in metric_models:
            self.dino = load_transformers("Dinov2Model", metric_models["dinov2"], "--dinov2",
                                          use_safetensors=True).to(device)
        self.clips = {name: ClipScorer(metric_models[name], f"--{name}", device)
                      for name in ("clip", "pickscore", "hpsv2") if name in metric_models}
        self.aesthetic = None
        if "aesthetic_predictor" in metric_models:
            embed_dim = self.clips["clip"].model.config.projection_dim
            self.aesthetic = load_aesthetic_predictor(metric_models["aesthetic_predictor"], embed_dim)

        captions = []

        def real_images():
            for batch in dataset.iter_batches(2 * n, 8, torch.Generator().manual_seed(seed)):
                captions.extend(batch.caption)
                yield batch.image
        embeds = self.embed(real_images())
        self.reference_captions = captions[:n]
        self.captions = captions[n:]
        self.features = {name: x[:n] for name, x in embeds.items()}
        self.text_embeds = {name: clip.embed_texts(self.captions) for name, clip in self.clips.items()}
        self.real_metrics = self.metrics_from_embeds({name: x[n:] for name, x in embeds.items()})

    def reference_images(self):
        """The images that models are compared with, read again -> (iterator over (b, 3, H, W), captions)."""
        batches = self.dataset.iter_batches(len(self.reference_captions), 8,
                                            torch.Generator().manual_seed(self.seed))
        return (batch.image for batch in batches), self.reference_captions

    def embed(self, image_batches):
        """Iterable of (b, 3, H, W) -> {name of the network: embeddings (N, D)}."""
        embeds = {}
        for images in image_batches:
            if self.dino is not None:
                embeds.setdefault("dinov2", []).append(self.dino_embed(images))
            for name, clip in self.clips.items():
                embeds.setdefault(name, []).append(clip.embed_images(images))
        return {name: torch.cat(parts) for name, parts in embeds.items()}

    @torch.no_grad()
    def dino_embed(self, images):
        """(B, 3, H, W) in [-1, 1] -> DINOv2's CLS token after the last norm (B, D), at 224 pixels, its own
        resolution."""
        x = preprocess(images.to(self.dino.device), 224, IMAGENET_MEAN, IMAGENET_STD)
        return self.dino(x).pooler_output.cpu()

    def compute_metrics(self, image_batches):
        """Iterable of (b, 3, H, W), made for self.captions in their order -> {metric: value}."""
        return self.metrics_from_embeds(self.embed(image_batches))

    def metrics_from_embeds(self, embeds):
        """The result of `embed` -> {metric: value}."""
        metrics = {}
        if "dinov2" in embeds:
            metrics["fd_dinov2"] = frechet_distance(self.features["dinov2"], embeds["dinov2"])
            precision, recall = precision_recall(self.features["dinov2"], embeds["dinov2"])
            metrics["precision"] = precision
            metrics["recall"] = recall
        if "clip" in embeds:
            metrics["cmmd"] = cmmd(self.features["clip"], embeds["clip"])
        for name, clip in self.clips.items():
            similarity = (embeds[name] * self.text_embeds[name]).sum(1).mean()
            scale = clip.model.logit_scale.exp() if name == "pickscore" else 1      # as its authors report it
            metrics[name] = float(similarity * scale)
        if self.aesthetic is not None:
            metrics["aesthetic"] = float(self.aesthetic(embeds["clip"]).mean())
        return metrics


def check_num_images(dataset, n):
    """ValueError unless n images can be measured against n others of the data set."""
    if n < 4:
        raise ValueError(f"--eval-samples {n}: measuring needs 4 images or more")
    available = dataset.split_sizes["test"]
    if not available or available < 2 * n:
        raise ValueError(f"--eval-samples {n}: measuring needs {2 * n} different images (--data), "
                         f"and '{dataset.name}' has {available or 'none'}")
