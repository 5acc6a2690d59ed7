"""Distances between sets of pictures, and the judges that real models are measured by.

The tiny world has a judge of its own (evaluate.py); for real models there are public ones, loaded through
transformers from a folder or hub id that the user names. Careful: a discriminator that looks through DINOv2
teaches its generator to please DINOv2; beside it FD-DINOv2 flatters, and CMMD is the one to believe.
Read next: evaluate.py"""

from functools import reduce

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------- distances

def frechet(a, b):
    """Fréchet distance of two Gaussians fitted to (N, D) and (M, D):
    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2); the trace by eigenvalues of the symmetric A^1/2 B A^1/2."""
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross)


def precision_recall(real, made, k=3):
    """Kynkäänniemi et al. 2019: the share of made features inside the real manifold (a union of
    k-nearest-neighbour balls), and of real features inside the made one."""
    def inside(points, centres):
        # +1: a point is its own neighbour
        radius = torch.cdist(centres, centres).kthvalue(k + 1, dim=1).values
        return (torch.cdist(points, centres) <= radius).any(1).float().mean().item()
    return inside(made, real), inside(real, made)


def cmmd(a, b, width=10.):
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024), times 1000: a Gaussian kernel between unit
    embeddings (N, D) and (M, D). No assumption of normality, and steady from few pictures on."""
    def near(x, y):
        return torch.exp(-torch.cdist(x.double(), y.double()).square() / (2 * width ** 2)).mean()
    return 1000 * float(near(a, a) + near(b, b) - 2 * near(a, b))


# ------------------------------------------------------------------------------------------------- judges

def loaded(kind, source, flag, **how):
    """A transformers class from a folder or hub id; a model of it frozen."""
    import transformers
    try:
        thing = getattr(transformers, kind).from_pretrained(source, **how)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        raise OSError(f"{flag} {source}: cannot load {kind}, name a folder with one ({why})") from None
    return thing.eval().requires_grad_(False) if isinstance(thing, torch.nn.Module) else thing


def prepared(images, side, mean, spread):
    """[-1, 1] (B, 3, H, W) -> (B, 3, side, side) as a judge of pictures of this mean and spread wants it."""
    x = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1) * .5 + .5
    mean, spread = (torch.tensor(value, device=x.device).view(3, 1, 1) for value in (mean, spread))
    return (x - mean) / spread


class Clip:
    """CLIP, and what was made of it: PickScore and HPSv2 are CLIPs that learned what people prefer."""

    def __init__(self, source, flag, device="cpu"):
        self.model = loaded("CLIPModel", source, flag, use_safetensors=True).to(device)
        self.words = loaded("AutoTokenizer", source, flag)
        self.side = self.model.config.vision_config.image_size

    @torch.no_grad()
    def picture(self, images):
        """[-1, 1] (B, 3, H, W) -> unit embeddings (B, D)."""
        x = prepared(images.to(self.model.device), self.side, (.4815, .4578, .4082), (.2686, .2613, .2758))
        seen = self.model.vision_model(pixel_values=x).pooler_output
        return F.normalize(self.model.visual_projection(seen)).cpu()

    @torch.no_grad()
    def caption(self, captions):
        tokens = self.words(captions, padding=True, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        return F.normalize(self.model.text_projection(self.model.text_model(**tokens).pooler_output)).cpu()


def aesthetics(path, width):
    """The LAION predictor, linear layers on CLIP ViT-L/14's unit embeddings -> a function of (B, width)."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        numbers = sorted({int(key.split(".")[1]) for key in state})
        layers = [[state[f"layers.{i}.{kind}"].float() for kind in ("weight", "bias")] for i in numbers]
    except Exception as error:
        raise OSError(f"--aesthetics {path}: wanted the state dict of the LAION predictor "
                      f"({type(error).__name__})") from None
    if (wants := layers[0][0].shape[1]) != width:
        raise ValueError(f"--aesthetics {path} reads embeddings of {wants} numbers, --clip gives {width}")
    return lambda x: reduce(lambda x, layer: F.linear(x, *layer), layers, x).squeeze(1)


class Panel:
    """Photographs, their captions and the judges that were given. Stands where evaluate.Examiner stands for
    the tiny world, with the same names: captions (asked of the models), floor, score and real."""

    def __init__(self, source, n, judges, device="cpu", seed=1234):
        """judges: {dino, clip, pickscore, hps, aesthetics: folder, file or hub id}, those that there are."""
        if n < 4:
            raise ValueError(f"--samples {n}: measuring wants 4 pictures or more")
        if not source.sizes["test"] or source.sizes["test"] < 2 * n:
            raise ValueError(f"--samples {n}: measuring wants twice as many different photographs (--data), "
                             f"and '{source.name}' has {source.sizes['test'] or 'none'}")
        self.dino = (loaded("Dinov2Model", judges["dino"], "--dino", use_safetensors=True).to(device)
                     if "dino" in judges else None)
        self.clips = {name: Clip(judges[name], f"--{name}", device)
                      for name in ("clip", "pickscore", "hps") if name in judges}
        if "aesthetics" in judges and "clip" not in judges:
            raise ValueError("--aesthetics reads CLIP ViT-L/14's embeddings: name it with --clip")
        self.taste = (aesthetics(judges["aesthetics"], self.clips["clip"].model.config.projection_dim)
                      if "aesthetics" in judges else None)
        # models are measured against the first half of the photographs, and asked the captions of the second
        self.source, self.seed, told = source, seed, []
        def photographs():
            for batch in source.batches(2 * n, 8, torch.Generator().manual_seed(seed)):
                told.extend(batch.caption)
                yield batch.image
        seen = self.look(photographs())
        self.told, self.captions = told[:n], told[n:]
        self.features = {name: x[:n] for name, x in seen.items()}
        self.said = {name: judge.caption(self.captions) for name, judge in self.clips.items()}
        self.floor = self.compare({name: x[n:] for name, x in seen.items()})

    def real(self):
        """What models are measured against, read anew -> pictures a few at a time, captions."""
        batches = self.source.batches(len(self.told), 8, torch.Generator().manual_seed(self.seed))
        return (batch.image for batch in batches), self.told

    def look(self, pictures):
        """(b, 3, H, W), a few at a time -> {judge: embeddings (N, D)}; only these stay in memory."""
        seen = {}
        for images in pictures:
            if self.dino is not None:
                seen.setdefault("dino", []).append(self.tokens(images))
            for name, judge in self.clips.items():
                seen.setdefault(name, []).append(judge.picture(images))
        return {name: torch.cat(parts) for name, parts in seen.items()}

    @torch.no_grad()
    def tokens(self, images):
        """[-1, 1] (B, 3, H, W) -> DINOv2's CLS after its last norm (B, D), at its own 224 pixels."""
        x = prepared(images.to(self.dino.device), 224, (.485, .456, .406), (.229, .224, .225))
        return self.dino(x).pooler_output.cpu()

    def score(self, pictures):
        """Pictures (b, 3, H, W) made for self.captions, a few at a time -> {figure: value}."""
        return self.compare(self.look(pictures))

    def compare(self, seen):
        """What the judges saw of such pictures -> {figure: value}."""
        figures = {}
        if "dino" in seen:
            figures["fd-dinov2"] = frechet(self.features["dino"], seen["dino"])
            figures["precision"], figures["recall"] = precision_recall(self.features["dino"], seen["dino"])
        if "clip" in seen:
            figures["cmmd"] = cmmd(self.features["clip"], seen["clip"])
        for name, judge in self.clips.items():
            agreement = (seen[name] * self.said[name]).sum(1).mean()
            figures[name] = float(agreement * (judge.model.logit_scale.exp() if name == "pickscore" else 1))
        if self.taste:
            figures["aesthetics"] = float(self.taste(seen["clip"]).mean())
        return figures
