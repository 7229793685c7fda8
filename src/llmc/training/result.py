"""What a run leaves behind in Python, and how a notebook shows it."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.data.tokenizer import Tokenizer
from llmc.models.model import Model
from llmc.plot import Run, figure
from llmc.system.signals import signal_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAST = ("train_loss", "val_loss", "val_bits_per_byte")
_BY_UPDATE = ("train_loss", "norm", "lr", "tokens_per_second")
_BY_VALIDATION = ("val_loss", "val_bits_per_byte")


@dataclass(repr=False)
class TrainResult:
    """What a run leaves behind.

    Attributes:
        history: "step", "train_loss", "norm", "lr", "tokens_per_second" by update; "val_step", "val_loss" by validation, and
            "val_bits_per_byte", which is empty if the run knows no tokenizer.
        run_dir: None if nothing was kept.
        stopped_by: the number of the signal that ended the run, or 0. It can be another only if fit() was told not to pass the signal
            on, or the program has a handler for it that returned.
        stopped_early: whether validation losses ended the run before its last step (the setting patience).
    """

    history: dict[str, list[float]]
    run_dir: Path | None
    model: Model
    tokenizer: Tokenizer | None
    step: int
    stopped_by: int = 0
    stopped_early: bool = False

    def __repr__(self) -> str:
        facts = [f"step={self.step}"]
        facts += [f"{name}={self.history[name][-1]:.4f}" for name in _LAST if self.history[name]]
        facts += [f"run_dir={str(self.run_dir)!r}"] if self.run_dir else []
        facts += [f"stopped by {signal_name(self.stopped_by)}"] if self.stopped_by else []
        facts += ["stopped early"] if self.stopped_early else []
        return f"TrainResult({', '.join(facts)})"

    def plot(self, *, window: int | None = None) -> Figure:
        """Draw the curves of history, as loss.png in a run directory has them. A notebook shows the figure as a picture.

        Args:
            window: as of llmc.plot.figure(): training loss and gradient norm are also averaged over so many steps.

        Raises:
            ValueError: if the run made no update and no validation.
        """
        return self._figure((*_BY_UPDATE, *_BY_VALIDATION), window)

    def _figure(self, names: tuple[str, ...], window: int | None = None) -> Figure:
        run = Run(self.run_dir.name if self.run_dir else "run")
        for name in names:
            steps = self.history["step" if name in _BY_UPDATE else "val_step"]
            run.series[name] = dict(zip(map(int, steps), self.history[name]))
        fig = figure([run], window=window)
        # A notebook shows Figures by itself only once pyplot was imported, which would take over how they are shown.
        vars(fig)["_repr_png_"] = partial(_png, fig)
        return fig

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the line of repr(), and the curve of the loss as a picture."""
        text = f"<code>{html.escape(repr(self))}</code>"
        if not self.history["step"] and not self.history["val_step"]:
            return text
        picture = base64.b64encode(_png(self._figure(_LAST))).decode()
        return f'{text}<br><img alt="loss by step" src="data:image/png;base64,{picture}">'


def _png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=72)
    return buffer.getvalue()
