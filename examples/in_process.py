import torch

import mpilsgd
from mpilsgd.train.formats import read_digits


def worker():
    (images, labels), _ = read_digits()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    optimizer = mpilsgd.LSGD(torch.optim.SGD(model.parameters(), lr=0.2), topology := mpilsgd.Topology(), period=8)
    for batch in torch.randint(len(labels), (200, 32), generator=torch.manual_seed(topology.world.rank)):
        inputs, targets = torch.tensor(images)[batch] / 16, torch.tensor(labels)[batch].long()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step(loss=loss)
    return model


models = mpilsgd.in_process(worker, workers=4) if __name__ == "__main__" else []
