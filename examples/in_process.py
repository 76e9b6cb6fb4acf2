import torch

import mpilsgd
from mpilsgd.train.formats import read_digits


def worker():
    torch.manual_seed((topology := mpilsgd.Topology()).world.rank)
    images, labels = map(torch.tensor, read_digits()[0])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    optimizer = mpilsgd.LSGD(torch.optim.SGD(model.parameters(), lr=0.2), topology, period=8)
    for batch in torch.randint(len(labels), (200, 32)):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[batch] / 16), labels[batch].long())
        loss.backward()
        optimizer.step(loss=loss)
    return model


for model in mpilsgd.in_process(worker, workers=4) if __name__ == "__main__" else []:
    print(model[1].bias)
