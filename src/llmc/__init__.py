"""llmc: GPT-2 and GPT-3 pretraining with hand-written kernels."""

from llmc import _llmc
from llmc._llmc import Backend, Error, __version__
from llmc.data.loader import DataLoader
from llmc.data.tokenizer import Tokenizer
from llmc.models.config import GPT2Config
from llmc.models.gpt2 import GPT2
from llmc.models.model import Model
from llmc.optim.adamw import AdamW
from llmc.optim.muon import Muon
from llmc.optim.schedule import lr_schedule
from llmc.system import cuda_libs
from llmc.system.cache import tune_file
from llmc.training.result import TrainResult
from llmc.training.settings import TrainConfig
from llmc.training.trainer import Callback, Trainer, train

__all__ = [
    "GPT2",
    "AdamW",
    "Backend",
    "Callback",
    "DataLoader",
    "Error",
    "GPT2Config",
    "Model",
    "Muon",
    "Tokenizer",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "__version__",
    "lr_schedule",
    "train",
]

if _llmc.cuda_built():
    _llmc.set_library_directories(cuda_libs.library_directories())
    _llmc.set_tune_file(str(tune_file()))
