"""Members of an ensemble, each in safetensors files of its own, which checkpoints name together with a digest.

Files are never written to again. Their names follow from the run and their content, so that two runs in one folder do not touch each
other's members, and a resumed run that collects a member again finds it there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from lightning_tricks._core.checks import check_choice
from lightning_tricks._core.shards import Shards
from lightning_tricks._core.strategies import cut, own_part, plain_name
from lightning_tricks._core.tensor_files import SUFFIX, TensorFiles, digest_of, finish_file, likes_of, sweep_unfinished, write_unfinished
from lightning_tricks.ensembling._lending import Lending
from lightning_tricks.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from torch import nn

    from lightning_tricks._core.lightning import Trainer

__all__ = ["Facts", "Member", "MemberStore", "member_in", "members_folder", "places_beside"]

Facts = Mapping[str, bool | int | float | str | None]
"""What is known of a member, such as the step at which it was taken."""

_KEYS = ("name", "folder", "files", "digests", "facts")


@dataclass(frozen=True, eq=False)
class Member:
    """The weights of a model at some moment, in files.

    Attributes:
        name: What it is called.
        folder: The folder of its files.
        files: One file, or one for each rank that owns parts of the model.
        digests: The SHA-256 digest of each.
        facts: What is known of it.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    digests: tuple[str, ...]
    facts: Facts

    @property
    def paths(self) -> list[Path]:
        """Where its files are."""
        return [Path(self.folder, file) for file in self.files]


def members_folder(trainer: Trainer, dirpath: str | None, prefix: str) -> Path:
    """Return the folder for a run's members; all ranks must call this.

    Args:
        trainer: The Trainer.
        dirpath: The folder, if the user gave one. None = `prefix` beside Lightning's ``checkpoints``.
        prefix: What the trick's folder is called.

    Raises:
        ArgumentError: If the Trainer's folder is no path of the file system.
    """
    if dirpath is not None:
        return Path(dirpath).absolute()
    root, parts = trainer.default_root_dir, []
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        root, parts = logger.save_dir or root, [str(logger.name), version]
    root = str(trainer.strategy.broadcast("/".join([str(root), *parts, prefix])))
    if "://" in root:
        msg = f"Members of an ensemble must be stored in a folder of the file system, and the Trainer's is {root!r}. Pass `dirpath`."
        raise ArgumentError(msg)
    return Path(root).absolute()


class MemberStore:
    """The members that a run has collected, in their order.

    Methods that take a Trainer must be called by all ranks together, which must all reach the folder.

    Args:
        folder: Where members are written.
        memory: ``"cpu"`` also keeps each rank's parts of all members in main memory; ``"disk"`` reads them whenever they are needed.

    Attributes:
        members: The members.
    """

    def __init__(self, folder: Path, memory: Literal["cpu", "disk"] = "cpu") -> None:
        self.folder = folder
        self.members: list[Member] = []
        self._memory = check_choice("memory", memory, ("cpu", "disk"))
        self._kept: dict[Member, dict[str, Tensor]] = {}
        self._run = ""  # part of the files' names, once there is a member
        self._written: list[Member] = []  # by this process, and not there before
        self._naming: dict[str, tuple[set[str], bool]] = {}  # by checkpoint, the files that it names, and whether it was seen there
        self._pending: set[str] = set()  # files named by a checkpoint that is not written yet, or of which we do not know where it is

    def sweep(self) -> None:
        """Delete what a killed process has left half-written in the folder."""
        sweep_unfinished(self.folder)

    def add(self, module: nn.Module, trainer: Trainer, name: str, facts: Facts, state: Mapping[str, Tensor] | None = None) -> Member:
        """Write the module's parameters and persistent buffers to the folder, as the next member.

        Args:
            module: The module.
            trainer: Its Trainer.
            name: Beginning of the files' names.
            facts: What a checkpoint is to say of the member.
            state: Tensors in place of the module's own, by name: whole ones, or sharded as the module's.

        Returns:
            The member.

        Raises:
            OSError: On all ranks, if one of them cannot write.
        """
        likes = likes_of(module)
        given = {plain_name(key, compiled=False): value for key, value in (state or {}).items() if isinstance(value, Tensor)}
        parts = {key: _part_of(given[key], like) if key in given else own_part(like) for key, like in likes.items()}
        sharded = any(isinstance(like, Shards) for like in likes.values())
        unfinished, digest, problem = None, None, None
        if sharded or trainer.is_global_zero:
            try:
                unfinished, digest = write_unfinished(self.folder, parts, likes)
            except OSError as error:
                problem = error
        found = _from_all((digest, problem, self._run or uuid4().hex[:8]))
        _raise_first(error for _, error, _ in found)
        digests, self._run = tuple(each for each, *_ in found if each is not None), found[0][2]
        stem = f"{name}-{self._run}-{hashlib.sha256(''.join(digests).encode()).hexdigest()[:8]}"
        ranks = len(digests)
        files = tuple(f"{stem}-rank{rank}of{ranks}{SUFFIX}" if ranks > 1 else f"{stem}{SUFFIX}" for rank in range(ranks))
        member = Member(name, str(self.folder), files, digests, dict(facts))
        known = member.paths[0].exists()
        if unfinished is not None:
            finish_file(unfinished, member.paths[trainer.global_rank if sharded else 0])
        trainer.strategy.barrier()  # so that any rank can read it from here on
        self._keep(member, likes, trainer.global_rank)
        self.members.append(member)
        self._written += [] if known else [member]
        return member

    def drop(self, member: Member, trainer: Trainer) -> None:
        """Take a member out.

        Its files are deleted if this run wrote them and no checkpoint that it wrote since names them; they go with the last one that
        does, the next time that a member is dropped or a checkpoint is written.
        """
        self.members.remove(member)
        self._kept.pop(member, None)
        if trainer.is_global_zero:
            self._tidy()

    # Checkpoints

    def entries(self) -> list[dict[str, Any]]:
        """Return what a checkpoint is to hold: plain data that name the members' files."""
        self._pending |= self._files(self.members)
        return [
            {
                "name": member.name,
                "folder": member.folder,
                "files": list(member.files),
                "digests": list(member.digests),
                "facts": dict(member.facts),
            }
            for member in self.members
        ]

    def saved(self, path: str | os.PathLike[str], entries: Iterable[Mapping[str, Any]], trainer: Trainer) -> None:
        """Note where a checkpoint was written, and what it holds, so that no file is deleted as long as it is there."""
        named = {str(Path(entry["folder"], file)) for entry in entries for file in entry["files"]}
        self._naming[str(path)], self._pending = (named, False), self._pending - named
        if trainer.is_global_zero:
            self._tidy()

    def restore(self, entries: Sequence[Mapping[str, Any]], module: nn.Module, trainer: Trainer) -> None:
        """Take over the members that a checkpoint names, in place of those held, after checking that all files are as they were.

        Files that are no longer where they were are looked for in this store's folder, and in one of the same name beside the
        checkpoint or beside its folder.

        Raises:
            CheckpointError: On all ranks, if the entries are none, or a file is missing, altered or of another model.
        """
        problem, members = None, []
        try:
            members = [member_in(entry, self._places(trainer)) for entry in entries]
            likes = likes_of(module)
            for member in members:
                _check(member, likes, module, trainer)
        except CheckpointError as error:
            problem = error
        _raise_first(_from_all(problem))
        self.members, self._kept = members, {}
        for member in members:
            self._run = member.files[0].removeprefix(f"{member.name}-").partition("-")[0]
            self._keep(member, likes, trainer.global_rank)

    def _places(self, trainer: Trainer) -> list[Path]:
        return [self.folder, *(places_beside(trainer.ckpt_path, self.folder) if trainer.ckpt_path else ())]

    # Use

    def lending(self, module: nn.Module, trainer: Trainer) -> Lending[Member]:
        """Return what lends the members' weights to the module, one after another; unless read from disk, they stay on its device."""
        likes = likes_of(module)

        def parts_of(member: Member) -> dict[str, Tensor]:
            return self._kept.get(member) or _read(member, likes, trainer.global_rank)

        return Lending(module, likes, parts_of, keep=self._memory == "cpu")

    def state_dict(self, member: Member) -> dict[str, Tensor]:
        """Return a member's whole tensors on the CPU, by names without wrappers, whatever the number of ranks that wrote them."""
        return TensorFiles(member.paths).wholes()

    def _keep(self, member: Member, likes: Mapping[str, Tensor | Shards], rank: int) -> None:
        if self._memory == "cpu":
            self._kept[member] = {name: part.clone() for name, part in _read(member, likes, rank).items()}

    def _files(self, members: Iterable[Member]) -> set[str]:
        return {str(path) for member in members for path in member.paths}

    def _tidy(self) -> None:
        for path, (files, seen) in list(self._naming.items()):
            there = Path(path).exists()
            if seen and not there:
                del self._naming[path]
            else:  # one that was never seen may be written elsewhere, or later
                self._naming[path] = files, seen or there
        needed = self._files(self.members).union(self._pending, *(files for files, _ in self._naming.values()))
        for member in [member for member in self._written if not self._files([member]) & needed]:
            self._written.remove(member)
            for file in member.paths:
                file.unlink(missing_ok=True)


def _part_of(value: Tensor, like: Tensor | Shards) -> Tensor:
    """Return this rank's part of a tensor that is whole or spread already."""
    if isinstance(value, DTensor):
        return value._local_tensor
    return cut(value, like) if value.shape == like.shape else value


def _read(member: Member, likes: Mapping[str, Tensor | Shards], rank: int) -> dict[str, Tensor]:
    files = TensorFiles(member.paths)
    with torch.inference_mode(mode=False), torch.no_grad():
        return {name: files.part(name, like, rank) for name, like in likes.items()}


def places_beside(checkpoint: str | os.PathLike[str], folder: Path) -> list[Path]:
    """Return where a folder of members lies, if it was moved together with a checkpoint."""
    parent = Path(checkpoint).parent
    return [parent / folder.name, parent.parent / folder.name]


def member_in(entry: Mapping[str, Any], places: Sequence[Path]) -> Member:
    """Return the member that an entry of a checkpoint describes, in the first folder that has it: the recorded one, or one of these.

    Raises:
        CheckpointError: If it describes none.
    """
    valid = isinstance(entry, Mapping) and set(_KEYS) <= set(entry) and len(entry["files"]) == len(entry["digests"]) > 0
    if not valid:
        msg = (
            f"A checkpoint must name each member's files and their digests, found {entry!r}. Nothing was loaded; the checkpoint is damaged."
        )
        raise CheckpointError(msg)
    recorded = Path(entry["folder"])
    folder = next((place for place in (recorded, *places) if (place / entry["files"][0]).is_file()), recorded)
    return Member(entry["name"], str(folder), tuple(entry["files"]), tuple(entry["digests"]), dict(entry["facts"]))


def _check(member: Member, likes: Mapping[str, Tensor | Shards], module: nn.Module, trainer: Trainer) -> None:
    """Check that a member's files are there, unaltered, and of the module's architecture."""
    advice = "Nothing of it was loaded. Restore the file, or start anew without the checkpoint"
    for path in member.paths:
        if not path.is_file():
            msg = f"The checkpoint names '{path}', which holds weights of a member of its ensemble, and there is no such file. {advice}."
            raise CheckpointError(msg)
    own = member.paths if len(member.files) != trainer.world_size else [member.paths[trainer.global_rank]]
    for path in own:
        if digest_of(path) != member.digests[member.paths.index(path)]:
            msg = f"'{path}' must hold the weights that the checkpoint names, and has been altered or cut short since. {advice}."
            raise CheckpointError(msg)
    files = TensorFiles(member.paths)
    for name in [*likes, *files.names]:
        needed = f"shape {tuple(likes[name].shape)}" if name in likes else "no tensor of that name"
        found = f"shape {files.shape(name)}" if name in files.names else "no tensor of that name"
        if needed != found:
            msg = (
                f"'{member.paths[0]}' must fit the model: there, {name!r} has {found}, and in {type(module).__name__} {needed}. "
                "Nothing of it was loaded. Resume with the model that wrote the checkpoint."
            )
            raise CheckpointError(msg)


def _from_all(value: Any) -> list[Any]:
    """Return what each rank has, in their order."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _raise_first(problems: Iterable[Exception | None]) -> None:
    """Let all ranks fail with the first error of any, since a rank alone would leave the others waiting."""
    problem = next((problem for problem in problems if problem is not None), None)
    if problem is not None:
        raise problem
