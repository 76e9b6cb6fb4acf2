"""Lightning: each rank has a Trainer of its own, and the method keeps the ranks together.

pip install lightning; mpiexec -n 4 python -m mpi4py examples/lightning_module.py
"""

import lightning
import torch

import mpilsgd

topo = mpilsgd.Topology()
rank, size = topo.world.rank, topo.world.size
torch.manual_seed(0)
x = torch.randn(5000, 2)
y = (x.norm(dim=1) > 1.18).long()


class Circle(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))

    def training_step(self, batch, index):
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self):  # Lightning steps with a closure, so LSGD gets the loss by itself
        self.opt = mpilsgd.LSGD(torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9), topo, period=10)
        return self.opt

    def on_train_end(self):
        with self.opt.center(), torch.no_grad():  # every rank comes here
            self.error = (self.net(x[4000:]).argmax(1) != y[4000:]).float().mean()


mine = torch.utils.data.TensorDataset(x[rank:4000:size], y[rank:4000:size])
model = Circle()
trainer = lightning.Trainer(
    max_epochs=8,
    accelerator="cpu",
    devices=1,  # one for each rank: the ranks are not Lightning's
    strategy="auto",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, torch.utils.data.DataLoader(mine, batch_size=50, shuffle=True))
if rank == 0:
    print(f"test error {100 * model.error:.1f} %")
