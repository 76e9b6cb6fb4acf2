import torch

import mpilsgd

topo = mpilsgd.Topology()  # all ranks that mpiexec has started
rank, size = topo.world.rank, topo.world.size

torch.manual_seed(0)  # every rank makes the same data
x = torch.randn(12_000, 2)
y = (x.norm(dim=1) > 1.18).long()  # is the point outside a circle?
mine = torch.utils.data.TensorDataset(x[rank:10_000:size], y[rank:10_000:size])  # this rank's part

model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
opt = mpilsgd.LSGD(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), topo, pull=0.1, period=10)
for _ in range(10):  # epochs
    for inputs, targets in torch.utils.data.DataLoader(mine, batch_size=50, shuffle=True):
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        opt.step(loss=loss)  # a local step; after every 10th, a pull to the leader
with opt.center():  # all ranks enter, equally often; inside, the model holds the centre
    if rank == 0:
        print(f"test error {100 * (model(x[10_000:]).argmax(1) != y[10_000:]).float().mean():.1f} %")
        torch.save(model.state_dict(), "model.pt")  # plain torch loads it
