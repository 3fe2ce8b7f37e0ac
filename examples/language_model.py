"""Train a small transformer on Python's own manual, character by character, and let it go on writing.

    python examples/language_model.py                             # a table, a picture and a sample in runs/language_model
    python examples/language_model.py --strategy ddp              # the same on two processes
    python examples/language_model.py --strategy model_parallel   # the same, each with half of every weight (FSDP2)

The text is what `help("assert")` prints, and comes with every Python: `pydoc_data.topics`. The module below says what it computes; how
it is optimized, guarded and averaged is said by three callbacks in `main`. Do not expect wonders: LZMA, which finds again every phrase
that it has read, needs fewer bits than so small a network, and while the learning rate falls along a cosine, an average ends where the
weights end. Other releases of Python have another manual, and other figures.
"""

import lzma
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.utils.data import DataLoader
from typing_extensions import override

import lightning_tricks as lt
from lightning_tricks import optim, schedules
from processes import command_line, make_trainer, one_thread, positive, report, shard, share

CONTEXT = 128  # characters
HEADS = 4  # of attention, in every block
LEAST = 3000  # characters of text, a tenth of which, kept for validation, is longer than what the model sees at once


class Block(nn.Module):
    """Attention to what was written before, and a network for each character, both added to what there is.

    Args:
        width: Features of each character.
        heads: Number of heads of attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # What lies farther back counts less, in each head by another rate (ALiBi), so that no positions need be learned.
        back = torch.arange(CONTEXT)[:, None] - torch.arange(CONTEXT)
        rates = torch.tensor([4.0**-head for head in range(heads)])[:, None, None]
        self.register_buffer("bias", torch.where(back < 0, -torch.inf, -rates * back), persistent=False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        parts = self.attention(self.norm1(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        bias = self.get_buffer("bias")[:, : x.shape[1], : x.shape[1]]
        x = x + self.project(scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2))
        return x + self.narrow(gelu(self.widen(self.norm2(x))))


class LanguageModel(LightningModule):
    """Says for each character how likely each other comes next.

    Args:
        characters: Number of different characters.
        width: Features of each.
        layers: Number of blocks.
    """

    def __init__(self, characters: int, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.blocks = nn.Sequential(*(Block(width, HEADS) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    @override
    def configure_model(self) -> None:
        shard(self, *self.blocks, self)

    @override
    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(text))))

    @override
    def training_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch)

    @override
    def validation_step(self, batch: Tensor) -> None:
        self.log("bits", self.loss(batch) / math.log(2), batch_size=len(batch), sync_dist=True)

    def loss(self, batch: Tensor) -> Tensor:
        """Return the mean negative log-likelihood of each character, given those before."""
        return cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())  # `OptimizerFactory` takes its place

    @torch.no_grad()
    def write(self, text: Tensor, count: int) -> Tensor:
        """Go on from a text, character by character, each drawn by what the model holds likely."""
        draw = torch.Generator().manual_seed(0)
        for _ in range(count):
            likely = (self(text[None, -CONTEXT:])[0, -1] / 0.8).softmax(0)  # colder than learned: fewer slips
            text = torch.cat([text, likely.multinomial(1, generator=draw)])
        return text


class History(Callback):
    """Remembers what every validation found."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.raw: list[float] = []
        self.averaged: list[float] = []

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.append(trainer.global_step)
        self.raw.append(float(trainer.logged_metrics["raw/bits"]))
        self.averaged.append(float(trainer.logged_metrics["bits"]))


def load(limit: int | None) -> tuple[str, str]:
    """Return nine tenths of the manual to train on and the rest to validate, without the paragraphs that it has twice."""
    paragraphs = dict.fromkeys(paragraph for topic in topics.values() for paragraph in topic.split("\n\n"))
    text = "\n\n".join(paragraphs)[:limit]
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def baselines(train: str, test: str) -> dict[str, float]:
    """Return the bits per character that simple means take for a text, knowing another."""
    counts, size = Counter(train), len(set(train + test))
    alone = -sum(math.log2((counts[character] + 1) / (len(train) + size)) for character in test) / len(test)
    packed = [len(lzma.compress(text.encode(), preset=9)) for text in (train, train + test)]
    return {"all characters alike": math.log2(size), "frequencies of characters": alone, "LZMA": 8 * (packed[1] - packed[0]) / len(test)}


@rank_zero_only
def plot(history: History, compressed: float, path: Path) -> None:
    """Draw the bits per character of raw and averaged weights over the steps."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    curves = ((history.raw, "raw weights", "#D55E00", 1.4), (history.averaged, "averaged weights", "#0072B2", 2.6))
    for values, label, color, width in curves:
        axes.plot(history.steps, values, color=color, linewidth=width, marker="o", markersize=1.8 * width, label=label)
    axes.axhline(compressed, color="#999999", linestyle=":")
    axes.text(history.steps[-1], compressed, "LZMA ", color="#777777", ha="right", va="bottom")
    axes.set_title("A transformer reads Python's manual", loc="left", fontweight="bold", pad=12)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("bits per character, validation")
    axes.grid(color="#E5E5E5")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(loc="upper right", frameon=False, labelcolor="linecolor")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def windows(text: str, characters: Sequence[str], batch_size: int, *, shuffle: bool) -> DataLoader[Tensor]:
    """Cut a text into pieces that overlap by the one character that a piece only foretells."""
    numbers = torch.tensor([characters.index(character) for character in text])
    return DataLoader(numbers.unfold(0, CONTEXT + 1, CONTEXT), batch_size, shuffle=shuffle, drop_last=shuffle)  # type: ignore[arg-type]


def main() -> None:
    """Train, measure and write."""
    parser = command_line(__doc__, "runs/language_model")
    parser.add_argument("--epochs", type=positive, default=3, help="times that the text is read (default: %(default)s)")
    parser.add_argument("--characters", type=positive, help=f"read no more than this of the text, at least {LEAST}")
    parser.add_argument("--write", type=positive, default=400, help="characters to go on writing (default: %(default)s)")
    parser.add_argument(
        "--width", type=positive, default=64, help=f"features of each character, a multiple of {HEADS} (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.characters is not None and options.characters < LEAST:
        parser.error(f"argument --characters: must be at least {LEAST}, got {options.characters}")
    if options.width % HEADS:
        parser.error(f"argument --width: must be a multiple of {HEADS}, got {options.width}")
    one_thread()
    train, test = load(options.characters)
    characters = sorted(set(train + test))
    seed_everything(0, verbose=False)
    model, history = LanguageModel(len(characters), options.width), History()
    recipe = optim.AdamW(lr=4e-3, betas=(0.9, 0.99), weight_decay=0.1)  # decays matrices alone
    callbacks = [
        lt.OptimizerFactory(recipe, schedule=schedules.Cosine(final=0.02, warmup="5%")),
        lt.LossSpikeGuard(watch=["loss", "grad_norm"]),
        lt.EMA(half_life="5%", warmup="10%", evaluate="both"),
        history,
    ]
    reading = windows(train, characters, share(options, 16), shuffle=True)
    make_trainer(options, callbacks, epochs=options.epochs, validate_every=1 / 3).fit(
        model, reading, windows(test, characters, 64, shuffle=False)
    )
    known = baselines(train, test)
    found = {**known, "transformer, raw weights": history.raw[-1], "transformer, averaged weights": history.averaged[-1]}
    plot(history, known["LZMA"], options.output / "language_model.png")
    prompt = 'The "yield" statement\n'
    text = model.eval().write(torch.tensor([characters.index(character) for character in prompt]), options.write)
    report(
        "Bits per character",
        [{"text foretold by": name, "bits": bits} for name, bits in found.items()],
        options.output / "language_model.csv",
    )
    if model.global_rank == 0:
        print("".join(characters[i] for i in text.tolist()))


if __name__ == "__main__":
    main()
