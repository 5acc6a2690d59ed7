"""What a training run needs besides its algorithm: optimisers, EMA, micro-batches, seeds, and saving it all.

train.Trainer inherits from this and adds the training step. Everything random is drawn from a seed that
follows from the step's number, so a checkpoint holds no random state, a resumed run repeats what it would
have done, and two processes draw what one process with two micro-batches draws.
Read next: train.py
"""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from utils import checkpoint, distributed, precision
from utils.messages import format_duration

GRAD_NORM_EVERY = 10                   # steps between two measurements of each loss term's gradient norm
PREFETCH_STEPS = 3                     # steps whose batches are read in advance
DIAGNOSE_WINDOW = 100                  # steps after which a useless discriminator is reported
TIMED_STEPS = 10                       # whose mean duration tells how long a large model still takes


class TrainingState:
    """model, teacher: Denoisers · disc: discriminator · method: the module with both losses · config: its
    Config · dataset: source of batches · total_steps: length of the run · batch_parts: into how many
    smaller micro-batches each is divided (utils/launch.py)."""

    def __init__(self, model, teacher, disc, method, config, dataset, total_steps, seed=0, skip_nan=False,
                 batch_parts=1):
        self.model, self.teacher, self.disc = model, teacher, disc
        self.method, self.config, self.dataset = method, config, dataset
        self.step, self.total_steps, self.seed = 0, total_steps, seed
        self.skip_nan, self.num_skipped = skip_nan, 0
        self.last_saved_step = self.first_step = 0
        self.is_small = not model.is_large or model.lora_rank > 0      # measured and saved often
        self.warmup_steps_d = min(config.warmup_steps_d, total_steps // 4) if config.lambda_adv else 0
        self.run_id = [method.__name__, seed]               # what the data is says its fingerprint

        if config.batch_size % batch_parts:
            raise ValueError(f"a batch of {config.batch_size} images has no {batch_parts} equal parts")
        self.batch_size = config.batch_size // batch_parts
        self.num_micro_batches = (config.gradient_accumulation_steps * batch_parts
                                  * distributed.get_torchrun_size())
        num_own = self.num_micro_batches // distributed.get_world_size()
        self.micro_batch_ids = range(num_own * distributed.get_rank(), num_own * (distributed.get_rank() + 1))
        self.prefetch_pool, self.prefetched = ThreadPoolExecutor(1), {}    # step: future of its batches

        self.g_params = [param for param in model.network.parameters() if param.requires_grad]
        self.d_params = list(disc.parameters())
        self.ema_params = [param.detach().clone() for param in self.g_params]
        self.opt_g = make_optimizer(config.optimizer, self.g_params, config.lr, (config.beta1, config.beta2),
                                    config.weight_decay)
        self.opt_d = make_optimizer("adamw", self.d_params, config.lr_d, (config.beta1_d, config.beta2_d))
        self.scaler_g = precision.make_grad_scaler(model.precision)    # does nothing unless fp16
        self.scaler_d = precision.make_grad_scaler(model.precision)

    # ---------------------------------------------------------------------------------- batches and seeds

    def next_batches(self):
        """This step's micro-batches; a thread prepares those of the next PREFETCH_STEPS steps meanwhile."""
        last_step = max(self.step, min(self.step + PREFETCH_STEPS, self.total_steps - 1))
        for step in range(self.step, last_step + 1):
            if step not in self.prefetched:
                self.prefetched[step] = self.prefetch_pool.submit(self.load_batches, step)
        batches = self.prefetched.pop(self.step).result()
        return [batch.to(self.model.alpha.device, self.model.resolution) for batch in batches]

    def load_batches(self, step):
        """Images and captions of a step. They depend on its number only."""
        batches = []
        for micro_batch_id in self.micro_batch_ids:
            generator = torch.Generator().manual_seed(self.derive_seed(micro_batch_id, "data", step=step))
            if hasattr(self.dataset, "training_batch"):                # it has epochs
                position = self.data_position(step, micro_batch_id)
                batch = self.dataset.training_batch(position, self.batch_size, self.seed, generator)
            else:
                batch = self.dataset.sample_batch(self.batch_size, generator)
            batch.generator = torch.Generator().manual_seed(self.derive_seed("path", step=step))
            batches.append(batch.pin_memory() if self.model.alpha.is_cuda else batch)
        return batches

    def data_position(self, step, micro_batch_id):
        """The number of images before a micro-batch: of all processes, or of this one if it has a part of
        the data for itself."""
        first_id, per_step = 0, self.num_micro_batches
        if self.dataset.has_own_positions:
            first_id, per_step = self.micro_batch_ids.start, len(self.micro_batch_ids)
        return (step * per_step + micro_batch_id - first_id) * self.batch_size

    def derive_seed(self, *tags, step=None):
        """A random seed from the run's seed, the step and a purpose."""
        tags = (self.seed, self.step if step is None else step, *tags)
        return int.from_bytes(hashlib.sha256(repr(tags).encode()).digest()[:8])

    # ------------------------------------------------------------------------------------------ what is told

    def step_label(self):
        """For a grid of samples: 'training step 100', and why nothing has changed in it yet."""
        if 0 < self.step <= self.warmup_steps_d:
            return f"training step {self.step}, discriminator's warm-up"
        return f"training step {self.step}"

    def progress_notes(self, rows):
        """Sentences to print after a step; rows: of log.jsonl, up to this step. ArithmeticError if none of
        many steps was finite."""
        notes = []
        if self.step % DIAGNOSE_WINDOW == 0:
            notes.append(diagnose_discriminator(rows))
        if self.model.is_large:
            notes += [self.warmup_note(), self.time_note(rows)]
        return [note for note in notes if note]

    def warmup_note(self):
        if 0 < self.step == self.warmup_steps_d:
            return "the discriminator's warm-up is over; from here on the generator is trained, too"
        return None

    def time_note(self, rows):
        """How long the run still takes, TIMED_STEPS steps after its start (without the first, which is slow)
        and after the warm-up."""
        if self.step - TIMED_STEPS - 1 not in (self.first_step, self.warmup_steps_d):
            return None
        if len(rows) <= TIMED_STEPS or self.step == self.total_steps:
            return None
        seconds = (rows[-1]["seconds"] - rows[-1 - TIMED_STEPS]["seconds"]) / TIMED_STEPS
        left = format_duration(seconds * (self.total_steps - self.step))
        note = f"{seconds:.2g} s a step, about {left} left without samples and checkpoints"
        if self.step <= self.warmup_steps_d:
            note += "; after the discriminator's warm-up a step takes longer"
        return note

    # ------------------------------------------------------------------------------------- gradients and EMA

    def set_learning_rate(self):
        """The generator's rate follows lr_schedule; the discriminator's is constant."""
        lr = self.config.lr * lr_factor(self.config.lr_schedule, self.step, self.total_steps,
                                        self.config.lr_warmup_steps, self.step - self.warmup_steps_d)
        for group in self.opt_g.param_groups:
            group["lr"] = lr

    def generator_backward(self, losses):
        """Backward pass of the sum of the losses. Every GRAD_NORM_EVERY steps one term at a time, to measure
        its gradient norm -> {"grad_norm/term": value}, otherwise {}."""
        num_g_updates = self.step - self.warmup_steps_d
        if not self.is_small or num_g_updates % GRAD_NORM_EVERY:
            self.scaler_g.scale(sum(losses.values()) / self.num_micro_batches).backward()
            return {}
        scale = self.num_micro_batches / self.scaler_g.get_scale()
        if distributed.is_sharded(self.g_params[0]):                   # summed over the processes already
            scale = self.config.gradient_accumulation_steps            # and not fp16
        grad_norms, last_name = {}, list(losses)[-1]
        for name, loss in losses.items():
            grads_before = [None if param.grad is None else param.grad.clone() for param in self.g_params]
            scaled = self.scaler_g.scale(loss / self.num_micro_batches)
            scaled.backward(retain_graph=name != last_name)            # terms share a graph
            grad_norms[f"grad_norm/{name}"] = scale * distributed.grad_norm_since(self.g_params, grads_before)
        return grad_norms

    def check_finite(self, logs, scaler):
        """Whether an update may be made with these losses and norms. A NaN or infinity stops the run
        (ArithmeticError) or, with skip_nan, skips the update. A gradient that overflows in fp16 is no error:
        the update is skipped and the loss scale becomes smaller."""
        bad = [name for name, value in logs.items() if not math.isfinite(value)]
        only_gradients = all(name.startswith("grad_norm") for name in bad)
        if scaler.is_enabled() and only_gradients and scaler.get_scale() > precision.MIN_LOSS_SCALE:
            return not bad
        if bad and not self.skip_nan:
            raise ArithmeticError(f"step {self.step}: {bad[0]} is {logs[bad[0]]}")
        if bad:
            self.num_skipped += 1
        return not bad

    def reduce_mean(self, rows):
        """Logs of this process's micro-batches -> their mean over all micro-batches of all processes."""
        values = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64).sum(0)
        values = (values / self.num_micro_batches).to(self.model.alpha.device)
        distributed.all_reduce_sum_([values])
        return dict(zip(rows[0], values.tolist()))

    @torch.no_grad()
    def update_ema(self):
        decay = ramped_ema_decay(self.config.ema_decay, self.step - self.warmup_steps_d)
        torch._foreach_lerp_(self.ema_params, self.g_params, 1 - decay)

    @contextmanager
    def ema_weights(self):
        """The model with its EMA weights, which are shown, measured and exported; afterwards as before."""
        self.swap_ema()
        try:
            yield self.model
        finally:
            self.swap_ema()

    @torch.no_grad()
    def swap_ema(self):
        for param, ema_param in zip(self.g_params, self.ema_params):
            backup = param.clone()
            param.copy_(ema_param)
            ema_param.copy_(backup)
        distributed.reshard_(self.model.network)

    def initial_model(self):
        """The model as it was before training, for the final evaluation. Beside a large one there is no room
        for the optimisers; nothing is trained or saved after this."""
        device, is_sharded = distributed.get_device(), distributed.is_sharded(self.g_params[0])
        if self.model.is_large:
            self.opt_g = self.opt_d = None
            for param in self.g_params + self.d_params:
                param.grad = None
        if self.teacher is None:
            self.teacher = self.model.initial_copy()
            half_dtype = precision.compute_dtype(self.model.precision)
            if device.type == "cuda":
                self.teacher.cast_frozen(half_dtype)
            self.teacher.to(device)
            if is_sharded:
                self.teacher.apply_fsdp(half_dtype)
        return self.teacher.to(device)

    # -------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self):
        """Everything the next step depends on, on the CPU of process 0."""
        state = {"run_id": self.run_id, "data": self.dataset.fingerprint, "step": self.step,
                 "num_skipped": self.num_skipped, "warmup_steps_d": self.warmup_steps_d,
                 "params": [param.detach() for param in self.g_params], "ema": self.ema_params,
                 "disc": self.disc.state_dict(), "opt_g": self.opt_g.state_dict(),
                 "opt_d": self.opt_d.state_dict(), "scaler_g": self.scaler_g.state_dict(),
                 "scaler_d": self.scaler_d.state_dict()}
        return distributed.gather_full(state, cpu_rank0=True)

    def load_state_dict(self, state):
        """RuntimeError if the state is not of this run."""
        is_8bit = self.config.optimizer == "adamw8bit"
        checkpoint.validate_checkpoint(state, self.run_id, self.g_params, self.d_params, is_8bit)
        with torch.no_grad():
            for param, saved in zip(self.g_params + self.ema_params, state["params"] + state["ema"]):
                param.copy_(distributed.distribute_like(saved, param))
        self.disc.load_state_dict(state["disc"])
        if is_8bit:
            self.opt_g.load_state_dict(state["opt_g"])
        for optimizer, name, params in ((self.opt_g, "opt_g", self.g_params),
                                        (self.opt_d, "opt_d", self.d_params))[is_8bit:]:
            moments = {i: {key: distributed.distribute_like(value, params[i]) for key, value in saved.items()}
                       for i, saved in state[name]["state"].items()}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        for name in ("scaler_g", "scaler_d"):
            if state.get(name):                                        # empty unless fp16
                getattr(self, name).load_state_dict(state[name])
        self.step = self.last_saved_step = self.first_step = state["step"]
        self.num_skipped, self.warmup_steps_d = state["num_skipped"], state["warmup_steps_d"]

    def save(self, run_dir, log, sampling_configs, metadata):
        """Write checkpoint.pt and, if it is small or the run has ended, the result for other programs.
        ArithmeticError if a weight is not finite, OSError if the disk refuses; the old files then stay."""
        moments = [value for optimizer in (self.opt_g, self.opt_d) for row in optimizer.state.values()
                   for value in row.values() if torch.is_tensor(value)]
        tensors = [*self.g_params, *self.ema_params, *self.d_params, *moments]
        is_finite = all(distributed.to_local(tensor).isfinite().all() for tensor in tensors)
        if distributed.any_rank(not is_finite):
            raise ArithmeticError(f"step {self.step}: a weight is NaN or infinite")
        checkpoint.save_checkpoint(run_dir, self.state_dict(), log)
        self.last_saved_step = self.step
        if self.is_small or self.step == self.total_steps:
            def export():
                with self.ema_weights() as model:
                    model.save_pretrained(run_dir, sampling_configs, steps=self.step, **metadata,
                                          **self.bucket_metadata())
            checkpoint.save_on_all_ranks(f"the result of step {self.step}", export)

    def bucket_metadata(self):
        """What a result says about the shapes of its training images; nothing if they were squares."""
        summary = getattr(self.dataset, "bucket_summary", None)
        return {"buckets": summary} if summary else {}

    def keep_result(self, run_dir, num_kept, sampling_configs, metadata):
        """Write the EMA weights of this step for other programs into step_STEPS; the last num_kept stay."""
        if not num_kept:
            return
        folder = run_dir / f"step_{self.step:06d}"

        def export():
            folder.mkdir(exist_ok=True)
            with self.ema_weights() as model:
                model.save_pretrained(folder, sampling_configs, steps=self.step, **metadata,
                                      **self.bucket_metadata())
            if distributed.get_rank() == 0:
                for old in sorted(run_dir.glob("step_*"))[:-num_kept]:
                    checkpoint.remove_path(old)

        checkpoint.save_on_all_ranks(str(folder), export)

    def resume(self, run_dir, allow_data_change=False):
        """Continue from the checkpoint in run_dir. ValueError if it is damaged, of another run, of other
        data, or already past total_steps."""
        trained_on = []

        def restore(state):
            self.load_state_dict(state)
            trained_on.append(state["data"])

        checkpoint.load_checkpoint(run_dir, restore)
        if trained_on[0] != self.dataset.fingerprint and not allow_data_change:
            raise ValueError(f"{run_dir} was trained on other images or captions than '{self.dataset.name}' "
                             "has now, or by an older version, which compared sizes only: restore the data "
                             "set, or add --allow-data-change")
        if self.step > self.total_steps:
            raise ValueError(f"{run_dir} is at step {self.step} already, past --steps {self.total_steps}")


def lr_factor(schedule, step, total_steps, warmup_steps=0, num_updates=None):
    """Factor on the learning rate of a step: rises linearly in the first warmup_steps updates, times the
    schedule. num_updates: of the generator so far (default: step)."""
    num_updates = step if num_updates is None else max(0, num_updates)
    fraction = step / total_steps
    factor = {"constant": 1., "linear": 1 - fraction, "cosine": .5 * (1 + math.cos(math.pi * fraction))}
    return factor[schedule] * min(1., (num_updates + 1) / (warmup_steps + 1))


def make_optimizer(kind, params, lr, betas, weight_decay=0.):
    """AdamW. adamw8bit stores its moments in 8 bits a number; ValueError without the
    package."""
    if kind == "adamw":
        return torch.optim.AdamW(params, lr, betas, weight_decay=weight_decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("optimizer=adamw8bit: the package is not installed: pip install bitsandbytes"
                         ) from None
    return AdamW8bit(params, lr, betas, weight_decay=weight_decay)


def ramped_ema_decay(ema_decay, num_updates):
    """The EMA's decay after num_updates updates. Its memory is short at first: at most (k + 1) / (k + 10)."""
    return min(ema_decay, (num_updates + 1) / (num_updates + 10))


def prepare_networks(model, run_config, needs_teacher, random_init):
    """Add LoRA, copy the teacher, initialise, choose the types of frozen weights, move to the device and
    shard -> teacher, a frozen Denoiser. Where only the final evaluation needs one, it is None instead of a
    second copy of a large network: TrainingState.initial_model makes it then.
    run_config["lora_rank"] becomes the model's."""
    device = distributed.get_device()
    if model.lora_rank and not run_config["lora_rank"]:
        raise ValueError("--full: the weights that --pretrained names are LoRA adapters: train these on "
                         "without --full, or name a whole pipeline")
    if run_config["lora_rank"]:
        model.add_lora(run_config["lora_rank"], run_config["lora_targets"])
    model.precision = run_config["precision"]
    half_dtype = precision.compute_dtype(model.precision)
    teacher = None
    if needs_teacher or not model.is_large or model.lora_rank:
        teacher = model.frozen_copy()
    if random_init:
        model.reset_parameters()
    if run_config["gradient_checkpointing"]:
        model.enable_gradient_checkpointing()
    # a student predicts x0 from pure noise; there weights in bf16 would be as imprecise as calls in bf16
    is_amplified = needs_teacher and model.needs_fp32(half_dtype)
    trained = [model, teacher] if needs_teacher else [model]
    for item in trained:
        if item.is_large and device.type == "cuda":
            item.cast_frozen(half_dtype, torch.float16 if is_amplified else half_dtype)
        item.to(device)
    if run_config["compile"]:
        model.network.compile()                                        # in place: names of weights stay
    if run_config["fsdp"]:
        networks = {id(item.network): item for item in trained}        # one, if the teacher is without LoRA
        for item in networks.values():
            item.apply_fsdp(None if is_amplified else half_dtype)
    return teacher


def diagnose_discriminator(rows):
    """A warning if D was useless in every one of the last DIAGNOSE_WINDOW steps, else None. ArithmeticError
    if no update of these steps was finite."""
    if len(rows) < DIAGNOSE_WINDOW:
        return None
    if all(None in row.values() for row in rows):
        raise ArithmeticError(f"step {rows[-1]['step']}: none of the last {DIAGNOSE_WINDOW} steps was finite")
    real, fake = ([row.get(f"acc_d_{side}", .5) or 0. for row in rows] for side in ("real", "fake"))
    if min(fake) > .99 and max(real) > .01:
        return (f"D accuracy on fakes has been above 99 % for {DIAGNOSE_WINDOW} steps: its gradient carries "
                "no signal; try a smaller lr_d or n_critic, or a larger augment_strength or r1_gamma; "
                "see docs/healthy_runs.md#d-too-strong")
    if max(real) < .01 or max(fake) < .01:
        return (f"D has given all images the same answer for {DIAGNOSE_WINDOW} steps: it has learned "
                "nothing; try a larger lr_d or warmup_steps_d, or a smaller r1_gamma; "
                "see docs/healthy_runs.md#d-too-weak")
    return None
