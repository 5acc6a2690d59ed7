"""Which one do people prefer? The way ADD was judged: pairs of pictures, two questions, votes into Elo.

    python evaluate.py --study base add --data fashion --prompts captions.txt    writes samples.html
    python evaluate.py --study-results votes-*.json                              what the votes say

The page is one file that asks nothing of a server: send it to whoever has eyes. It shows every pair twice,
for quality and for the caption, in random order and on random sides, and saves its votes as JSON.

    P(i beats j) = 1 / (1 + 10^((R_j - R_i) / 400)),   ratings R by maximum likelihood (Bradley, Terry 1952)
"""

import base64
import hashlib
import io
import json
from pathlib import Path

import torch

QUESTIONS = ("quality", "prompt")


# -------------------------------------------------------------------------------------------- asking

def data_uri(image):
    """(3, H, W) in [-1, 1] -> a PNG inside a link."""
    from PIL import Image
    packed = io.BytesIO()
    Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(packed, "PNG")
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()


def page(names, captions, pictures):
    """Two names, n captions, two (n, 3, H, W) -> the whole study as one HTML file."""
    pairs = [{"caption": caption, "a": data_uri(a), "b": data_uri(b)}
             for caption, a, b in zip(captions, *pictures)]
    digest = hashlib.sha256(json.dumps([names, pairs]).encode()).hexdigest()[:12]
    study = json.dumps({"id": digest, "a": names[0], "b": names[1], "pairs": pairs})
    template = (Path(__file__).parent / "preference.html").read_text(encoding="utf-8")
    return template.replace("/* STUDY */", study.replace("<", "\\u003c"))     # no caption ends the script


def prompts(path):
    """The captions to ask for: a text file, one per line."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path}: wanted a text file with a caption per line ({error})") from None
    if not any(lines):
        raise ValueError(f"--prompts {path}: there is no caption in it")
    return [line for line in lines if line]


# ------------------------------------------------------------------------------------------ counting

def votes(paths):
    """Exported files -> [(question, model that won, model that lost, 1 or, for a tie, 1/2)]. A file that was
    handed in twice counts once."""
    found, seen = [], set()
    for path in paths:
        try:
            one = json.loads(Path(path).read_text(encoding="utf-8"))
            models = {"a": one["a"], "b": one["b"]}
            if not all(isinstance(name, str) for name in models.values()):
                raise TypeError
            for vote in one["votes"]:
                winner = vote["winner"]
                first = "a" if winner == "tie" else winner
                if vote["question"] not in QUESTIONS or first not in models:
                    raise ValueError
                key = one["id"], one["rater"], vote["pair"], vote["question"]
                if key not in seen:
                    seen.add(key)
                    found.append((vote["question"], models[first], models["ab".replace(first, "")],
                                  .5 if winner == "tie" else 1.))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path} is not a file of votes that the study's page saved") from None
    if not found:
        raise ValueError("there are no votes in these files")
    return found


def elo(wins):
    """wins (B, M, M): how often model i won against j, in B resamplings -> ratings (B, M), mean 1000. The
    likelihood is climbed by Bradley-Terry's own iteration, which never overshoots. Half a win is given to
    both sides of every pair that met: who never lost would else be infinitely strong."""
    met = (wins + wins.mT).mean(0) > 0
    wins = wins + .5 * met
    played, strength = wins + wins.mT, torch.ones(wins.shape[:2], dtype=torch.double)
    for _ in range(2000):
        faced = played / (strength[:, :, None] + strength[:, None, :])
        strength = wins.sum(2) / faced.sum(2)
        strength = strength / strength.log().mean(1, keepdim=True).exp()
    return 1000 + 400 * strength.log10()


def results(found, resamplings=1000, seed=0):
    """Votes -> [(question, model, rate of wins, its 95 % interval, Elo, its 95 % interval)]; the intervals by
    drawing the votes anew, with replacement."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for question in QUESTIONS:
        asked = [vote for vote in found if vote[0] == question]
        if not asked:
            continue
        names = sorted({name for _, *pair, _ in asked for name in pair})
        one = torch.zeros(len(asked), len(names), len(names), dtype=torch.double)
        for vote, (_, winner, loser, share) in zip(one, asked):
            i, j = names.index(winner), names.index(loser)
            vote[i, j], vote[j, i] = share, 1 - share
        again = torch.randint(len(asked), (resamplings, len(asked)), generator=generator)
        counts = torch.zeros(resamplings, len(asked), dtype=torch.double)
        counts.scatter_add_(1, again, torch.ones_like(counts))
        wins = torch.cat([one.sum(0, keepdim=True), torch.einsum("rv,vij->rij", counts, one)])
        rates = wins.sum(2) / (wins + wins.mT).sum(2)
        ratings = elo(wins)
        for m, name in enumerate(names):
            bounds = [torch.nanquantile(x[1:, m], torch.tensor([.025, .975], dtype=torch.double)).tolist()
                      for x in (rates, ratings)]
            rows.append((question, name, rates[0, m].item(), bounds[0], ratings[0, m].item(), bounds[1]))
    return rows


def table(rows):
    """-> columns and rows of the table that people read."""
    return (["question", "model", "wins", "95 %", "Elo", "95 %"],
            [(question, name, f"{rate:.1%}", f"{low:.1%} – {high:.1%}",
              f"{rating:.0f}", f"{worst:.0f} – {best:.0f}")
             for question, name, rate, (low, high), rating, (worst, best) in rows])
