"""Files of a run: weights, config.json, checkpoint.pt, log.jsonl, and the signals that stop a run.

Every file is written beside its final name and renamed when it is complete, so a kill, a full disk or a power
cut leaves the previous version intact. A checkpoint holds everything the next step depends on; random numbers
follow from the step's number (train.Trainer.derive_seed). Whatever is read back is validated first.
Read next: train.py
"""

import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import stat
import tempfile
import time
import warnings
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import torch

from utils import distributed
from utils.messages import is_out_of_memory

# config.json: the fields that say what to run, and their types
RUN_CONFIG_TYPES = {"method": str, "recipe": str, "model": str, "data": str, "pretrained": str | None,
                    "backbone": str | None, "vae": str | None, "resolution": int | None, "lora_rank": int,
                    "lora_targets": str,
                    "gradient_checkpointing": bool, "precision": str | None, "compile": bool, "fsdp": bool,
                    "on_nan": str, "world_size": int, "batch_parts": int, "seed": int, "steps": int,
                    "overrides": list, "prompts": list, "eval_every": int, "keep_checkpoints": int,
                    "report_to": str | None, "push_to_hub": str | None, "random_flip": bool,
                    "random_crop": bool, "save_every": float | int | None, "aspect_buckets": bool,
                    "cache_latents": bool}
# of fields that older runs do not have
RUN_CONFIG_DEFAULTS = {"recipe": "paper", "pretrained": None, "backbone": None, "vae": None,
                       "resolution": None, "lora_rank": 0, "lora_targets": "attention",
                       "gradient_checkpointing": False, "precision": None, "compile": False, "fsdp": False,
                       "on_nan": "stop", "world_size": 1, "batch_parts": 1, "prompts": [], "eval_every": 50,
                       "keep_checkpoints": 0, "report_to": None, "push_to_hub": None,
                       "random_flip": False, "random_crop": False, "save_every": None,
                       "aspect_buckets": False, "cache_latents": False}
# everything a run writes besides config.json
RUN_FILES = ("checkpoint.pt", "log.jsonl", "result.json", "table.md", "curves.png", "before_after.png",
             "samples_*.png", "denoiser.safetensors", "pytorch_lora_weights.safetensors",
             "lora_for_comfyui.safetensors", "pipeline", "scheduler", "README.md", "step_*", "tensorboard",
             "wandb", "*.part")
# what reading a file may raise that torch.save did not write, or wrote for something else
CORRUPT_FILE_ERRORS = (RuntimeError, LookupError, TypeError, AttributeError, ValueError, EOFError,
                       pickle.UnpicklingError)


# ---------------------------------------------------------------------------------------------- atomic writes

@contextmanager
def atomic_write(path):
    """Yields a temporary path for a file or a folder; on success it replaces `path`. Readers see the old
    version or the new one, never a part. New files get at least the permissions that the umask grants."""
    path = Path(path)
    tmp_path = path.with_name(path.name + ".part")
    try:
        yield tmp_path
        for part in [tmp_path, *tmp_path.rglob("*")]:
            add_permissions(part)
            fsync_path(part)
        if path.is_dir():
            old_path = path.with_name(path.name + ".old.part")
            path.rename(old_path)
            tmp_path.rename(path)
            shutil.rmtree(old_path)
        else:
            tmp_path.replace(path)
        fsync_path(path.parent)
    finally:
        remove_path(tmp_path)


def add_permissions(path):
    """Grant what the umask allows: safetensors writes files with 0600. File systems that keep no permissions
    (FAT, NTFS, CIFS) refuse the change."""
    mode = stat.S_IMODE(path.stat().st_mode)
    wanted = mode | (0o777 if path.is_dir() else 0o666) & ~current_umask()
    if mode != wanted:
        with suppress(OSError):
            path.chmod(wanted)


def short_file_name(name, max_bytes=200):
    """The name of a file; where file systems could not hold it, its beginning and a hash of the whole."""
    encoded = os.fsencode(name)
    if len(encoded) <= max_bytes:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[:max_bytes - 9].decode(errors='ignore')}-{digest}"


def current_umask():
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def fsync_path(path):
    """Flush a file or a folder's entry to the disk. Windows opens no folders and flushes only handles that
    may write; some file systems flush no folders: for folders this is best effort."""
    is_dir = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_dir else os.O_RDWR)
    except OSError:
        if is_dir:
            return
        raise
    try:
        os.fsync(handle)
    except OSError:
        if not is_dir:
            raise
    finally:
        os.close(handle)


def remove_path(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def atomic_write_text(path, text):
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8")


def cache_dir():
    """The user's cache folder: XDG_CACHE_HOME, ~/.cache, or a temporary folder where there is no home
    (containers without a passwd entry)."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "cache"


# ---------------------------------------------------------------------------------------------------- weights

def save_weights(module, path, **metadata):
    """Write module.state_dict() as fp16 safetensors; metadata (JSON values) goes into the header. All
    processes must call it; process 0 writes."""
    from safetensors.torch import save_file
    path = Path(path)
    state = {k: v.half().contiguous() for k, v in distributed.gather_full(module.state_dict()).items()}
    if distributed.get_rank() > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as tmp_path:
        save_file(state, tmp_path, {k: json.dumps(v) for k, v in metadata.items()})


def load_weights(path):
    """-> (state dict in fp32, metadata). FileNotFoundError, or ValueError if the file is damaged."""
    from safetensors import SafetensorError, safe_open
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}: name another file, or train them with "
                                "python -m scripts.pretrain --data ...")
    try:
        with safe_open(path, "pt") as file:
            metadata = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
            return {k: file.get_tensor(k).float() for k in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from None


def load_state_dict_strict(module, state, path):
    """module.load_state_dict with one sentence for what does not fit -> module."""
    expected = module.state_dict()
    mismatched = list(expected.keys() ^ state.keys())
    mismatched += [k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape]
    if mismatched:
        raise ValueError(f"{path} holds the weights of another network: {len(mismatched)} tensors do not "
                         f"fit, the first is '{min(mismatched)}'")
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{path} holds NaN or infinite weights")
    module.load_state_dict(state)
    return module


# ----------------------------------------------------------------------------------------------- run folders

def load_run_config(path):
    """Read and validate a run's config.json -> the fields of RUN_CONFIG_TYPES, sampling_configs, and
    config: {setting: value}."""
    try:
        run_config = RUN_CONFIG_DEFAULTS | json.loads(Path(path).read_text(encoding="utf-8"))
        for key, kind in RUN_CONFIG_TYPES.items():
            if not isinstance(run_config[key], kind):
                raise TypeError
        if run_config["batch_parts"] < 1:
            raise ValueError
        if not all(isinstance(override, str) for override in run_config["overrides"]):
            raise TypeError
        settings = {key: value for key, (value, _) in run_config.get("config", {}).items()}
        fields = {key: run_config[key] for key in RUN_CONFIG_TYPES}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is not the config.json of a run of train.py") from None
    check_hub_names(path, fields)
    return fields | {"sampling_configs": run_config.get("sampling_configs"), "config": settings}


def check_hub_names(path, run_config):
    """ValueError if a name that stood for a repository of the hub is here that of a folder, which would be
    taken instead. Folders and files have absolute names in config.json."""
    for key in ("pretrained", "backbone", "vae", "data"):
        name = (run_config[key] or "").partition("#")[0]
        if "/" in name and not os.path.isabs(name) and os.path.exists(name):
            raise ValueError(f"{path} says {key} {name}, which was on the hub when the run began; the folder "
                             f"{name} here would be taken instead: rename it, or go to another folder")


def check_run_dir(run_dir, run_config, overwrite):
    """ValueError unless a new run may use the folder."""
    parent = next(path for path in run_dir.absolute().parents if path.exists())
    if not parent.is_dir():
        raise ValueError(f"--output-dir {run_dir}: {parent} is not a folder")
    if not run_dir.exists():
        return
    if run_dir.is_dir() and all(path.suffix == ".part" for path in run_dir.iterdir()):
        return
    if not (run_dir / "config.json").is_file():
        raise ValueError(f"--output-dir {run_dir} exists and is not a run of train.py: choose another folder")
    load_run_config(run_dir / "config.json")
    if not overwrite and not (run_dir / "checkpoint.pt").is_file():
        raise ValueError(f"{run_dir} holds a run that stopped before its first checkpoint: "
                         "--overwrite starts it anew, --output-dir names another folder")
    if not overwrite:
        raise ValueError(f"{run_dir} already holds a run: --resume {run_dir} continues it, "
                         "--overwrite replaces it, --output-dir names another folder")
    for key in ("pretrained", "backbone", "data"):                    # a path is absolute, a name is not
        path = Path(run_config[key] or "")
        if path.is_absolute() and path.resolve().is_relative_to(run_dir.resolve()):
            raise ValueError(f"--{key} {run_config[key]} lies in the run that --overwrite would replace")


def create_run_dir(run_dir, run_config, settings, resumed):
    """Write config.json; settings: {name: [value, provenance]}. A run that is replaced loses its checkpoint
    first and its other files last: until config.json is new, --overwrite still recognises the folder."""
    if distributed.get_rank() > 0:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    if not resumed:
        remove_path(run_dir / "checkpoint.pt")
    atomic_write_text(run_dir / "config.json", json.dumps({**run_config, "config": settings}, indent=1))
    if not resumed:
        for old_path in [path for pattern in RUN_FILES for path in run_dir.glob(pattern)]:
            remove_path(old_path)


@contextmanager
def lock_run_dir(run_dir):
    """ValueError, in every process, if another run is writing to the folder. The lock ends with the process;
    where the system has no flock (Windows, some network file systems) there is none."""
    handle, busy = None, False
    if distributed.get_rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        with suppress(ImportError, OSError):
            import fcntl
            handle = os.open(run_dir, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy = True
    try:
        if distributed.any_rank(busy):
            raise ValueError(f"another process is training in {run_dir}: wait for it, or stop it first")
        yield
    finally:
        if handle is not None:
            os.close(handle)


# ---------------------------------------------------------------------------------------------------- the log

def read_log(path, before_step=math.inf, max_rows=None):
    """Rows of log.jsonl with step < before_step, up to the first line that a full disk or a power cut left
    incomplete. max_rows: about so many rows of a long log, evenly spaced."""
    rows = {}
    with (suppress(FileNotFoundError, ValueError, RecursionError, TypeError, KeyError),
          open(path, encoding="utf-8") as file):
        stride = 1
        if max_rows is not None:
            stride += path.stat().st_size // (max_rows * max(len(file.readline()), 1))
        file.seek(0)
        for line in islice(file, 0, None, stride):
            row = json.loads(line)
            if row["step"] < before_step and row["seconds"] >= 0:
                rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


class JsonlLog:
    """log.jsonl, one row a step. A row is written at once and is on the disk after the next `flush`."""

    def __init__(self, path, step):
        """step: the run's next one. Rows of later steps, after the last checkpoint, are dropped: these steps
        will be repeated."""
        self.path, self.unsynced_lines = path, []
        self.rows = read_log(path, step)
        if distributed.get_rank() == 0:
            atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
            if len(self.rows) < step:
                print(f"{path}: {step - len(self.rows)} of its {step} rows are lost")
            self.file = open(path, "r+b", buffering=0)  # noqa: SIM115
            self.synced_offset = self.file.seek(0, os.SEEK_END)

    def append(self, row, max_rows):
        """Write one row; the last max_rows stay in memory as `rows`."""
        self.rows = [*self.rows[1 - max_rows:], row]
        if distributed.get_rank() == 0:
            self.unsynced_lines.append(json.dumps(row) + "\n")
            self.file.write(self.unsynced_lines[-1].encode())

    def flush(self):
        """Write again what a full disk may have dropped, and sync. OSError if there is still no space."""
        self.file.seek(self.synced_offset)
        self.file.truncate()
        text = "".join(self.unsynced_lines).encode()
        if self.file.write(text) < len(text):
            raise OSError("no space left for log.jsonl")
        os.fsync(self.file.fileno())
        self.synced_offset, self.unsynced_lines = self.file.tell(), []


# ------------------------------------------------------------------------------------------------ checkpoints

def save_on_all_ranks(what, write_fn):
    """Run write_fn in every process; if it fails in one, OSError in all of them. A process without memory
    keeps its own exception, which ends the others."""
    from safetensors import SafetensorError
    error = None
    try:
        write_fn()
    except (OSError, RuntimeError, SafetensorError) as caught:  # each writer raises its own kind
        if is_out_of_memory(caught):
            raise
        error = caught
    if distributed.any_rank(error is not None):
        reason = str(error or "process 0 failed")[:200]
        raise OSError(f"cannot write {what} ({reason})")


def save_checkpoint(run_dir, state, log):
    """Write the log's pending rows, then checkpoint.pt. OSError in every process if the disk refuses; the
    previous checkpoint is then intact."""
    def write():
        if distributed.get_rank() == 0:
            log.flush()
            with atomic_write(run_dir / "checkpoint.pt") as tmp_path:
                torch.save(state, tmp_path)
    save_on_all_ranks(f"the checkpoint of step {state['step']}", write)


def load_checkpoint(run_dir, restore):
    """Read checkpoint.pt and call restore(state). ValueError if it cannot be used."""
    path = run_dir / "checkpoint.pt"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickles before it refuses them
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=torch.cuda.is_available())
        restore(state)
    except CORRUPT_FILE_ERRORS as error:
        is_unsafe_pickle = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors" if is_unsafe_pickle else str(error).split("\n")[0][:120]
        raise ValueError(f"{path} is damaged or belongs to another run ({reason})") from None


def validate_checkpoint(state, run_id, g_params, d_params, has_8bit_moments=False):
    """RuntimeError unless the state belongs to this run: same id, same shapes, finite numbers. Fused AdamW
    does not check the shapes of its moments itself; bitsandbytes does (has_8bit_moments: the generator's)."""
    if [state["run_id"][0], state["run_id"][-1]] != run_id:           # once with a name of the data between
        raise RuntimeError(f"it is of {' '.join(map(str, state['run_id']))}"[:70])
    if not all(type(state[name]) is int and state[name] >= 0 for name in ("step", "num_skipped",
                                                                          "warmup_steps_d")):
        raise RuntimeError("its step counts are not whole numbers")
    shapes = [param.shape for param in g_params]
    if [w.shape for w in state["params"]] != shapes or [w.shape for w in state["ema"]] != shapes:
        raise RuntimeError("it holds another network's weights")
    optimizers = {"opt_d": d_params} if has_8bit_moments else {"opt_g": g_params, "opt_d": d_params}
    for name, params in optimizers.items():
        for i, moments in state[name]["state"].items():
            if moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                raise RuntimeError(f"{name} is not an AdamW state")
            for key, value in moments.items():
                shape = () if key == "step" else params[i].shape
                if value.shape != shape or not value.is_floating_point():
                    raise RuntimeError(f"{name} belongs to other weights")
    tensors = [state["params"], state["ema"], state["disc"].values()]
    tensors += [moments.values() for name in optimizers for moments in state[name]["state"].values()]
    if not all(value.isfinite().all() for values in tensors for value in values):
        raise RuntimeError("it holds NaN or infinite values")


# ---------------------------------------------------------------------------------------------------- signals

@contextmanager
def defer_signals():
    """Inside, Ctrl-C and SIGTERM do not interrupt: they are appended to the list that is yielded, as
    (signal number, time), for the loop to stop after its step. A second Ctrl-C ends the process at once;
    with several processes, torchrun passes the first one on within a second."""
    stop_requests = []

    def handler(number, _):
        is_repeated = stop_requests and (distributed.get_world_size() == 1
                                         or time.time() - stop_requests[0][1] > 1)
        if number == signal.SIGINT and is_repeated:
            os._exit(130)
        stop_requests.append((number, time.time()))

    old_handlers = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_requests
    finally:
        for number, old_handler in old_handlers.items():
            signal.signal(number, old_handler)
