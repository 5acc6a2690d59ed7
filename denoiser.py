"""What a denoiser is, in one contract, and who fulfils it.

Every diffusion model here, whatever its family, is asked one thing: given x_t = alpha x0 + sigma eps, output
y = a x0 + b eps with known (a, b). Two linear equations, two unknowns: solving them gives back (x0, eps), and
so the samplers and losses of this project never ask whether a model predicts noise, pictures, velocities or
flows.

    [x_t]   [alpha sigma] [x0 ]          eps: (a, b) = (0, 1)            x0:   (1, 0)
    [ y ] = [  a     b  ] [eps]          v:          (-sigma, alpha)     flow: (-1, 1)

Time runs one way everywhere: index 0 is the cleanest step, T-1 the noisiest.        Read next: models.py"""

import copy

import torch
import torch.nn as nn


class Denoiser(nn.Module):
    """The contract. A family gives three tables and four methods (output, encode, decode, condition)."""

    network: nn.Module                                      # what training changes; everything else is frozen
    size: int                                               # of a picture, pixels
    shape: tuple                                            # of a latent picture, (C, h, w)
    heavy = False                                           # its pictures and checkpoints take minutes
    facts = {}                                              # what its file says of itself
    at_once = 100                                           # pictures that are drawn together

    def __init__(self, target, alpha, sigma, time):
        """target: eps, x0, v or flow · alpha, sigma, time: (T,) tables from cleanest to noisiest."""
        super().__init__()
        if target not in ("eps", "x0", "v", "flow"):
            raise ValueError(f"unknown prediction target '{target}': wanted eps, x0, v or flow")
        if target == "eps" and alpha[-1] == 0:
            raise ValueError("an eps-model needs alpha_T > 0: pure noise says nothing about x0")
        self.target = target
        for name, table in (("alpha", alpha), ("sigma", sigma), ("time", time)):
            self.register_buffer(name, table.float(), persistent=False)

    @property
    def T(self):
        return len(self.alpha)

    def look_up(self, table, t):
        """t (B,) -> (B,). Fractional t reads between the rows: SD3's own sampler visits such times."""
        low = t.long()
        high = (low + 1).clamp(max=self.T - 1)
        if not t.is_floating_point():
            return table[low]
        return torch.lerp(table[low], table[high], (t - low).to(table))

    def at(self, t):
        """t (B,) -> alpha, sigma, each (B, 1, 1, 1)."""
        return tuple(self.look_up(table, t).view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))

    def add_noise(self, x0, t, eps):
        """The forward process, x_t = alpha x0 + sigma eps."""
        alpha, sigma = self.at(t)
        return alpha * x0 + sigma * eps

    def coefficients(self, t):
        """(a, b) of y = a x0 + b eps."""
        alpha, sigma = self.at(t)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        return {"eps": (zero, one), "x0": (one, zero), "v": (-sigma, alpha), "flow": (-one, one)}[self.target]

    def training_target(self, x0, eps, t):
        """What the network should have said: a x0 + b eps."""
        a, b = self.coefficients(t)
        return a * x0 + b * eps

    def split(self, x, y, t):
        """Solve the 2x2 system by Cramer's rule: (x_t, y) -> (x0, eps), in x's precision, whatever y's.
        Its determinant: alpha (eps), -sigma (x0), 1 (v) or alpha + sigma (flow): alpha_T = 0 is harmless."""
        y = y.to(x.dtype)
        (alpha, sigma), (a, b) = self.at(t), self.coefficients(t)
        determinant = alpha * b - sigma * a
        return (b * x - sigma * y) / determinant, (alpha * y - a * x) / determinant

    def predict(self, x, t, cond, uncond=None, guidance=1.0):
        """One guided call: y_u + w (y_c - y_u). w = 1 is off; otherwise both halves share one pass."""
        time = self.look_up(self.time, t)
        if guidance == 1.0:
            return self.output(x, time, cond)
        if uncond is None:
            raise ValueError("guidance other than 1 needs `uncond`, the condition of empty captions")
        both = {key: torch.cat([uncond.get(key, value).expand_as(value), value])
                for key, value in cond.items()}
        y_u, y_c = self.output(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
        return y_u + guidance * (y_c - y_u)

    def twin(self):
        """The same model with a network of its own, frozen: what it is now, kept."""
        other = copy.copy(self)
        other._modules = {**self._modules, "network": copy.deepcopy(self.network)}
        return other.eval().requires_grad_(False)

    rank = 0                                                 # of its low-rank adapters, if it has any

    def adapt(self, rank):
        """Freeze the network; let low-rank adapters learn instead."""
        raise ValueError("--lora is for sd15, sdxl and sd3: this network is small enough to learn as it is")

    def save_memory(self):
        """Recompute every block of the network in the backward pass."""
        raise ValueError("--lean is for sd15, sdxl and sd3: this network is small as it is")

    def prime(self, captions):
        """Whatever these captions will need is made now, or a ValueError names the first that cannot be."""
        for i in range(0, len(captions), 64):
            self.condition(captions[i:i + 64])

    def close(self):
        """Every caption that will be asked has been: what only `condition` needs may go."""

    def keep(self, out, **facts):
        """Write into the run folder `out` what training made, in a form that others load."""
        raise NotImplementedError

    def forget(self):
        """Give the network fresh random weights."""
        raise NotImplementedError

    def output(self, x, time, cond):
        """x (B, C, h, w), time (B,) in the family's own unit, cond from `condition` -> y (B, C, h, w)."""
        raise NotImplementedError

    def encode(self, image):
        """[-1, 1] (B, 3, H, W) -> (B, C, h, w)."""
        raise NotImplementedError

    def decode(self, z):
        """(B, C, h, w) -> (B, 3, H, W), differentiable and not clamped."""
        raise NotImplementedError

    def condition(self, captions, frame=None):
        """B strings -> a dict of tensors whose first dimension is B, passed to `output` unread. One is
        "pooled" (B, P), the caption as one vector, on which a discriminator may condition. frame (B, 4): what
        size a photograph had and where it was cut; SDXL wants to know."""
        raise NotImplementedError
