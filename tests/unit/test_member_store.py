"""Members of an ensemble in files."""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import os
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_tricks._core.tensor_files import TensorFiles, digest_of
from lightning_tricks.ensembling._store import MemberStore
from lightning_tricks.errors import CheckpointError
from lightning_tricks.nn import Ensemble


class Odd(nn.Module):
    """A model with what safetensors refuses or might lose: tied, transposed, small and complex tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.tied = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.tied.weight = self.first.weight
        self.strided = nn.Parameter(torch.randn(3, 5).T)
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("small", torch.tensor(0.5, dtype=torch.float16))
        self.register_buffer("none", torch.zeros(0, 2))
        self.register_buffer("wave", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("passing", torch.ones(2), persistent=False)


def scramble(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.copy_(
                torch.randint(0, 2, tensor.shape) if not (tensor.is_floating_point() or tensor.is_complex()) else torch.randn_like(tensor)
            )
    return module


def trainer():
    strategy = SimpleNamespace(barrier=lambda: None)
    return SimpleNamespace(is_global_zero=True, global_rank=0, world_size=1, strategy=strategy, ckpt_path=None)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.mark.parametrize("memory", ["cpu", "disk"])
def test_members_come_back_and_the_module_keeps_its_own(tmp_path, memory):
    module, store = Odd(), MemberStore(tmp_path / "members", memory)
    states = []
    for step in range(3):
        states.append(copy.deepcopy(scramble(module).state_dict()))
        store.add(module, trainer(), f"step={step}", {"step": step})
    scramble(module)
    own, pointers = copy.deepcopy(module.state_dict()), {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    strides = [tensor.stride() for tensor in module.state_dict().values()]
    lending = store.lending(module, trainer())
    for member, state in zip(store.members, states, strict=True):
        assert equal(store.state_dict(member), state)
        with torch.inference_mode():
            lending.hold(member)
        assert equal(module.state_dict(), state)
        assert module.tied.weight is module.first.weight
        assert [tensor.stride() for tensor in module.state_dict().values()] == strides
        module.norm.running_mean.add_(1)  # by an evaluation that changes a buffer
    lending.hold(None)
    assert equal(module.state_dict(), own)
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == pointers
    assert equal(store.state_dict(store.members[0]), states[0])
    lending.hold(store.members[0])
    assert equal(module.state_dict(), states[0])


def test_a_member_file_is_read_as_a_model_by_itself(tmp_path):
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = nn.Linear(3, 2)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Compiled()

    modules, store = [Wrapper(), Wrapper()], MemberStore(tmp_path)
    for module in modules:
        store.add(module, trainer(), "member", {})
    paths = [path for member in store.members for path in member.paths]
    for make_module in (Wrapper, lambda: nn.Linear(3, 2)):
        for member, module in zip(Ensemble.from_checkpoints(paths, make_module), modules, strict=True):
            assert torch.equal(dict(member.named_parameters()).popitem()[1], module.net._orig_mod.bias)


@pytest.fixture
def stored(tmp_path):
    module, store = nn.Linear(3, 2), MemberStore(tmp_path / "members")
    store.add(module, trainer(), "first", {"step": 1})
    scramble(module)
    store.add(module, trainer(), "second", {"step": 2, "val_loss": 0.5})
    return module, store


def test_a_checkpoint_names_members_and_their_facts(stored, tmp_path):
    module, store = stored
    torch.save(store.entries(), tmp_path / "entries.pt")
    other = MemberStore(tmp_path / "elsewhere", "disk")
    other.restore(torch.load(tmp_path / "entries.pt", weights_only=True), module, trainer())
    assert [(member.name, dict(member.facts)) for member in other.members] == [
        ("first", {"step": 1}),
        ("second", {"step": 2, "val_loss": 0.5}),
    ]
    for one, same in zip(store.members, other.members, strict=True):
        assert equal(store.state_dict(one), other.state_dict(same))


def missing(path):
    path.unlink()


def altered(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("harm", "words"), [(missing, "there is no such file"), (altered, "altered or cut short"), (truncated, "altered or cut short")]
)
def test_a_file_that_is_not_as_it_was_is_named(stored, harm, words):
    module, store = stored
    entries, path = store.entries(), store.members[1].paths[0]
    harm(path)
    fresh = MemberStore(store.folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        fresh.restore(entries, module, trainer())
    assert str(path) in str(caught.value)
    assert "Restore the file" in str(caught.value)
    assert fresh.members == []


def test_files_that_are_read_by_themselves_are_named_when_they_are_damaged(stored, tmp_path):
    _, store = stored
    whole, alone = store.members[0].paths[0], tmp_path / "member-rank0of2.safetensors"
    alone.write_bytes(whole.read_bytes())
    truncated(whole)
    for path, words in ((whole, f"'{whole}' is damaged"), (alone, "member-rank1of2.safetensors' does not exist")):
        with pytest.raises(CheckpointError, match=words):
            Ensemble.from_checkpoints([path], lambda: nn.Linear(3, 2))


def test_a_folder_that_cannot_be_written_to_is_an_error_without_leftovers(stored, tmp_path):
    module, _ = stored
    (tmp_path / "file").touch()
    store = MemberStore(tmp_path / "file" / "members")
    with pytest.raises(OSError, match="Weights could not be written to"):
        store.add(module, trainer(), "member", {})
    assert store.members == []


def test_members_of_another_model_are_refused(stored):
    _, store = stored
    with pytest.raises(CheckpointError, match=r"'weight' has shape \(2, 3\), and in Linear shape \(2, 4\)"):
        MemberStore(store.folder).restore(store.entries(), nn.Linear(4, 2), trainer())
    with pytest.raises(CheckpointError, match=r"'bias' has shape .* no tensor of that name"):
        MemberStore(store.folder).restore(store.entries(), nn.Linear(3, 2, bias=False), trainer())
    with pytest.raises(CheckpointError, match="must name each member's files"):
        MemberStore(store.folder).restore([{"name": "first"}], nn.Linear(3, 2), trainer())


def test_members_are_found_where_their_run_was_moved(stored, tmp_path):
    module, store = stored
    entries = store.entries()
    store.folder.rename(tmp_path / "moved")
    own = MemberStore(tmp_path / "moved")
    own.restore(entries, module, trainer())
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    (tmp_path / "moved").rename(tmp_path / "new" / "members")
    beside, resumed = MemberStore(tmp_path / "later" / "members"), trainer()
    resumed.ckpt_path = str(tmp_path / "new" / "checkpoints" / "last.ckpt")
    beside.restore(entries, module, resumed)
    for found in (own, beside):
        assert [member.digests for member in found.members] == [member.digests for member in store.members]


def files_in(store):
    return {path.name for path in store.folder.iterdir()}


def test_dropped_members_stay_as_long_as_a_checkpoint_names_them(stored, tmp_path):
    module, store = stored
    first, second = store.members

    def save(name):
        entries = store.entries()
        torch.save({"entries": entries}, tmp_path / name)
        for _ in range(2):  # as where saving was wrapped twice
            store.saved(tmp_path / name, entries, trainer())

    save("a.ckpt")
    save("b.ckpt")
    store.drop(store.add(scramble(module), trainer(), "third", {}), trainer())
    assert files_in(store) == {*first.files, *second.files}
    store.drop(first, trainer())
    (tmp_path / "a.ckpt").unlink()
    save("c.ckpt")
    assert files_in(store) == {*first.files, *second.files}
    (tmp_path / "b.ckpt").unlink()
    save("d.ckpt")
    assert files_in(store) == set(second.files)
    store.entries()  # for a checkpoint that is written somewhere unknown
    store.drop(second, trainer())
    (tmp_path / "d.ckpt").unlink()
    assert files_in(store) == set(second.files)


def test_a_checkpoint_that_was_never_seen_keeps_its_members(stored):
    _, store = stored
    store.saved("remote://bucket/a.ckpt", store.entries(), trainer())  # or one that is still being written
    store.drop(store.members[0], trainer())
    store.drop(store.members[0], trainer())
    assert len(files_in(store)) == 2


def test_another_run_in_the_same_folder_touches_nothing(stored):
    module, store = stored
    state, entries = store.state_dict(store.members[1]), store.entries()
    other = MemberStore(store.folder)
    other.sweep()
    same = other.add(module, trainer(), "second", {"step": 2})
    assert same.digests == store.members[1].digests
    other.drop(same, trainer())
    resumed = MemberStore(store.folder)
    resumed.restore(entries[:1], module, trainer())
    again = resumed.add(module, trainer(), "second", {"step": 2})
    assert again.files == store.members[1].files
    resumed.drop(again, trainer())
    assert equal(store.state_dict(store.members[1]), state)
    assert files_in(store) == {file for member in store.members for file in member.files}


def test_only_what_nobody_writes_any_more_is_swept(tmp_path):
    host, day = socket.gethostname(), 25 * 60 * 60
    dead = multiprocessing.get_context("fork").Process(target=int)
    dead.start()
    dead.join()
    for name, age in {f"{host}~{dead.pid}~a": 0, f"{host}~{os.getppid()}~b": day, "other~1~c": 0, "other~1~d": day}.items():
        path = tmp_path / f"{name}.unfinished"
        path.mkdir()
        (path / "tensors").write_bytes(b"half")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    MemberStore(tmp_path).sweep()
    assert {path.stem.rpartition("~")[2] for path in tmp_path.iterdir()} == {"b", "c"}


def collect_for_ever(folder):
    store, module = MemberStore(folder, "disk"), nn.Linear(500, 500)
    while True:
        store.add(scramble(module), trainer(), "member", {})


def test_a_killed_run_leaves_no_half_written_member(tmp_path):
    for delay in (0.03, 0.05, 0.08, 0.11):
        process = multiprocessing.get_context("fork").Process(target=collect_for_ever, args=(tmp_path,))
        process.start()
        while not any(tmp_path.glob("*.safetensors")):
            time.sleep(0.005)
        time.sleep(delay)
        process.kill()
        process.join()
    found = list(tmp_path.glob("*.safetensors"))
    assert found
    for path in found:
        state = TensorFiles([path]).wholes()
        assert state["weight"].shape == (500, 500)
        run, name = path.stem.split("-")[1:]
        assert run and hashlib.sha256(digest_of(path).encode()).hexdigest()[:8] == name  # noqa: PT018
    MemberStore(tmp_path).sweep()
    assert set(tmp_path.iterdir()) == set(found)


@pytest.mark.full
def test_compiled_code_is_not_compiled_again(tmp_path):
    from torch._dynamo.testing import CompileCounter

    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last).eval()
    store, x, expected, counter = MemberStore(tmp_path), torch.randn(2, 2, 5, 5), [], CompileCounter()
    compiled = torch.compile(module, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            scramble(module)[1].running_var.abs_()
            store.add(module, trainer(), "member", {})
            expected.append(module(x))
        compiled(x)
        lending = store.lending(module, trainer())
        for member, prediction in zip(store.members, expected, strict=True):
            lending.hold(member)
            torch.testing.assert_close(compiled(x), prediction)
        lending.hold(None)
        compiled(x)
    assert counter.frame_count == 1
