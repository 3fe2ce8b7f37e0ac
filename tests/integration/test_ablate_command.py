"""``lightning-tricks ablate`` as a user would type it: killed, interrupted and continued, and refused with the line at fault."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightning_tricks.__main__ import main

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # LightningCLI calls what jsonargparse deprecates
TOY = '''
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, width: int = 4, lr: float = 0.05):
        super().__init__()
        self.lr = lr
        self.net = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))

    def on_train_start(self):
        """Wait as long as a file says how many trainings may be done."""
        while Path("hold").exists() and len(list(Path("results/trainings").glob("*.json"))) >= int(Path("hold").read_text()):
            Path("held").touch()
            time.sleep(0.02)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Data(LightningDataModule):
    def __init__(self):
        super().__init__()
        x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
        self.data = TensorDataset(x, x.sum(1, keepdim=True).sin())

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=32)
'''
STUDY = """
config:
  seed_everything: 7
  model:
    class_path: toy.Net
    init_args:
      width: 8
  data: toy.Data
  trainer:
    max_epochs: 1
    accelerator: cpu
tricks:
  EMA:
    - class_path: lightning_tricks.EMA
      init_args:
        decay: 0.8
  decay:
    class_path: WeightDecay
    init_args:
      weight_decay: 0.1
seeds: 2
folder: results
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module and a study, as the current one."""
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "study.yaml").write_text(STUDY.lstrip())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("toy", None)


def start(here, *, hold):
    """Start the real command, and wait until so many trainings are done and another is running."""
    (here / "hold").write_text(str(hold))
    (here / "held").unlink(missing_ok=True)
    command = [sys.executable, "-m", "lightning_tricks", "ablate", "--config", "study.yaml"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (here / "held").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def trainings(here):
    return {file.name: (file.stat().st_mtime_ns, yaml.safe_load(file.read_text())) for file in (here / "results/trainings").glob("*.json")}


def table(here, folder):
    """Return what does not depend on the clock."""
    import pandas as pd

    return pd.read_csv(here / folder / "ablation.csv").drop(columns=["step_time", "added_time", "memory", "added_memory"])


def test_a_study_that_was_interrupted_and_killed_goes_on_where_it_stopped(here, capsys):
    process = start(here, hold=2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "2 of 8 trainings are done. The same call goes on with the others." in output
    assert re.search(r"^\[2/8\] \+ EMA, seed 0: val_loss [\d.]+ \(", errors, flags=re.MULTILINE)
    assert "Traceback" not in errors
    assert (here / "results/ablation.html").exists()

    process = start(here, hold=4)
    process.kill()
    assert "2 of 8 trainings were done before." in process.communicate()[1]
    (here / "hold").unlink()
    before = trainings(here)
    assert len(before) == 4

    assert main(["ablate", "--config", "study.yaml"]) == 0
    after = trainings(here)
    assert len(after) == 8
    assert {name: after[name] for name in before} == before
    assert main(["ablate", "--config", str(here / "study.yaml"), "--folder", "whole"]) == 0
    assert table(here, "results").equals(table(here, "whole"))
    values = {name: content["outcome"]["metrics"]["val_loss"] for name, (_, content) in after.items()}
    assert len(set(values.values())) == 8  # `seed_everything` of the configuration does not make seeds alike
    assert "results/ablation.html" in capsys.readouterr().out

    assert main(["ablate", "--config", "study.yaml", "--seeds", "1"]) == 0
    assert table(here, "results")["seeds"].unique().tolist() == [1]
    assert trainings(here) == after


MISTAKES = [
    ("width: 8", "widht: 8", 6, "widht"),
    ("width: 8", "width: eight", 6, "eight"),
    ("toy.Net", "toy.Nett", 3, "Nett"),
    ("max_epochs: 1", "max_epoch: 1", 9, "max_epoch"),
    ("max_epochs: 1", "devices: 2", 8, "`trainer` must train in one process, got one of 2"),
    ("accelerator: cpu", "accelerator: cpu\n    callbacks: EMA", 12, "The cell '+ EMA' cannot be trained"),
    ("folder: results", "folder: 3", 21, "`folder` must be the path of a folder, got 3"),
    ("folder: results", "folder: toy.py", 21, "`folder` must be one where files can be written, got 'toy.py'"),
    ("folder: results", "seeds: 3", 21, "each key must be there once, and 'seeds' is in line 20, too"),
    ("folder: results", "wandb: true", 21, "`wandb` must be the name of a project"),
    ("folder: results", "metric: [a]", 21, "`metric` must be the name of what"),
    ("folder: results", "designs:", 21, "`designs` must be one of 'add', 'remove', got None"),
    ("decay: 0.8", "decay: 1.8", 15, "`decay` must lie in [0, 1]"),
    ("decay: 0.8", "decays: 0.8", 15, "decays"),
    ("class_path: WeightDecay", "class_path: WeightDecays", 17, "WeightDecays"),
    ("seeds: 2", "seeds: none", 20, "`seeds` must be"),
    ("seeds: 2", "seeds: 2\nmetric: val_los", 21, "`metric` must be logged by validation_step, got 'val_los'; logged are: val_loss"),
    ("seeds: 2", "sedes: 2", 20, "a study has no `sedes`"),
    ("seeds: 2", "seeds: [2", 21, "expected"),
    ("folder: results", "designs: minus", 21, "`designs` must be"),
    ("tricks:", "trick:", 1, "a study must have `config` and `tricks`"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[1].partition("\n")[2] or mistake[1])
def test_what_is_wrong_is_told_with_its_line_before_anything_is_trained(here, capsys, mistake):
    old, new, line, words = mistake
    assert STUDY.count(old) == 1
    (here / "study.yaml").write_text(STUDY.lstrip().replace(old, new))
    errors = refusal(capsys)
    assert errors.startswith(f"lightning-tricks ablate: study.yaml:{line}: ")
    assert words in errors
    assert not (here / "results").exists()


def refusal(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["ablate", "--config", "study.yaml"])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_configuration_in_another_file_is_told_with_its_lines(here, capsys):
    study = yaml.safe_load(STUDY)
    config = study["config"] | {"ckpt_path": None}
    (here / "sub").mkdir()
    (here / "sub/config.yaml").write_text(yaml.safe_dump(config).replace("width: 8", "width: x"))
    (here / "study.yaml").write_text(yaml.safe_dump(study | {"config": "sub/config.yaml", "tricks": {"EMA": study["tricks"]["EMA"]}}))
    errors = refusal(capsys)
    line = (here / "sub/config.yaml").read_text().splitlines().index("    width: x") + 1
    assert f"{Path('sub/config.yaml')}:{line}: " in errors
    (here / "sub/config.yaml").write_text(yaml.safe_dump(config))
    assert main(["ablate", "--config", "study.yaml", "--seeds", "1"]) == 0
    assert "+ EMA" in capsys.readouterr().out
    (here / "study.yaml").write_text(yaml.safe_dump(study | {"config": "none.yaml"}))
    assert "study.yaml:1: `config` must be a configuration of LightningCLI or the path of one" in refusal(capsys)
