"""The datasets library, on local folders and without a network."""

import os
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastcure.data import hub, load

NAMES = ["train/cat/0.png", "train/dog/1.png", "test/cat/2.png"]


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "1")
        import datasets

        yield datasets


@pytest.fixture(autouse=True)
def caches(library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (7, 5)) -> Image.Image:
    shape = size[::-1] + ((len(mode),) if mode != "L" else ())
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def write_folder(root: Path, pictures: dict[str, Image.Image]) -> str:
    for name, image in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
    return f"hf:{root}"


def write_parquet(library: Any, root: Path, features: dict[str, Any], **splits: dict[str, list[Any]]) -> str:
    root.mkdir()
    for split, columns in splits.items():
        table = library.Dataset.from_dict(columns, features=library.Features(features))
        table.to_parquet(root / f"{split}.parquet")
    return f"hf:{root}"


def test_image_folder(tmp_path: Path) -> None:
    pictures = {f"train/{kind}/{i}.png": picture(i) for i, kind in enumerate(["cat", "cat", "dog", "owl"])}
    pictures |= {f"test/{kind}/{i}.png": picture(9 + i) for i, kind in enumerate(["owl", "cat"])}
    data = load(write_folder(tmp_path / "pets", pictures))
    assert data.x_train.shape == (4, 3, 5, 7)
    assert data.y_train.tolist() == [0, 0, 1, 2]
    assert data.y_test.tolist() == [0, 2]
    assert (data.num_classes, data.name) == (3, f"hf:{tmp_path / 'pets'}")
    assert (data.x_train[2].permute(1, 2, 0).numpy() == np.asarray(picture(2))).all()


def test_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "pets", {name: picture(0) for name in NAMES})
    monkeypatch.chdir(tmp_path)
    assert load("hf:./pets").x_train.shape == (2, 3, 5, 7)


def test_grey_stays_grey_and_mixed_becomes_colour(tmp_path: Path) -> None:
    grey = {name: picture(i, "L") for i, name in enumerate(NAMES)}
    data = load(write_folder(tmp_path / "grey", grey))
    assert data.x_train.shape == (2, 1, 5, 7)
    assert (data.x_test[0, 0].numpy() == np.asarray(picture(2, "L"))).all()
    mixed = load(write_folder(tmp_path / "mixed", {**grey, NAMES[2]: picture(2, "RGBA")}))
    assert mixed.x_train.shape == (2, 3, 5, 7)
    assert (mixed.x_train == data.x_train).all()
    assert (mixed.x_test[0].permute(1, 2, 0).numpy() == np.asarray(picture(2, "RGBA"))[..., :3]).all()


def test_parquet_with_class_label_and_validation(library: Any, tmp_path: Path) -> None:
    features = {
        "img": library.Image(),
        "species": library.ClassLabel(names=["a", "b", "c", "without images"]),
        "note": library.Value("string"),
    }
    train = {"img": [picture(i) for i in range(3)], "species": [2, 0, 0], "note": ["", "x", "y"]}
    validation = {"img": [picture(5)], "species": [1], "note": [""]}
    data = load(write_parquet(library, tmp_path / "zoo", features, train=train, validation=validation))
    assert data.y_train.tolist() == [2, 0, 0]
    assert data.y_test.tolist() == [1]
    assert data.num_classes == 4
    assert (data.x_test[0].permute(1, 2, 0).numpy() == np.asarray(picture(5))).all()


def test_whole_number_labels(library: Any, tmp_path: Path) -> None:
    features = {"image": library.Image(), "labels": library.Value("int8")}
    columns = {"image": [picture(i) for i in range(3)], "labels": [1, 0, 1]}
    data = load(write_parquet(library, tmp_path / "set", features, train=columns, test=columns))
    assert data.y_train.tolist() == [1, 0, 1]
    assert data.num_classes == 2


def test_labels_are_those_of_the_classes_that_a_network_knows(library: Any, tmp_path: Path) -> None:
    """By name: a set to test on may number its classes in another way, and grey images come out as RGB."""
    features = {"image": library.Image(), "label": library.ClassLabel(names=["owl", "emu", "cat"])}
    test = {"image": [picture(i, "L") for i in range(4)], "label": [2, 0, 0, -1]}
    name, known = write_parquet(library, tmp_path / "set", features, test=test), ("cat", "dog", "owl")
    with pytest.raises(ValueError, match=r"test labels must lie in 0\.\.2, got -1\.\.2"):
        load(name, train=False, classes=known, channels=3)
    name = write_parquet(library, tmp_path / "whole", features, test={n: c[:3] for n, c in test.items()})
    data = load(name, train=False, classes=known, channels=3)
    assert (data.y_test.tolist(), data.classes, data.x_test.shape[1]) == ([0, 2, 2], known, 3)
    assert load(name, train=False).y_test.tolist() == [2, 0, 0]
    with pytest.raises(ValueError, match="owl must be one of the classes cat, dog, which the network was trained on"):
        load(name, train=False, classes=("cat", "dog"))


def test_a_colour_image_is_grey_to_a_network_of_grey_images(library: Any, tmp_path: Path) -> None:
    features = {"image": library.Image(), "label": library.Value("int64")}
    name = write_parquet(library, tmp_path / "set", features, test={"image": [picture(0)], "label": [0]})
    found = load(name, train=False, channels=1).x_test[0, 0].double().numpy()
    red, green, blue = np.asarray(picture(0)).astype(float).transpose(2, 0, 1)
    assert np.abs(found - (0.299 * red + 0.587 * green + 0.114 * blue)).max() <= 1  # ITU-R BT.601


def test_unlabelled_test_split(library: Any, tmp_path: Path) -> None:
    features = {"image": library.Image(), "label": library.ClassLabel(names=["a", "b"])}
    train, test = ({"image": [picture(0)] * 2, "label": labels} for labels in ([0, 1], [-1, -1]))
    with pytest.raises(ValueError, match=r"test labels must lie in 0\.\.1, got -1\.\.-1"):
        load(write_parquet(library, tmp_path / "set", features, train=train, test=test))


@pytest.mark.parametrize("label", ["fine", "name"])
def test_ambiguous_columns(library: Any, tmp_path: Path, label: str) -> None:
    kinds = {"fine": library.ClassLabel(names=["a"]), "coarse": library.ClassLabel(names=["a"])}
    features = {"image": library.Image(), **(kinds if label == "fine" else {"name": library.Value("string")})}
    columns = {key: [picture(0) if key == "image" else "a"] for key in features}
    with pytest.raises(ValueError, match=f"needs one Image column and one label column, has .*{label}"):
        load(write_parquet(library, tmp_path / "set", features, train=columns, test=columns))


def test_missing_split(tmp_path: Path) -> None:
    name = write_folder(tmp_path / "pets", {"train/cat/0.png": picture(0)})
    with pytest.raises(ValueError, match=r"needs the splits train and test \(or validation\), has train"):
        load(name)


def test_unequal_sizes(tmp_path: Path) -> None:
    pictures = {**dict.fromkeys(NAMES, picture(0)), NAMES[1]: picture(1, size=(4, 9))}
    with pytest.raises(ValueError, match="must have one size, got 7x5 and 4x9: give --image-size N"):
        load(write_folder(tmp_path / "pets", pictures))
    data = load(f"hf:{tmp_path / 'pets'}", image_size=6)
    assert (data.x_train.shape, data.x_test.shape) == ((2, 3, 6, 6), (1, 3, 6, 6))
    assert data.classes == ("cat", "dog")


def test_sixteen_bits_are_not_clipped(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((5, 7), 40_000, np.uint16))
    pictures = {**dict.fromkeys(NAMES, picture(0)), NAMES[1]: deep}
    with pytest.raises(ValueError, match=r"image 1 must have 8 bits a channel, got Pillow mode I"):
        load(write_folder(tmp_path / "pets", pictures))


def test_an_image_for_which_pillow_would_run_a_program_is_refused(tmp_path: Path) -> None:
    name = write_folder(tmp_path / "pets", {name: picture(i) for i, name in enumerate(NAMES)})
    picture(0).save(tmp_path / "pets" / NAMES[1], "EPS")  # whatever the file is called
    with pytest.raises(ValueError, match="cannot identify image file"):
        load(name)


def test_an_image_that_is_missing(library: Any, tmp_path: Path) -> None:
    features = {"image": library.Image(), "label": library.ClassLabel(names=["a"])}
    columns = {"image": [picture(0), None], "label": [0, 0]}
    with pytest.raises(ValueError, match=r"image 1 must have 8 bits a channel, got none"):
        load(write_parquet(library, tmp_path / "set", features, train=columns, test=columns))


def test_nothing_is_looked_up_on_the_network(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"(?i)offline|couldn't|not found|doesn't exist"):
        load("hf:nobody/nothing-of-this-name")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def png(width: int, height: int, content: bytes) -> bytes:
    """A grey PNG that announces a size and holds other pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("side", [9000, 12_000, 30_000])  # Pillow refuses from 13,400 on, and warns from 9,460 on
def test_decompression_bombs_are_not_decoded(library: Any, tmp_path: Path, side: int, embedded: bool) -> None:
    bomb = png(side, side, bytes(side + 1) * 1000)
    if embedded:
        features = {"image": library.Image(), "label": library.ClassLabel(names=["a"])}
        columns = {"image": [{"bytes": bomb, "path": None}], "label": [0]}
        name = write_parquet(library, tmp_path / "set", features, train=columns, test=columns)
    else:
        name = write_folder(tmp_path / "pets", {name: picture(0) for name in NAMES})
        (tmp_path / "pets" / NAMES[0]).write_bytes(bomb)
    message = f"{name}: .*(announces {side}x{side} pixels in a file of|DecompressionBomb)"
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        load(name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 26


@pytest.mark.parametrize(
    "content",
    [
        b"not a picture",
        b"",
        b"\x89PNG\r\n\x1a\n",
        png(7, 5, b"")[:40],
        png(7, 5, bytes(3)),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 7 5\n%%EndComments\nshowpage\n",  # a program for ghostscript
    ],
)
def test_damaged_pictures_are_one_line(library: Any, tmp_path: Path, content: bytes) -> None:
    features = {"image": library.Image(), "label": library.ClassLabel(names=["a"])}
    columns = {"image": [{"bytes": content, "path": None}], "label": [0]}
    name = write_parquet(library, tmp_path / "set", features, train=columns, test=columns)
    with pytest.raises(ValueError, match=f"{name}: damaged, or not what its name says"):
        load(name)


def test_an_address_in_a_set_is_not_followed() -> None:
    message = r"image 3 is at the address https://nowhere\.invalid/a\.png, which is not followed"
    with pytest.raises(ValueError, match=message):
        hub._check_size({"bytes": None, "path": "https://nowhere.invalid/a.png"}, "image 3", 1)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("README.md", "---\nconfigs: [\n---\n"),
        ("README.md", "---\nconfigs:\n- config_name: [1]\n  data_files: 7\n---\n"),
        ("README.md", "---\ndataset_info:\n  features:\n  - name: image\n    dtype: nonsense\n---\n"),
        ("dataset_infos.json", "{" * 50),
        ("train.parquet", "PAR1 not at all PAR1"),
        ("test.parquet", ""),
    ],
)
def test_broken_metadata_is_one_error(library: Any, tmp_path: Path, file: str, content: str) -> None:
    features = {"image": library.Image(), "label": library.ClassLabel(names=["a"])}
    columns = {"image": [picture(0)], "label": [0]}
    name = write_parquet(library, tmp_path / "set", features, train=columns, test=columns)
    (tmp_path / "set" / file).write_text(content)
    with suppress(ValueError, FileNotFoundError):  # what the library ignores may be broken
        assert load(name).x_train.shape == (1, 3, 5, 7)


def test_a_set_whose_images_are_not_to_be_decoded(library: Any, tmp_path: Path) -> None:
    features = {"image": library.Image(decode=False), "label": library.ClassLabel(names=["a"])}
    columns = {"image": [{"bytes": png(2, 1, bytes([0, 7, 9])), "path": None}], "label": [0]}
    name = write_parquet(library, tmp_path / "set", features, train=columns, test=columns)
    assert load(name).x_train.flatten().tolist() == [7, 9]


def test_a_turned_photograph_is_upright(library: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    for name in NAMES:
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(path, exif=exif)
    data = load(f"hf:{tmp_path / 'pets'}")
    upright = np.rot90(np.asarray(picture(0)), -1)
    assert (data.x_train[0].permute(1, 2, 0).numpy() == upright).all()
