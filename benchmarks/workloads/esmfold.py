"""ESMFold's architecture, from transformers, with seeded random weights and the homologs' profile as an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.models.esm.configuration_esm import EsmConfig, get_default_vocab_list
from transformers.models.esm.modeling_esmfold import EsmForProteinFolding


@dataclass(frozen=True)
class Size:
    """How large the model is. The defaults are 8 of the 33 layers of ESM-2 650M before a small folding trunk."""

    layers: int = 8
    width: int = 1280  # of the language model; 64 a head
    blocks: int = 1
    recycles: int = 1
    pair_heads: int = 2  # of the trunk's triangle attention; 16 channels each


class ProfileEmbedding(nn.Embedding):  # type: ignore[misc]
    """A residue embedding that adds the alignment's profile, as AlphaFold's input embedder does.

    Set `profile` ([residues, 20], each row summing to at most 1) before a forward pass.
    """

    profile: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Embed residue types [batch, residues]; returns [batch, residues, channels]."""
        embedded = super().forward(input)
        if self.profile is None:
            return embedded
        return embedded + self.profile @ self.weight[: self.profile.shape[-1]]


def build(size: Size, seed: int) -> EsmForProteinFolding:
    """Build the model on the CPU, in float32, for inference; the same seed gives the same weights.

    Random weights cannot fold a protein: the structure is a function of sequence and profile, not the real fold.
    """
    with no_init_weights():  # transformers would initialise every weight twice, and the head's outputs to zero
        model = EsmForProteinFolding(_configuration(size))
    embedding = model.embedding
    model.embedding = ProfileEmbedding(embedding.num_embeddings, embedding.embedding_dim)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _initialise(name, parameter, generator)
    return model.eval().requires_grad_(False)


def _initialise(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if parameter.ndim >= 2:
        fan_in = parameter.shape[-1]
        scale = 0.1 if "bb_update" in name else 1.0  # small rotations and steps: neighbours stay near each other
        parameter.normal_(std=scale * fan_in**-0.5, generator=generator)
    elif name.endswith("head_weights"):
        parameter.fill_(0.541324854612918)  # softplus of it is 1
    elif name.endswith("weight"):
        parameter.fill_(1.0)  # of a layer norm
    else:
        parameter.zero_()


def _configuration(size: Size) -> EsmConfig:
    trunk: dict[str, Any] = {
        "num_blocks": size.blocks,
        "sequence_state_dim": 128,
        "pairwise_state_dim": 16 * size.pair_heads,
        "sequence_head_width": 32,
        "pairwise_head_width": 16,
        "max_recycles": size.recycles,
        "chunk_size": None,
        "structure_module": {
            "sequence_dim": 128,
            "pairwise_dim": 32,
            "num_blocks": 4,
            "num_heads_ipa": 4,
            "resnet_dim": 64,
        },
    }
    return EsmConfig(
        vocab_list=get_default_vocab_list(),
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64,
        intermediate_size=4 * size.width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        is_folding_model=True,
        esmfold_config={"fp16_esm": False, "trunk": trunk},
    )
