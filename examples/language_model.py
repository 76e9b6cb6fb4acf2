"""A small GPT that learns to write Python's documentation, character by character.

mpiexec -n 4 python -m mpi4py examples/language_model.py [STEPS]
"""

import math
import sys
from pydoc_data.topics import topics

import torch
from torch import nn

import mpilsgd

CONTEXT, BATCH, WIDTH = 32, 16, 64  # characters that it looks back on, texts a batch, numbers a character

text = "\n".join(topics.values())
letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
data = torch.tensor([letters[letter] for letter in text[:200_000]])
train, test = data[:180_000], data[180_000:]


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(len(letters), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, len(letters))

    def forward(self, x):
        hidden = self.token(x) + self.place.weight[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.blocks(hidden, mask, is_causal=True))


def bits(model, source, places):
    """The mean bits that the model needs for each character of the texts that begin there."""
    texts = torch.stack([source[i : i + CONTEXT + 1] for i in places])
    scores = model(texts[:, :-1])
    return nn.functional.cross_entropy(scores.flatten(0, 1), texts[:, 1:].flatten()) / math.log(2)


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
topo = mpilsgd.Topology()
torch.manual_seed(topo.world.rank)  # each rank reads other places
model = GPT()
opt = mpilsgd.LocalSGD(torch.optim.AdamW(model.parameters(), lr=1e-2), topo, period=16)
for _ in range(steps):
    opt.zero_grad()
    loss = bits(model, train, torch.randint(len(train) - CONTEXT, (BATCH,)))
    loss.backward()
    opt.step(loss=loss)
with opt.center(), torch.no_grad():
    if topo.world.rank == 0:
        print(f"{bits(model, test, range(0, 6400, CONTEXT)):.2f} bits a character")
