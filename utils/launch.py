"""The cores of one machine: how many processes train.py starts by itself, and how many threads each has.

An operation of the tiny model takes a millisecond or less. Two threads gain little on it, and nothing once
another program is busy: every operation then waits for the slower thread. Two processes, each with its part
of every batch, wait for each other a few times per step. The environment variable OMP_NUM_THREADS, if it is
set, is the number of cores that a command may use.
Read next: utils/distributed.py"""

import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager

import torch
from tqdm import tqdm

from utils import cli, distributed
from utils import config as settings
from utils.failures import RunFailed

MAX_AUTO_PROCESSES = 2
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", distributed.LAUNCHED)
EXIT_TIMEOUT_S = 30                    # for a helper whose process 0 is done, or that has failed


def usable_cores():
    """Cores that this process may run on, at most OMP_NUM_THREADS of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) else cores


def set_threads(is_large=False):
    """Threads of this process for operations on the CPU: one for the tiny model, or with OMP_NUM_THREADS this
    process's share of them. Large models keep torch's choice."""
    if is_large:
        return
    num_threads = usable_cores() if "OMP_NUM_THREADS" in os.environ else 1
    torch.set_num_threads(max(1, num_threads // distributed.get_world_size()))


def batch_parts(gradient_accumulation_steps, num_processes=None):
    """Into how many parts each micro-batch is divided, so that all processes have equally many. num_processes
    that share the batches of one; default: those that helper_processes has started."""
    num_processes = num_processes or distributed.get_world_size() // distributed.get_torchrun_size()
    return num_processes // math.gcd(gradient_accumulation_steps, num_processes)


def configure(args, methods, models, default_data):
    """-> run_config, run_dir, the method's Config; parameters and errors as those of
    cli.resolve_run_config."""
    run_config, run_dir = cli.resolve_run_config(args, methods, models, default_data)
    method = methods[run_config["method"]]
    saved = {k: v for k, v in run_config.pop("config", {}).items() if k not in method.fixed}
    config = settings.build_config(method, settings.as_overrides(saved) + run_config["overrides"],
                                   run_config["model"], run_config["lora_rank"] > 0,
                                   run_config["world_size"], run_config["recipe"])
    if not args.resume:
        run_config["batch_parts"] = batch_parts(config.gradient_accumulation_steps)
    return run_config, run_dir, config


def choose_processes(args, run_config, run_dir, config, is_automatic):
    """How many processes train a run: --processes; by default one, or with is_automatic one for each core up
    to MAX_AUTO_PROCESSES, if they can share a batch equally. ValueError if they cannot as wanted."""
    wanted, accumulation = args.processes, config.gradient_accumulation_steps
    if run_config["model"] != "tiny" or torch.cuda.is_available():
        if (wanted or 1) > 1:
            raise ValueError(f"--processes {wanted} is for the tiny model on a CPU: start several processes "
                             f"with torchrun --nproc-per-node {wanted} train.py …")
        return 1

    def can_share(num_processes):
        if args.resume:                                                # the parts of a run stay as they are
            return accumulation * run_config["batch_parts"] % num_processes == 0
        return config.batch_size % batch_parts(accumulation, num_processes) == 0

    if wanted is None:
        num_processes = min(MAX_AUTO_PROCESSES, usable_cores()) if is_automatic else 1
        return num_processes if can_share(num_processes) else 1
    if wanted < 1:
        raise ValueError(f"--processes {wanted}: wanted 1 or more")
    if args.resume and not can_share(wanted):
        raise ValueError(f"--processes {wanted}: a step of {run_dir} has "
                         f"{accumulation * run_config['batch_parts']} micro-batch(es), which {wanted} "
                         "processes cannot share equally: leave out --processes")
    if not can_share(wanted):
        raise ValueError(f"--processes {wanted}: a batch of {config.batch_size} images cannot be divided "
                         f"into {batch_parts(accumulation, wanted)} equal parts: change batch_size or "
                         "--processes")
    return wanted


@contextmanager
def process_group(args, configure, main, argv):
    """Inside, this is one of the processes of a run: of torchrun's, or process 0 of those that it starts
    here, which run main(argv). They print nothing but errors of their own, and end with process 0.

    configure: train.configure. A command line (argv None) chooses the number of processes by itself."""
    if "WORLD_SIZE" in os.environ:
        if args.processes and distributed.LAUNCHED not in os.environ:
            raise ValueError("--processes is for runs without torchrun, which starts its own: leave it out")
        num_processes = 1
    else:
        num_processes = choose_processes(args, *configure(args), is_automatic=argv is None)
    if num_processes == 1:
        distributed.init_distributed()
        yield
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ.update(zip(VARIABLES, (str(num_processes), "0", "0", "127.0.0.1", str(port), "1")))
    context = multiprocessing.get_context("spawn")
    helpers = [context.Process(target=run_helper, args=(rank, main, argv), daemon=True)
               for rank in range(1, num_processes)]
    try:
        for helper in helpers:
            helper.start()
        distributed.init_distributed(lambda: check_running(helpers))
        yield
        for helper in helpers:
            helper.join(EXIT_TIMEOUT_S)
    except RuntimeError as error:
        raise_failure_of(helpers, error)
    finally:
        stop_helpers(helpers)


def stop_helpers(helpers):
    """End the processes and leave the group: this process is alone again."""
    for helper in helpers:
        if helper.pid is not None:
            helper.kill()
            helper.join()
    distributed.leave_group()
    for name in VARIABLES:
        os.environ.pop(name, None)


def run_helper(rank, main, argv):
    """The main function of process `rank`. Ctrl-C reaches all processes of a terminal: this one goes on until
    process 0 has decided."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())                                   # its default would outlive os._exit
    parent = multiprocessing.parent_process()

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)                                                        # process 0 waits for this


def check_running(helpers):
    """RuntimeError if a process has ended."""
    if not all(helper.is_alive() for helper in helpers):
        raise RuntimeError("a helper process has ended")


def raise_failure_of(helpers, error):
    """Process 0 has failed with a RuntimeError. If another process has ended, a collective operation has
    failed for that reason, and that process has explained itself, unless a signal killed it."""
    for helper in helpers:
        helper.join(2)
    for rank, helper in enumerate(helpers, 1):
        if (helper.exitcode or 0) < 0:
            raise RunFailed(f"process {rank} was killed by signal {-helper.exitcode}, perhaps for lack of "
                            "memory: --resume continues from the last checkpoint, --processes 1 needs less",
                            1) from None
        if helper.exitcode:
            sys.exit(helper.exitcode)
    raise error
