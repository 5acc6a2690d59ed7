"""Which of two models do people prefer? A web page with pairs of images, two questions, votes, Elo ratings.

    python -m scripts.user_study base add --data fashion --steps 50,1 --prompts-file captions.txt
    python -m scripts.user_study --count votes-*.json

The first command writes one HTML file that needs no server. It shows each pair twice, once for image
quality and once for agreement with the caption, in random order and on random sides, and saves the votes as
JSON. The second command counts the saved files.

    P(i beats j) = 1 / (1 + 10^((R_j - R_i) / 400)),   ratings R by maximum likelihood (Bradley, Terry 1952)
"""

import argparse
import base64
import hashlib
import io
import json
import signal
import sys
from pathlib import Path

if __name__ == "__main__":    # the imports take seconds: Ctrl-C ends them without a traceback, too
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import torch

import evaluate
from models.loading import MODEL_FAMILIES
from models.named import load_named_models
from utils import arguments, distributed, plotting
from utils.checkpoint import atomic_write_text
from utils.cli import read_caption_file
from utils.failures import clear_exit, start_program

QUESTIONS = ("quality", "prompt")
BOOTSTRAP_SAMPLES = 1000


# --------------------------------------------------------------------------------------------------- the page

def png_data_uri(image):
    """(3, H, W) in [-1, 1] -> a data: URI of its PNG."""
    png = io.BytesIO()
    plotting.to_pil(image).save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def render_page(names, captions, images):
    """Two model names, n captions, two tensors (n, 3, H, W) -> the study as one HTML text."""
    pairs = [{"caption": caption, "a": png_data_uri(a), "b": png_data_uri(b)}
             for caption, a, b in zip(captions, *images)]
    study_id = hashlib.sha256(json.dumps([names, pairs]).encode()).hexdigest()[:12]
    study = json.dumps({"id": study_id, "a": names[0], "b": names[1], "pairs": pairs})
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return template.replace("/* STUDY */", study.replace("<", "\\u003c"))     # no caption can end the script


def read_prompts(path):
    """A text file with one caption per line -> the captions; empty lines are skipped."""
    captions = read_caption_file(path, "--prompts-file")
    if not captions:
        raise ValueError(f"--prompts-file {path}: wanted one caption per line, found none")
    return captions


def write_page(args):
    """Sample both models with the captions of --prompts-file and write the page. -> its number of pairs."""
    arguments.check_sampling_arguments(args, output_suffix=".html")
    captions = read_prompts(args.prompts_file)
    loaded = load_named_models(args.models, evaluate.PRETRAINED, args.data, args.model, args.pretrained,
                               args.resolution)
    model_of = dict(zip(dict.fromkeys(args.models), loaded))         # one model may be compared with itself
    steps_of_models = args.steps.split(",") if args.steps else [None, None]
    names, images = [], []
    for name, steps in zip(args.models, steps_of_models):
        item = model_of[name]
        own_args = argparse.Namespace(**{**vars(args), "steps": steps})
        num_steps, settings = evaluate.possible_configs(item, own_args)[0]
        item.model.to(distributed.get_device())
        item.model.precompute_prompt_embeds(["", *captions])
        batches = evaluate.sample_batches(item.model, captions, num_steps, seed=args.seed, **settings)
        images.append(torch.cat(list(plotting.show_progress(batches, len(captions), f"sampling {name}"))))
        names.append(f"{item.group}, {plotting.format_steps(num_steps)}")
    atomic_write_text(args.output, render_page(names, captions, images))
    return len(captions)


# ------------------------------------------------------------------------------------------------- the votes

def read_votes(paths):
    """Files that the page saved -> [(question, winner, loser, score of the winner: 1, or 1/2 in a tie)]. A
    vote that occurs in several files counts once."""
    votes, known = [], set()
    for path in paths:
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            models = {"a": saved["a"], "b": saved["b"]}
            if not all(isinstance(name, str) for name in models.values()):
                raise TypeError
            for vote in saved["votes"]:
                is_tie = vote["winner"] == "tie"
                winner = "a" if is_tie else vote["winner"]
                if vote["question"] not in QUESTIONS or winner not in models:
                    raise ValueError
                loser = "b" if winner == "a" else "a"
                key = saved["id"], saved["rater"], vote["pair"], vote["question"]
                if key not in known:
                    known.add(key)
                    votes.append((vote["question"], models[winner], models[loser], .5 if is_tie else 1.))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"--count {path}: wanted a file of votes that the study's page saved") from None
    if not votes:
        raise ValueError("--count: there are no votes in these files")
    return votes


def bradley_terry_elo(wins):
    """wins (B, M, M): how often model i won against j, in each of B resamplings -> Elo ratings (B, M), mean
    1000.

    Bradley and Terry's iteration increases the likelihood in every step. Each pair that has met gets half a
    win on both sides: without it, a model that never lost would have an infinite rating."""
    has_pair = (wins + wins.mT).mean(0) > 0
    wins = wins + .5 * has_pair
    games = wins + wins.mT
    strength = torch.ones(wins.shape[:2], dtype=torch.double)
    for _ in range(2000):
        expected = games / (strength[:, :, None] + strength[:, None, :])
        strength = wins.sum(2) / expected.sum(2)
        strength = strength / strength.log().mean(1, keepdim=True).exp()
    return 1000 + 400 * strength.log10()


def summarize(votes, seed=0):
    """-> [(question, model, win rate, its 95 % interval, Elo, its 95 % interval)]; the intervals are from
    bootstrap samples of the votes."""
    generator = torch.Generator().manual_seed(seed)
    quantiles = torch.tensor([.025, .975], dtype=torch.double)
    rows = []
    for question in QUESTIONS:
        asked = [vote[1:] for vote in votes if vote[0] == question]
        if not asked:
            continue
        names = sorted({name for winner, loser, _ in asked for name in (winner, loser)})
        vote_matrix = torch.zeros(len(asked), len(names), len(names), dtype=torch.double)
        for matrix, (winner, loser, score) in zip(vote_matrix, asked):
            i, j = names.index(winner), names.index(loser)
            matrix[i, j] = score
            matrix[j, i] = 1 - score
        bootstrap_idx = torch.randint(len(asked), (BOOTSTRAP_SAMPLES, len(asked)), generator=generator)
        counts = torch.zeros(BOOTSTRAP_SAMPLES, len(asked), dtype=torch.double)
        counts.scatter_add_(1, bootstrap_idx, torch.ones_like(counts))
        resampled = torch.einsum("rv,vij->rij", counts, vote_matrix)
        wins = torch.cat([vote_matrix.sum(0, keepdim=True), resampled])       # first the votes themselves
        rates = wins.sum(2) / (wins + wins.mT).sum(2)
        ratings = bradley_terry_elo(wins)
        for m, name in enumerate(names):
            rate_interval = torch.nanquantile(rates[1:, m], quantiles).tolist()
            elo_interval = torch.nanquantile(ratings[1:, m], quantiles).tolist()
            rate, rating = rates[0, m].item(), ratings[0, m].item()
            rows.append((question, name, rate, rate_interval, rating, elo_interval))
    return rows


def format_table(rows):
    """The result of summarize -> Markdown."""
    cells = [(question, name, f"{rate:.1%}", f"{rate_low:.1%} – {rate_high:.1%}",
              f"{elo:.0f}", f"{elo_low:.0f} – {elo_high:.0f}")
             for question, name, rate, (rate_low, rate_high), elo, (elo_low, elo_high) in rows]
    return plotting.markdown_table(["question", "model", "wins", "95 %", "Elo", "95 %"], cells)


# ------------------------------------------------------------------------------------------ the command line

def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="user_study", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_sampling_arguments(parser, evaluate.PRETRAINED, MODEL_FAMILIES)
    parser.add_argument("--prompts-file", metavar="FILE", help="the captions, one per line")
    parser.add_argument("--output", default="study.html", help="the page to write")
    parser.add_argument("--count", nargs="+", metavar="FILE", help="count the votes that such pages saved")
    return parser, parser.parse_args(argv)


def check_args(args):
    """ValueError unless the command line asks for one thing: a page of two models, or the count of votes."""
    if args.count and args.models:
        raise ValueError("--count takes files of votes and no models")
    if not args.count and len(args.models) != 2:
        raise ValueError(f"wanted two models to compare (or --count FILE …), found {len(args.models)}")
    if not args.count and not args.prompts_file:
        raise ValueError("wanted --prompts-file, a text file with one caption per line")
    if args.steps and args.steps.count(",") != 1:
        raise ValueError(f"--steps {args.steps}: wanted two numbers, one for each model, like 50,1")


def main(argv=None):
    parser, args = parse_args(argv)
    with clear_exit(parser, "user_study.py"):
        check_args(args)
        if args.count:
            votes = read_votes(args.count)
            print(format_table(summarize(votes)))
            print(f"\n{len(votes)} votes; a tie counts as half a win for both models")
        else:
            num_pairs = write_page(args)
            print(f"wrote {args.output}: {num_pairs} pairs of images. Open it in a browser, vote, save the "
                  "votes, then: python -m scripts.user_study --count votes-*.json")


if __name__ == "__main__":
    start_program()
    main()
