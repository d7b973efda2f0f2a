"""The truth that everything else is compared with: the PyTorch models, losses, trainer and samplers.

model = load_model("nnet_ema.pth", "dim-huge-256")      # DiM:  model(x, t, y) -> eps
model = load_model(SHIPPED_CHECKPOINT, "mdm-tiny")      # MDM:  generate(model, Tokenizer(SHIPPED_TOKENIZER), ...)
"""

from importlib.resources import files
from pathlib import Path

from mdm.reference.checkpoint import build_model, load_model, published_name
from mdm.reference.config import PRESETS, Config, load_config
from mdm.reference.generate import Result, generate
from mdm.reference.schedule import make_schedule, time_grid
from mdm.reference.solvers import SOLVERS, sample
from mdm.reference.tokenizer import Tokenizer

_ASSETS = Path(str(files("mdm.reference"))) / "assets"
SHIPPED_CHECKPOINT = _ASSETS / "mdm-tiny.safetensors"
SHIPPED_TOKENIZER = _ASSETS / "mdm-tiny.tokenizer.model"

__all__ = [
    "PRESETS",
    "SHIPPED_CHECKPOINT",
    "SHIPPED_TOKENIZER",
    "SOLVERS",
    "Config",
    "Result",
    "Tokenizer",
    "build_model",
    "generate",
    "load_config",
    "load_model",
    "make_schedule",
    "published_name",
    "sample",
    "time_grid",
]
