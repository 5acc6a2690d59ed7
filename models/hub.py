"""The Hugging Face hub: is it reachable, which pipeline is a repository, upload of a result.

Everything else that comes from the hub is downloaded by diffusers, transformers and datasets themselves."""

import json
from pathlib import Path

RESULT_FILES = ["README.md", "config.json", "*.safetensors", "scheduler/*", "pipeline/*", "samples_*.png",
                "before_after.png", "curves.png", "log.jsonl"]


def reason_of(error):
    """The first line of an error, with its kind."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def remote_model_index(repository):
    """model_index.json of a hub repository as a dict, read before anything large is downloaded. OSError with
    one sentence if it cannot be read."""
    from huggingface_hub import hf_hub_download
    try:
        path = hf_hub_download(repository, "model_index.json")
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # network, licence, cache, JSON: each raises its own kind
        raise OSError(f"cannot load {repository} ({reason_of(error)}); check the network, and whether "
                      f"https://huggingface.co/{repository} wants its licence accepted and a login "
                      "(`hf auth login`); or name a local folder with --pretrained") from None


def check_login(repository):
    """ValueError, before training, if a result cannot be uploaded. repository: OWNER/NAME or None."""
    if not repository:
        return
    from huggingface_hub import HfApi
    try:
        HfApi().whoami()
    except Exception as error:
        raise ValueError(f"--push-to-hub {repository}: not logged in to the hub ({reason_of(error)}): "
                         "`hf auth login` with a token that may write") from None


def push(repository, run_dir):
    """Upload the result of a run and its model card. OSError with the command that tries again."""
    if not repository:
        return
    from huggingface_hub import HfApi
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(run_dir), allow_patterns=RESULT_FILES,
                          ignore_patterns=["step_*"])
    except Exception as error:
        raise OSError(f"the run is complete, but its upload failed ({reason_of(error)}); try again with: "
                      f"hf upload {repository} {run_dir} --exclude checkpoint.pt 'step_*'") from None
    print(f"uploaded to https://huggingface.co/{repository}")
