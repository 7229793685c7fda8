"""llmc: GPT-2 and GPT-3 pretraining with hand-written kernels."""

from llmc import _cuda_libs, _llmc
from llmc._llmc import Backend, Error, __version__
from llmc.config import GPT2Config
from llmc.data import DataLoader
from llmc.model import GPT2
from llmc.optim import AdamW
from llmc.schedule import lr_schedule
from llmc.settings import TrainConfig
from llmc.tokenizer import Tokenizer
from llmc.train import Callback, Trainer, TrainResult, train

__all__ = [
    "GPT2",
    "AdamW",
    "Backend",
    "Callback",
    "DataLoader",
    "Error",
    "GPT2Config",
    "Tokenizer",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "__version__",
    "lr_schedule",
    "train",
]

if _llmc.cuda_built():
    _llmc.set_library_directories(_cuda_libs.library_directories())
