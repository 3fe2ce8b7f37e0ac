"""Collects members under DDP and FSDP2 on two processes: ``python member_store_worker.py FOLDER``, with the variables of torchrun.

Writes what the parent process needs to read them alone: ``FOLDER/KIND.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lightning.pytorch.callbacks import Callback

import lightning_tricks as lt
from contracts.cases import CASES
from contracts.harness import Loader, StepCheckpoints, assert_equal, gathered
from contracts.sharded_worker import RANK, fit, runs_here, whole
from lightning_tricks.ensembling._store import MemberStore
from lightning_tricks.errors import CheckpointError

CASE = next(case for case in CASES if case.trick is lt.CheckpointEnsemble)


class Whole(Callback):
    """Gathers the weights at the ends of epochs, compares what is lent with them, and breaks a file."""

    def __init__(self, trick) -> None:
        self.trick, self.ends = trick, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.is_last_batch:
            self.ends.append(whole(pl_module))

    def on_train_end(self, trainer, pl_module):
        store, before = self.trick._store, whole(pl_module)
        lending = store.lending(pl_module, trainer)
        for member, end in zip(store.members[-len(self.ends) :], self.ends, strict=True):
            with torch.inference_mode():
                lending.hold(member)
                pl_module(next(iter(Loader()))[0])  # which leaves the root gathered
            lending.hold(member)
            assert_equal({name: whole(pl_module)[name] for name in end}, end)
        lending.hold(None)
        assert_equal(whole(pl_module), before)
        self.break_one(trainer, pl_module, store)

    def break_one(self, trainer, pl_module, store):
        """Let all ranks fail where one finds its file altered."""
        entries, path = store.entries(), store.members[0].paths[-1]
        content = path.read_bytes()
        trainer.strategy.barrier()
        if RANK == 1:
            path.write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
        trainer.strategy.barrier()
        try:
            MemberStore(store.folder, "disk").restore(entries, pl_module, trainer)
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            raise AssertionError
        trainer.strategy.barrier()
        if RANK == 1:
            path.write_bytes(content)
        trainer.strategy.barrier()


def members(trick):
    """Return what tells members apart."""
    return [(member.files, member.digests, dict(member.facts)) for member in trick._members]


def check(kind: str, folder: Path) -> None:
    """Collect, resume in the middle, and leave the members to the parent process."""
    made = []
    for ckpt_path in (None, folder / kind / "step=7.ckpt"):
        trick = lt.CheckpointEnsemble(2, dirpath=folder / kind / "members")
        watch = Whole(trick)
        fit([trick, watch, StepCheckpoints(folder / kind, 7)], CASE, kind, sharded=kind == "fsdp2", ckpt_path=ckpt_path)
        made.append((members(trick), watch.ends))
    (whole_run, ends), (resumed, ends_again) = made
    assert gathered(resumed) == [resumed] * 2
    assert [facts for *_, facts in resumed] == [facts for *_, facts in whole_run]
    assert resumed[0] == whole_run[0]
    assert_equal(ends_again[-1], ends[-1])  # but statistics, of which a sharded checkpoint has those of any rank
    if RANK == 0:
        torch.save({"entries": trick._store.entries(), "ends": ends}, folder / f"{kind}.pt")


def main() -> None:
    """Check every kind."""
    torch.set_num_threads(1)
    for kind in ("ddp", "fsdp2"):
        if kind == "ddp" or runs_here(kind):
            check(kind, Path(sys.argv[1]))
            torch.distributed.barrier()


if __name__ == "__main__":
    main()
