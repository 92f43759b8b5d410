"""A folder of images: which are trained and tested on, how they are scaled, and that streaming changes nothing."""

import os
from pathlib import Path
from weakref import ref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastcure.data import Augment, Dataset, ImageFiles, Loader, hold_out, image_files, limited, load
from fastcure.data import folder as module


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> Image.Image:
    shape = size[::-1] + ((len(mode),) if mode != "L" else ())
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def write(root: Path, *names: str, **options: object) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i, **options).save(root / name)  # type: ignore[arg-type]
    return root


def tree(root: Path, count: int = 10) -> Path:
    """Two classes of equal images, one file as large as `count` of a class."""
    return write(root, *(f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(count)))


def rows(images: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def test_train_and_test_folders(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/a.png", "train/cat/deep/b.PNG", "train/dog/c.png", "train/owl/d.png", "test/owl/e.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    data = load(f"folder:{tmp_path}")
    assert data.classes == ("cat", "dog", "owl")
    assert (data.y_train.tolist(), data.y_test.tolist(), data.num_classes) == ([0, 0, 1, 2], [2], 3)
    assert isinstance(data.x_train, Tensor)
    for place in range(4):
        assert (data.x_train[place].permute(1, 2, 0).numpy() == np.asarray(picture(place))).all()
    assert data.validation is None


def test_a_validation_folder_is_what_a_run_is_followed_on_or_is_tested_on(tmp_path: Path) -> None:
    write(tmp_path, "train/a/0.png", "train/b/1.png", "val/a/2.png", "val/b/3.png")
    assert load(f"folder:{tmp_path}").y_test.tolist() == [0, 1]  # there is no other
    write(tmp_path, *(f"test/{kind}/{i}.png" for kind in "ab" for i in range(3)))
    data = load(f"folder:{tmp_path}")
    assert len(data.y_test) == 6
    rest, x, y = hold_out(data, None, 0)
    assert (len(rest.y_train), y.tolist()) == (2, [0, 1])
    assert rows(x) == [np.asarray(picture(i)).transpose(2, 0, 1).tobytes() for i in (2, 3)]


@pytest.mark.parametrize("fraction", [None, 0.3])
def test_one_tree_is_divided_in_each_class_and_alike_for_whoever_asks(tmp_path: Path, fraction: float | None) -> None:
    name = f"folder:{tree(tmp_path / 'pets')}"
    data = load(name, test_fraction=fraction)
    each = 1 if fraction is None else 3
    assert data.y_test.bincount().tolist() == [each, each]
    assert data.y_train.bincount().tolist() == [10 - each, 10 - each]
    assert isinstance(data.x_train, Tensor)
    assert set(rows(data.x_train)).isdisjoint(rows(data.x_test))
    measured = load(name, train=False, test_fraction=fraction or 0.1)
    assert torch.equal(measured.x_test, data.x_test)
    assert len(load(name, train=False).y_test) == 20  # nothing was trained on


def test_images_to_test_on_need_not_show_every_class(tmp_path: Path) -> None:
    write(tmp_path, "new/owl/0.png", "new/cat/1.png")
    known = {"train": False, "classes": ("cat", "dog", "owl")}
    data = load(f"folder:{tmp_path / 'new'}", **known)  # type: ignore[arg-type]
    assert (data.y_test.tolist(), data.num_classes, len(data.y_train)) == ([0, 2], 3, 0)
    write(tmp_path, "new/emu/2.png")
    with pytest.raises(ValueError, match=r"new/emu: must be one of the classes cat, dog, owl: move or rename it"):
        load(f"folder:{tmp_path / 'new'}", **known)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (16, 16), (9, 15)])
def test_the_shorter_side_is_scaled_and_the_middle_cut_out(tmp_path: Path, size: tuple[int, int]) -> None:
    """Against torch's antialiased interpolation; Pillow rounds after each of two passes."""
    write(tmp_path, "a/0.png", "b/0.png", size=size)
    found = load(f"folder:{tmp_path}", image_size=12, train=False).x_test[0]
    whole = torch.from_numpy(np.array(picture(0, size=size))).permute(2, 0, 1).double()
    H, W = (12 * side // min(size) for side in whole.shape[1:])
    scaled = F.interpolate(whole[None], size=(H, W), mode="bilinear", antialias=True)[0]
    top, left = (H - 12) // 2, (W - 12) // 2
    assert (found - scaled[:, top : top + 12, left : left + 12]).abs().max() < 1.1


def test_grey_stays_grey_and_a_photo_is_turned_upright(tmp_path: Path) -> None:
    write(tmp_path / "grey", "a/0.png", "b/0.png", mode="L")
    assert load(f"folder:{tmp_path / 'grey'}", train=False).x_test.shape == (2, 1, 7, 9)
    assert load(f"folder:{tmp_path / 'grey'}", train=False, channels=3).x_test.shape == (2, 3, 7, 9)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned by a quarter
    for kind in "ab":
        (tmp_path / "turned" / kind).mkdir(parents=True)
        picture(0).save(tmp_path / "turned" / kind / "0.png", exif=turned)
    upright = load(f"folder:{tmp_path / 'turned'}", train=False, image_size=7).x_test[0]
    assert torch.equal(upright, torch.from_numpy(np.array(picture(0))[:, 1:8]).permute(2, 0, 1).rot90(-1, (1, 2)))


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere not found; give a folder that has a folder of images for"):
        load(f"folder:{tmp_path / 'nowhere'}")
    pets = tree(tmp_path / "pets", 2)
    write(pets, "dog/wide.png", size=(30, 9))
    with pytest.raises(
        ValueError, match=r"one size, got 9x7 \(cat/.*\) and 30x9 \(dog/wide.png\): give --image-size N"
    ):
        load(f"folder:{pets}")
    (pets / "dog" / "wide.png").write_bytes((pets / "dog" / "0.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"dog/wide\.png: damaged, or not what its name says"):
        load(f"folder:{pets}")
    (pets / "empty").mkdir()
    with pytest.raises(ValueError, match=r"pets/empty: has no images .* remove it, or add some"):
        load(f"folder:{pets}")
    with pytest.raises(ValueError, match=r"image_size is of folder: and hf: data.*, got 8 for 'digits': leave it out"):
        load("digits", image_size=8)


def in_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, Dataset]:
    """A tree in memory, and one that does not fit into it."""
    held = load(f"folder:{root}")
    monkeypatch.setattr(image_files, "IN_MEMORY", 0)
    return held, load(f"folder:{root}")


def test_images_that_do_not_fit_into_memory_stay_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, files = in_files(tree(tmp_path), monkeypatch)
    assert isinstance(held.x_train, Tensor)
    assert isinstance(files.x_train, ImageFiles)
    assert files.x_train.shape == held.x_train.shape
    assert torch.equal(files.x_train[torch.tensor([3, 0, 17])], held.x_train[[3, 0, 17]])
    assert torch.equal(files.x_test, held.x_test)
    for few in (hold_out(held, 4, 0), hold_out(files, 4, 0)):
        assert len(few[0].y_train) == 14
    rest, x, _ = hold_out(limited(files, 10, 0), 4, 0)
    expected, y, _ = hold_out(limited(held, 10, 0), 4, 0)
    assert torch.equal(x, y)
    assert isinstance(rest.x_train, ImageFiles)
    assert torch.equal(rest.x_train[torch.arange(6)], expected.x_train[torch.arange(6)])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than the machine has cores
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_epochs_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """The same images, cropped and mirrored alike, from a later batch on as well; no number of torch's own is drawn."""
    held, files = in_files(tree(tmp_path), monkeypatch)

    def batches(data: Dataset, share: tuple[int, int] = (0, 1), start: int = 0, epochs: int = 2) -> list[Tensor]:
        options = {"augment": Augment(pad=2, flip=True), "generator": torch.Generator().manual_seed(3)}
        loader = Loader(data.x_train, data.y_train, 4, share=share, workers=workers, **options)  # type: ignore[arg-type]
        drawn = [batch for _ in range(epochs) for batch in loader.batches(start)]
        return [part for x, y, index, transform in drawn for part in (x, y, index, *torch.as_tensor(transform.draws))]

    before = torch.get_rng_state()
    found, expected = batches(files), batches(held)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*pair) for pair in zip(batches(files, start=2, epochs=1), expected[12:30], strict=True))
    for share in ((0, 3), (2, 3)):
        whole = [part[share[0] :: 3] if len(part) > share[0] else part[:1] for part in expected]
        assert all(torch.equal(*pair) for pair in zip(batches(files, share), whole, strict=True))


def test_a_file_that_breaks_while_it_is_streamed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, files = in_files(tree(tmp_path), monkeypatch)
    for path in (tmp_path / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{tmp_path}/dog/\d\.png: damaged, or not what its name says"):
        list(Loader(files.x_train, files.y_train, 4, workers=0))


def test_names_are_read_in_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which a file system lists them."""
    name = f"folder:{tree(tmp_path)}"
    data = load(name)
    walk = os.walk
    monkeypatch.setattr(module.os, "walk", lambda *a, **k: [(p, d, sorted(f)[::-1]) for p, d, f in walk(*a, **k)])
    again = load(name)
    assert torch.equal(torch.as_tensor(data.x_train[:]), torch.as_tensor(again.x_train[:]))


def test_workers_of_a_stream_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cycle of references they are ended by the garbage collector, in an order in which each waits for 5 s."""
    _, files = in_files(tree(tmp_path), monkeypatch)
    loader = Loader(files.x_train, files.y_train, 4, workers=0)
    stream = ref(loader.stream)
    list(loader)
    del loader
    assert stream() is None
