"""The network calls of a training step, each of which can be repeated and timed, alone or in turns.

Read next: scripts/benchmark.py"""

import statistics
import time
from collections import Counter
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves, tree_map

import losses
from utils.precision import autocast


def clone_leaves(inputs):
    """The same tensors as leaves of their own graph."""
    return tree_map(lambda x: x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x,
                    inputs)


class CallRecorder:
    """The network calls of one training step.

    call_counts: {(part, batch size, has a graph): number of calls}; calls: for each key a function that
    repeats the first of them. Recomputation in the backward pass counts as a call without graph."""

    def __init__(self, trainer):
        self.call_counts, self.calls, self.patches = Counter(), {}, ExitStack()
        model, teacher, disc = trainer.model, trainer.teacher, trainer.disc
        parts = [("network", model, "forward_network")]
        if teacher:
            parts += [("teacher", teacher, "forward_network")]
        if hasattr(disc, "logits"):
            parts += [("backbone", disc.backbone, "forward"), ("heads", disc, "logits"),
                      ("global embedding", disc.backbone, "global_embedding")]
        else:
            parts += [("backbone and heads", disc, "forward")]
        if model.is_large:                                             # captions are encoded beforehand
            parts += [("VAE encoder", model, "encode"), ("VAE decoder", model.vae, "decode")]
        else:
            parts += [("text encoder", model, "encode_prompts")]
        for part in parts:
            self.wrap(*part)
        self.wrap_r1_penalty()
        with self.patches:
            trainer.train_step()
        self.call_counts = +self.call_counts                           # drops counts of 0

    def patch(self, owner, attribute, wrapper):
        self.patches.enter_context(patch.object(owner, attribute, wrapper))

    def record(self, key, call, inputs):
        self.call_counts[key] += 1
        if key not in self.calls:
            inputs = clone_leaves(inputs)
            self.calls[key] = lambda: call(*clone_leaves(inputs))

    def wrap(self, name, owner, attribute):
        """Record the calls of owner.attribute."""
        original = getattr(owner, attribute)

        def wrapper(*inputs):
            batch_size = len(inputs[0][0] if name == "heads" else inputs[0])
            if name == "heads":
                self.heads_call = original, inputs[1]
            if torch._C._current_graph_task_id() >= 0:                 # recomputation in a backward pass
                self.record((name, batch_size, False), original, inputs)
                return original(*inputs)
            out = original(*inputs)
            has_graph = any(torch.is_tensor(x) and x.requires_grad for x in tree_leaves(out))
            self.record((name, batch_size, has_graph), original, inputs)
            return out

        self.patch(owner, attribute, wrapper)

    def wrap_r1_penalty(self):
        """R1 differentiates a call of the heads, so the two are recorded as one."""
        original = losses.r1_penalty

        def wrapper(logits, features):
            batch_size = len(features[0])
            heads, disc_cond = self.heads_call                         # made for it just before
            self.call_counts["heads", batch_size, True] -= 1

            def repeat(features, disc_cond):
                return original(heads(features, disc_cond), features)

            self.record(("R1 of heads", batch_size, True), repeat, (features, disc_cond))
            return original(logits, features)

        self.patch(losses, "r1_penalty", wrapper)


def time_call(trainer, call, has_graph):
    """A function that makes the call, and its backward pass if it has a graph."""
    def job():
        with autocast(), torch.set_grad_enabled(has_graph):
            outputs = [x for x in tree_leaves(call()) if torch.is_tensor(x) and x.requires_grad]
        if has_graph:
            trainer.opt_g.zero_grad()
            trainer.opt_d.zero_grad()
            sum(x.float().square().mean() for x in outputs).backward()
    return job


def time_interleaved(jobs, rounds):
    """{name: function} -> {name: median seconds}. Each round calls every function once; the first round does
    not count."""
    seconds = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            start_time = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start_time)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}
