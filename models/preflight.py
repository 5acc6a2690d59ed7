"""Before a large model is trained: can this machine do it, what will it take, what will be written.

The estimates are computed, not measured: scripts/memory_of_large_models.py builds the networks in full size
without values and counts what a training step allocates and multiplies (estimates.json).
Read next: train.py"""

import json
import time
from pathlib import Path

import torch

from models import hub, pipelines
from models.families import MODEL_FAMILIES, is_hub_id, local_weights
from utils import cli, distributed, precision, report
from utils import config as settings
from utils.plotting import format_number

ESTIMATES = Path(__file__).with_name("estimates.json")
# weights of each U-Net or transformer, in millions
NETWORK_SIZES = {"sd15": 860, "sdxl": 2567, "sd3": 2028, "sd35": 2243, "sd35-large": 8057}


def load_estimate(run_config):
    """The entry of estimates.json for a run, or None: {"resolution": pixels, "fixed_gib": weights, optimiser
    and EMA, "activations_gib": of one image, "tflop": of one image, and of adapters "lora_rank": the rank
    that is in fixed_gib, "gib_per_rank": what a rank more takes}."""
    tuning = "lora" if run_config["lora_rank"] else "full"
    suffix = " checkpointing" if run_config["gradient_checkpointing"] else ""
    key = f"{run_config['method']} {run_config['model']} {tuning}{suffix}"
    return json.loads(ESTIMATES.read_text()).get(key)


def expected_gib(estimate, config, resolution, run_config):
    """Memory of a training step on each device, GiB. run_config: its lora_rank, world_size and fsdp count."""
    fixed = estimate["fixed_gib"]
    if run_config["lora_rank"]:
        fixed += estimate["gib_per_rank"] * (run_config["lora_rank"] - estimate["lora_rank"])
    if run_config["fsdp"]:
        fixed /= run_config["world_size"]
    pixels = (resolution / estimate["resolution"]) ** 2
    return fixed + config.batch_size * estimate["activations_gib"] * pixels


def family_of_size(model_name, num_params):
    """The key of NETWORK_SIZES whose network is that of `model_name` by its class, and that of num_params by
    its size: `--model sd35` may have been given 3.5 large. None for a network of another size."""
    names = [name for name in NETWORK_SIZES if MODEL_FAMILIES[name][0] is MODEL_FAMILIES[model_name][0]]
    name = min(names, key=lambda name: abs(NETWORK_SIZES[name] - num_params / 1e6))
    return name if abs(num_params / 1e6 / NETWORK_SIZES[name] - 1) < .05 else None


def estimate_before_loading(run_config, max_resolution=None):
    """The estimate and the resolution of a run, from what can be known before its weights are loaded: the
    names of weights on the hub, sizes and configs of those on this machine -> estimate or None, pixels."""
    source, model_name = local_weights(run_config["pretrained"]), run_config["model"]
    resolution, component = run_config["resolution"], MODEL_FAMILIES[model_name][0].component_name
    if source is not None:
        model_name = family_of_size(model_name, pipelines.count_network_params(source, component))
        own = pipelines.checkpoint_resolution(*(pipelines.read_config(source, name)
                                                for name in (component, "vae")))
        if own and not resolution:
            resolution = min(own, max_resolution or own)
    estimate = load_estimate({**run_config, "model": model_name})
    return estimate, resolution or (estimate and estimate["resolution"])


def check_run(run_config, config, max_resolution=None):
    """ValueError for what would stop a run later: the machine, --fsdp, --report-to, --push-to-hub.
    max_resolution: the method's, for checkpoints of more pixels."""
    if run_config["fsdp"] and not torch.distributed.is_initialized():
        raise ValueError("--fsdp divides the weights among several processes, and this is one process: start "
                         "them with torchrun --nproc-per-node N train.py …, or leave --fsdp out")
    if run_config["model"] != "tiny":
        check_machine(run_config, config, max_resolution)
    report.check_tracker(run_config["report_to"])
    hub.check_login(run_config["push_to_hub"])


def check_machine(run_config, config, max_resolution=None):
    """ValueError with one sentence if a large model cannot be trained on this machine. Weights in a local
    folder may be trained without a GPU: tiny networks are, and large ones by those who have the time."""
    model_name, pretrained = run_config["model"], run_config["pretrained"]
    is_downloaded = pretrained is None or is_hub_id(pretrained) and not Path(pretrained).exists()
    if not torch.cuda.is_available():
        if not is_downloaded:
            return
        has_mps = torch.backends.mps.is_available()
        found = "an Apple GPU, on which this code was never run" if has_mps else "none"
        raise ValueError(
            f"--model {model_name} wants a GPU with CUDA, found {found}. On this machine the tiny model can "
            f"be trained: python train.py --method {run_config['method']}. (Without a GPU large models are "
            "trained only from a local folder, --pretrained DIR; a step then takes minutes.)")
    estimate, resolution = estimate_before_loading(run_config, max_resolution)
    if estimate is None:
        return
    wanted = expected_gib(estimate, config, resolution, run_config)
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
        gib.append(expected_gib(estimate, config, estimate["resolution"], run_config))
    return gib[0] < gib[1]


def savings(run_config, config):
    """What would need less memory."""
    ways = []
    if not run_config["gradient_checkpointing"] and saves_memory(run_config, config):
        ways.append("leave out --no-gradient-checkpointing")
    if not run_config["lora_rank"]:
        ways.append("train LoRA adapters (without --full)")
    elif run_config["lora_rank"] > load_estimate(run_config)["lora_rank"]:
        ways.append("a smaller --lora-rank")
    if config.batch_size > 1:
        accumulation = config.batch_size * config.gradient_accumulation_steps
        ways.append(f"--set batch_size=1 --set gradient_accumulation_steps={accumulation}")
    return [*ways, "a smaller --resolution", "several GPUs with torchrun and --fsdp"]


def matmul_tflops(device, dtype, side=8192, repeats=4):
    """The speed of matrix products on a device, TFLOP/s, measured in about a tenth of a second on a GPU."""
    side = side if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side ** 3 / shortest_time(lambda: (a @ a)[0, 0], repeats) / 1e12


def shortest_time(job, repeats):
    """Seconds of the quickest of several calls of job, which returns a tensor of one element."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        job().item()                                                   # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def seconds_of_call(model, repeats=3):
    """The time of a network call for one latent, on a GPU mostly that in which Python starts its kernels."""
    x = torch.zeros(1, *model.latent_shape, device=model.alpha.device)
    t, cond = torch.full((1,), model.T // 2, device=x.device), model.encode_prompts([""])
    with model.autocast():                                             # it casts trained weights once
        return shortest_time(lambda: model.predict(x, t, cond).sum(), repeats)


def count_calls(method_name, config, recomputes_blocks):
    """Network calls of a micro-batch that follow each other, on average. A backward pass counts as two: about
    that many kernels."""
    backward = 3 if recomputes_blocks else 2                           # with the forward pass that it repeats
    if method_name == "add":
        return 1 + backward + config.teacher_steps
    if config.lambda_adv == 0:
        return 1 + backward
    if config.checkpoint_rollout:
        backward = 3
    path_length = config.num_inference_steps
    num_graphs = min(config.num_grad_steps, path_length)
    is_repeated = not config.checkpoint_rollout                        # adt.py, rollout_from_batch
    if config.rollout_start == "image":
        num_graphs -= num_graphs * (num_graphs - 1) / (2 * path_length)  # an image that joins late has fewer
        path_length -= (path_length / config.batch_size - 1) / 2       # the first of evenly spread starts
        is_repeated |= recomputes_blocks and config.batch_size > 1
    return 1 + backward + path_length + num_graphs * (is_repeated + backward)


def count(n, singular, plural):
    """'1 image', '2,000 images'."""
    return f"{n:,} {singular if n == 1 else plural}"


def describe_data(run_config, trainer):
    """How many images there are, how many a step takes, and how often the run sees each -> text."""
    config, size = trainer.config, trainer.dataset.split_sizes["train"]
    per_step = config.batch_size * trainer.num_micro_batches
    factors = [f"batch_size {config.batch_size}",
               count(config.gradient_accumulation_steps, "micro-batch", "micro-batches"),
               count(run_config["world_size"], "process", "processes")]
    num_images, seen = "streamed", f"{per_step * trainer.total_steps:,} in all"
    if size is not None:
        num_images = count(size, "image", "images")
        seen = f"{format_number(per_step * trainer.total_steps / size)} epochs in all"
    return (f"{trainer.dataset.name}: {num_images}; {count(per_step, 'image', 'images')} a step "
            f"({' x '.join(factors)}), {seen}")


def describe_run(run_config, run_dir, trainer, method):
    """What is trained, on what, at which cost, and what will be written -> text of a few lines. method: the
    run's config.Method."""
    model, config = trainer.model, trainer.config
    num_trained = sum(param.numel() for param in trainer.g_params)
    num_all = sum(param.numel() for param in model.network.parameters())
    what = f"LoRA adapters of rank {model.lora_rank}" if model.lora_rank else "all weights"
    device = distributed.get_device()
    dtype = run_config["precision"] or precision.default_precision()
    machine = "CPU"
    if device.type == "cuda":
        free, total = (n / 2 ** 30 for n in torch.cuda.mem_get_info())
        machine = f"{torch.cuda.get_device_name()}, {total:.0f} GiB, {free:.0f} free"
    source = run_config["pretrained"] or MODEL_FAMILIES[run_config["model"]][2]
    steps = f"{trainer.total_steps:,}"
    if trainer.step:
        steps += f", {trainer.step:,} of them done"
    if trainer.step < trainer.warmup_steps_d:
        steps += f", the first {trainer.warmup_steps_d} for the discriminator alone"
    save_minutes = cli.save_interval_s(run_config) / 60
    lines = [f"model    {run_config['model']} from {source}, {model.resolution} px, {what}: "
             f"{format_number(num_trained / 1e6)} of {format_number(num_all / 1e6)} M",
             f"data     {describe_data(run_config, trainer)}",
             *(f"buckets  {summary}" for summary in trainer.bucket_metadata().values()),
             f"steps    {steps}; a checkpoint every {save_minutes:g} minutes",
             f"machine  {machine}, {dtype}",
             f"cost     {expected_cost(run_config, trainer, device, dtype)}",
             f"writes   {run_dir}: samples every {run_config['eval_every']} steps, "
             f"{'a LoRA file' if model.lora_rank else 'a pipeline folder'}, a model card (README.md)"]
    notes = [settings.batch_note(method, config, run_config["model"], model.lora_rank > 0,
                                 run_config["world_size"]), *config.warnings(model)]
    return "\n".join([*lines, *(f"note     {note}" for note in notes if note)])


def expected_cost(run_config, trainer, device, dtype):
    """Memory and time of the run as far as estimates.json knows them, as text."""
    num_steps = trainer.total_steps - trainer.step
    num_params = sum(param.numel() for name, param in trainer.model.network.named_parameters()
                     if "lora_" not in name)
    estimate = load_estimate({**run_config, "model": family_of_size(run_config["model"], num_params)})
    if estimate is None:
        return f"{num_steps:,} steps; no estimate for a network of this size"
    config, resolution = trainer.config, trainer.model.resolution
    gib = expected_gib(estimate, config, resolution, run_config)
    num_images = config.batch_size * config.gradient_accumulation_steps
    pixels = (resolution / estimate["resolution"]) ** 2
    tflops = matmul_tflops(device, precision.compute_dtype(dtype))
    bounds = {"matrix products": num_images * estimate["tflop"] * pixels / tflops}
    if not (run_config["fsdp"] or run_config["compile"]):              # all processes call it, or compile it
        num_calls = count_calls(run_config["method"], config, trainer.model.recomputes_blocks)
        bounds["a network call"] = (num_calls * config.gradient_accumulation_steps
                                    * seconds_of_call(trainer.model))
    bound = max(bounds, key=bounds.get)
    seconds, hours = bounds[bound], bounds[bound] * num_steps / 3600
    return (f"about {gib:.0f} GiB, {seconds:.2g} s a step and {hours:.2g} h for {num_steps:,} steps "
            f"(by arithmetic, from this device's speed of {bound})")
