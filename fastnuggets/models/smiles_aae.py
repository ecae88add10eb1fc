"""An adversarial autoencoder of SMILES: D. Polykovskiy et al., Mol. Pharm. 2018, doi:10.1021/acs.molpharmaceut.8b00839,
in the form of the MOSES benchmark, doi:10.3389/fphar.2020.565644."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fastnuggets.models.char_rnn import State, recur, unroll
from fastnuggets.ops.sample import Key


class SmilesAAE(nn.Module):
    """SMILES -> code -> SMILES, and a discriminator that tells codes from draws of a standard normal.

    Args:
        tokens: V, size of the vocabulary.
        embedding: features of a token, the same for reading and writing.
        encoder: features of each direction of the LSTM that reads; its last cell states make the code.
        hidden, layers: of the LSTM that writes; the code makes its first cell state, the same in all layers.
        latent: Z, numbers of a code.
        discriminator: features of its layers.

    Sequences as in ``models.char_rnn``. MOSES' own reader leaves out the last character of each SMILES; this one sees
    it.
    """

    def __init__(
        self,
        tokens: int,
        *,
        embedding: int = 32,
        encoder: int = 512,
        hidden: int = 512,
        layers: int = 2,
        latent: int = 128,
        discriminator: tuple[int, ...] = (640, 256),
    ) -> None:
        super().__init__()
        self.latent = latent
        self.embedding = nn.Embedding(tokens, embedding)
        self.reader = nn.LSTM(embedding, encoder, bidirectional=True)
        self.code = nn.Linear(2 * encoder, latent)
        self.start = nn.Linear(latent, hidden)
        self.writer = nn.LSTM(embedding, hidden, layers)
        self.output = nn.Linear(hidden, tokens)
        sizes = (latent, *discriminator)
        hidden_layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ELU())]
        self.discriminator = nn.Sequential(*hidden_layers, nn.Linear(sizes[-1], 1))

    def encode(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """[T, B] sequences, the longest first, their lengths [B] -> codes [B, Z]. The lengths are needed on the CPU."""
        # Packed, as one direction begins at the end.
        packed = pack_padded_sequence(self.embedding(inputs), lengths.cpu())
        _, (_, cells) = recur(self.reader, packed)
        return self.code(cells.transpose(0, 1).flatten(1))

    def decode(self, inputs: Tensor, codes: Tensor) -> Tensor:
        """[T, B] tokens before each, codes [B, Z] -> logits [T, B, V]."""
        return self._write(inputs, self._begin(codes))[0]

    def discriminate(self, codes: Tensor) -> Tensor:
        """[B, Z] -> logits [B] of being a draw of the normal."""
        return self.discriminator(codes).squeeze(1)

    @torch.no_grad()
    def sample(self, codes: Tensor, *, length: int = 100, temperature: float = 1.0, key: Key = None) -> Tensor:
        """Sequences of codes [B, Z]: [B, length] uint8, as in ``char_rnn.unroll``. Call it in evaluation mode."""
        return unroll(self._write, self._begin(codes), length=length, temperature=temperature, key=key)

    def _begin(self, codes: Tensor) -> State:
        cells = self.start(codes).expand(self.writer.num_layers, -1, -1).contiguous()
        return torch.zeros_like(cells), cells

    def _write(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        features, state = recur(self.writer, self.embedding(inputs), state)
        return self.output(features), state
