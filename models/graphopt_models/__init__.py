"""Small models to optimize: digit classifiers trained in PyTorch and a decoder of any size.

The modules `digits_cnn`, `digits_transformer` and `digits_lstm` train and export a classifier
(they need torch and scikit-learn); `llama` writes an untrained Llama-shaped decoder (it needs
neither). One trained model is part of the package, with labelled samples that it was never
trained on:

* `DIGITS_CNN`: ONNX file, float32 `image` [batch, 1, 8, 8] in [0, 1] -> float32 `logits`
  [batch, 10].
* `DIGITS_CNN_SAMPLES`: .npz with float32 `image` [300, 1, 1, 8, 8], 300 samples of batch 1.
* `DIGITS_CNN_LABELS`: .npy with int64 [300], the digit that each sample shows.

`python -m graphopt_models.digits_cnn OUT_DIR` makes these three files anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).parent

DIGITS_CNN: Final = _HERE / "digits_cnn.onnx"
DIGITS_CNN_SAMPLES: Final = _HERE / "digits_cnn_samples.npz"
DIGITS_CNN_LABELS: Final = _HERE / "digits_cnn_labels.npy"

__all__ = ["DIGITS_CNN", "DIGITS_CNN_LABELS", "DIGITS_CNN_SAMPLES"]
