"""The training loop of all methods:        python train.py --method adt

A step has two halves: the generator is updated with the discriminator frozen, then the discriminator with
the generated images as constants. Losses: adt.py, add.py. Networks: models/. Read next: evaluate.py"""

import signal
import sys
import time

if __name__ == "__main__":    # the imports take seconds: Ctrl-C ends them without a traceback, too
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import torch
from tqdm import tqdm

import add
import adt
import data
import discriminator
import evaluate
from models import hub, latent_cache, loading, preflight
from utils import checkpoint, cli, distributed, failures, launch, report
from utils.config import Method, provenance, settings_help
from utils.distributed import all_reduce_sum_, clip_grad_norm
from utils.training_state import DIAGNOSE_WINDOW, TrainingState, prepare_networks

METHODS = {
    "adt": Method(adt, default_steps=300, lora_rank=128, presets=adt.PRESETS, max_resolution={"sdxl": 512}),
    "add": Method(add, default_steps=400, large_steps=10000, lora_targets="all", presets=add.PRESETS,
                  max_resolution=dict.fromkeys(loading.MODEL_FAMILIES, 512)),
    "diffusion": Method(adt, default_steps=1000, fixed={"lambda_adv": 0.0}, presets=adt.DIFFUSION_PRESETS)}
MODELS = ["tiny", *loading.MODEL_FAMILIES]


class Trainer(TrainingState):
    """train_step is the algorithm; everything around it is in utils/training_state.py."""

    def train_step(self):
        """One generator update and n_critic discriminator updates -> {name: value} for the log."""
        batches, inputs, logs = self.next_batches(), [], []
        update_g = self.step >= self.warmup_steps_d
        self.set_learning_rate()

        # Generator half. D is frozen, but the gradient of -D(fake) flows through it into the generator.
        self.disc.requires_grad_(False).eval()
        self.opt_g.zero_grad()
        for micro_batch_id, batch in zip(self.micro_batch_ids, batches):
            torch.manual_seed(self.derive_seed(micro_batch_id, "generator"))
            with self.model.autocast(), torch.set_grad_enabled(update_g):
                losses, d_inputs = self.method.generator_loss(self.model, self.teacher, self.disc, batch,
                                                              self.config)
            logs.append({f"loss_{name}": loss.item() for name, loss in losses.items()})
            if update_g:
                logs[-1] |= self.generator_backward(losses)            # gradients of all micro-batches add up
            inputs.append(d_inputs and d_inputs._replace(fake=d_inputs.fake.detach()))
        g_logs = self.reduce_mean(logs)
        if update_g:
            all_reduce_sum_([param.grad for param in self.g_params if param.grad is not None])
            self.scaler_g.unscale_(self.opt_g)                         # fp16 only, as all of scaler_g
            g_logs["grad_norm"] = clip_grad_norm(self.g_params, self.config.max_grad_norm)
            if self.check_finite(g_logs, self.scaler_g):
                self.scaler_g.step(self.opt_g)
            self.scaler_g.update()
            self.update_ema()

        # Discriminator half. The generated images are constants; every D step augments them anew.
        d_logs = {}
        for d_iter in range(self.config.n_critic if self.config.lambda_adv else 0):
            self.disc.requires_grad_(True)
            discriminator.update_spectral_norm(self.disc)
            self.opt_d.zero_grad()
            logs = []
            for micro_batch_id, d_inputs in zip(self.micro_batch_ids, inputs):
                torch.manual_seed(self.derive_seed(micro_batch_id, "discriminator", d_iter))
                with self.model.autocast():
                    losses, logits_real, logits_fake = self.method.discriminator_loss(self.disc, d_inputs,
                                                                                      self.config)
                self.scaler_d.scale(sum(losses.values()) / self.num_micro_batches).backward()
                logs.append({f"loss_{name}": loss.item() for name, loss in losses.items()})
                logs[-1]["acc_d_real"] = discriminator.mean_of_heads(logits_real, lambda logits: logits > 0)
                logs[-1]["acc_d_fake"] = discriminator.mean_of_heads(logits_fake, lambda logits: logits < 0)
            d_logs = self.reduce_mean(logs)
            all_reduce_sum_([param.grad for param in self.d_params if param.grad is not None])
            self.scaler_d.unscale_(self.opt_d)
            d_logs["grad_norm_d"] = clip_grad_norm(self.d_params, self.config.max_grad_norm_d)
            if self.check_finite(d_logs, self.scaler_d):
                self.scaler_d.step(self.opt_d)
            self.scaler_d.update()
        self.step += 1
        return g_logs | d_logs | ({"skipped_steps": self.num_skipped} if self.skip_nan else {})


def show_samples(trainer, run_config, captions, reporter):
    """A grid of samples from fixed noise: a row for the fewest steps and one for the most."""
    configs = run_config["sampling_configs"]
    with trainer.ema_weights() as model:
        to_sample = [(trainer.step_label(), model, *config) for config in configs[:1] + configs[1:][-1:]]
        _, image_rows = evaluate.evaluate_models(to_sample, captions)
    if distributed.get_rank() == 0:
        reporter.add_samples(trainer.step, image_rows, captions)


def train_loop(trainer, run_dir, run_config, metadata, captions, stop_requests, reporter):
    """Train until the end or a stop request. Process 0 writes the log, grids of samples from fixed noise and
    checkpoints; the others sample and save along, since they may hold shards of the weights."""
    is_main = distributed.get_rank() == 0
    to_save = run_dir, reporter.log, run_config["sampling_configs"], metadata
    last_save_time = time.time()
    pbar = tqdm(range(trainer.step, trainer.total_steps), initial=trainer.step, total=trainer.total_steps,
                desc=run_dir.name, mininterval=1, disable=not is_main)
    if trainer.step == 0 and trainer.model.is_large:
        show_samples(trainer, run_config, captions, reporter)
    if trainer.step == trainer.total_steps:                            # complete, but its result may be lost
        trainer.save(*to_save)
    for step in pbar:
        logs = trainer.train_step()
        is_last_step = step + 1 == trainer.total_steps
        reporter.add_step(step, logs, max_rows=DIAGNOSE_WINDOW)
        pbar.set_postfix({k: f"{v:.3g}" for k, v in logs.items() if k.startswith("loss")}, refresh=False)
        for note in trainer.progress_notes(reporter.log.rows):
            if is_main:
                pbar.write(f"step {step + 1}: {note}")
        if (step + 1) % run_config["eval_every"] == 0 or is_last_step:
            show_samples(trainer, run_config, captions, reporter)
            trainer.keep_result(run_dir, run_config["keep_checkpoints"], *to_save[2:])
        is_due = time.time() - last_save_time > cli.save_interval_s(run_config)
        if distributed.any_rank(bool(stop_requests) or is_due or is_last_step):
            trainer.save(*to_save)
            last_save_time = time.time()
            if distributed.any_rank(bool(stop_requests)):
                break


# ------------------------------------------------------------------------------------- around the training

def parse_args(argv=None):
    parser = cli.make_parser(__doc__.split("\n")[0], METHODS, MODELS)
    return parser, parser.parse_args(argv)


def configure(args):
    """-> run_config, run_dir, the method's Config. ValueError or OSError with one sentence."""
    return launch.configure(args, METHODS, MODELS, ("glyphs", data.DEFAULT_HUB_DATASET))


def setup(args):
    """-> run_config, run_dir, trainer, evaluator or None; ValueError or OSError if the run is impossible."""
    run_config, run_dir, config = configure(args)
    method, model_name = METHODS[run_config["method"]], run_config["model"]
    launch.set_threads(is_large=model_name != "tiny")
    run_config["sampling_configs"] = [row[1:] for row in config.eval_sampling_configs() if row[0] == "after"]
    max_resolution = method.max_resolution.get(model_name)
    preflight.check_run(run_config, config, max_resolution)            # before anything is downloaded
    dataset_name = data.dataset_name(run_config["data"], resumed_run=None if args.data else args.resume)
    if not args.resume and model_name != "tiny":                       # loading takes minutes
        checkpoint.check_run_dir(run_dir, run_config, args.overwrite)
    model = loading.load_model(model_name, dataset_name, run_config["pretrained"], run_config["resolution"],
                               run_config["vae"], max_resolution)
    if model.is_large:
        run_config["resolution"] = model.resolution
    dataset = data.training_dataset(run_config, model)
    config.check_model(model, run_config["fsdp"])
    with torch.no_grad():                                              # every caption must be encodable
        model.precompute_prompt_embeds([*config.extra_prompts(model), *run_config["prompts"],
                                        *dataset.all_captions])
        text_dim = model.encode_prompts([""])["pooled"].shape[1]
    model.release_text_encoders(dataset.has_fixed_captions)
    torch.manual_seed(run_config["seed"])
    device = distributed.get_device()
    network = loading.load_backbone(model_name, dataset_name, config.backbone, run_config["backbone"],
                                    run_config["pretrained"], dataset.fingerprint).to(device)
    if config.whiten_features and config.lambda_adv and not args.resume:  # a checkpoint holds the whitening
        batch = dataset.sample_batch(32 if model.is_large else 256, torch.Generator().manual_seed(0))
        images = batch.to(device, model.resolution).image
        backbone = discriminator.build_backbone(network, images, config.instance_noise)
    else:
        backbone = discriminator.FrozenBackbone(network).to(device)
    disc = config.build_discriminator(backbone, text_dim).to(device)
    teacher = prepare_networks(model, run_config, config.has_teacher, config.init == "random")
    if run_config["cache_latents"]:
        latent_cache.cache_latents(model, dataset, config.needs_images)
    trainer = Trainer(model, teacher, disc, method.module, config, dataset, run_config["steps"],
                      run_config["seed"], run_config["on_nan"] == "skip", run_config["batch_parts"])
    num_samples = 0 if model.is_large else cli.num_eval_samples(args.eval_samples, dataset.split_sizes)
    if not args.resume:                                                # after what was mistyped
        checkpoint.check_run_dir(run_dir, run_config, args.overwrite)
    evaluator = None
    if num_samples:                                                    # this takes seconds
        evaluator = evaluate.Evaluator(dataset, num_samples, weights_dir=run_config["pretrained"])
    return run_config, run_dir, trainer, evaluator


def final_evaluation(trainer, evaluator, run_config, run_dir, captions):
    """Measure and show the model before and after training."""
    recorded = report.recorded_metrics(run_config, loading.WEIGHTS_DIR, evaluator)
    with trainer.ema_weights() as model:
        models = {"before": trainer.initial_model(), "after": model}
        to_sample = [(label, models[label], *row)
                     for label, *row in trainer.config.eval_sampling_configs(model.guidance_scale)]
        rows, image_rows = evaluate.evaluate_models(to_sample, captions, evaluator, recorded=recorded)
    report.save_report(run_dir, rows, image_rows, captions, evaluator, recorded)


def run_training(args):
    """Train, save and evaluate one run. Its checkpoint is read when no other process can write any more."""
    run_config, run_dir, trainer, evaluator = setup(args)
    is_main = distributed.get_rank() == 0
    captions = run_config["prompts"] or trainer.dataset.sample_batch(
        4 if trainer.model.is_large else 16, torch.Generator().manual_seed(7)).caption
    metadata = {k: run_config[k] for k in ("method", "recipe", "overrides", "seed")}
    metadata["data"] = trainer.dataset.name
    with checkpoint.lock_run_dir(run_dir):
        if args.resume:
            trainer.resume(run_dir, args.allow_data_change)
        elif is_main:                                                  # again: another may have been faster
            checkpoint.check_run_dir(run_dir, run_config, args.overwrite)
        sources = provenance(METHODS[run_config["method"]], trainer.config, run_config["model"],
                             run_config["lora_rank"] > 0, run_config["world_size"], run_config["recipe"])
        checkpoint.create_run_dir(run_dir, run_config, sources, bool(args.resume))
        if is_main and trainer.model.is_large:
            print(preflight.describe_run(run_config, run_dir, trainer, METHODS[run_config["method"]]))
        reporter = report.Reporter(run_dir, trainer.step, run_config)
        with failures.explain_failures(trainer, run_dir, run_config["world_size"], lambda: trainer.save(
                run_dir, reporter.log, run_config["sampling_configs"], metadata)):
            with checkpoint.defer_signals() as stop_requests:
                train_loop(trainer, run_dir, run_config, metadata, captions, stop_requests, reporter)
            if stop_requests or trainer.step < trainer.total_steps:    # another process was stopped
                raise KeyboardInterrupt(*[number for number, _ in stop_requests[:1]])
            if args.eval_samples != 0:
                final_evaluation(trainer, evaluator, run_config, run_dir, captions)
        reporter.close()
        if is_main:
            hub.push(run_config["push_to_hub"], run_dir)
            print(f"run folder: {run_dir}    measure it: {cli.evaluation_command(run_config, run_dir)}")


def main(argv=None):
    parser, args = parse_args(argv)
    with failures.clear_exit(parser, "train.py", failures.SMALLER_TRAINING):
        if cli.wants_settings_help(args, METHODS, MODELS):
            print(settings_help(METHODS[args.method or "adt"], args.model or "tiny", not args.full,
                                args.recipe or "paper"))
            return
        with launch.process_group(args, configure, main, argv):
            run_training(args)


if __name__ == "__main__":
    failures.start_program()
    main()
