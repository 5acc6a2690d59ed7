"""How a program ends when something goes wrong: one sentence and an exit code instead of a traceback.

    1    the run failed: NaN, out of memory             2    a wrong argument, file or folder
    130  stopped by Ctrl-C      143  stopped by SIGTERM (as shells have it: a stopped run has not succeeded)

Before training every ValueError and OSError is such a sentence; with the environment variable DEBUG=1 it
keeps its traceback. In the training loop only BadInput and OSError are; others are faults of a program.
"""

import os
import signal
import sys
import traceback
from contextlib import contextmanager, suppress

from utils import checkpoint, cli, distributed
from utils.messages import BadInput, is_out_of_memory, printable


class RunFailed(Exception):
    """A sentence for the user and an exit code. everywhere: the sentence may concern this process only."""

    def __init__(self, message, code, everywhere=False):
        super().__init__(message)
        self.code, self.everywhere = code, everywhere


def interrupt_on_sigterm():
    """SIGTERM raises KeyboardInterrupt, like Ctrl-C, and is remembered in it. While a program imports its
    libraries, Ctrl-C exits at once."""
    def handler(number, _):
        raise KeyboardInterrupt(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, handler)


def print_any_text():
    """stdout writes \\x.. for what its encoding lacks, as stderr does: any path can be printed."""
    if hasattr(sys.stdout, "reconfigure"):                             # a StringIO takes any text
        sys.stdout.reconfigure(errors="backslashreplace")


def start_program():
    """What a program does after its imports and before it reads its command line, whose help is text, too."""
    interrupt_on_sigterm()
    print_any_text()
    # the hub's own default, except where there is no home: there its libraries would write to ./~
    os.environ.setdefault("HF_HOME", str(checkpoint.cache_dir() / "huggingface"))


def signal_number(error):
    """The signal that a KeyboardInterrupt stands for."""
    return error.args[0] if error.args else signal.SIGINT


END_OTHER_PROGRAMS = "end other programs that use it"
SMALLER_TRAINING = ("a new run needs less with a smaller batch_size and more gradient_accumulation_steps, "
                    "and for Stable Diffusion with --gradient-checkpointing, --lora-rank or a smaller "
                    "--resolution")


@contextmanager
def clear_exit(parser, program, when_out_of_memory=END_OTHER_PROGRAMS):
    """Turn expected errors into one sentence on stderr and an exit code. when_out_of_memory: what to do."""
    def leave(code, message, everywhere=False):
        is_shown = everywhere or distributed.get_rank() == 0
        newline = "" if code == 2 else "\n"                           # a progress bar may end in mid-line
        parser.exit(code, f"{newline}{program}: {printable(message)}\n" if is_shown else "")

    print_any_text()
    with tell_other_processes():
        if os.environ.get("DEBUG") == "1":
            yield
            return
        try:
            yield
        except RunFailed as error:
            leave(error.code, error, error.everywhere)
        except KeyboardInterrupt as error:
            leave(128 + signal_number(error), "stopped")
        except (ValueError, OSError) as error:
            leave(2, error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            leave(1, f"out of memory; {when_out_of_memory}", everywhere=True)


@contextmanager
def tell_other_processes():
    """With several processes, one that fails ends at once and the others with it: they would wait for it."""
    try:
        yield
    except SystemExit as error:
        if distributed.get_world_size() > 1 and error.code in (1, 2):
            distributed.abort(error.code)
        raise
    except Exception:
        if distributed.get_world_size() > 1:
            traceback.print_exc()
            distributed.abort(1)
        raise


@contextmanager
def explain_failures(trainer, run_dir, world_size, save):
    """Inside the training loop: RunFailed says what happened, which checkpoint is good and how to resume.
    save(): tries to keep the steps since the last checkpoint."""
    resume = cli.resume_command(run_dir, world_size)
    try:
        yield
    except ArithmeticError as error:
        raise RunFailed(f"{error}; {checkpoint_hint(trainer, resume)}; --on-nan skip leaves such steps out; "
                        f"a smaller lr, lr_d or lambda_adv{restart_option(trainer, run_dir)} may help", 1
                        ) from None
    except (BadInput, OSError) as error:                               # data or disk, perhaps of one process
        if distributed.get_world_size() == 1:
            with suppress(OSError, ArithmeticError):
                if trainer.last_saved_step < trainer.step:
                    save()
        raise RunFailed(f"{error}; {checkpoint_hint(trainer, resume)}", 2, everywhere=True) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(f"step {trainer.step}: out of memory; {SMALLER_TRAINING}"
                        f"{restart_option(trainer, run_dir)}; {checkpoint_hint(trainer, resume)}", 1,
                        everywhere=True) from None
    except KeyboardInterrupt as error:
        raise stopped(trainer, resume, signal_number(error)) from None


def restart_option(trainer, run_dir):
    """With what a new run starts from the weights of this one, if it has saved any: --resume keeps all
    settings."""
    return f" (--pretrained {run_dir})" if trainer.last_saved_step and trainer.is_small else ""


def checkpoint_hint(trainer, resume):
    if trainer.last_saved_step:
        return f"the checkpoint of step {trainer.last_saved_step} is good: {resume}"
    return "nothing was saved before: start again with --overwrite"


def stopped(trainer, resume, number):
    """RunFailed for a run that was stopped by a signal after its state was saved."""
    if trainer.step < trainer.total_steps:
        return RunFailed(f"stopped after step {trainer.step}, everything is saved; continue with: {resume}",
                         128 + number)
    what = "the last samples" if trainer.model.is_large else "the table"
    return RunFailed(f"stopped before {what}, all {trainer.step} steps are saved; continue with: {resume}",
                     128 + number)
