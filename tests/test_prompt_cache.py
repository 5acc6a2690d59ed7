"""Text encodings: computed once, kept on disk, and shared only by models that would compute the same."""

import json
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import CAPTIONS, FAMILIES, RESOLUTION, build_model

from conftest import ROOT
from models import loading, prompt_cache

pytestmark = pytest.mark.usefixtures("cache_home")

STRANGE_CAPTIONS = ["", "  \t ", "cat " * 2500, "c" * 10000, "a 🐈‍⬛ on a 🛋️", "قطة على أريكة",
                    "c" + "\u0301" * 300, "a\x00cat", "<script>alert(1)</script>", "../../etc/passwd"]


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def edit_tensor(folder, part):
    """Change the last element of the first tensor whose name contains `part`."""
    path = folder / "model.safetensors"
    state = load_file(path)
    name = next(name for name in sorted(state) if part in name)
    state[name].flatten()[-1] += .125
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_caption_is_encoded_once(pretrained, name, monkeypatch):
    model = build_model(pretrained, name)
    encoded = []
    encode_prompt = model.encode_prompt
    def recording_encode_prompt(captions):
        encoded.extend(captions)
        return encode_prompt(captions)
    monkeypatch.setattr(model, "encode_prompt", recording_encode_prompt)
    cond = model.encode_prompts([*CAPTIONS, CAPTIONS[0]])
    assert encoded == CAPTIONS
    assert torch.equal(cond["text"][0], cond["text"][2])
    assert not torch.equal(cond["pooled"][0], cond["pooled"][1])

    later = build_model(pretrained, name)                              # as another process would
    monkeypatch.setattr(later, "encode_prompt", None)
    later.unload_text_encoders()
    for key, value in later.encode_prompts(CAPTIONS).items():
        assert torch.equal(value, cond[key][:2])
    with pytest.raises(ValueError, match="have not encoded 'a green hat'"):
        later.encode_prompts(["a green hat"])


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_encoder_is_part_of_the_model(pretrained, name):
    names = [type(module).__name__.lower() for module in build_model(pretrained, name).modules()]
    assert not [module_name for module_name in names if "clip" in module_name or "t5" in module_name]


@pytest.mark.parametrize("name", FAMILIES)
def test_any_caption_is_encoded(pretrained, name):
    model = build_model(pretrained, name)
    cond, expected = model.encode_prompts(STRANGE_CAPTIONS), model.encode_prompts(["a red fox"])
    assert all(value.isfinite().all() for value in cond.values())
    assert all(value.shape[1:] == expected[key].shape[1:] for key, value in cond.items())
    with pytest.raises(ValueError, match="half a character"):
        model.encode_prompts(["a \ud83d cat"])


# -------------------------------------------------------------------------- what shares a cache folder

def changed(family, part, change):
    return pytest.param(family, part, change, id=f"{family}-{part}")


CHANGES = [
    changed("sdxl", "pipeline setting", lambda home: edit_json(
        home / "model_index.json", force_zeros_for_empty_prompt=False)),
    changed("sdxl", "token embeddings", lambda home: edit_tensor(home / "text_encoder", "token_embedding")),
    changed("sdxl", "projection", lambda home: edit_tensor(home / "text_encoder_2", "projection")),
    changed("sd3", "T5's weights", lambda home: edit_tensor(home / "text_encoder_3", "relative")),
    changed("sd15", "text_encoder config", lambda home: edit_json(
        home / "text_encoder" / "config.json", hidden_act="gelu")),
    changed("sd15", "tokenizer length", lambda home: edit_json(
        home / "tokenizer" / "tokenizer_config.json", model_max_length=30)),
    changed("sd15", "tokenizer vocabulary", lambda home: (home / "tokenizer" / "tokenizer.json").write_text(
        (home / "tokenizer" / "tokenizer.json").read_text().replace('"q</w>"', '"é</w>"'))),
    changed("sd3", "tokenizer_3 end token", lambda home: edit_json(
        home / "tokenizer_3" / "tokenizer_config.json", eos_token="<unk>")),
    changed("sd3", "T5 left out", lambda home: edit_json(
        home / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])),
]


@pytest.mark.parametrize("family,part,change", CHANGES)
def test_another_encoder_has_another_folder(pretrained, tmp_path, family, part, change):
    """Also where the change shows in no encoding of a particular caption."""
    home = shutil.copytree(pretrained / family, tmp_path / family)
    before = loading.load_model(family, "", home, RESOLUTION)
    change(home)
    after = loading.load_model(family, "", home, RESOLUTION)
    assert after.prompt_cache.folder != before.prompt_cache.folder


def test_switching_the_zeros_of_sdxl_changes_the_empty_caption(pretrained, tmp_path):
    home = shutil.copytree(pretrained / "sdxl", tmp_path / "sdxl")
    empty = {}
    for zeros in (True, False):
        edit_json(home / "model_index.json", force_zeros_for_empty_prompt=zeros)
        empty[zeros] = loading.load_model("sdxl", "", home, RESOLUTION).encode_prompts([""])["pooled"]
    assert empty[True].abs().max() == 0 < empty[False].abs().max()


def test_a_missing_t5_is_replaced_by_zeros_of_the_networks_width(pretrained):
    config = dict(build_model(pretrained, "sd3").network.config)
    pipe = build_model(pretrained, "sd3")._pipe[0]
    names = {prompt_cache.text_encoding_hash(pipe, "SD3", config | {"joint_attention_dim": dim})
             for dim in (32, 64)}
    assert len(names) == 2


@pytest.mark.parametrize("what", ["libraries", "format", "precision"])
def test_other_code_or_precision_has_another_folder(pretrained, monkeypatch, what):
    pipe = build_model(pretrained, "sd15")._pipe[0]
    before = prompt_cache.text_encoding_hash(pipe, "SD15", {})
    if what == "libraries":
        monkeypatch.setattr(prompt_cache.importlib.metadata, "version", lambda name: "0.0.1")
    elif what == "format":
        monkeypatch.setattr(prompt_cache, "FORMAT_VERSION", prompt_cache.FORMAT_VERSION + 1)
    else:
        pipe.text_encoder.half()
    assert prompt_cache.text_encoding_hash(pipe, "SD15", {}) != before


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_and_trained_pipelines_share_the_folder_of_their_base(pretrained, tmp_path, name):
    """Their encoders are the same, wherever they lie and whatever the network and the scheduler are."""
    model = build_model(pretrained, name)
    copied = loading.load_model(name, "", shutil.copytree(pretrained / name, tmp_path / name), RESOLUTION)
    with torch.no_grad():
        model.output_layer.weight.add_(1)
    model.save_pretrained(tmp_path, [(10, {})])
    trained = loading.load_model(name, "", tmp_path / "pipeline", RESOLUTION)
    assert model.prompt_cache.folder == copied.prompt_cache.folder == trained.prompt_cache.folder


# ------------------------------------------------------------------------------------------- the files

@pytest.mark.parametrize("umask,mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_cache_files_have_the_umasks_mode(pretrained, umask, mode):
    model = build_model(pretrained, "sd15")
    old = os.umask(umask)
    try:
        model.encode_prompts(CAPTIONS)
    finally:
        os.umask(old)
    files = list(model.prompt_cache.folder.iterdir())
    assert len(files) == 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_loading_a_model_writes_nothing(pretrained, cache_home):
    build_model(pretrained, "sd15")
    assert not cache_home.exists()


def test_processes_may_store_the_same_captions_at_once(cache_home):
    cache = prompt_cache.PromptCache("name")
    encodings = {"text": torch.randn(2, 1000, 100)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.store(["a cat", "a dog"], encodings), range(20)))
    other = prompt_cache.PromptCache("name")
    for i, caption in enumerate(("a cat", "a dog")):
        assert torch.equal(other.load(caption)["text"], encodings["text"][i].half())
    assert {path.suffix for path in cache.folder.iterdir()} == {".safetensors"}
    cache.store(["a bird"], {"text": torch.ones(1, 1000, 100)})        # by the first process, later
    assert other.load("a bird")["text"].min() == 1
    assert other.load("a fish") is None


def test_many_captions_are_few_files_of_half_the_bytes(pretrained, monkeypatch):
    model = build_model(pretrained, "sd15")
    captions = [f"a cat of kind {i}" for i in range(150)]
    row_bytes = 2 * (77 * 32 + 32)
    monkeypatch.setattr(prompt_cache, "FILE_BYTES", 100 * row_bytes)
    model.precompute_prompt_embeds(captions)
    files = list(model.prompt_cache.folder.iterdir())
    assert len(files) == 3                                             # of 1, of 128 and of 21 captions
    assert sum(path.stat().st_size for path in files) < 1.1 * 150 * row_bytes
    later = build_model(pretrained, "sd15")
    later.unload_text_encoders()
    exact = model.encode_prompt(captions[70:140])
    for key, value in later.encode_prompts(captions[70:140]).items():
        torch.testing.assert_close(value, exact[key], rtol=1e-3, atol=1e-3)


def test_too_many_captions_are_encoded_batch_by_batch(pretrained, monkeypatch, capsys):
    captions = [f"a cat of kind {i}" for i in range(1000)]
    monkeypatch.setattr(prompt_cache, "DISK_BYTES", 2 ** 20)
    model = build_model(pretrained, "sd15")
    model.precompute_prompt_embeds(captions)
    model.unload_text_encoders()
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "1,000 captions" in printed
    assert "each batch is encoded when it is needed" in printed
    num_files = len(list(model.prompt_cache.folder.iterdir()))
    cond = model.encode_prompts(captions[500:502])
    assert torch.equal(model.encode_prompts(captions[500:502])["text"], cond["text"])
    torch.testing.assert_close(cond["text"], model.encode_prompt(captions[500:502])["text"], rtol=1e-3,
                               atol=1e-3)
    assert len(list(model.prompt_cache.folder.iterdir())) == num_files
    with pytest.raises(ValueError, match="half a character"):
        model.precompute_prompt_embeds([*captions, "a \ud83d cat"])


def test_memory_holds_a_limited_number(cache_home, monkeypatch):
    cache = prompt_cache.PromptCache("name")
    monkeypatch.setattr(prompt_cache, "MEMORY_BYTES", 2000)
    cache.store([str(i) for i in range(10)], {"text": torch.arange(10.)[:, None].expand(10, 250)})
    for i in [*range(10), 0]:
        assert cache.load(str(i))["text"][0] == i
    assert 3 <= len(cache.in_memory) <= 5


@pytest.mark.parametrize("damage", ["cut", "one bit", "gone"])
def test_damaged_encodings_are_computed_again(pretrained, damage):
    model = build_model(pretrained, "sd15")
    before = model.encode_prompts(CAPTIONS)
    path, = model.prompt_cache.folder.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[-100] ^= 4
        path.write_bytes(content[:-50] if damage == "cut" else content)
    again = build_model(pretrained, "sd15")
    again.precompute_prompt_embeds(CAPTIONS)
    again.unload_text_encoders()
    for key, value in again.encode_prompts(CAPTIONS).items():
        torch.testing.assert_close(value, before[key], rtol=1e-3, atol=1e-3)


def test_a_damaged_encoding_without_encoders_and_a_read_only_folder_are_one_sentence(pretrained, cache_home,
                                                                                    monkeypatch):
    model = build_model(pretrained, "sd15")
    model.encode_prompts(CAPTIONS)
    path, = model.prompt_cache.folder.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    without = build_model(pretrained, "sd15")
    without.unload_text_encoders()
    with pytest.raises(ValueError, match="is damaged: start again"):
        without.encode_prompts(CAPTIONS)
    (cache_home.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home.parent / "file"))
    with pytest.raises(OSError, match="set XDG_CACHE_HOME to another folder"):
        model.encode_prompts(["a green hat"])


@pytest.mark.thorough
def test_a_container_without_a_home_can_encode(pretrained, tmp_path):
    """No HOME, and a user id that has no passwd entry: Path.home() raises RuntimeError there."""
    code = f"""
import os, pwd, sys
sys.path.insert(0, {str(ROOT)!r})
def no_entry(uid):
    raise KeyError(uid)
pwd.getpwuid = no_entry
from models.families import load_denoiser
model = load_denoiser("sd15", {str(pretrained / "sd15")!r}, {RESOLUTION})
for name in ("", {str(tmp_path / "chosen")!r}):
    os.environ["XDG_CACHE_HOME"] = name
    model.encode_prompts(["a cat"])
    print(model.prompt_cache.folder)
"""
    (tmp_path / "temporary").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "HOME"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env=environment | {"TMPDIR": str(tmp_path / "temporary")})
    assert done.returncode == 0, done.stderr
    without, chosen = [Path(line) for line in done.stdout.splitlines()]
    assert without.is_relative_to(tmp_path / "temporary")
    assert chosen.is_relative_to(tmp_path / "chosen")
