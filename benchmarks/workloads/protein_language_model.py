"""A transformer that guesses masked residues."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING or __package__:
    from .masked_proteins import MaskedProteins
else:
    from masked_proteins import MaskedProteins


class ProteinLanguageModel(nn.Module):  # type: ignore[misc]
    """Pre-norm transformer encoder over `width` channels, 32 a head, for sequences of up to `length` tokens."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(MaskedProteins.TOKENS, width)
        self.positions = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, MaskedProteins.UNKNOWN)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [batch, length, 20] for tokens [batch, length]; padding is not attended to."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        embedded = self.tokens(tokens) + self.positions(position)
        padding = tokens == MaskedProteins.PADDING
        return self.head(self.norm(self.layers(embedded, src_key_padding_mask=padding)))
