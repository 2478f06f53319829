"""Training before the export and after it, on PyTorch: it needs `pip install graphopt[train]`.

A TOML file says what is trained on what, how, and by how many processes::

    trained = train("digits_cnn.toml")

The parts: `config` and `reading` (the file), `batches`, `seeding`, `objectives`, `optimizers`,
`precision` (what a step is made of), `distillation` and `teachers` (what a student learns from),
`preparations` and `prepared_weights` (weights in the forms that passes store), `strategy` and one
module for each kind of parallelism (how processes divide it), `loop`, `checkpoints`, `recorder`,
`assembly` (all of these put together), `exporting` and `delivery` (what is left behind), and `api`,
which does one after the other.

What passes made of a model learns from the original again::

    healed = heal("model.onnx", "optimized.onnx", samples="samples/")

The parts: `interpreter` (ONNX in torch), `stored_weights` and `weight_forms` (what can learn, and
in which form), `original_weights` and `settling` (where codes begin and end), `common_values`,
`learnable_outputs` and `output_aims` (what is learnt), `sample_batches` (from what), `healing` (the
loop), `companions` and `ranks` (several processes), and `heal`, the verb.
"""

from __future__ import annotations

from graphopt.training.api import Trained, train
from graphopt.training.config import Config
from graphopt.training.delivery import Delivery
from graphopt.training.heal import Healed, heal
from graphopt.training.objectives import Objective
from graphopt.training.preparation import Preparation
from graphopt.training.reading import config_of, read_config
from graphopt.training.summary import render_trained, trained_to_json

__all__ = [
    "Config",
    "Delivery",
    "Healed",
    "Objective",
    "Preparation",
    "Trained",
    "config_of",
    "heal",
    "read_config",
    "render_trained",
    "train",
    "trained_to_json",
]
