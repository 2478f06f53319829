"""A small LSTM that reads a digit row by row; `python -m graphopt_models.digits_lstm OUT_DIR`."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

from graphopt_models.digits import CLASSES, SIDE
from graphopt_models.export import main
from graphopt_models.training import Classifier

_HIDDEN: Final = 64


class DigitsLstm(nn.Module):
    """One LSTM layer over the eight rows and a linear head on its last state."""

    def __init__(self) -> None:
        """Build the layers with random weights."""
        super().__init__()
        self.lstm = nn.LSTM(SIDE, _HIDDEN, batch_first=True)
        self.head = nn.Linear(_HIDDEN, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        """Classify images.

        Args:
            rows: float32 [batch, 8, 8], brightness in [0, 1], the rows of an image from the top.

        Returns:
            Logits, float32 [batch, 10].
        """
        _, (hidden, _) = self.lstm(rows)
        logits: Tensor = self.head(hidden[-1])
        return logits


CLASSIFIER: Final = Classifier("digits_lstm", "rows", DigitsLstm, epochs=40)

if __name__ == "__main__":
    main(CLASSIFIER)
