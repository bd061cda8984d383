"""What a sceptic tries on a task before believing that it needs long distances.

Simple classifiers look at statistics of pixels, or at small patches wherever they are. They are trained and
tested like any network.
"""
import torch
import torch.nn.functional as F
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import nn

from mamba2d.evidence import normalise, right_answers


class PatchBag(nn.Module):
    "A network that sees patches of 11 × 11 pixels, one by one, and averages what it makes of them."

    def __init__(self, num_classes, width=16):
        super().__init__()
        layers = []
        for k in range(5):  # each adds two pixels to the patch
            layers += [nn.Conv2d(1 if k == 0 else width, width, 3), nn.GELU()]
        self.patches = nn.Sequential(*layers, nn.Conv2d(width, 4 * width, 1), nn.GELU())
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images):
        images = F.pad(images, (5, 5, 5, 5), value=float(images.amin()))
        return self.head(self.patches(images).mean((2, 3)))


def train_patch_bag(train, test, steps=200, batch_size=32, seed=0):
    "The accuracy on `test` of a `PatchBag` trained on `train`."
    torch.manual_seed(seed)
    device = train.images.device
    model = PatchBag(train.num_classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        batch = torch.randint(len(train.labels), (batch_size,), device=device)
        loss = F.cross_entropy(model(normalise(train.images[batch], train)), train.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return right_answers(model, test, 250).float().mean().item()


def pixel_statistics(images):
    "Histogram, moments, sums of rows and of columns of images (n, 1, size, size): (n, features)."
    pixels = images[:, 0].double() / 255
    in_bins = [(pixels >= k / 8) & (pixels < (k + 1) / 8) for k in range(8)]
    histogram = torch.stack([in_bin.double().mean((1, 2)) for in_bin in in_bins], 1)
    moments = torch.stack([pixels.mean((1, 2)), pixels.square().mean((1, 2))], 1)
    return torch.cat([histogram, moments, pixels.mean(1), pixels.mean(2)], 1).numpy()


def statistics_score(train, test, features=pixel_statistics):
    "The accuracy on `test` of boosted trees on pixel statistics of `train`."
    model = HistGradientBoostingClassifier(max_iter=80, max_depth=3, random_state=0)
    model.fit(features(train.images), train.labels)
    return model.score(features(test.images), test.labels)
