"""A variational autoencoder of SMILES: R. Gomez-Bombarelli et al., ACS Cent. Sci. 2018, doi:10.1021/acscentsci.7b00572,
in the form of the MOSES benchmark, doi:10.3389/fphar.2020.565644."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnuggets.models.char_rnn import State, recur, unroll
from fastnuggets.nn import GaussianEncoder
from fastnuggets.ops.sample import Key


class SmilesVAE(nn.Module):
    """SMILES -> normal code -> SMILES. The code is the decoder's first state and a part of every input of it.

    Args:
        tokens: V, size of the vocabulary.
        encoder: features of the GRU that reads.
        hidden, layers: of the GRU that writes.
        latent: Z, numbers of a code.

    The embedding is that of the identity when training begins. Sequences as in ``models.char_rnn``.
    """

    def __init__(
        self, tokens: int, *, encoder: int = 256, hidden: int = 512, layers: int = 3, latent: int = 128
    ) -> None:
        super().__init__()
        self.latent = latent
        self.embedding = nn.Embedding.from_pretrained(torch.eye(tokens), freeze=False)
        self.reader = nn.GRU(tokens, encoder)
        self.code = GaussianEncoder(encoder, latent)
        self.start = nn.Linear(latent, hidden)
        self.writer = nn.GRU(tokens + latent, hidden, layers)
        self.output = nn.Linear(hidden, tokens)

    def encode(self, tokens: Tensor, lengths: Tensor, *, key: Key = None) -> tuple[Tensor, Tensor]:
        """[T, B] whole sequences, their lengths [B] -> codes [B, Z] and their KL [B], as in ``nn.GaussianEncoder``."""
        features, _ = recur(self.reader, self.embedding(tokens))
        return self.code(features[lengths - 1, torch.arange(len(lengths), device=tokens.device)], key=key)

    def decode(self, inputs: Tensor, codes: Tensor) -> Tensor:
        """[T, B] tokens before each, codes [B, Z] -> logits [T, B, V]."""
        return self._write(inputs, self._begin(codes))[0]

    @torch.no_grad()
    def sample(self, codes: Tensor, *, length: int = 100, temperature: float = 1.0, key: Key = None) -> Tensor:
        """Sequences of codes [B, Z]: [B, length] uint8, as in ``char_rnn.unroll``. Call it in evaluation mode."""
        return unroll(self._write, self._begin(codes), length=length, temperature=temperature, key=key)

    def _begin(self, codes: Tensor) -> State:
        return self.start(codes).expand(self.writer.num_layers, -1, -1).contiguous(), codes[None]

    def _write(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        hidden, codes = state
        features = torch.cat([self.embedding(inputs), codes.expand(len(inputs), -1, -1)], 2)
        features, hidden = recur(self.writer, features, hidden)
        return self.output(features), (hidden, codes)
