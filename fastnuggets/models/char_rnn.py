"""A recurrent network that writes SMILES a character at a time, and how all such networks are trained and asked.

The baseline of M. Segler et al., ACS Cent. Sci. 2018, doi:10.1021/acscentsci.7b00512, with the sizes of the MOSES
benchmark, D. Polykovskiy et al., Front. Pharmacol. 2020, doi:10.3389/fphar.2020.565644.

Sequences are time-major, [T, B] int64, and padded. Padding lies behind a sequence, where a network that reads forwards
has given all its answers, and changes no loss. Batches of about equal lengths, so padded, train two LSTM layers of 256
on one CPU core with 8.5 thousand characters of PubChem a second; random batches, packed, as MOSES has them, with 2.7.
Token 0 begins every sequence and token 1 ends it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnuggets import ops
from fastnuggets.ops.sample import Key

BEGIN, END = 0, 1
IGNORED = -100  # the target of padding

# Tensors whose second axis is the batch.
State = tuple[Tensor, ...]


class CharRNN(nn.Module):
    """Tokens so far -> logits of the next one: embedding, LSTM layers with dropout between them, linear.

    Args:
        tokens: V, size of the vocabulary, which is the embedding's size too.
        hidden, layers, dropout: of the LSTM.
    """

    def __init__(self, tokens: int, *, hidden: int = 768, layers: int = 3, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, tokens)
        self.rnn = nn.LSTM(tokens, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.output = nn.Linear(hidden, tokens)

    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """[T, B] tokens -> logits [T, B, V] and the state after them; without a state, from the beginning."""
        features, state = recur(self.rnn, self.embedding(inputs), state)
        return self.output(features), state

    @torch.no_grad()
    def sample(self, count: int, *, length: int = 100, temperature: float = 1.0, key: Key = None) -> Tensor:
        """[count, length] uint8, as in :func:`unroll`. Call it in evaluation mode."""
        zeros = self.output.weight.new_zeros(self.rnn.num_layers, count, self.rnn.hidden_size)
        return unroll(self.forward, (zeros, zeros), length=length, temperature=temperature, key=key)


def recur(rnn: nn.RNNBase, features: Any, state: Any = None) -> tuple[Any, Any]:
    """rnn(features, state); on the CPU in the type of its weights, whatever autocast says.

    Not every processor has recurrent kernels of half types, and torch does not look.
    """
    if rnn.weight_ih_l0.device.type != "cpu":
        return rnn(features, state)
    dtype = rnn.weight_ih_l0.dtype
    if isinstance(state, tuple):
        state = tuple(part.to(dtype) for part in state)
    elif state is not None:
        state = state.to(dtype)
    with torch.autocast("cpu", enabled=False):
        return rnn(features.to(dtype), state)


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln of the probability of each sequence. logits [T, B, V], targets [T, B], IGNORED behind the end -> [B]."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape).sum(0)


def unroll(
    step: Callable[[Tensor, State], tuple[Tensor, State]],
    state: State,
    *,
    length: int,
    temperature: float = 1.0,
    key: Key = None,
) -> Tensor:
    """Sequences drawn a token at a time, [B, length] uint8, filled up with END.

    Args:
        step: tokens [1, B] and state -> logits [1, B, V] and state.
        state: of the beginning; says B and the device.
        length: a sequence without an END by then is cut there, and has none.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        key: of the noise, as in ``fastnuggets.ops``. A sequence depends on the key and its place in the batch, and not
            on how many others there are, up to the rounding of the network.

    Sequences that have ended are computed no further. Synchronises at each token. Deterministic for a key.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    count, device = state[0].shape[1], state[0].device
    key = ops.noise_key(device, key=key) if temperature > 0 else torch.zeros(2, dtype=torch.int64, device=device)
    onward = torch.tensor([0, 1], device=device)
    drawn = torch.full((count, length), END, dtype=torch.uint8, device=device)
    rows = torch.arange(count, device=device)
    last = torch.full((1, count), BEGIN, device=device)
    for place in range(length if count else 0):
        logits, state = step(last, state)
        scores = logits[0].float()
        if temperature > 0:
            # The largest of logits with Gumbel noise is a draw of their softmax.
            noise = ops.noise("gumbel", (count, scores.shape[1]), dtype=torch.float32, device=device, key=key)
            scores = scores / temperature + noise[rows]
        last = scores.argmax(1)
        drawn[rows, place] = last.to(torch.uint8)
        going = (last != END).nonzero().squeeze(1)
        if len(going) == 0:
            break
        if len(going) < len(rows):
            rows, last = rows[going], last[going]
            state = tuple(part[:, going].contiguous() for part in state)
        last, key = last[None], key + onward
    return drawn
