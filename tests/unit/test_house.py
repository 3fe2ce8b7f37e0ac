"""The rules that hold the package together."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lightning_tricks as lt
from lightning_tricks import errors
from lightning_tricks._core.surgery import Patches
from lightning_tricks._core.trick import Trick

ROOT = Path(lt.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
EXTRAS = {
    "torchvision",
    "timm",
    "wandb",
    "hydra",
    "jsonargparse",
    "matplotlib",
    "pytorch_optimizer",
    "schedulefree",
    "optuna",
    "pandas",
    "ray",
    "rich",
    "scipy",
    "yaml",
}


def imports(path: Path) -> set[str]:
    """Return every module a file imports, also in functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str | None:
    """Return the room of one of our modules, or None for what lies at the top."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "lightning_tricks" and (ROOT / parts[1]).is_dir() else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_the_core_and_themselves_only(path):
    own = path.relative_to(ROOT).parts[0] if path.parent != ROOT else None
    others = {room(module) for module in imports(path)} - {None, "_core", own}
    assert own is None or others == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lightning_comes_through_one_door(path):
    direct = {module for module in imports(path) if module.split(".")[0] in {"lightning", "pytorch_lightning"}}
    assert direct == set() or path == ROOT / "_core" / "lightning.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_an_extra_at_import_time(path):
    assert not {module.split(".")[0] for module in imports(path)} & EXTRAS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) < 400


def test_the_base_of_all_callbacks_overrides_no_hook_but_setup():
    hooks = {name for name in vars(Trick) if name.startswith("on_") or name in {"setup", "teardown", "state_dict", "load_state_dict"}}
    assert hooks == {"setup"}
    assert len((ROOT / "_core" / "trick.py").read_text().splitlines()) <= 100


def test_every_error_has_our_base_and_one_of_pythons_or_lightnings():
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.TrickError)
        assert kind is errors.TrickError or any(
            base not in {errors.TrickError, kind} and base.__module__ != errors.__name__ for base in kind.__bases__
        )


HIDE = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in {hidden!r} else find(name, *a)
"""

FIT = """
import torch, warnings
warnings.filterwarnings("ignore")
import lightning_tricks as lt
import {package} as pl
class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def validation_step(self, batch, batch_idx):
        self.log("loss", self.net(batch).square().mean())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
data = torch.utils.data.DataLoader(torch.ones(8, 2))
trick, module = lt.EMA(0.5, evaluate="both"), Net()
pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[trick], logger=False, enable_checkpointing=False,
           enable_progress_bar=False, enable_model_summary=False).fit(module, data, data)
assert trick._averages.tracks[0].updates == 8
assert torch.equal(module.net.weight, trick.averaged_state_dict()["net.weight"])
assert isinstance(trick, pl.Callback)
print("fitted")
"""


def installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


@pytest.mark.parametrize(
    ("package", "hidden"),
    [
        ("lightning.pytorch", []),
        ("pytorch_lightning", []),
        ("lightning.pytorch", ["pytorch_lightning", "timm", "wandb"]),
        ("pytorch_lightning", ["lightning"]),
    ],
    ids=str,
)
def test_works_with_a_trainer_of_either_package_and_with_one_alone(package, hidden):
    top = package.split(".", maxsplit=1)[0]
    if not installed(top):
        pytest.skip(f"{top} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=hidden) + FIT.format(package=package)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("fitted"), done.stderr[-2000:]


def test_without_any_lightning_the_error_says_what_to_install():
    script = HIDE.format(hidden=["lightning", "pytorch_lightning"]) + "import lightning_tricks"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "ImportError: lightning-tricks needs Lightning" in done.stderr


def test_patches_are_undone_and_applied_once():
    class Owner:
        def say(self):
            return 1

    owner, patches = Owner(), Patches()
    for _ in range(2):
        patches.wrap(owner, "say", lambda say: lambda: say() + 1)
    assert owner.say() == 2
    assert not hasattr(owner.say, "__wrapped__")
    patches.undo()
    assert owner.say() == 1
    assert vars(owner) == {}
    patches.wrap(owner, "say", lambda say: lambda: say() + 1)
    owner.say = lambda: 7  # somebody replaces it after us
    patches.undo()
    assert owner.say() == 7


def test_the_oldest_releases_tested_are_the_oldest_admitted():
    top = ROOT.parents[1]
    if not (top / "pyproject.toml").exists():
        pytest.skip("installed without its source tree")
    admitted = tomllib.loads((top / "pyproject.toml").read_text())["project"]["dependencies"]
    floors = {name: floor.split(",")[0] for name, _, floor in (line.partition(">=") for line in admitted)}
    tested = dict(line.split("==") for line in (top / ".ci" / "oldest.txt").read_text().splitlines() if "==" in line)
    assert tested.keys() == floors.keys()
    assert all(f"{tested[name]}.0".startswith(f"{floors[name]}.0") for name in floors)
