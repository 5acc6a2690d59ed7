"""Runs the Stable Diffusion code on a GPU in full size with random weights, and writes docs/gpu.md.

    python -m scripts.gpu_report                 everything, at most nine minutes, without a network
    python -m scripts.gpu_report --only memory   cells whose name contains "memory"
    python -m scripts.gpu_report --tiny          the same with tiny networks, also on a CPU: a rehearsal

Each cell is one line of JSON, printed and appended to the output as soon as it is known. A cell that fails or
takes too long says so and the next one runs. Read next: docs/gpu.md"""

import argparse
import copy
import gc
import json
import platform
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

import train
from models import loading
from models.backbones import load_dino
from models.families import MODEL_FAMILIES
from models.hub import reason_of
from models.preflight import expected_gib, load_estimate
from scripts import tiny_pipelines
from scripts.full_size_networks import full_size_network
from scripts.memory_of_large_models import GPU_TFLOPS
from utils import distributed
from utils.checkpoint import atomic_write_text
from utils.plotting import markdown_table

ROOT = Path(__file__).parent.parent
CELL_SECONDS = 200                     # a cell that takes longer is interrupted
GIB = 2 ** 30


# ----------------------------------------------------------------------------------- networks in full size

def full_size_pipeline(model_name, folder):
    """A diffusers pipeline with the public model's U-Net or transformer and VAE in full size, and text
    encoders of its widths with two layers; all weights are random."""
    import diffusers
    tokenizer = tiny_pipelines.make_clip_tokenizer(folder)
    vae_channels = 16 if model_name == "sd3" else 4
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=vae_channels,
        sample_size=MODEL_FAMILIES[model_name][3], scaling_factor=.18215).eval()
    clip, network = tiny_pipelines.make_clip, full_size_network(model_name)
    if model_name == "sd15":
        return diffusers.StableDiffusionPipeline(
            vae=vae, text_encoder=clip(tokenizer, 768), tokenizer=tokenizer, unet=network,
            scheduler=diffusers.DDIMScheduler(**tiny_pipelines.BETAS), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False)
    if model_name == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            vae=vae, text_encoder=clip(tokenizer, 768), text_encoder_2=clip(tokenizer, 1280, 1280),
            tokenizer=tokenizer, tokenizer_2=tokenizer, unet=network,
            scheduler=diffusers.EulerDiscreteScheduler(**tiny_pipelines.BETAS))
    return diffusers.StableDiffusion3Pipeline(
        vae=vae, text_encoder=clip(tokenizer, 768, 768), text_encoder_2=clip(tokenizer, 1280, 1280),
        text_encoder_3=tiny_pipelines.make_t5(4096), tokenizer=tokenizer, tokenizer_2=tokenizer,
        tokenizer_3=tiny_pipelines.make_t5_tokenizer(), transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.))


class Networks:
    """Builds models for the cells; tiny: the tests' networks instead of full size."""

    def __init__(self, tiny):
        self.tiny = tiny
        self.folder = Path(tempfile.mkdtemp())

    def denoiser(self, model_name, resolution=None):
        """A new Denoiser with random weights, on the CPU."""
        torch.manual_seed(0)
        if self.tiny:
            path = self.folder / model_name
            if not path.exists():
                tiny_pipelines.make_pipeline(model_name, self.folder)
            return loading.load_model(model_name, "", str(path), tiny_pipelines.RESOLUTION)
        with torch.device(distributed.get_device()):                   # where random numbers are quick
            pipe = full_size_pipeline(model_name, self.folder / "tokenizer")
        cls, _, _, own_resolution = MODEL_FAMILIES[model_name]
        return cls(pipe, resolution or own_resolution, "random weights")

    def backbone(self, *_, **__):
        if self.tiny:
            return load_dino("vit", str(tiny_pipelines.make_dino(self.folder / "dino")))
        return load_dino("random").requires_grad_(False).eval()

    def trainer(self, method, model_name, *args):
        """The Trainer of `train.py --method … --model … args`, on drawn glyphs, with random weights."""
        args = ["--method", method, "--model", model_name, "--data", "glyphs", "--eval-samples", "0",
                "--pretrained", str(self.folder), "--steps", "100", "--set", "warmup_steps_d=0", *args]
        resolution = train.METHODS[method].max_resolution.get(model_name)
        if model_name == "sd3":
            resolution = 1024
        with ExitStack() as stack:
            model = self.denoiser(model_name, resolution)
            stack.enter_context(patch.object(loading, "load_model", lambda *_, **__: model))
            stack.enter_context(patch.object(loading, "load_backbone", self.backbone))
            return train.setup(train.parse_args(args)[1])[2]


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_per_call(job, repeats=3):
    """Median time of a call after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        job()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def reset_memory():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib():
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else float("nan")


# ------------------------------------------------------------------------------------------------- cells

def memory_and_time(networks, method, model_name, batch_size, *options):
    """Steps of training -> GiB at most, seconds a step, and the estimate of both."""
    args = ["--set", f"batch_size={batch_size}", "--set", "gradient_accumulation_steps=1", *options]
    trainer = networks.trainer(method, model_name, *args)
    seconds = seconds_per_call(trainer.train_step, 3 if method != "adt" else 2)
    run_config = {"method": method, "model": model_name, "lora_rank": trainer.model.lora_rank, "fsdp": False,
                  "gradient_checkpointing": "--no-gradient-checkpointing" not in options}
    estimate = load_estimate(run_config)
    return {"gib": peak_gib(), "gib by arithmetic": expected_gib(estimate, trainer.config,
                                                                 trainer.model.resolution, run_config),
            "seconds": seconds, "tflop by arithmetic": batch_size * estimate["tflop"],
            "pixels": trainer.model.resolution}


def profile_step(networks, method, model_name, batch_size):
    """Where the time of a step goes: is the GPU busy, or does it wait for the CPU to start its kernels?"""
    trainer = networks.trainer(method, model_name, "--set", f"batch_size={batch_size}", "--set",
                               "gradient_accumulation_steps=1")
    trainer.train_step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    start = time.perf_counter()
    model_cls = type(trainer.model)
    with (torch.profiler.profile(activities=activities) as profiler,
          patch.object(model_cls, "call_network", autospec=True,
                       side_effect=model_cls.call_network) as calls):
        trainer.train_step()
        synchronize()
        seconds = time.perf_counter() - start
    events = profiler.key_averages()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    longest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:8]
    return {"s with the profiler": seconds, "network calls": calls.call_count,
            "kernels": sum(event.count for event in kernels),
            "GPU busy, s": sum(event.self_device_time_total for event in kernels) / 1e6,
            "longest": {event.key[:60]: event.self_device_time_total / 1e6 for event in longest}}


def fits_24_gib(networks):
    """ADT on SD 1.5 as `--model sd15` trains it, with the memory of a 24 GB card."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1., 24e9 / total))
    try:
        trainer = networks.trainer("adt", "sd15")
        for _ in range(2):
            trainer.train_step()
        return {"fits": True, "gib": peak_gib(), "batch_size": trainer.config.batch_size}
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.)


def precision_of_eps(networks, model_name):
    """Relative error of the network's output in each arithmetic against fp32, and the standard deviation of
    the error of x0 that follows, at three timesteps."""
    model = networks.denoiser(model_name).to(distributed.get_device()).requires_grad_(False)
    device = model.alpha.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *model.latent_shape, generator=generator).to(device)
    cond = model.encode_prompts(["a cat", "a dog"])
    result = {}
    for t in (999, 500, 20):
        times = torch.full((2,), t, device=device)
        exact = predict_with(model, x, times, cond, "fp32", False)
        x0 = model.to_x0_eps(x, exact, times)[0]
        for name in ("tf32", "fp16", "bf16"):
            y = predict_with(model, x, times, cond, "fp32" if name == "tf32" else name, name == "tf32")
            error = (y - exact).std() / exact.std()
            x0_error = (model.to_x0_eps(x, y, times)[0] - x0).std()
            result[f"{name}, t = {t}"] = {"relative error": error.item(), "std of the error of x0":
                                          x0_error.item()}
    return result


@torch.no_grad()
def predict_with(model, x, t, cond, precision, tf32):
    model.precision = precision
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        with model.autocast():
            return model.predict(x, t, cond).float()
    finally:
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = False


def recomputation(networks, model_name):
    """The same step with and without gradient checkpointing: largest relative difference of a loss and of a
    gradient."""
    results = []
    for option in ("--gradient-checkpointing", "--no-gradient-checkpointing"):
        trainer = networks.trainer("adt", model_name, option, "--lora-rank", "8", "--set", "batch_size=1",
                                   "--set", "num_inference_steps=4", "--set", "num_grad_steps=2")
        torch.manual_seed(0)
        logs = trainer.train_step()
        results.append((logs, [param.grad.clone() for param in trainer.g_params]))
        del trainer
        reset_memory()
    (logs, grads), (other_logs, other_grads) = results
    differences = [((a - b).norm() / (a.norm() + 1e-12)).item() for a, b in zip(grads, other_grads)]
    return {"losses": max(abs(logs[k] - other_logs[k]) / (abs(logs[k]) + 1e-12) for k in logs
                          if k.startswith("loss")),
            "gradients, median": statistics.median(differences), "gradients, largest": max(differences)}


def calls_of_several_sizes(networks, model_name):
    """Seconds of a call without gradients: equal ones for all sizes mean that it waits for the CPU."""
    result = {}
    for rank in (0, 128):
        model = networks.denoiser(model_name)
        if rank:
            model.add_lora(rank)
        model.to(distributed.get_device()).cast_frozen(torch.bfloat16)
        for batch_size in (2, 8, 32):
            x = torch.randn(batch_size, *model.latent_shape, device=model.alpha.device)
            t = torch.full((batch_size,), 500, device=x.device)
            job = partial(model.predict, x, t, model.encode_prompts(["a cat"] * batch_size))
            with torch.no_grad(), model.autocast():
                seconds = seconds_per_call(job)
            result[f"rank {rank}, batch {batch_size}"] = seconds
    return result


def layout_and_compiler(networks, model_name):
    """Seconds of a forward and backward pass of the network: as it is, channels_last, compiled."""
    model = networks.denoiser(model_name).to(distributed.get_device())
    x = torch.randn(2, *model.latent_shape, device=model.alpha.device)
    t = torch.tensor([500, 500], device=x.device)
    cond = model.encode_prompts(["a cat", "a dog"])

    def call():
        with model.autocast():
            model.predict(x, t, cond).square().mean().backward()
        model.zero_grad()

    result = {"as it is": seconds_per_call(call)}
    model.network.to(memory_format=torch.channels_last)
    result["channels_last"] = seconds_per_call(call)
    start = time.perf_counter()
    model.network.compile()
    call()
    result["compiling, s"] = time.perf_counter() - start
    result["compiled"] = seconds_per_call(call)
    return result


def one_sharded_process(networks):
    """FSDP2 with a single process: the same losses as without."""
    import torch.distributed as dist
    losses = []
    for options in ([], ["--fsdp"]):
        if options and not dist.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        trainer = networks.trainer("adt", "sd15", "--full", "--set", "batch_size=1", "--set",
                                   "num_inference_steps=2", "--set", "num_grad_steps=1", *options)
        losses.append(trainer.train_step()["loss_diffusion"])
        del trainer
        reset_memory()
    dist.destroy_process_group()
    return {"loss": losses[0], "loss, sharded": losses[1]}


def tiny_model(networks, method):
    """Steps of the tiny model's own training: seconds a step, and whether a resumed run repeats its bits."""
    args = ["--method", method, "--eval-samples", "0", "--steps", "40", "--set", "warmup_steps_d=2"]
    trainer, other = (train.setup(train.parse_args(args)[1])[2] for _ in range(2))
    seconds = seconds_per_call(trainer.train_step, 5)
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    same = trainer.train_step() == other.train_step()
    params = all(torch.equal(a, b) for a, b in zip(trainer.g_params, other.g_params))
    return {"seconds": seconds, "resumed step has the same losses": same, "and weights": params}


def all_cells():
    """{name: (function, arguments)} in the order of their importance."""
    plain = "--no-gradient-checkpointing"
    cells = {"tiny adt": (tiny_model, "adt"), "tiny add": (tiny_model, "add")}
    for method, model_name, batch_size, *options in (
            ("adt", "sd15", 4), ("add", "sd15", 4), ("adt", "sd15", 1), ("add", "sd15", 1),
            ("adt", "sd15", 1, plain), ("add", "sd15", 4, plain), ("adt", "sdxl", 1), ("add", "sdxl", 1),
            ("adt", "sd3", 1), ("adt", "sd15", 1, "--full"), ("adt", "sd15", 4, "--precision", "fp16")):
        name = " ".join(["memory", method, model_name, f"batch {batch_size}", *options])
        cells[name] = (memory_and_time, method, model_name, batch_size, *options)
    for method, model_name, batch_size in (("adt", "sd15", 4), ("adt", "sdxl", 1), ("add", "sd15", 4)):
        cells[f"profile {method} {model_name} batch {batch_size}"] = (profile_step, method, model_name,
                                                                      batch_size)
    cells["24 GB"] = (fits_24_gib,)
    cells["calls sd15"] = (calls_of_several_sizes, "sd15")
    cells["precision sd15"] = (precision_of_eps, "sd15")
    cells["precision sdxl"] = (precision_of_eps, "sdxl")
    cells["recomputation sd15"] = (recomputation, "sd15")
    cells["recomputation sd3"] = (recomputation, "sd3")
    cells["sharding"] = (one_sharded_process,)
    cells["layout and compiler sd15"] = (layout_and_compiler, "sd15")
    return cells


# -------------------------------------------------------------------------------------------- the report

@contextmanager
def time_limit(seconds):
    """TimeoutError if the block takes longer."""
    def stop(*_):
        raise TimeoutError(f"more than {seconds} s")
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run_cell(networks, function, *arguments):
    """The result of a cell, or {"failed": reason}."""
    reset_memory()
    start = time.perf_counter()
    try:
        with time_limit(CELL_SECONDS):
            result = function(networks, *arguments)
    except Exception as error:  # whatever it is, the next cell runs
        result = {"failed": reason_of(error)}
    return {**result, "cell, s": round(time.perf_counter() - start, 1)}


def rounded(value):
    """Floats with three digits, in nested dicts."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def describe_machine():
    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{device_name}, torch {torch.__version__}, Python {platform.python_version()}"


def report_page(machine, results):
    """docs/gpu.md: a table of the training steps, one of the precisions, and what the other cells say."""
    steps, precisions, others = [], [], []
    for name, result in results.items():
        kind, *words = name.split()
        if "failed" in result:
            others.append(f"- {name}: failed ({result['failed']})")
        elif kind == "memory":
            method, model_name, _, batch_size, *options = words
            steps.append((f"{method}, {model_name}", " ".join(options), result["pixels"], batch_size,
                          result["gib"], result["gib by arithmetic"], result["seconds"],
                          f"{result['tflop by arithmetic'] / GPU_TFLOPS:.2g}"))
        elif kind == "precision":
            timesteps = dict.fromkeys(key.split(", ")[1] for key in result if ", t" in key)
            precisions += [(words[0], timestep,
                            *(" / ".join(f"{value:.2g}" for value in result[f"{dtype}, {timestep}"].values())
                              for dtype in ("tf32", "fp16", "bf16"))) for timestep in timesteps]
        else:
            others.append(f"- {name}: " + ", ".join(f"{key} {value}" for key, value in result.items()
                                                    if key != "cell, s"))
    parts = ["# Measured on a GPU",
             f"`python -m scripts.gpu_report` on: {machine}.",
             "Networks of full size with random weights; nothing was trained to its end.",
             "## A training step", "The median of two or three steps. *By arithmetic*: "
             "[how](stable_diffusion.md#memory-and-time-of-a-step); seconds are a lower bound, "
             f"{GPU_TFLOPS} TFLOP/s.",
             markdown_table(["run", "options", "px", "batch", "GiB", "by arithmetic", "s", "by arithmetic"],
                            steps),
             "## Precision", "Relative error of ε / standard deviation of the error of x0, against fp32.",
             markdown_table(["model", "timestep", "TF32", "fp16", "bf16"], precisions),
             "## Other measurements", "\n".join(others)]
    return "\n\n".join(parts) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--tiny", action="store_true", help="tiny networks: a rehearsal, also on a CPU")
    parser.add_argument("--only", default="", help="cells whose name contains this text")
    parser.add_argument("--minutes", type=float, default=9., help="start no cell after so many minutes")
    parser.add_argument("--output", type=Path, help="file to write (default: docs/gpu.md on a GPU)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.tiny:
        parser.exit(2, "gpu_report.py: wanted a GPU with CUDA, found none: --tiny rehearses it on a CPU\n")
    output = args.output or (None if args.tiny else ROOT / "docs" / "gpu.md")
    networks, start, results = Networks(args.tiny), time.perf_counter(), {}
    for name, (function, *arguments) in all_cells().items():
        if args.only not in name:
            continue
        if time.perf_counter() - start > 60 * args.minutes:
            results[name] = {"failed": "no time left"}
        else:
            results[name] = rounded(run_cell(networks, function, *arguments))
        print(json.dumps({name: results[name]}, ensure_ascii=False), flush=True)
        if output:
            atomic_write_text(output, report_page(describe_machine(), results))
    if any("failed" in result for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
