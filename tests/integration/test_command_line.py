"""The command line, as a user would type it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_tricks as lt
from contracts.harness import Net, fit
from lightning_tricks.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")


def run(capsys, *arguments):
    assert main(arguments) == 0
    return capsys.readouterr().out


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    keep = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    fit([lt.EMA(0.8), lt.EMA(0.5, name="fast", evaluate=False), lt.NormSwap("batch", "group"), keep], max_epochs=1)
    return folder


def test_the_installed_command_and_the_module_are_one():
    commands = [[str(Path(sys.executable).with_name("lightning-tricks"))], [sys.executable, "-m", "lightning_tricks"]]
    outputs = [subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout for command in commands]
    assert outputs == [f"{lt.__version__}\n"] * 2


def test_list_has_a_line_for_every_trick(capsys):
    lines = run(capsys, "list").splitlines()
    names = [name for name in lt.__all__ if isinstance(getattr(lt, name), type)]
    assert [line.split()[0] for line in lines] == sorted(names, key=str.lower)
    assert all(line.endswith(".") and len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("name", ["EMA", "ema", "lt.EMA", "lightning_tricks.EMA"])
def test_explain_prints_what_a_card_comes_to(capsys, name):
    text = run(capsys, "explain", name)
    assert "Keep a moving average of the weights beside training" in text
    assert "| `half_life` | `None` |" in text
    assert "## Pitfalls" in text
    assert "## References" not in text


def test_explain_prints_the_whole_card_and_docstrings(capsys):
    assert "## References" in run(capsys, "explain", "EMA", "--whole")
    assert run(capsys, "explain", "functional.ema_update_").startswith("functional.ema_update_(")


def test_explain_knows_names_that_are_spelled_alike(capsys):
    assert "got 'functional.swap_nrm'. Did you mean" in refusal(capsys, "explain", "functional.swap_nrm")
    assert "`lightning-tricks list` prints" in refusal(capsys, "explain", "0000")


def test_inspect_says_what_a_checkpoint_holds(capsys, folder):
    text = run(capsys, "inspect", str(folder / "last.ckpt"))
    count = len(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])
    for words in (
        "epoch 0 · step 5",
        f"weights: {count} tensors",
        "\nEMA(decay=0.8)\n  averages: in the state dict",
        "\nEMA(decay=0.5, evaluate=False, name='fast')\n  averages: beside the state dict",
        "begun at step 0, 5 updates",
        "functional.swap_norm(model, source='batch', target='group'",
    ):
        assert words in text


def test_inspect_without_tricks(capsys, tmp_path):
    torch.save(Net().state_dict(), tmp_path / "plain.pt")
    assert "No trick has left anything in it." in run(capsys, "inspect", str(tmp_path / "plain.pt"))


class Sly:
    """Would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_inspect_runs_no_code_of_the_file(capsys, folder, tmp_path):
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    torch.save({**checkpoint, "hyper_parameters": {"sly": Sly(tmp_path / "done"), "kind": Net}}, tmp_path / "sly.ckpt")
    text = run(capsys, "inspect", str(tmp_path / "sly.ckpt"))
    assert "EMA(decay=0.8)" in text
    assert "Not read, since the file would have other code make it:" in text
    assert "contracts.harness.Net" in text
    assert not (tmp_path / "done").exists()


def test_inspect_refuses_what_is_no_checkpoint(capsys, folder, tmp_path):
    assert "`path` must be a checkpoint file" in refusal(capsys, "inspect", str(tmp_path / "none.ckpt"))
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes((folder / "last.ckpt").read_bytes()[:1000])
    assert "The file is damaged" in refusal(capsys, "inspect", str(damaged))
    record = {"state_dict": {}, "lightning_tricks": {"version": 99}}
    torch.save(record, damaged)
    assert "found version 99" in refusal(capsys, "inspect", str(damaged))
