import torch

import mpilsgd
from mpilsgd.train.formats import read_digits


def worker():
    (images, labels), _ = (tuple(map(torch.from_numpy, part)) for part in read_digits())
    topology = mpilsgd.Topology()
    torch.manual_seed(topology.world.rank)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    optimizer = mpilsgd.LSGD(torch.optim.SGD(model.parameters(), lr=0.2), topology, period=8)
    for _ in range(200):
        batch = torch.randint(len(labels), (32,))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[batch] / 16), labels[batch].long())
        loss.backward()
        optimizer.step(loss=loss)
    return model


if __name__ == "__main__":
    models = mpilsgd.in_process(worker, workers=4)
