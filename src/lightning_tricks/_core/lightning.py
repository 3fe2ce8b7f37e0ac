"""The one door to Lightning: every other file imports Lightning's names from here.

Lightning is published twice, as ``lightning.pytorch`` and as ``pytorch_lightning``, and each Trainer accepts callbacks of its own
package only. With one of the two installed, its names are taken. With both, `Callback` inherits from both, so that a trick fits
whichever Trainer the user imports, now or later.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

if TYPE_CHECKING:
    from types import ModuleType

    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
    from lightning.pytorch.utilities.data import extract_batch_size
    from lightning.pytorch.utilities.seed import isolate_rng
    from lightning.pytorch.utilities.types import STEP_OUTPUT
    from torch import nn

__all__ = [
    "STEP_OUTPUT",
    "Callback",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "callbacks_of",
    "configure",
    "defines",
    "extract_batch_size",
    "is_averaging_callback",
    "is_bystander",
    "is_callback",
    "is_data_module",
    "is_lightning_module",
    "is_lightning_module_class",
    "is_progress_bar",
    "is_pruning_callback",
    "is_rate_finder",
    "is_trainer",
    "is_wandb_logger",
    "isolate_rng",
    "logged_hyperparameters",
    "logs_now",
    "make_callbacks",
    "overridden",
    "override",
    "rank_zero_info",
    "rank_zero_warn",
    "rng_states",
    "scales_gradients",
    "scheduled_accumulation",
    "seed_process",
    "set_rng_states",
    "trainer_class",
    "trainer_of",
    "wrapped",
]


def _installed() -> list[str]:
    packages = [name for name in ("lightning", "pytorch_lightning") if find_spec(name) is not None]
    if not packages:
        msg = "lightning-tricks needs Lightning, and neither `lightning` nor `pytorch_lightning` is installed: `pip install lightning`."
        raise ImportError(msg)
    return packages


def _load() -> list[ModuleType]:
    """Import every Lightning installed, first the one that the user has imported.

    Each takes over the logger behind `rank_zero_info` when it is imported; the first one gets it back.
    """
    names = ["lightning.pytorch" if name == "lightning" else name for name in _installed()]
    names.sort(key=lambda name: name not in sys.modules)
    first, *others = names
    loaded = [import_module(first)]
    rank_zero: Any = import_module("lightning_utilities.core.rank_zero")
    logger = rank_zero.log
    loaded += [import_module(name) for name in others]
    rank_zero.log = logger
    return loaded


_LIGHTNINGS: Final = _load()
_HOME: Final = _LIGHTNINGS[0]
_MODULES: Final = tuple(lightning.LightningModule for lightning in _LIGHTNINGS)
_SEEDS: Final = import_module(f"{_HOME.__name__}.utilities.seed")

if not TYPE_CHECKING:
    Callback = (
        _HOME.Callback
        if len(_LIGHTNINGS) == 1
        else type("Callback", tuple(lightning.Callback for lightning in _LIGHTNINGS), {"__module__": __name__})
    )
    MisconfigurationException = import_module(f"{_HOME.__name__}.utilities.exceptions").MisconfigurationException
    extract_batch_size = import_module(f"{_HOME.__name__}.utilities.data").extract_batch_size
    isolate_rng = import_module(f"{_HOME.__name__}.utilities.seed").isolate_rng
    rank_zero_info = import_module(f"{_HOME.__name__}.utilities").rank_zero_info
    rank_zero_warn = import_module(f"{_HOME.__name__}.utilities").rank_zero_warn
    LightningModule, Trainer = _HOME.LightningModule, _HOME.Trainer
    STEP_OUTPUT = Any


def _kinds(*names: str) -> tuple[type, ...]:
    """Return Lightning's callback classes of these names, from every Lightning installed; older releases lack some."""
    return tuple(getattr(lightning.callbacks, name) for lightning in _LIGHTNINGS for name in names if hasattr(lightning.callbacks, name))


_CALLBACKS: Final = _kinds("Callback")
_AVERAGING: Final = _kinds("WeightAveraging", "StochasticWeightAveraging")
_PRUNING: Final = _kinds("ModelPruning")
_PROGRESS: Final = _kinds("ProgressBar")
_ACCUMULATING: Final = _kinds("GradientAccumulationScheduler")
_RATE_FINDING: Final = _kinds("LearningRateFinder")
_BYSTANDING: Final = _kinds("ProgressBar", "ModelSummary", "Checkpoint", "LearningRateMonitor", "DeviceStatsMonitor", "Timer")


def is_callback(value: object) -> bool:
    """Tell whether something is a callback, ours or of any Lightning."""
    return isinstance(value, _CALLBACKS)


def is_averaging_callback(callback: object) -> bool:
    """Tell whether a callback is one of Lightning's own that replace the weights by an average."""
    return isinstance(callback, _AVERAGING)


def is_pruning_callback(callback: object) -> bool:
    """Tell whether a callback is Lightning's own that replaces parameters by masked ones during the fit."""
    return isinstance(callback, _PRUNING)


def is_progress_bar(callback: object) -> bool:
    """Tell whether a callback only shows progress."""
    return isinstance(callback, _PROGRESS)


def is_rate_finder(callback: object) -> bool:
    """Tell whether a callback is Lightning's own that searches for a learning rate, and sets it, before a fit."""
    return isinstance(callback, _RATE_FINDING)


def is_bystander(callback: object) -> bool:
    """Tell whether a callback is one of Lightning's own that show, time or save a training and do nothing to it."""
    return isinstance(callback, _BYSTANDING)


def is_lightning_module(value: object) -> bool:
    """Tell whether something is a LightningModule, of whichever Lightning."""
    return isinstance(value, _MODULES)


def is_data_module(value: object) -> bool:
    """Tell whether something is a LightningDataModule, of whichever Lightning."""
    return isinstance(value, tuple(lightning.LightningDataModule for lightning in _LIGHTNINGS))


def is_trainer(value: object) -> bool:
    """Tell whether something is a Trainer, of whichever Lightning."""
    return isinstance(value, tuple(lightning.Trainer for lightning in _LIGHTNINGS))


def is_wandb_logger(value: object) -> bool:
    """Tell whether something is a Lightning's logger for W&B, which alone imports W&B."""
    return isinstance(value, tuple(lightning.loggers.WandbLogger for lightning in _LIGHTNINGS))


def logged_hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """Return the hyperparameters of module and datamodule that Lightning hands to loggers when a run begins."""
    owners: list[Any] = [owner for owner in (trainer.lightning_module, trainer.datamodule) if owner is not None]  # type: ignore[attr-defined]
    initial = [owner.hparams_initial for owner in owners if owner._log_hyperparams]
    return {key: value for each in initial for key, value in each.items() if key != "_class_path"}  # which LightningCLI adds


def trainer_class(module: object) -> type[Trainer]:
    """Return the Trainer of the Lightning that a LightningModule is of."""
    kinds: list[type[Trainer]] = [lightning.Trainer for lightning in _LIGHTNINGS if isinstance(module, lightning.LightningModule)]
    return kinds[0]


def overridden(owner: object) -> set[str]:
    """Return the names of Lightning's methods that the class of a LightningModule or LightningDataModule defines anew."""
    kinds = [kind for lightning in _LIGHTNINGS for kind in (lightning.LightningModule, lightning.LightningDataModule)]
    bases = [kind for kind in kinds if isinstance(owner, kind)]
    own = [kind for kind in type(owner).__mro__ if not any(issubclass(base, kind) for base in bases)]
    return {name for base in bases for name in dir(base) if not name.startswith("_") and any(name in vars(kind) for kind in own)}


def is_lightning_module_class(kind: type) -> bool:
    """Tell whether a class is one of LightningModules, of whichever Lightning."""
    return issubclass(kind, _MODULES)


def scheduled_accumulation(trainer: Trainer) -> dict[int, int]:
    """Return how many batches make a step from which epochs on, if a callback of Lightning's sets that at the start of epochs."""
    callbacks: list[Any] = [callback for callback in callbacks_of(trainer) if isinstance(callback, _ACCUMULATING)]
    return dict(callbacks[0].scheduling) if callbacks else {}


def defines(module: LightningModule, *hooks: str) -> bool:
    """Tell whether the module's class implements one of these hooks itself.

    The instance's attributes are left aside, since a hook replaced on the instance is ours and not the user's.
    """
    return any(getattr(type(module), hook) not in [getattr(lightning.LightningModule, hook) for lightning in _LIGHTNINGS] for hook in hooks)


def configure(config: dict[str, Any]) -> tuple[LightningModule, Any, Trainer]:
    """Let LightningCLI make what a configuration describes: a module, a datamodule or None, and a Trainer. No seed is set.

    Raises:
        Exception: Whatever LightningCLI or a constructor raises.
    """
    line = import_module(f"{_HOME.__name__}.cli").LightningCLI

    class Line(line):  # type: ignore[misc, valid-type]
        @override
        def parse_arguments(self, parser: Any, args: Any) -> None:
            self.config = parser.parse_object(args)  # whatever the command line of this process is

    made = Line(args=config, run=False, save_config_callback=None, seed_everything_default=False, parser_kwargs={"exit_on_error": False})
    return made.model, made.datamodule, made.trainer


def make_callbacks(items: list[Any]) -> list[Callback]:
    """Let jsonargparse, as LightningCLI would, make callbacks from what a configuration says of them: ``class_path`` and ``init_args``.

    Raises:
        Exception: Whatever jsonargparse or a constructor raises.
    """
    parser = import_module("jsonargparse").ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[_HOME.Callback])  # type: ignore[name-defined]
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes  # as it was called before 4.49
    callbacks: list[Callback] = make(parser.parse_object({"callbacks": items})).callbacks
    return callbacks


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the Trainer's callbacks, those the module brings included."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def trainer_of(model: object) -> Trainer | None:
    """Return the Trainer that a LightningModule is attached to, or None if it is to none, or no LightningModule at all."""
    trainer: Trainer | None = getattr(model, "_trainer", None) if isinstance(model, _MODULES) else None
    return trainer


def rng_states() -> dict[str, Any]:
    """Return the states of the random numbers of torch, of its devices, of NumPy and of Python, to be set again."""
    states: dict[str, Any] = _SEEDS._collect_rng_states()
    return states


def set_rng_states(states: dict[str, Any]) -> None:
    """Let random numbers be drawn as from the moment at which these states were taken."""
    _SEEDS._set_rng_states(states)


def seed_process(seed: int) -> None:
    """Seed the random numbers of torch, NumPy and Python, and those of loading processes and distributed samplers made from now on."""
    _HOME.seed_everything(seed, workers=True, verbose=False)


def logs_now(trainer: Trainer) -> bool:
    """Tell whether the Trainer hands this training step's metrics to its loggers."""
    return bool(trainer.loggers) and trainer._logger_connector.should_update_logs


def scales_gradients(module: object) -> bool:
    """Tell whether the Trainer of a LightningModule scales gradients, as it does in float16."""
    plugin = getattr(getattr(module, "_trainer", None), "precision_plugin", None)
    return getattr(plugin, "scaler", None) is not None


def wrapped(module: nn.Module) -> nn.Module:
    """Return a module as the strategy of its Trainer has wrapped it, or as it is."""
    strategy = getattr(trainer_of(module), "strategy", None)
    model: nn.Module | None = getattr(strategy, "model", None)
    return module if model is None or getattr(strategy, "lightning_module", None) is not module else model
