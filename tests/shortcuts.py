"""What a sceptic tries on a task before believing that it needs long distances.

Simple classifiers look at statistics of pixels, or at small patches wherever they are. They are trained and
tested like any network.
"""
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from sklearn.cluster import MiniBatchKMeans
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
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


class OneConvolution(nn.Sequential):
    "One 5 × 5 convolution, means of squares of 4 × 4 pixels, and a linear readout that knows the places."

    def __init__(self, num_classes, size=64, width=8):
        squares = (size // 4) ** 2
        super().__init__(nn.Conv2d(1, width, 5, padding=2), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(),
                         nn.Linear(width * squares, num_classes))


def train_patch_bag(train, test, steps=200, batch_size=32, seed=0):
    "The accuracy on `test` of a `PatchBag` trained on `train`."
    return train_network(PatchBag, train, test, steps=steps, batch_size=batch_size, seed=seed)


def train_network(kind, train, test, *, steps, batch_size=32, seed=0):
    "The accuracy on `test` of a network trained on `train`: `PatchBag` or `OneConvolution`."
    torch.manual_seed(seed)
    device = train.images.device
    model = kind(train.num_classes).to(device)
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


def sums(images):
    "Sums of rows and of columns (n, 2 · size)."
    pixels = images[:, 0].double() / 255
    return torch.cat([pixels.sum(1), pixels.sum(2)], 1).numpy()


def pooled(images, side=4):
    "Means of squares of pixels, for a linear model: (n, features)."
    return F.avg_pool2d(images.float() / 255, side).flatten(1).numpy()


def raw(images):
    "All pixels (n, size²)."
    return pooled(images, 1)


def covariance(images):
    "Mean, variances and covariance of row and column of the ink: the covariance comes last (n, 6)."
    ink = images[:, 0].double()
    mass = ink.sum((1, 2))
    place = torch.arange(ink.shape[1], dtype=torch.float64) - (ink.shape[1] - 1) / 2
    row, column = (ink.sum(2) @ place) / mass, (ink.sum(1) @ place) / mass
    of_rows = (ink.sum(2) @ place ** 2) / mass - row ** 2
    of_columns = (ink.sum(1) @ place ** 2) / mass - column ** 2
    both = torch.einsum("nhw,h,w->n", ink, place, place) / mass - row * column
    return torch.stack([mass / mass.mean(), row, column, of_rows, of_columns, both], 1).numpy()


def global_numbers(images):
    "Amount and spread of the ink, determinant of its covariance, offset of its center, and all moments."
    mass, row, column, of_rows, of_columns, both = covariance(images).T
    turned = [mass, of_rows + of_columns, of_rows * of_columns - both ** 2, np.hypot(row, column)]
    return np.stack([*turned, row, column, of_rows, of_columns, both], 1)


def dot_places(dots):
    "Distance of two dots (n, 2, 2), their places, their middle and the way between them, signs left out."
    way, middle = (dots[:, 0] - dots[:, 1]).abs(), dots.mean(1)
    about = (middle - middle.mean()).abs()
    return torch.cat([way.norm(dim=1, keepdim=True), way, about, dots.flatten(1)], 1).numpy()


def about_dots(images, dots):
    """Nine moments of the ink, dots painted over, in the frame of the dots: (n, 9).

    Distance, amount, the center along and across (and its distance), and the spreads."""
    ink = images[:, 0].double() * (images[:, 0] < 0.9 * 255)
    place = torch.arange(ink.shape[1], dtype=torch.float64)
    offset = torch.stack(torch.meshgrid(place, place, indexing="ij"), -1) - dots.mean(1)[:, None, None]
    way = dots[:, 1] - dots[:, 0]
    unit = way / way.norm(dim=1, keepdim=True)
    along = torch.einsum("nhwc,nc->nhw", offset, unit)
    across = torch.einsum("nhwc,nc->nhw", offset, torch.stack([-unit[:, 1], unit[:, 0]], 1))
    mass = ink.sum((1, 2))

    def mean(values):
        return (ink * values).sum((1, 2)) / mass
    a, b = mean(along), mean(across)
    spreads = [mean(along ** 2) - a ** 2, mean(across ** 2) - b ** 2, (mean(along * across) - a * b).abs()]
    size = mean(along ** 2 + across ** 2)
    center = [a.abs(), b.abs(), torch.hypot(a, b)]
    return torch.stack([way.norm(dim=1), mass, *center, *spreads, size], 1).numpy()


def on_the_line(images, dots):
    "Ink along the straight line between two dots, three pixels wide, and their distance: a local cue."
    smooth = F.avg_pool2d(images.double(), 3, 1, 1)
    steps = torch.linspace(0.25, 0.75, 15, dtype=torch.float64)[:, None]
    points = (dots[:, :1] + (dots[:, 1:] - dots[:, :1]) * steps).round().long()
    ink = smooth[torch.arange(len(images))[:, None], 0, points[..., 0], points[..., 1]]
    return torch.stack([ink.mean(1), ink.amin(1), (dots[:, 0] - dots[:, 1]).norm(dim=1)], 1).numpy()


def same_component(images, dots, threshold=0):
    "Whether both dots lie in one 8-connected component of the pixels above a threshold: (n,) of 0 and 1."
    same = np.zeros(len(images), dtype=np.int64)
    for k, (image, places) in enumerate(zip(images[:, 0].numpy(), dots.round().long().numpy(), strict=True)):
        components, _ = ndimage.label(image > threshold, np.ones((3, 3)))
        one, other = components[places[:, 0], places[:, 1]]
        same[k] = one == other
    return same


def patch_words(images, side=9, words=100, patches=20000, seed=0):
    "A dictionary of patches (words, 1, side, side) from k-means on patches with ink."
    rng = np.random.default_rng(seed)
    corners = rng.integers(images.shape[-1] - side + 1, size=(4 * patches, 2))
    which = rng.integers(len(images), size=4 * patches)
    inside = np.arange(side)
    rows, columns = corners[:, :1] + inside, corners[:, 1:] + inside
    found = images[:, 0].numpy()[which[:, None, None], rows[:, :, None], columns[:, None]] / 255
    found = found.reshape(len(found), -1)
    found = found[found.sum(1) > 0.5][:patches]
    means = MiniBatchKMeans(words, n_init=1, batch_size=2048, random_state=seed).fit(found)
    return torch.from_numpy(means.cluster_centers_).float().view(words, 1, side, side)


def bag_of_words(images, dictionary):
    "How often each patch of a dictionary is the nearest one, over all patches with ink: (n, words)."
    offset = dictionary.square().sum((1, 2, 3)) / 2
    ones = torch.ones_like(dictionary[:1])
    counts = []
    for part in images.split(100):
        part = part.float() / 255
        nearest = F.conv2d(part, dictionary, -offset).argmax(1).flatten(1)
        inked = (F.conv2d(part, ones) > 0.5).flatten(1).float()
        counts.append(torch.zeros(len(part), len(dictionary)).scatter_add_(1, nearest, inked))
    return torch.cat(counts).numpy()


def crosses_at(places, size, side=4):
    "How many crosses (n, marks, 2) lie in each square of the image: (n, squares)."
    cells = -(-size // side)
    found = np.zeros((len(places), cells, cells))
    for place in places.transpose(1, 0, 2):
        found[np.arange(len(places)), place[:, 0] // side, place[:, 1] // side] += 1
    return found.reshape(len(places), -1)


def trees_score(train, test):
    "The accuracy of boosted trees: train and test are (features, labels)."
    model = HistGradientBoostingClassifier(max_iter=80, max_depth=3, random_state=0).fit(*train)
    return model.score(*test)


def linear_score(train, test):
    "The accuracy of a logistic regression: train and test are (features, labels)."
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=100)).fit(*train)
    return model.score(*test)
