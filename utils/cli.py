"""The command line of train.py -> run_config, everything that config.json keeps besides the settings.

Read next: utils/checkpoint.py"""

import argparse
import re
import shlex
from pathlib import Path

from utils import checkpoint, distributed, hub_data, precision
from utils.batch import check_num_samples

EVAL_SAMPLES = 2000                    # images per row of the final table
MIN_EVAL_SAMPLES = 200                 # fewer give no Frechet distance
EVAL_EVERY, EVAL_EVERY_LARGE = 50, 100  # steps between two sample grids; of Stable Diffusion
SAVE_EVERY, SAVE_EVERY_LARGE = 1, 15   # minutes between two checkpoints; of Stable Diffusion
# what a resumed run may change; everything else stays as it was
CHANGEABLE = ("steps", "on_nan", "eval_every", "save_every", "report_to", "keep_checkpoints", "push_to_hub")


def make_parser(description, methods, models):
    """The command line of train.py. An option that is not given is None, so that a resumed run can tell.
    methods: {name: config.Method}; models: names."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    lengths = ", ".join(f"{name} {method.default_steps} (Stable Diffusion {method.large_steps})"
                        for name, method in methods.items())
    parser.add_argument("--method", help=f"{', '.join(methods)} (default: {next(iter(methods))})")
    parser.add_argument("--model", help=f"{', '.join(models)} (default: tiny)")
    parser.add_argument("--recipe", help="paper: the method as published (default); tuned: with the changes "
                        "that gave better images here")
    parser.add_argument("--data", help="glyphs (default), glyphs:FAMILY,FAMILY (letters in these fonts: sans,"
                        " serif, roman, typewriter), fashion, a folder of captioned images, a data set's hub "
                        "id (OWNER/NAME or OWNER/NAME@SPLIT), or WebDataset shards "
                        "('shards/{000..012}.tar') (default of Stable Diffusion: a small set from the hub); "
                        "with --resume: the place to which the run's own data was moved")
    parser.add_argument("--random-flip", action="store_true", default=None, help="mirror half of the "
                        "training images (not where captions say left or right, or for text)")
    parser.add_argument("--random-crop", action="store_true", default=None,
                        help="cut the training squares anywhere, not from the middle")
    parser.add_argument("--pretrained", metavar="PATH", help="initial weights: a file or a run folder; for "
                        "Stable Diffusion a diffusers folder, a .safetensors file or a hub id (default: the "
                        "shipped or public ones)")
    parser.add_argument("--backbone", metavar="PATH", help="folder or hub id of the discriminator's frozen "
                        "network (default: the shipped one; Stable Diffusion: facebook/dinov2-small)")
    parser.add_argument("--seed", type=int, help="random seed (default: 0)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="change a setting; --set help lists all of them")
    add_large_model_arguments(parser.add_argument_group("Stable Diffusion"), methods)
    group = parser.add_argument_group("the run")
    group.add_argument("--steps", type=int, help="length of the whole run, also when resumed (default: "
                       f"{lengths})")
    group.add_argument("--output-dir", help="run folder (default: runs/METHOD-MODEL-DATA-SETTINGS-SEED)")
    group.add_argument("--resume", metavar="DIR", help="continue the run in DIR with its own settings")
    group.add_argument("--allow-data-change", action="store_true", default=None,
                       help="with --resume: accept a data set that differs from the one at the start")
    group.add_argument("--overwrite", action="store_true", default=None,
                       help="replace a run that is already in the run folder")
    group.add_argument("--on-nan", choices=["stop", "skip"], help="at a loss or gradient that is not "
                       "finite: stop the run (default), or skip the update and count it")
    group.add_argument("--eval-every", type=int, metavar="STEPS", help="steps between two grids of samples "
                       f"(default: {EVAL_EVERY}; Stable Diffusion {EVAL_EVERY_LARGE})")
    group.add_argument("--save-every", type=float, metavar="MINUTES", help="between two checkpoints, from "
                       f"which --resume goes on (default: {SAVE_EVERY}; Stable Diffusion {SAVE_EVERY_LARGE})")
    group.add_argument("--eval-samples", type=int, help="images per row of the final table (default: "
                       f"{EVAL_SAMPLES}; Stable Diffusion has none); 0: neither table nor before_after.png")
    group.add_argument("--validation-prompt", action="append", metavar="TEXT", dest="prompts",
                       help="caption of the grids of samples, may be repeated (default: from the data)")
    group.add_argument("--prompts", metavar="FILE", dest="prompts_file",
                       help="captions of the grids of samples from a text file, one a line")
    group.add_argument("--keep-checkpoints", type=int, metavar="N", help="at every grid of samples also keep "
                       "the weights of that step, the last N of them, in step_STEPS folders (default: 0)")
    group.add_argument("--processes", type=int, metavar="N", help="processes that share each batch, started "
                       "here; for the tiny model on a CPU (default: 2 where there are two cores; "
                       "OMP_NUM_THREADS limits the cores)")
    group.add_argument("--report-to", choices=["tensorboard", "wandb"],
                       help="send losses and samples there as well (an optional package)")
    group.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the result to this model "
                       "repository at the end (after `hf auth login`)")
    return parser


def add_large_model_arguments(group, methods):
    ranks = ", ".join(f"{name} {method.lora_rank}" for name, method in methods.items())
    group.add_argument("--lora-rank", type=int, metavar="RANK",
                       help=f"rank of the LoRA adapters that are trained (default: {ranks})")
    targets = ", ".join(f"{name} {method.lora_targets}" for name, method in methods.items())
    group.add_argument("--lora-targets", choices=["attention", "all"], help="layers that get adapters: those "
                       f"of the attention, or all but the outermost (default: {targets})")
    group.add_argument("--full", action="store_true", default=None,
                       help="train all weights of the network instead of LoRA adapters")
    group.add_argument("--resolution", type=int, help="pixels, both sides (default: the checkpoint's own, "
                       "512 at most for ADD and for ADT on SDXL)")
    group.add_argument("--aspect-buckets", action="store_true", default=None, help="train images at a shape "
                       "near their own, of about as many pixels, instead of cutting squares")
    group.add_argument("--cache-latents", action="store_true", default=None, help="encode the training "
                       "images once and keep their latents on disk")
    group.add_argument("--vae", metavar="PATH", help="another VAE: a diffusers folder or hub id")
    group.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                       help="recompute every block in the backward pass to save memory (default: yes)")
    group.add_argument("--precision", choices=precision.PRECISIONS,
                       help="number format of network calls (default: the best in hardware)")
    group.add_argument("--compile", action="store_true", default=None, help="torch.compile the network: "
                       "minutes at the start, faster steps afterwards; for the tiny model, too")
    group.add_argument("--fsdp", action="store_true", default=None,
                       help="with torchrun: shard the weights over all processes (FSDP2)")


def num_eval_samples(wanted, split_sizes):
    """How many images the final table measures: --eval-samples, or by default what a small data set has, and
    0 if that is too little for a Frechet distance. ValueError if --eval-samples is impossible. split_sizes:
    of the data set; None is endless."""
    if wanted:
        check_num_samples(wanted, split_sizes)
    if wanted is not None:
        return wanted
    test_size = split_sizes["test"]
    max_samples = test_size // 2 if test_size else EVAL_SAMPLES
    num_samples = min(EVAL_SAMPLES, max_samples)
    return num_samples if num_samples >= MIN_EVAL_SAMPLES else 0


def evaluation_command(run_config, run_dir):
    """The command that compares a finished run with the model that it started from."""
    command = f"python evaluate.py base {shlex.quote(str(run_dir))}"
    if run_config["model"] == "tiny":
        return command
    options = ["--model", run_config["model"], "--resolution", str(run_config["resolution"])]
    if run_config["pretrained"]:
        options += ["--pretrained", run_config["pretrained"]]
    if not any(settings.get("stochasticity") for _, settings in run_config["sampling_configs"]):
        options += ["--steps", "10,50"]                                # a student has its own, few steps
    return (f"{command} {shlex.join(options)} --data HELD_OUT_IMAGES --dinov2 facebook/dinov2-large --clip "
            "openai/clip-vit-large-patch14")


def save_interval_s(run_config):
    """Seconds between two checkpoints."""
    minutes = SAVE_EVERY if run_config["model"] == "tiny" else SAVE_EVERY_LARGE
    return 60 * (run_config["save_every"] or minutes)


def resume_command(run_dir, world_size):
    launcher = f"torchrun --nproc-per-node {world_size}" if world_size > 1 else "python"
    return f"{launcher} train.py --resume {shlex.quote(str(run_dir))}"


def default_run_dir(run_config):
    """runs/METHOD-RECIPE-MODEL-DATA-SETTINGS-SEED with what a file name can hold; -full: no LoRA."""
    parts = [run_config["method"]]
    if run_config["recipe"] != "paper":
        parts.append(run_config["recipe"])
    if run_config["model"] != "tiny":
        parts.append(run_config["model"])
        parts += [] if run_config["lora_rank"] else ["full"]
    parts += [Path(run_config["data"]).resolve().name, *run_config["overrides"]]
    name = "-".join(re.sub(r"[^\w.=+-]+", "_", part) for part in parts)
    return Path("runs") / f"{checkpoint.short_file_name(name, 170)}-seed{run_config['seed']}"


def resolve_run_config(args, methods, models, default_data):
    """What to run and where -> run_config (the fields of checkpoint.RUN_CONFIG_TYPES), run_dir. A resumed run
    keeps its own settings except CHANGEABLE. default_data: name of the data set of the tiny and of a large
    model. ValueError or FileNotFoundError with one sentence."""
    if args.resume:
        run_config, run_dir = resumed_run_config(args)
    else:
        run_config = new_run_config(args, methods, models, default_data)
        run_dir = Path(args.output_dir) if args.output_dir else default_run_dir(run_config)
    if run_config["method"] not in methods:                            # in the config.json of a resumed run
        raise ValueError(f"unknown method '{run_config['method']}': wanted {', '.join(methods)}")
    if args.eval_samples is not None and not 0 <= args.eval_samples <= 10 ** 6:
        raise ValueError(f"--eval-samples {args.eval_samples}: wanted 0 to a million")
    if run_config["model"] == "tiny" and 0 < (args.eval_samples or 0) < MIN_EVAL_SAMPLES:
        raise ValueError(f"--eval-samples {args.eval_samples}: a Fréchet distance of 128 features needs "
                         f"{MIN_EVAL_SAMPLES} or more; 0 measures nothing")
    if run_config["model"] != "tiny" and args.eval_samples:
        raise ValueError(f"--eval-samples {args.eval_samples}: a run of Stable Diffusion ends with images "
                         "and has no table; evaluate.py measures its result (0 leaves out the images, too)")
    for name in CHANGEABLE:
        if getattr(args, name) is not None:
            run_config[name] = getattr(args, name)
    for name, minimum in (("steps", 1), ("eval_every", 1), ("keep_checkpoints", 0)):
        if run_config[name] < minimum:
            raise ValueError(f"--{name.replace('_', '-')} {run_config[name]}: wanted {minimum} or more")
    if run_config["save_every"] is not None and not 0 < run_config["save_every"] < float("inf"):
        raise ValueError(f"--save-every {run_config['save_every']:g}: wanted a number of minutes above 0")
    repository = run_config["push_to_hub"]
    if repository and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"--push-to-hub {repository}: wanted OWNER/NAME of a model repository")
    return run_config, run_dir


def check_options(args, methods, models):
    """ValueError for options of a new run that are wrong or exclude each other."""
    if args.method not in (None, *methods):
        raise ValueError(f"unknown method '{args.method}': wanted {', '.join(methods)}")
    if args.recipe not in (None, "paper", "tuned"):
        raise ValueError(f"unknown recipe '{args.recipe}': wanted paper or tuned")
    if args.model not in (None, *models):
        raise ValueError(f"unknown model '{args.model}': wanted {', '.join(models)}")
    for name in ("lora_rank", "lora_targets", "gradient_checkpointing", "full", "vae"):
        if args.model in (None, "tiny") and getattr(args, name):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is for Stable Diffusion: the tiny model is trained as a whole")
    if args.model in (None, "tiny") and args.aspect_buckets:
        raise ValueError("--aspect-buckets is for Stable Diffusion: the tiny model's images are squares")
    if args.model in (None, "tiny") and args.cache_latents:
        raise ValueError("--cache-latents is for Stable Diffusion: the tiny model has no VAE")
    if args.cache_latents and args.random_crop:
        raise ValueError("--cache-latents and --random-crop exclude each other: a new crop has a new latent; "
                         "leave out one of them")
    if args.full and args.lora_rank:
        raise ValueError("--full trains all weights, --lora-rank adapters: leave out one of them")
    if args.allow_data_change:
        raise ValueError("--allow-data-change is for a run that goes on with --resume: leave it out")
    if args.resolution is not None and args.resolution < 1:
        raise ValueError(f"--resolution {args.resolution}: wanted a number of pixels")
    if args.lora_rank is not None and args.lora_rank < 1:
        raise ValueError(f"--lora-rank {args.lora_rank}: wanted 1 or more")
    if not 0 <= (args.seed or 0) < 2 ** 63:
        raise ValueError(f"--seed {args.seed}: wanted 0 to 2^63 - 1")
    precision.check_precision(args.precision, args.fsdp)


def wants_settings_help(args, methods, models):
    """Whether --set help was given; ValueError if method or model are unknown then."""
    if "help" not in args.overrides:
        return False
    check_options(args, methods, models)
    return True


def new_run_config(args, methods, models, default_data):
    check_options(args, methods, models)
    method_name, model_name = args.method or next(iter(methods)), args.model or "tiny"
    method, is_large = methods[method_name], model_name != "tiny"
    default_data_tiny, default_data_large = default_data
    if is_large:
        data, steps, eval_every = default_data_large, method.large_steps, EVAL_EVERY_LARGE
    else:
        data, steps, eval_every = default_data_tiny, method.default_steps, EVAL_EVERY
    checkpointing = args.gradient_checkpointing
    run_config = {
        "method": method_name, "recipe": args.recipe or "paper", "model": model_name,
        "data": args.data or data, "pretrained": args.pretrained, "backbone": args.backbone,
        "vae": args.vae, "resolution": args.resolution,
        "random_flip": bool(args.random_flip), "random_crop": bool(args.random_crop),
        "aspect_buckets": bool(args.aspect_buckets), "cache_latents": bool(args.cache_latents),
        "lora_rank": initial_lora(args, "lora_rank", method) if is_large and not args.full else 0,
        "lora_targets": initial_lora(args, "lora_targets", method) if is_large else "attention",
        "gradient_checkpointing": is_large if checkpointing is None else checkpointing,
        "precision": args.precision, "compile": bool(args.compile), "fsdp": bool(args.fsdp),
        "world_size": distributed.get_torchrun_size(), "batch_parts": 1, "seed": args.seed or 0,
        "overrides": args.overrides, "prompts": read_prompts(args), "on_nan": "stop",
        "eval_every": eval_every, "save_every": None, "keep_checkpoints": 0, "report_to": None,
        "push_to_hub": None, "steps": steps}
    run_config["data"] = hub_data.absolute_name(run_config["data"])    # a resume may come from another folder
    for key in ("pretrained", "backbone", "vae"):
        if run_config[key] and Path(run_config[key]).exists():
            run_config[key] = str(Path(run_config[key]).resolve())
    return run_config


def initial_lora(args, key, method):
    """lora_rank or lora_targets: the option, or that of the adapters in the run that --pretrained names, or
    the method's default."""
    default, wanted = getattr(method, key), getattr(args, key)
    pretrained_config = Path(args.pretrained or "", "config.json")
    if wanted or not args.pretrained or not pretrained_config.is_file():
        return wanted or default
    if (pretrained_config.parent / "model_index.json").is_file():      # not a run
        return default
    initial = checkpoint.load_run_config(pretrained_config)
    return initial[key] if initial["lora_rank"] else default


def read_caption_file(path, option):
    """The lines of a text file that are not empty. ValueError with the name of the option."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} {path}: wanted a text file in UTF-8 with a caption per line, could not "
                         f"read it ({error})") from None
    return [line.strip() for line in lines if line.strip()]


def read_prompts(args):
    """Captions of --validation-prompt and --prompts -> list, [] without."""
    prompts = list(args.prompts or [])
    if args.prompts_file:
        prompts += read_caption_file(args.prompts_file, "--prompts")
    if args.prompts_file and not prompts:
        raise ValueError(f"--prompts {args.prompts_file}: wanted a caption a line, found none")
    if len(prompts) > 64:
        raise ValueError(f"{len(prompts)} validation prompts: wanted 64 at most")
    return prompts


def may_be_moved(args, run_config):
    """Whether --data of a resumed run may name a new place of its data: TrainingState.resume compares them.
    The built-in data sets have no place, and bring their own networks."""
    return not (hub_data.is_built_in(run_config["data"]) or hub_data.is_built_in(args.data or ""))


def resumed_run_config(args):
    run_dir = Path(args.resume)
    if not (run_dir / "checkpoint.pt").is_file():
        raise FileNotFoundError(f"--resume {run_dir}: wanted a run folder with checkpoint.pt, found none")
    run_config = checkpoint.load_run_config(run_dir / "config.json")
    free = [*CHANGEABLE, "world_size", "batch_parts", *(["data"] if may_be_moved(args, run_config) else [])]
    for key in ["output_dir", "overwrite", "full", "prompts_file", *checkpoint.RUN_CONFIG_TYPES]:
        if key in free:
            continue
        if getattr(args, key) not in (None, [], run_config.get(key)):
            options = {"overrides": "set", "prompts": "validation-prompt", "prompts_file": "prompts"}
            option = options.get(key, key).replace("_", "-")
            raise ValueError(f"--resume keeps a run's own settings: leave out --{option}")
    if args.data:
        run_config["data"] = hub_data.absolute_name(args.data)
    if run_config["world_size"] != distributed.get_torchrun_size():
        raise ValueError(f"{run_dir} is a run of {run_config['world_size']} process(es), not "
                         f"{distributed.get_torchrun_size()}: "
                         f"{resume_command(run_dir, run_config['world_size'])}")
    return run_config, run_dir
