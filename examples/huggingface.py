"""HuggingFace's Trainer: each rank has one of its own, and the method keeps the ranks together.

pip install transformers accelerate; mpiexec -n 4 python -m mpi4py examples/huggingface.py [STEPS]
"""

import math
import os
import sys
import tempfile
from collections import deque
from pydoc_data.topics import topics

import torch

import mpilsgd

topo = mpilsgd.Topology()  # starts MPI, which has read the launcher's variables now
rank, size = topo.world.rank, topo.world.size
for name in [name for name in os.environ if name.startswith(("PMI", "OMPI_", "MPI_", "MV2_", "SLURM_"))]:
    del os.environ[name]  # accelerate would take them for its own, and start torch.distributed

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments  # noqa: E402

text = "\n".join(topics.values())[:100_000]
letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
data = torch.tensor([letters[letter] for letter in text]).split(64)[:-1]
mine = [{"input_ids": one, "labels": one} for one in data[rank::size]]  # this rank's part

torch.manual_seed(0)
size_of = {"vocab_size": len(letters), "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
config = GPT2Config(**size_of, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
losses = deque(maxlen=10)


class Scored(Trainer):
    def training_step(self, *arguments, **options):
        loss = super().training_step(*arguments, **options)
        losses.append(float(loss))
        return loss


opt = mpilsgd.LSGD(  # the Trainer calls step() without a loss, so the score is given
    torch.optim.AdamW(model.parameters(), lr=2e-3), topo, period=8, score=lambda: sum(losses) / len(losses)
)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=int(sys.argv[1]) if len(sys.argv) > 1 else 60,
    per_device_train_batch_size=16,
    use_cpu=True,
    save_strategy="no",
    report_to="none",
    disable_tqdm=rank > 0,
)
Scored(model=model, args=arguments, train_dataset=mine, optimizers=(opt, None)).train()
with opt.center():
    if rank == 0:
        print(f"{sum(losses) / len(losses):.2f} nats a character; to begin with {math.log(len(letters)):.2f}")
        model.save_pretrained("model")
