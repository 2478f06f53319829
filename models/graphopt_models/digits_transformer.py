"""A small transformer that reads a digit row by row.

`python -m graphopt_models.digits_transformer OUT_DIR` trains and exports it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from graphopt_models.digits import CLASSES, SIDE
from graphopt_models.export import main
from graphopt_models.training import Classifier

_WIDTH: Final = 48
_HEADS: Final = 4
_MLP_WIDTH: Final = 96
_LAYERS: Final = 2
_DROPOUT: Final = 0.1


class SelfAttention(nn.Module):
    """Multi-head self-attention with separate projections."""

    def __init__(self) -> None:
        """Build the projections with random weights."""
        super().__init__()
        self.query = nn.Linear(_WIDTH, _WIDTH)
        self.key = nn.Linear(_WIDTH, _WIDTH)
        self.value = nn.Linear(_WIDTH, _WIDTH)
        self.output = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens, float32 [batch, sequence, 48] in and out."""
        query = _split_heads(self.query(tokens))
        key = _split_heads(self.key(tokens))
        value = _split_heads(self.value(tokens))
        scores = query @ key.transpose(-2, -1) / (_WIDTH // _HEADS) ** 0.5
        mixed = torch.softmax(scores, dim=-1) @ value
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer perceptron, each behind a layer norm and a residual."""

    def __init__(self) -> None:
        """Build the layers with random weights."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(_WIDTH)
        self.attention = SelfAttention()
        self.mlp_norm = nn.LayerNorm(_WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(_WIDTH, _MLP_WIDTH), nn.GELU(), nn.Linear(_MLP_WIDTH, _WIDTH)
        )
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens, float32 [batch, sequence, 48] in and out."""
        tokens = tokens + self.dropout(self.attention(self.attention_norm(tokens)))
        result: Tensor = tokens + self.dropout(self.mlp(self.mlp_norm(tokens)))
        return result


class DigitsTransformer(nn.Module):
    """Two encoder layers over the eight rows, then their mean and a linear head."""

    def __init__(self) -> None:
        """Build the layers with random weights."""
        super().__init__()
        self.embedding = nn.Linear(SIDE, _WIDTH)
        self.positions = nn.Parameter(torch.randn(SIDE, _WIDTH) * 0.02)
        self.layers = nn.Sequential(*(EncoderLayer() for _ in range(_LAYERS)))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        """Classify images.

        Args:
            rows: float32 [batch, 8, 8], brightness in [0, 1], the rows of an image from the top.

        Returns:
            Logits, float32 [batch, 10].
        """
        tokens = self.layers(self.embedding(rows) + self.positions)
        logits: Tensor = self.head(self.norm(tokens).mean(dim=1))
        return logits


def _split_heads(tokens: Tensor) -> Tensor:
    """Rearrange [batch, sequence, 48] as [batch, heads, sequence, 12]."""
    batch, sequence, _ = tokens.shape
    return tokens.reshape(batch, sequence, _HEADS, _WIDTH // _HEADS).transpose(1, 2)


CLASSIFIER: Final = Classifier("digits_transformer", "rows", DigitsTransformer, epochs=40)

if __name__ == "__main__":
    main(CLASSIFIER)
