"""Before a large model is trained: can this machine do it, what will it take, what will be written.

The estimates are computed, not measured: scripts/memory_of_large_models.py builds the networks in full size
without values and counts what a training step allocates and multiplies (estimates.json).
Read next: train.py"""

import json
import time
from pathlib import Path

import torch

from models import hub
from models.families import MODEL_FAMILIES, is_hub_id
from utils import distributed, precision, report

ESTIMATES = Path(__file__).with_name("estimates.json")


def load_estimate(run_config):
    """The entry of estimates.json for a run, or None: {"resolution": pixels, "fixed_gib": weights, optimiser
    and EMA, "activations_gib": of one image, "tflop": of one image}."""
    tuning = "lora" if run_config["lora_rank"] else "full"
    suffix = " checkpointing" if run_config["gradient_checkpointing"] else ""
    key = f"{run_config['method']} {run_config['model']} {tuning}{suffix}"
    return json.loads(ESTIMATES.read_text()).get(key)


def expected_gib(estimate, config, resolution, world_size=1, is_sharded=False):
    """Memory of a training step on each device, GiB."""
    fixed = estimate["fixed_gib"] / (world_size if is_sharded else 1)
    pixels = (resolution / estimate["resolution"]) ** 2
    return fixed + config.batch_size * estimate["activations_gib"] * pixels


def check_run(run_config, config):
    """ValueError for what would stop a run later: the machine, --report-to, --push-to-hub."""
    check_machine(run_config, config)
    report.check_tracker(run_config["report_to"])
    hub.check_login(run_config["push_to_hub"])


def check_machine(run_config, config):
    """ValueError with one sentence if a large model cannot be trained on this machine. Weights in a local
    folder may be trained without a GPU: tiny networks are, and large ones by those who have the time."""
    model_name, pretrained = run_config["model"], run_config["pretrained"]
    is_downloaded = pretrained is None or is_hub_id(pretrained) and not Path(pretrained).exists()
    if model_name == "tiny" or not is_downloaded:
        return
    if not torch.cuda.is_available():
        has_mps = torch.backends.mps.is_available()
        found = "an Apple GPU, on which this code was never run" if has_mps else "none"
        raise ValueError(
            f"--model {model_name} wants a GPU with CUDA, found {found}. On this machine the tiny model can "
            f"be trained: python train.py --method {run_config['method']}. (Without a GPU large models are "
            "trained only from a local folder, --pretrained DIR; a step then takes minutes.)")
    estimate = load_estimate(run_config)
    if estimate is None:
        return
    resolution = run_config["resolution"] or estimate["resolution"]
    wanted = expected_gib(estimate, config, resolution, run_config["world_size"], run_config["fsdp"])
    device = torch.cuda.get_device_properties(distributed.get_device())
    found = device.total_memory / 2 ** 30
    if wanted > found:
        raise ValueError(
            f"this run wants about {wanted:.0f} GiB of GPU memory (by arithmetic), the {device.name} has "
            f"{found:.0f}: {'; '.join(savings(run_config, config))}")


def saves_memory(run_config, config):
    """Whether gradient checkpointing needs less memory: without it ADT recomputes whole calls."""
    gib = []
    for checkpointing in (True, False):
        estimate = load_estimate({**run_config, "gradient_checkpointing": checkpointing})
        gib.append(expected_gib(estimate, config, estimate["resolution"]))
    return gib[0] < gib[1]


def savings(run_config, config):
    """What would need less memory."""
    ways = []
    if not run_config["gradient_checkpointing"] and saves_memory(run_config, config):
        ways.append("leave out --no-gradient-checkpointing")
    if not run_config["lora_rank"]:
        ways.append("train LoRA adapters (without --full)")
    if config.batch_size > 1:
        accumulation = config.batch_size * config.gradient_accumulation_steps
        ways.append(f"--set batch_size=1 --set gradient_accumulation_steps={accumulation}")
    return [*ways, "a smaller --resolution", "several GPUs with torchrun and --fsdp"]


def matmul_tflops(device, dtype, side=8192, repeats=4):
    """The speed of matrix products on a device, TFLOP/s, measured in about a tenth of a second on a GPU."""
    side = side if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        b = a @ a
        b[0, 0].item()                                                 # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * side ** 3 / min(times) / 1e12


def describe_run(run_config, run_dir, trainer):
    """What is trained, on what, at which cost, and what will be written -> text of a few lines."""
    model, config = trainer.model, trainer.config
    num_trained = sum(param.numel() for param in trainer.g_params)
    num_all = sum(param.numel() for param in model.network.parameters())
    what = f"LoRA adapters of rank {model.lora_rank}" if model.lora_rank else "all weights"
    images_per_step = config.batch_size * trainer.num_micro_batches
    size = trainer.dataset.split_sizes["train"]
    device = distributed.get_device()
    dtype = run_config["precision"] or precision.default_precision()
    machine = "CPU"
    if device.type == "cuda":
        free, total = (n / 2 ** 30 for n in torch.cuda.mem_get_info())
        machine = f"{torch.cuda.get_device_name()}, {total:.0f} GiB, {free:.0f} free"
    source = run_config["pretrained"] or MODEL_FAMILIES[run_config["model"]][2]
    lines = [f"model    {run_config['model']} from {source}, {model.resolution} px, {what}: "
             f"{num_trained / 1e6:.1f} of {num_all / 1e6:.0f} M",
             f"data     {trainer.dataset.name}: {'streamed' if size is None else f'{size:,} images'}; "
             f"{images_per_step} images a step ({config.batch_size} x {config.gradient_accumulation_steps} x "
             f"{run_config['world_size']} processes)",
             f"machine  {machine}, {dtype}",
             f"cost     {expected_cost(run_config, trainer, device, dtype)}",
             f"writes   {run_dir}: samples every {run_config['eval_every']} steps, "
             f"{'a LoRA file' if model.lora_rank else 'a pipeline folder'}, a model card (README.md)"]
    return "\n".join(lines)


def expected_cost(run_config, trainer, device, dtype):
    """Memory and time of the run as far as estimates.json knows them, as text."""
    num_steps = trainer.total_steps - trainer.step
    estimate = load_estimate(run_config)
    is_full_size = sum(param.numel() for param in trainer.model.network.parameters()) > 10 ** 8
    if estimate is None or not is_full_size:
        return f"{num_steps:,} steps; no estimate for this network"
    config, resolution = trainer.config, trainer.model.resolution
    gib = expected_gib(estimate, config, resolution, run_config["world_size"], run_config["fsdp"])
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    num_images = config.batch_size * config.gradient_accumulation_steps
    pixels = (resolution / estimate["resolution"]) ** 2
    seconds = num_images * estimate["tflop"] * pixels / matmul_tflops(device, torch_dtype)
    hours = seconds * num_steps / 3600
    return (f"about {gib:.0f} GiB, at least {seconds:.2g} s a step and {hours:.2g} h for {num_steps:,} steps "
            "(by arithmetic, from this device's speed of matrix products)")
