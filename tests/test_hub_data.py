"""Data sets by the library `datasets`: the hub, folders of tables, .tar shards, in any order and streamed."""

import io
import json
import os
import tarfile
import time
from collections import Counter

import pytest
import torch
from PIL import Image

import data
import train
from conftest import train_run
from scripts import pretrain
from utils import captioned_images, distributed, failures, hub_data
from utils.messages import BadInput

datasets = pytest.importorskip("datasets")
SHADES = [12 * i for i in range(20)]                     # image i is red with this value


@pytest.fixture(autouse=True)
def library_cache(tmp_path, monkeypatch):
    """An empty cache, and no pause of five seconds after a parquet stream."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def streaming(monkeypatch):
    """Every data set counts as large."""
    monkeypatch.setattr(hub_data, "MAP_STYLE_BYTES", -1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def png_bytes(shade, size=(40, 60)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 10, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def caption_of(i):
    return f"shade {SHADES[i]}"


def make_table(image="image", caption="text", **columns):
    """A table of 20 images."""
    rows = {image: [{"bytes": png_bytes(shade), "path": None} for shade in SHADES],
            caption: [caption_of(i) for i in range(20)], **columns}
    kinds = {name: datasets.Value("string") for name in rows} | {image: datasets.Image()}
    return datasets.Dataset.from_dict(rows, datasets.Features(kinds))


def make_shards(folder, num_shards=4, files=None):
    """.tar shards of the 20 images. files: function of a number -> {suffix: content}."""
    folder.mkdir(exist_ok=True)
    files = files or (lambda i: {"png": png_bytes(SHADES[i]), "txt": caption_of(i).encode()})
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for i in range(shard * 20 // num_shards, (shard + 1) * 20 // num_shards):
                for suffix, content in files(i).items():
                    info = tarfile.TarInfo(f"{i:04}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def make_parquet(folder):
    folder.mkdir()
    make_table().to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def shades_of(batch):
    """The values in the images of a batch, which its captions must name."""
    values = ((batch.image[:, 0].mean((1, 2)) + 1) * 127.5).round().int().tolist()
    assert batch.caption == [f"shade {value}" for value in values]
    return values


def complaint(name):
    with pytest.raises((ValueError, OSError)) as caught:
        data.build_dataset(str(name))
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- what is read

def parquet_folder(path):
    return make_parquet(path / "mine")


def saved_to_disk(path):
    make_table().save_to_disk(path / "mine")
    return path / "mine"


def saved_splits(path):
    datasets.DatasetDict(train=make_table(), test=make_table()).save_to_disk(path / "mine")
    return path / "mine"


def shards_in_sub_folders(path):
    (path / "mine").mkdir()
    make_shards(path / "mine" / "sub [1] {0..1}")
    return path / "mine"


def shards_by_braces(path):
    return make_shards(path / "mine") / "{000..003}.tar"


def shards_by_stars(path):
    return make_shards(path / "mine") / "*.tar"


@pytest.mark.parametrize("make", [parquet_folder, saved_to_disk, saved_splits, shards_in_sub_folders,
                                  shards_by_braces, shards_by_stars])
@pytest.mark.parametrize("is_large", [False, True])
def test_every_form_gives_all_images_with_their_captions(tmp_path, monkeypatch, make, is_large):
    name = str(make(tmp_path))
    if is_large:
        monkeypatch.setattr(hub_data, "MAP_STYLE_BYTES", -1)
    dataset = data.build_dataset(name)
    is_stream = is_large and "saved" not in make.__name__
    assert isinstance(dataset, captioned_images.StreamedImages) == is_stream
    assert sorted(shades_of(dataset.training_batch(0, 20, 0, seeded()))) == SHADES
    batch = dataset.sample_batch(3, seeded())
    assert len(set(shades_of(batch))) == 3
    assert batch.micro_cond.tolist() == [[60, 40, 8, 0]] * 3
    assert torch.equal(dataset.sample_batch(3, seeded()).image, batch.image)
    parts = list(dataset.iter_batches(3, 2, seeded()))
    assert torch.equal(torch.cat([part.image for part in parts]), batch.image)
    assert dataset.name == ("mine" if "by" not in make.__name__ else name.split("/")[-1])


def test_braces_are_all_numbers_with_their_zeros():
    assert hub_data.expand_braces("a{08..10}b") == ["a08b", "a09b", "a10b"]
    assert hub_data.expand_braces("{0..1}/{2..3}") == ["0/2", "0/3", "1/2", "1/3"]
    assert hub_data.expand_braces("plain.tar") == ["plain.tar"]


def test_a_folder_with_image_files_stays_a_folder_of_images(tmp_path, capsys):
    folder = make_shards(tmp_path / "mine")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "a.txt").write_text("a caption")
    assert data.build_dataset(str(folder)).captions == ["a caption"]
    assert "left out: 4 file(s)" in capsys.readouterr().out


def test_shards_with_capital_suffixes_count_and_system_files_do_not(tmp_path, capsys):
    folder = make_shards(tmp_path / "mine", 2)
    (folder / "001.tar").rename(folder / "001.TAR")
    (folder / "._000.tar").write_bytes(b"\0\5\x16\7")
    assert len(data.build_dataset(str(folder)).captions) == 20
    (folder / "000.tar").unlink()
    assert len(data.build_dataset(str(folder)).captions) == 10
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("make, suffix", [(make_shards, ".tar"), (make_parquet, ".parquet")])
def test_what_lies_beside_shards_and_tables_is_named(tmp_path, capsys, make, suffix):
    folder = make(tmp_path / "mine")
    for name in ("0.avif", "notes.md", "extra.csv"):
        (folder / name).write_text("something")
    assert len(data.build_dataset(str(folder)).captions) == 20
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "left out: 3 file(s)" in line
    assert f"that are not {suffix} files: 0.avif, extra.csv, notes.md" in line


def test_a_folder_that_save_to_disk_wrote_has_nothing_to_leave_out(tmp_path, capsys):
    data.build_dataset(str(saved_splits(tmp_path)))
    assert "left out" not in capsys.readouterr().out


def test_shards_that_the_library_cannot_read_are_named(tmp_path):
    def latin_caption(i):
        return {"png": png_bytes(SHADES[i]), "txt": "für".encode("latin-1") if i == 7 else b"a caption"}

    def mixed_formats(i):
        return {"png" if i % 2 else "jpg": png_bytes(SHADES[i]), "txt": b"a caption"}

    folder = make_shards(tmp_path / "latin", files=latin_caption)
    assert complaint(folder) == f"0007.txt in {folder}/001.tar is not UTF-8: save it as UTF-8"
    folder = make_shards(tmp_path / "mixed", files=mixed_formats)
    assert f"{folder}/000.tar differ: some are jpg and txt, others png and txt" in complaint(folder)
    folder = make_shards(tmp_path / "empty", files=lambda i: {})
    assert f"{folder}/000.tar has no samples" in complaint(folder)


def test_a_fingerprint_identifies_a_table(tmp_path):
    table = make_table()
    prints = set()
    for number, content in enumerate([table, table.select(range(19)), table.select(range(20))]):
        content.save_to_disk(tmp_path / str(number))
        prints.add(data.build_dataset(str(tmp_path / str(number))).fingerprint)
    assert len(prints) == 2
    other = make_table().map(lambda row: {"text": row["text"] + "!"})
    other.save_to_disk(tmp_path / "other")
    assert data.build_dataset(str(tmp_path / "other")).fingerprint not in prints


def test_a_repainted_picture_changes_the_fingerprint_of_a_table(tmp_path):
    """In the table, and in a file that the table names; the sizes stay as they are."""
    outside, prints = tmp_path / "0.bmp", set()
    for in_table in ("red", "blue"):
        for in_file in ("red", "blue"):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), in_table).save(file, "bmp")
            Image.new("RGB", (8, 8), in_file).save(outside)
            cells = [{"bytes": file.getvalue(), "path": None}, {"bytes": None, "path": str(outside)},
                     {"bytes": None, "path": "https://localhost/0.bmp"}, None]
            kinds = {"image": datasets.Image(decode=False), "text": datasets.Value("string")}
            table = datasets.Dataset.from_dict({"image": cells, "text": ["a"] * 4}, datasets.Features(kinds))
            images = hub_data.TableImages(table, "image", ("text",), "owner/name", None)
            prints.add(images.fingerprint)
    assert len(prints) == 4


def test_repainted_shards_have_another_version(tmp_path, monkeypatch):
    """The sizes of .tar files are rounded up, so they hardly tell."""
    monkeypatch.setattr(hub_data, "MAP_STYLE_BYTES", 0)
    folder, prints = make_shards(tmp_path / "mine"), set()
    for shade in (3, 4):
        make_shards(folder, files=lambda i, shade=shade: {"png": png_bytes(shade), "txt": b"a caption"})
        prints.add(data.build_dataset(str(folder)).fingerprint)
    assert len(prints) == 2


# --------------------------------------------------------------------------------------------------- columns

def find(table, columns=()):
    source = hub_data.Source("OWNER/NAME", "hub", "OWNER/NAME", columns=columns)
    return hub_data.find_columns(datasets, table.features, source)


@pytest.mark.parametrize("image, caption", [("image", "text"), ("jpg", "caption"), ("picture", "prompt"),
                                            ("photo", "title")])
def test_columns_are_found_by_type_and_by_the_usual_names(image, caption):
    assert find(make_table(image, caption)) == (image, (caption,))
    assert find(make_table(image, "text", source=["web"] * 20)) == (image, ("text",))


def test_columns_that_cannot_be_told_apart_are_named():
    two_captions = make_table(prompt=["another"] * 20)
    with pytest.raises(BadInput, match="cannot tell its captions.*found text, prompt; add the names"):
        find(two_captions)
    assert find(two_captions, ("image", "prompt")) == ("image", ("prompt",))
    with pytest.raises(BadInput, match="the images are in image, the texts in text, prompt"):
        find(two_captions, ("image", "title"))
    with pytest.raises(BadInput, match="cannot tell its captions"):
        find(make_table(caption="title", source=["web"] * 20))
    with pytest.raises(BadInput, match="has no captions"):
        find(make_table().remove_columns("text"))
    with pytest.raises(BadInput, match="has no images"):
        find(make_table().remove_columns("image"))
    with pytest.raises(BadInput, match="cannot tell its images.*found left, right"):
        find(datasets.concatenate_datasets([make_table("left"), make_table("right", "other")], axis=1))


def test_captions_in_json_files_of_shards(tmp_path):
    def files(i):
        return {"png": png_bytes(SHADES[i]), "json": json.dumps({"caption": caption_of(i), "id": i}).encode()}

    dataset = data.build_dataset(str(make_shards(tmp_path / "mine", files=files)))
    assert sorted(shades_of(dataset.training_batch(0, 20, 0, seeded()))) == SHADES
    named = data.build_dataset(f"{tmp_path / 'mine'}#png,json.caption")
    assert named.captions == dataset.captions and named.name == "mine"


def test_a_caption_may_be_missing(tmp_path):
    table = make_table().map(lambda row, i: {"text": None if i == 3 else row["text"]}, with_indices=True)
    table.save_to_disk(tmp_path / "mine")
    assert data.build_dataset(str(tmp_path / "mine")).captions[3] == ""


# --------------------------------------------------------------------------------------------------- streams

def shades_at(dataset, position, n, seed=0):
    return shades_of(dataset.training_batch(position, n, seed, seeded()))


def test_a_stream_gives_every_image_once_an_epoch_in_another_order(tmp_path, streaming):
    dataset = data.build_dataset(str(make_shards(tmp_path / "mine")))
    epochs = [shades_at(dataset, 20 * epoch, 20) for epoch in range(3)]
    assert all(sorted(shades) == SHADES for shades in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != SHADES
    assert shades_at(dataset, 0, 20, seed=1) != epochs[0]


def test_a_stream_continues_where_it_was(tmp_path, streaming):
    name = str(make_shards(tmp_path / "mine"))
    dataset = data.build_dataset(name)
    shades = [shades_at(dataset, position, 3) for position in range(0, 60, 3)]
    for position in (45, 27, 0, 3):
        assert shades_at(data.build_dataset(name), position, 3) == shades[position // 3]
        assert shades_at(dataset, position, 3) == shades[position // 3]


@pytest.mark.parametrize("num_shards", [4, 3])           # whole shards, or every second image
def test_processes_have_parts_without_a_common_image(tmp_path, monkeypatch, streaming, num_shards):
    name = str(make_shards(tmp_path / "mine", num_shards))
    parts = []
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        dataset = data.build_dataset(name)
        parts.append(shades_at(dataset, 0, 9))
        parts[-1] += shades_at(dataset, 9, 1)
    if num_shards == 4:
        assert sorted(parts[0] + parts[1]) == SHADES
    assert not set(parts[0]) & set(parts[1])
    assert torch.equal(dataset.sample_batch(4, seeded()).image,
                       data.build_dataset(name).sample_batch(4, seeded()).image)


def test_a_broken_image_of_a_stream_is_replaced_and_positions_stay(tmp_path, streaming, capsys):
    def files(i):
        return {"png": b"no image" if i == 7 else png_bytes(SHADES[i]), "txt": caption_of(i).encode()}

    name = str(make_shards(tmp_path / "mine", files=files))
    dataset = data.build_dataset(name)
    shades = [shades_at(dataset, position, 1) for position in range(20)]
    counts = Counter(value for batch in shades for value in batch)
    assert SHADES[7] not in counts and sum(counts.values()) == 20 and len(counts) == 19
    assert "0007.png" in capsys.readouterr().out
    assert [shades_at(data.build_dataset(name), position, 1) for position in range(20)] == shades


def test_a_stream_that_breaks_off_is_a_sentence(tmp_path, streaming):
    folder = make_shards(tmp_path / "mine")
    dataset = data.build_dataset(str(folder))
    for path in folder.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(BadInput, match="cannot read"):
        dataset.training_batch(0, 20, 0, seeded())


# --------------------------------------------------------------------------------------------------- the hub

@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set of two splits; -> a dictionary: bytes of its files, arguments of the calls."""
    state = {"bytes": 10 ** 6, "calls": []}

    def load_dataset(hub_id, config, revision, streaming):
        state["calls"].append((hub_id, config, revision, streaming))
        splits = {"train": make_table(), "test": make_table().select(range(5))}
        if streaming:
            return {name: table.to_iterable_dataset(num_shards=2) for name, table in splits.items()}
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(hub_data, "is_hub_reachable", lambda: True)
    monkeypatch.setattr(hub_data, "hub_size_and_version", lambda hub_id: (state["bytes"], "3f2a"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


def test_a_small_data_set_of_the_hub_is_a_table_and_a_large_one_a_stream(hub):
    dataset = data.build_dataset("owner/name")
    assert sorted(shades_of(dataset.training_batch(0, 20, 0, seeded()))) == SHADES
    assert dataset.name == "owner/name"
    for hub["bytes"] in (None, hub_data.MAP_STYLE_BYTES + 1):
        dataset = data.build_dataset("owner/name:large@test")
        assert sorted(shades_of(dataset.training_batch(0, 5, 0, seeded()))) == SHADES[:5]
        assert dataset.fingerprint == "3f2a"
    assert hub["calls"] == [("owner/name", None, "3f2a", False)] + [("owner/name", "large", "3f2a", True)] * 2


def test_a_split_that_is_not_there_is_named(hub):
    assert "has the splits train, test: add one of them, like owner/name@train" in complaint("owner/name@dev")


@pytest.mark.parametrize("name", ["cats", "a/b/c", "/owner/name", "a b/c", "owner/", "../data", "a/b@c@d"])
def test_what_is_no_hub_id_and_no_folder_is_refused(name):
    with pytest.raises(FileNotFoundError, match="wanted glyphs, fashion, a folder .* a hub data set"):
        data.dataset_name(name)


def test_bad_names_get_a_sentence(tmp_path):
    folder = make_shards(tmp_path / "mine")
    assert "there is no file" in complaint(folder / "{000..007}.tar")
    assert "there is no file" in complaint(folder / "x*.tar")
    assert "wanted two columns after #" in complaint(f"{folder}#png")
    assert "the images are in png, the texts in txt" in complaint(f"{folder}#png,title")
    (folder / "000.tar").write_bytes(b"no tar")
    assert "cannot load the data set" in complaint(folder)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.parquet").write_bytes(b"no parquet")
    assert "cannot load the data set" in complaint(tmp_path / "tables")
    with pytest.raises(BadInput, match="has no images"):
        hub_data.TableImages(make_table().select([]), "image", ("text",), "owner/name", None)


def test_without_a_network_the_answer_comes_at_once_and_the_cache_is_used(tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    start = time.monotonic()
    message = complaint("owner/name")
    assert "does not answer" in message and "check the network" in message and "\n" not in message
    assert time.monotonic() - start < 5
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: make_table())
    assert len(data.build_dataset("owner/name").captions) == 20


def test_an_error_of_the_hub_is_one_sentence(hub, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported\nmore\nlines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = complaint("owner/name")
    assert "scripts are no longer supported" in message and "datasets/owner/name" in message
    assert "\n" not in message


def test_without_the_library_its_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_data.importlib.util, "find_spec", lambda name: None)
    for name in ("owner/name", str(make_shards(tmp_path / "mine"))):
        assert complaint(name).endswith("needs the library datasets: pip install datasets")
    assert data.dataset_name("glyphs") == "glyphs"


def test_without_a_home_the_libraries_write_where_it_is_said(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(hub_data.Path, "home", no_home)
    monkeypatch.setattr(failures, "interrupt_on_sigterm", lambda: None)
    failures.start_program()
    assert os.environ["HF_HOME"] == str(hub_data.cache_folder())
    assert "~" not in os.environ["HF_HOME"]


def test_the_default_data_set_is_announced_with_size_and_licence(monkeypatch):
    monkeypatch.setenv("HF_HOME", "/somewhere")
    message = data.default_dataset_message()
    for part in ("lambdalabs/naruto-blip-captions", "1,221", "0.7 GB", "1.4 GB", "/somewhere",
                 "licence: none"):
        assert part in message
    assert hub_data.parse_source(hub_data.DEFAULT_DATASET["id"]).kind == "hub"


# ------------------------------------------------------------------------------------------------------ runs

def test_names_of_files_mean_the_same_in_any_folder(tmp_path, monkeypatch):
    make_shards(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "mine/{000..003}.tar", "mine/*.tar", "mine#png,txt"):
        absolute = hub_data.absolute_name(name)
        assert absolute == str(tmp_path / name)
        monkeypatch.chdir("/")
        assert len(data.build_dataset(absolute).captions) == 20
        monkeypatch.chdir(tmp_path)
    assert hub_data.absolute_name("owner/name@train") == "owner/name@train"


@pytest.mark.parametrize("name", ["glyphs", "glyphs:serif,sans", "fashion"])
def test_the_name_of_a_built_in_data_set_comes_before_a_folder_of_that_name(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "0.txt").write_text("a picture")
    Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    monkeypatch.chdir(tmp_path)
    assert hub_data.absolute_name(name) == name
    assert data.dataset_name(name) == data.build_dataset(name).name == name.partition(":")[0]
    assert hub_data.absolute_name(f"./{name}") == str(tmp_path / name)


@pytest.fixture(scope="module")
def trained_weights(tmp_path_factory):
    """Weights of the tiny networks whose vocabulary is that of the captions."""
    path = tmp_path_factory.mktemp("weights")
    folder = make_shards(path / "mine")
    pretrain.main(["--data", str(folder), "--steps", "1", "--output-dir", str(path / "weights")])
    return str(path / "weights")


@pytest.mark.thorough
def test_a_run_on_a_stream_resumes_to_the_bit(tmp_path, monkeypatch, streaming, trained_weights):
    folder = make_shards(tmp_path / "mine")
    args = ["--method", "diffusion", "--data", str(folder), "--pretrained", trained_weights, "--random-flip",
            "--random-crop", "--set", "gradient_accumulation_steps=2", "--steps", "4"]
    whole = train_run(tmp_path / "whole", *args)
    train_step = train.Trainer.train_step

    def stop_after_two(trainer):
        if trainer.step == 2:
            raise OSError("the disk is gone")
        return train_step(trainer)

    part = tmp_path / "part"
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", stop_after_two)
        with pytest.raises(SystemExit):
            train_run(part, *args)
    train.main(["--resume", str(part), "--eval-samples", "0"])
    states = [torch.load(run_dir / "checkpoint.pt", weights_only=True) for run_dir in (whole, part)]
    assert states[0]["step"] == states[1]["step"] == 4
    for first, second in zip(states[0]["params"], states[1]["params"]):
        assert torch.equal(first, second)
    run_config = json.loads((part / "config.json").read_text())
    assert run_config["random_flip"] is run_config["random_crop"] is True


def test_a_word_that_a_stream_brings_and_the_tiny_model_does_not_know_is_a_sentence(tmp_path, streaming,
                                                                                    trained_weights, capsys):
    def files(i):
        return {"png": png_bytes(SHADES[i]), "txt": b"shade zebra"}

    folder = make_shards(tmp_path / "mine", files=files)
    with pytest.raises(SystemExit) as stop:
        train_run(tmp_path / "run", "--data", str(folder), "--pretrained", trained_weights, "--steps", "2")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "does not know the word 'zebra'" in error and "Traceback" not in error


def test_the_words_of_a_stream_are_not_known_beforehand(tmp_path, streaming, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--data", str(make_shards(tmp_path / "mine")), "--output-dir", str(tmp_path / "out")])
    assert stop.value.code == 2 and "is streamed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
