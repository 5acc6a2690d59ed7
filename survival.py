"""What a run keeps on disk, and how it goes on: the folder, the checkpoint, the log, the signals.

A file is written beside its name and renamed when it is whole, so a kill, a full disk or a power cut leaves
the one before. A checkpoint holds everything that the next step depends on; what is random follows from the
step's number (train.Run.dice). What is read back is checked before any of it is believed.
Read next: train.py"""

import json
import math
import os
import pickle
import shutil
import signal
import time
import warnings
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError

import parallel

PLAN = {"method": str, "model": str, "data": str, "weights": str | None, "features": str | None,
        "size": int | None, "lora": int, "lean": bool, "shard": bool, "on_nan": str, "world": int,
        "seed": int, "steps": int, "set": list}
PRODUCTS = ("checkpoint.pt", "log.jsonl", "result.json", "table.md", "curves.png", "before_after.png",
            "samples_*.png", "denoiser.safetensors", "pytorch_lora_weights.safetensors", "pipeline",
            "scheduler", "use.md", "*.part")
# what reading a file that torch.save did not write, or wrote of something else, may raise
DAMAGE = (RuntimeError, LookupError, TypeError, AttributeError, ValueError, EOFError, pickle.UnpicklingError)


# ----------------------------------------------------------------------------------------- files and folder

@contextmanager
def whole(path):
    """Yields where to write a file or a folder; when that is done, it gets its name. All or nothing: nobody
    ever meets half of it."""
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    try:
        yield partial
        for part in [partial, *partial.rglob("*")]:
            sync(part)                                       # on the disk before it gets its name
        if path.is_dir():
            path.rename(old := path.with_name(path.name + ".old.part"))
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.replace(path)
        sync(path.parent)
    finally:
        remove(partial)


def sync(path):
    """Out of the system's memory, onto the disk; not every file system does that for a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(handle)


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write(path, text):
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_plan(path):
    """A run's config.json, checked."""
    later = {"weights": None, "features": None, "size": None, "lora": 0, "lean": False, "shard": False,
             "on_nan": "stop", "world": 1}
    try:
        plan = later | json.loads(Path(path).read_text())
        if not all(isinstance(plan[key], kind) for key, kind in PLAN.items()):
            raise TypeError
        if not all(isinstance(change, str) for change in plan["set"]):
            raise TypeError
        settings = {key: value for key, (value, _) in plan.get("config", {}).items()}
        return {key: plan[key] for key in PLAN} | {"rows": plan.get("rows"), "config": settings}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is not the config.json of a run of this program") from None


def check_free(out, plan, overwrite):
    """Whether the run may have the folder `out`; ValueError if not."""
    if not out.exists() or out.is_dir() and all(path.suffix == ".part" for path in out.iterdir()):
        return
    if not (out / "config.json").is_file():
        raise ValueError(f"--out {out} holds something else than a run: choose another folder")
    read_plan(out / "config.json")
    if not overwrite and not (out / "checkpoint.pt").is_file():
        raise ValueError(f"{out} holds a run that was stopped before it saved anything: "
                         "--overwrite starts it anew, --out names another folder")
    if not overwrite:
        raise ValueError(f"{out} already holds a run: --resume {out} continues it, "
                         "--overwrite replaces it, --out names another folder")
    for key in ("weights", "features", "data"):
        if plan[key] and Path(plan[key]).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--{key} {plan[key]} lies in the run that would be replaced")


def settle_in(out, plan, sources, resumed):
    """Make the run folder: config.json, and nothing left of a run that is being replaced. That one is given
    up with its checkpoint; until config.json is the new run's, --overwrite still knows the folder for one."""
    if parallel.rank() > 0:
        return
    out.mkdir(parents=True, exist_ok=True)
    if not resumed:
        remove(out / "checkpoint.pt")
    write(out / "config.json", json.dumps({**plan, "config": sources}, indent=1))
    if not resumed:
        for old in [path for pattern in PRODUCTS for path in out.glob(pattern)]:
            remove(old)


# -------------------------------------------------------------------------------------------------- the log

def rows_of(path, done=math.inf, most=None):
    """The rows of a log that belong to steps before `done`, up to the first line that a full disk or a power
    cut left unfinished. most: of a long log about so many, evenly spread, however long it is."""
    rows = {}
    with suppress(FileNotFoundError, ValueError, RecursionError, TypeError, KeyError), open(path) as file:
        every = 1 if most is None else path.stat().st_size // (most * max(len(file.readline()), 1)) + 1
        file.seek(0)
        for line in islice(file, 0, None, every):
            row = json.loads(line)
            if row["step"] < done and row["seconds"] >= 0:
                rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


class Log:
    """log.jsonl: every row as it comes, before every checkpoint all of them for sure. Process 0 writes."""

    def __init__(self, path, done):
        self.path, self.fresh = path, []
        self.rows = rows_of(path, done)                      # what came after the checkpoint happens again
        if parallel.rank() == 0:
            write(path, "".join(json.dumps(row) + "\n" for row in self.rows))
            if len(self.rows) < done:
                print(f"{path}: the rows of {done - len(self.rows)} of its {done} steps are lost")
            self.file = open(path, "r+b", buffering=0)
            self.mark = self.file.seek(0, os.SEEK_END)       # so far it is on the disk

    def add(self, row, keep):
        """One more. In memory the last `keep` stay; the file knows the others."""
        self.rows = [*self.rows[1 - keep:], row]
        if parallel.rank() == 0:
            self.fresh.append(json.dumps(row) + "\n")
            self.file.write(self.fresh[-1].encode())

    def settle(self):
        """Whatever a full disk may have swallowed meanwhile is written again; OSError if it is still full."""
        self.file.seek(self.mark)
        self.file.truncate()
        text = "".join(self.fresh).encode()
        if self.file.write(text) < len(text):
            raise OSError("no space left for log.jsonl")
        os.fsync(self.file.fileno())
        self.mark, self.fresh = self.file.tell(), []


# ----------------------------------------------------------------------------------------------- checkpoints

def save(run, out, facts, log):
    """One checkpoint with everything, and the result in a form that others load (a pipeline at the end).
    OSError, in every process, and the checkpoint before is as it was, where the disk does not take it;
    ArithmeticError where a step was so long that its weights are no numbers any more."""
    moments = [v for opt in (run.opt_g, run.opt_d) for row in opt.state.values() for v in row.values()]
    if parallel.agree(not all(parallel.mine(w).isfinite().all() for w in
                              [*run.weights, *run.average, *run.critic_weights, *moments])):
        raise ArithmeticError(f"step {run.done}: the weights are no numbers any more")
    state = run.state()
    def checkpoint():
        if parallel.rank() == 0:
            log.settle()
            with whole(out / "checkpoint.pt") as partial:
                torch.save(state, partial)
    def result():
        with run.averaged() as model:
            model.keep(out, steps=run.done, **facts)
    for write_it in [checkpoint, *([result] if run.done == run.steps or run.light else [])]:
        trouble = None
        try:
            write_it()
        except (OSError, RuntimeError, SafetensorError) as error:            # each writer has its own
            trouble = error
        if parallel.agree(trouble is not None):
            what = "the checkpoint" if write_it is checkpoint else "the result"
            why = str(trouble or "process 0 could not")[:200]
            raise OSError(f"cannot write {what} of step {run.done} ({why})")
        run.saved = run.done


def sound(run, state):
    """What torch would take on trust: a checkpoint of this very run, whose moments have the shapes of their
    weights (fused AdamW does not look), and all of it numbers. RuntimeError with what is wrong."""
    if state["of"] != run.of:
        raise RuntimeError(f"it is of {' '.join(map(str, state['of']))}"[:70])
    if not all(type(state[name]) is int and state[name] >= 0 for name in ("done", "skipped", "warmup")):
        raise RuntimeError("its numbers of steps are none")
    if [w.shape for w in run.weights + run.average] != [w.shape for w in state["weights"] + state["average"]]:
        raise RuntimeError("it holds another network's weights")
    for name, own in (("opt_g", run.weights), ("opt_d", run.critic_weights)):
        for i, moments in state[name]["state"].items():
            if moments.keys() != {"step", "exp_avg", "exp_avg_sq"} or any(
                    value.shape != (() if key == "step" else own[i].shape) or not value.is_floating_point()
                    for key, value in moments.items()):
                raise RuntimeError(f"{name} belongs to other weights")
    learned = [state["weights"], state["average"], state["critic"].values(),
               *(row.values() for name in ("opt_g", "opt_d") for row in state[name]["state"].values())]
    if not all(value.isfinite().all() for values in learned for value in values):
        raise RuntimeError("what it learned is no numbers")


def resume(run, out):
    """Bring a run to where its checkpoint in `out` was written; ValueError if it cannot be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # torch has opinions on strangers' pickles
            state = torch.load(out / "checkpoint.pt", weights_only=True, map_location="cpu",
                               mmap=torch.cuda.is_available())               # many processes, one copy
        sound(run, state)
        run.restore(state)
    except DAMAGE as error:
        alien = isinstance(error, pickle.UnpicklingError)
        why = "it holds more than tensors" if alien else str(error).split("\n")[0][:80]
        raise ValueError(f"{out}/checkpoint.pt is damaged or another run's ({why})") from None
    if run.done > run.steps:
        raise ValueError(f"{out} is at step {run.done} already: --steps {run.steps} lies behind it")


# --------------------------------------------------------------------------------------------------- signals

@contextmanager
def patience():
    """Ctrl-C and SIGTERM wait for the end of the step: yields a list that then is no longer empty. The second
    Ctrl-C does not wait; of several processes, one within a second is the first, passed on by torchrun."""
    asked = []
    def hear(number, _):
        if number == signal.SIGINT and asked and (parallel.world() == 1 or time.time() - asked[0] > 1):
            os._exit(130)
        asked.append(time.time())
    kept = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
