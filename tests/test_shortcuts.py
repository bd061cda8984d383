"""A sceptic's checks of the tasks.

Whoever looks at small patches or at statistics of pixels must be at chance where a task is said to need long
distances, and be good where a task is said to need none.
"""
import pytest
import torch
from shortcuts import statistics_score, train_patch_bag

from mamba2d.data.pathfinder import pathfinder_images
from mamba2d.data.tasks import TaskSet, task_set
from mamba2d.evidence import grid_tasks

count = 2000
chance = 0.5 + 4 * 0.5 / count ** 0.5  # four standard deviations of coin tosses
quick_steps = 80  # of the bag of patches, enough to find a shortcut that is planted


def sets(name, **options):
    return [task_set(name, part, count, 32, **options) for part in ("train", "test")]


@pytest.fixture(scope="module")
def pathfinder():
    return sets("pathfinder", length=6)


@pytest.fixture(scope="module")
def signs():
    return sets("signs", marks=2, rings=2)


@pytest.mark.parametrize("task", ["pathfinder", "signs"])
def test_pixel_statistics_are_at_chance(task, request):
    assert statistics_score(*request.getfixturevalue(task)) < chance


@pytest.mark.parametrize("task", ["pathfinder", "signs"])
def test_bag_of_patches_is_at_chance(task, request):
    assert train_patch_bag(*request.getfixturevalue(task), steps=quick_steps) < chance


def test_bag_of_patches_finds_a_planted_shortcut(signs):
    "In as many steps it would see one: here images of one label have a white block."
    planted = []
    for part in signs:
        images = part.images.clone()
        images[part.labels == 1, :, 2:5, 2:5] = 255
        planted.append(part._replace(images=images))
    assert train_patch_bag(*planted, steps=quick_steps) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pathfinder", "signs"])
def test_bag_of_patches_is_at_chance_after_more_steps(task, request):
    assert train_patch_bag(*request.getfixturevalue(task)) < chance


@pytest.mark.slow
def test_bag_of_patches_solves_the_textures():
    assert train_patch_bag(*sets("textures", majority=0.5, noise=0.2)) > 0.6  # chance is 0.25


@pytest.mark.slow
@pytest.mark.parametrize("task", grid_tasks)
def test_no_image_of_the_grid_is_in_two_parts(task):
    "The sets that the networks of the comparison were trained, tuned and tested on."
    sizes = {"train": 20000, "valid": 2000, "test": 4000}
    options = dict(grid_tasks[task].get("options", ()))
    seen = [{image.numpy().tobytes() for image in task_set(task, part, count, **options).images}
            for part, count in sizes.items()]
    assert [len(images) for images in seen] == list(sizes.values())
    assert len(set.union(*seen)) == sum(sizes.values())


def test_dots_without_contours_are_at_chance():
    parts = [pathfinder_images(count, seed, 32, 6, contours=False) for seed in (1, 3)]
    train, test = (TaskSet(part.images, part.labels, 2, 0.05, 0.16) for part in parts)

    def places(images):
        "Row and column of all pixels of the dots, sorted: where the dots are."
        rows, columns = (images[:, 0] / 255).sum(2), (images[:, 0] / 255).sum(1)
        return torch.cat([rows, columns], 1).numpy()
    assert statistics_score(train, test, places) < chance


@pytest.mark.parametrize("task", ["pathfinder", "signs"])
def test_no_image_is_in_training_and_test(task, request):
    parts = request.getfixturevalue(task)
    train, test = ({image.numpy().tobytes() for image in part.images} for part in parts)
    assert len(train) == len(test) == count and not train & test


@pytest.mark.parametrize("task", ["pathfinder", "signs"])
def test_labels_are_balanced(task, request):
    for part in request.getfixturevalue(task):
        assert abs(part.labels.double().mean() - 0.5) < chance - 0.5
