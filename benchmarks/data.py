"""Real data for the benchmarks, from a local copy, each file checked by its digest.

Run ``python benchmarks/data.py --data-dir DIR`` to see what is there, and how to get the rest. Nothing is downloaded here.

- ``digits``: scikit-learn's 1,797 handwritten digits of 8×8, which are part of the package.
- ``fashion``: Fashion-MNIST, 70,000 images of 28×28. IDX files, gzipped or not, in ``FashionMNIST/raw``, where torchvision's download
  leaves them, in a folder ``fashion-mnist``, or in DIR itself.
- ``cifar10``: CIFAR-10, 60,000 images of 32×32. ``cifar-10-batches-py``, as torchvision's download leaves it, ``cifar-10-batches-bin``,
  or an archive ``*cifar10*.tgz`` with a PNG for each batch.
- ``brown``: the Brown corpus of 1.16 million words. Its 500 tagged files, ``ca01`` to ``cr09``, in a folder ``brown``, or in an archive
  ``*brown*.tgz``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import zlib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final, NoReturn

import numpy as np
import torch
from torch import Tensor

__all__ = ["Images", "MissingDataError", "load_images", "load_text"]

FASHION: Final = {  # SHA-256 of the unpacked files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
CIFAR10: Final = {  # SHA-256 of the binary release, and MD5 of the pickled one
    "data_batch_1": ("cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5", "c99cafc152244af753f735de768cd75f"),
    "data_batch_2": ("a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed", "d4bba439e000b95fd0a9bffe97cbabec"),
    "data_batch_3": ("bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67", "54ebc095f3ab1f0389bbae665268c751"),
    "data_batch_4": ("014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48", "634d18415352ddfa80567beed471001a"),
    "data_batch_5": ("755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add", "482c414d41f54cd18b22e5b47cb7c3cb"),
    "test_batch": ("8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b", "40351d587109b95175f43aff81a1287e"),
}
BROWN: Final = "cbc711696316d4aa801b51d6a062c4bc5a2c5f85abdf4ca5a51f6e11a50c1bc8"  # SHA-256 of the files one after another, by name
STEPS: Final = {
    "fashion": "Fetch it with `python -c \"from torchvision.datasets import FashionMNIST as D; D('DIR', download=True)\"`.",
    "cifar10": "Fetch it with `python -c \"from torchvision.datasets import CIFAR10 as D; D('DIR', download=True)\"`.",
    "brown": "Put the corpus's 500 tagged files, ca01 to cr09, into the folder DIR/brown.",
}


class MissingDataError(FileNotFoundError):
    """A data set is not there; the message says how to get it."""


@dataclass(frozen=True)
class Images:
    """Images in [0, 1], shape ``(N, C, H, W)``, with the labels of each; ``digits`` has no test set of its own and is split in order."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_images(name: str, folder: Path | None = None) -> Images:
    """Load ``digits``, ``fashion`` or ``cifar10``.

    Raises:
        MissingDataError: If the data is not below `folder`.
        ValueError: If a file is not the one it should be.
    """
    if name == "digits":
        digits = import_module("sklearn.datasets").load_digits()
        x, y = digits.images[:, None] / 16, digits.target
        parts = (x[:1297], y[:1297]), (x[1297:], y[1297:])
    else:
        parts = {"fashion": _fashion, "cifar10": _cifar10}[name](_given(name, folder))
        parts = tuple((images / np.float32(255), labels) for images, labels in parts)
    train, test = ((torch.tensor(images, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)) for images, labels in parts)
    return Images(train, test)


def load_text(folder: Path | None = None) -> str:
    """Load the Brown corpus as words with spaces between them, without its tags.

    Raises:
        MissingDataError: If the data is not below `folder`.
        ValueError: If it is not the corpus.
    """
    folder = _given("brown", folder)
    found = sorted(folder.glob("*brown*.tgz"))
    if (folder / "brown").is_dir():
        files = {path.name: path.read_bytes() for path in (folder / "brown").glob("c[a-r][0-9][0-9]")}
    elif found:
        files = {name: raw for name, raw in _unpack(found[0]).items() if len(name) == 4 and name[2:].isdigit()}
    else:
        _miss("brown", folder)
    whole = b"".join(files[name] for name in sorted(files))
    _check("the Brown corpus", whole, BROWN)
    return " ".join(word.rsplit("/", 1)[0] for word in whole.decode("latin1").split())


def _fashion(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    homes = ("FashionMNIST/raw", "fashion-mnist", "usr/share/datasets/fashion-mnist", ".")
    home = next((folder / home for home in homes if any((folder / home).glob("train-images-idx3-ubyte*"))), None)
    if home is None:
        _miss("fashion", folder)
    arrays = []
    for name, digest in FASHION.items():
        plain, packed = home / name, home / f"{name}.gz"
        if not plain.exists() and not packed.exists():
            _miss("fashion", folder)
        path = plain if plain.exists() else packed
        try:
            raw = path.read_bytes() if path == plain else gzip.decompress(path.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(str(path), f"it cannot be unpacked ({error})") from error
        _check(str(path), raw, digest)
        arrays.append(_idx(raw))
    return [(arrays[0][:, None], arrays[1]), (arrays[2][:, None], arrays[3])]


def _idx(raw: bytes) -> np.ndarray:
    """Read an array in the format of MNIST: two zeros, the type, the number of dimensions, the lengths, the bytes."""
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _cifar10(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    pickled, binary, archives = folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin", sorted(folder.glob("*cifar10*.tgz"))
    if pickled.is_dir():
        batches = {name: _unpickled(pickled / name, md5) for name, (_, md5) in CIFAR10.items() if (pickled / name).exists()}
    elif binary.is_dir():
        batches = {name: (binary / f"{name}.bin").read_bytes() for name in CIFAR10 if (binary / f"{name}.bin").exists()}
    elif archives:
        batches = _from_pictures(_unpack(archives[0]))
    else:
        _miss("cifar10", folder)
    if len(batches) < len(CIFAR10):
        _miss("cifar10", folder)
    rows = []
    for name, (digest, _) in CIFAR10.items():
        _check(f"CIFAR-10's {name}", batches[name], digest)
        rows.append(np.frombuffer(batches[name], np.uint8).reshape(-1, 1 + 3 * 32 * 32))
    train = np.concatenate(rows[:-1])
    return [(each[:, 1:].reshape(-1, 3, 32, 32), each[:, 0]) for each in (train, rows[-1])]


def _unpickled(path: Path, md5: str) -> bytes:
    """Return a batch of the pickled release as that of the binary one; what has another digest is never unpickled."""
    raw = path.read_bytes()
    _check(str(path), raw, md5, "md5")
    batch = pickle.loads(raw, encoding="bytes")  # noqa: S301  its digest is that of the published file
    return _as_binary(np.asarray(batch[b"data"], np.uint8), np.asarray(batch[b"labels"], np.uint8))


def _from_pictures(files: dict[str, bytes]) -> dict[str, bytes]:
    """Read one picture for each batch, an image in each row, with the labels in JSON."""
    image = import_module("PIL.Image")
    image.MAX_IMAGE_PIXELS = None
    pictures = {name: np.asarray(image.open(io.BytesIO(files[f"{name}.png"]))) for name in CIFAR10}
    labels = np.array(json.loads(files["train_lables.json"]) + json.loads(files["test_lables.json"]), np.uint8).reshape(len(CIFAR10), -1)
    pixels = {name: picture.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2) for name, picture in pictures.items()}
    return {name: _as_binary(pixels[name], each) for name, each in zip(CIFAR10, labels, strict=True)}


def _as_binary(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    return np.concatenate([labels[:, None], pixels.reshape(len(labels), -1)], 1).tobytes()


def _unpack(path: Path) -> dict[str, bytes]:
    """Return the files in an archive by name, read and nothing more."""
    try:
        with tarfile.open(path) as archive:
            return {Path(each.name).name: file.read() for each in archive if (file := archive.extractfile(each)) is not None}
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _damaged(str(path), f"it cannot be unpacked ({error})") from error


def _given(name: str, folder: Path | None) -> Path:
    if folder is None:
        msg = f"{name} lies outside this repository: name the folder that has it by `--data-dir DIR`. {STEPS[name]}"
        raise MissingDataError(msg)
    return folder


def _miss(name: str, folder: Path) -> NoReturn:
    msg = f"{name} is not below {folder}, or not whole. {STEPS[name]}".replace("DIR", str(folder))
    raise MissingDataError(msg)


def _check(what: str, raw: bytes, digest: str, algorithm: str = "sha256") -> None:
    found = hashlib.new(algorithm, raw, usedforsecurity=False).hexdigest()
    if found != digest:
        raise _damaged(what, f"its {algorithm} must be {digest}, got {found}")


def _damaged(what: str, why: str) -> ValueError:
    return ValueError(f"{what} is damaged, or another file: {why}. Delete it, and fetch it anew.")


def main() -> None:
    """Print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with the data")
    folder = parser.parse_args().data_dir
    for name in ("digits", "fashion", "cifar10"):
        try:
            images = load_images(name, folder)
        except MissingDataError as error:
            print(f"{name}: {error}")
        else:
            print(f"{name}: {tuple(images.train[0].shape)} to train on, {tuple(images.test[0].shape)} to test")
    try:
        print(f"brown: {len(load_text(folder).split()):,} words")
    except MissingDataError as error:
        print(f"brown: {error}")


if __name__ == "__main__":
    main()
