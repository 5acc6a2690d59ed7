"""The arguments that evaluate.py, panel.py and user_study.py share: which models, and how they are sampled.

Read next: evaluate.py"""

from pathlib import Path

from utils import metrics


def add_sampling_arguments(parser, pretrained_names, model_families):
    """pretrained_names: of the models in weights/. model_families: of the large models."""
    parser.add_argument("models", nargs="*", help=f"{', '.join(pretrained_names)} (pretrained; default: "
                        "all), run folders, weights files")
    parser.add_argument("--data", help="as --data of train.py (default: what the run was trained on)")
    parser.add_argument("--model", default="tiny", help=f"of 'base': tiny, {', '.join(model_families)}")
    parser.add_argument("--pretrained", help="large models: diffusers folder or hub id of 'base'")
    parser.add_argument("--resolution", type=int, help="large models: height and width, pixels")
    parser.add_argument("--steps", help="numbers of sampler steps, like 1,2,4,10,50 (default: what the model "
                        "was made for)")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance; 1 is none "
                        "(default: what the model was made for)")
    parser.add_argument("--timestep-shift", type=float, help="above 1: more steps at high noise "
                        "(default: what the model was made for, mostly 1)")
    parser.add_argument("--stochasticity", type=float, help="share of new noise in each step: 0 is DDIM or "
                        "Euler, 1 replaces all noise, which is more than DDIM's eta = 1 (default: what the "
                        "model was made for: 1 for a few-step student, else 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")


def add_measuring_arguments(parser):
    """Of evaluate.py: what is sampled, measured and written."""
    parser.add_argument("--prompt", help="sample eight images of this caption and measure nothing")
    parser.add_argument("--output", default="samples.png", help="the image grid to write")
    parser.add_argument("--save-images", metavar="DIR", help="write the measured images, too")
    parser.add_argument("--eval-samples", type=int, default=2000, help="images to measure per model")
    parser.add_argument("--split", default="test", help="of the captions: test, held_out (glyphs), train")
    parser.add_argument("--all-columns", action="store_true", help="print every metric")
    for name, meaning in metrics.METRIC_MODELS.items():
        parser.add_argument(metrics.flag_of(name), metavar="PATH", help=f"large models: {meaning}")


def check_sampling_arguments(args, output_suffix):
    """ValueError for what is wrong whatever the models are."""
    if args.steps and not all(part.isdecimal() for part in args.steps.split(",")):
        raise ValueError(f"--steps {args.steps}: wanted whole numbers separated by commas, like 4,10,50")
    if args.steps and "0" in args.steps.split(","):
        raise ValueError(f"--steps {args.steps}: a model is sampled in 1 step or more")
    if not 0 <= (args.stochasticity or 0) <= 1:
        raise ValueError(f"--stochasticity {args.stochasticity}: wanted a number from 0 to 1")
    if not 0 <= (args.guidance_scale or 0) < float("inf"):
        raise ValueError(f"--guidance-scale {args.guidance_scale}: wanted a number, 0 or more")
    if args.resolution is not None and args.resolution < 1:
        raise ValueError(f"--resolution {args.resolution}: wanted a number of pixels")
    if not 0 <= args.seed < 2 ** 63 - 1:
        raise ValueError(f"--seed {args.seed}: wanted 0 to 2^63 - 2")
    if args.pretrained and args.model == "tiny":
        raise ValueError("--pretrained is for large models (--model); to use other tiny weights, name their "
                         "file in place of 'base'")
    output = Path(args.output)
    if output.suffix != output_suffix or output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: wanted a file name ending in {output_suffix}, in a folder that "
                         "exists")


def sampling_settings(args):
    """The sampler settings that the command line states -> {setting: value}."""
    names = ("guidance_scale", "timestep_shift", "stochasticity")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def check_new_dir(path, flag):
    """ValueError unless the folder is empty or can be made."""
    path = Path(path)
    if path.is_file() or not path.absolute().parent.is_dir() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{flag} {path}: wanted a new or an empty folder, in a folder that exists")
