"""A good call of each public function, and what the functions that are not called have for a reason."""

import importlib
import types
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

packages = ("scan", "models", "data", "training", "viz")

# Public names that are not called, by the reason.
left_out = {
    "it is a constant, an error, or a record of what another function returns": """
        KernelError builders control_mixers mixers test_scales unseen_shapes canvas_mean canvas_std
        compile_options no_class task_names dashboards recipes ExampleImages CorruptImageError RankZeroError
        IncompatibleRunError RunLockedError StopRequestedError FileCheck ScanInputs HiddenStates
        DecayCurves Influence Canvases Pathfinder Scene TaskSet ImageList Evaluation DenseEvaluation
        DigitScenes Mamba2D_N_Weights Mamba2D_S_Weights Mamba2D_T_Weights Mamba2D_T_V1_Weights
        MaskRCNN_M2D_N_Weights MaskRCNN_M2D_S_Weights MaskRCNN_M2D_T_Weights UPerNet_M2D_N_Weights
        UPerNet_M2D_S_Weights UPerNet_M2D_T_Weights
    """,
    "it takes no argument": """
        available_backends cpu_kernel_status cuda_kernel_status fvcore_handles scan_decompositions
        scan_translations example_names StarReLU Detection RunProgressCallback
    """,
    "it is a layer, whose arguments come from the network that has it": """
        Attention AuxiliaryHead Block Classifier DeltaProjection Downsample GatedConv M2DMixer MLP
        PyramidPooling SelectiveScan SeparableConv SequenceMixer SequenceScan Stage UPerHead
        WithLocalPath
    """,
    "it is a callback or a part that a learner or a loader makes": """
        CheckpointCallback DashboardCallback DenseCallback DenseLearner DenseLoss FollowRecipeCallback
        PrepareModelCallback RecordEpochsCallback TensorBoard WeightsAndBiases DetectionDL
        SegmentationDL KeyedDL DetectionScenes SegmentationScenes DetectionData SegmentationData
        DetectionMetrics SegmentationMetrics Segmentation SegmentationByViews Distributed
    """,
    "a call takes seconds; its own notebook tries it": """
        check_file export_model save_onnx save_package save_pt2 mamba2d_s mamba2d_t mamba2d_t_v1
        mask_rcnn_m2d_n mask_rcnn_m2d_s mask_rcnn_m2d_t upernet_m2d_n upernet_m2d_s upernet_m2d_t
        MaskRCNN mask_rcnn_names upernet_names animate_wavefront StateExplorer ExplorerFigure train_run
        accuracies mamba2d_learner detection_learner segmentation_learner evaluate_dense plot_dense
        plot_predictions write_evaluation canvas_dls digits_dls imagenet_dls images_dl detection_dls
        segmentation_dls check_images check_masks pathfinder_images pathfinder_twins find_detection
        find_segmentation trainable make_detection_tree make_segmentation_tree evaluate
        predict segment sliding_logits
        example example_images
    """,
    "the fuzzer of weights, images or run folders tries it": """
        load_published read_weights open_image load_checkpoint plot_curves
    """,
    "it takes what another library returns, and tests/integrations tries it": "count_scans",
    "it draws what another function has checked": """
        mark_pixel draw_architecture plot_composite plot_confusion
    """,
}

# Arguments that are refused, but by an error of Python or PyTorch that does not name them. `make fuzz` fails
# where an entry no longer holds: whoever names the argument takes it out.
known = {
    "find_images": "path",  # what lies in the folder is wrong: the errors call it data, as the commands do
    "random_problem": "delta_range device optional seed shape strided",
    "scan_flops": "backward shape skip states",
}

# Arguments that say how often something is done: a huge one takes long, as it was asked for.
repetitions = {"effective_receptive_field": "probes"}


@dataclass
class Call:
    "A public function, and how to make good arguments of it by name."

    name: str
    function: object
    arguments: object


def tiny_network(**changes):
    from mamba2d.models import Mamba2D

    torch.manual_seed(0)
    options = dict(depths=(2, 1), dims=(8, 32), mixers=("m2d", "attention"), num_classes=3)
    return Mamba2D(**(options | changes)).eval()


def make_things(folder):
    "What good arguments are made of."
    from mamba2d.data import make_image_tree
    from mamba2d.models import UPerNet
    from mamba2d.viz import hidden_states

    things = types.SimpleNamespace(folder=folder, model=tiny_network())
    things.image = torch.rand(3, 32, 32)
    things.states = hidden_states(things.model, things.image)
    things.pyramid = tiny_network(
        depths=(1, 1, 1, 1), dims=(8, 8, 8, 32), mixers=("m2d",) * 3 + ("attention",)
    )
    things.segmenter = UPerNet(things.pyramid.features(), 3, channels=8, aux_channels=8)
    things.tree = make_image_tree(folder / "tree", 2, 2, 1, (16, 12))
    things.mask = folder / "mask.png"
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(things.mask)
    return things


def problem(things):
    from mamba2d.scan import random_problem

    return random_problem((2, 4, 3, 2, 2), dtype=torch.float32, requires_grad=False)


def pixel_call(things):
    "Arguments of the scan of one pixel."
    pixel = {name: value[:, 0, 0] if value.ndim == 4 else value for name, value in problem(things).items()}
    return {**pixel, "delta_softplus": True}


def scan_call(things):
    return {**problem(things), "delta_softplus": True, "reverse": False, "return_states": False}


def of_scan(things):
    return {
        "random_problem": lambda t: dict(
            shape=(2, 4, 3, 2, 2),
            seed=0,
            dtype=torch.float32,
            device="cpu",
            strided=False,
            optional=True,
            delta_range=(0.001, 0.3),
        ),
        "scan_backend": lambda t: dict(name="reference"),
        "scan_flops": lambda t: dict(shape=(1, 4, 4, 2), states=2, skip=True, backward=False),
        "scan_step": pixel_call,
        "selective_scan_2d": scan_call,
        "selective_scan_2d_naive": scan_call,
        "selective_scan_2d_ref": scan_call,
    }


def of_models(things):
    from mamba2d.models import count_parameters

    network = dict(depths=(1, 1), dims=(8, 32), mixers=("m2d", "attention"), num_classes=3, in_channels=3)
    return {
        "Mamba2D": lambda t: dict(network, drop_path=0.1, head_dropout=0.1),
        "mamba2d_n": lambda t: dict(
            weights=None, num_classes=3, in_channels=3, drop_path=0.1, head_dropout=0.1
        ),
        "add_local_paths": lambda t: dict(model=tiny_network()),
        "count_parameters": lambda t: dict(model=t.model),
        "example_about": lambda t: dict(task="canvases", mixer="m2d"),
        "features": lambda t: dict(model_or_name=t.pyramid, out_indices=(0, 1, 2, 3), frozen_stages=1),
        "FeaturePyramid": lambda t: dict(model=t.pyramid, out_indices=(0, 2), frozen_stages=0),
        "layer_decay_groups": lambda t: dict(model=t.model, lr=1e-3, layer_decay=0.75, weight_decay=0.05),
        "match_parameters": lambda t: dict(
            model=tiny_network(), parameters=count_parameters(t.model) + 3000
        ),
        "paste_masks": lambda t: dict(
            masks=torch.rand(2, 1, 4, 4),
            size=(20, 30),
            boxes=torch.tensor([[1.0, 2.0, 9.0, 9.0], [0.0, 0.0, 30.0, 20.0]]),
        ),
        "published_names": lambda t: dict(model=t.model),
        "published_state_dict": lambda t: dict(model=t.model),
        "SegmentationTransforms": lambda t: dict(short=32, long=64),
        "set_mlp_width": lambda t: dict(model=tiny_network(), width=16),
        "upernet_loss": lambda t: dict(
            outputs={"out": torch.rand(1, 3, 8, 8), "aux": torch.rand(1, 3, 8, 8)},
            masks=torch.zeros(1, 8, 8, dtype=torch.int64),
        ),
        "upernet_losses": lambda t: dict(
            outputs={"out": torch.rand(1, 3, 8, 8), "aux": torch.rand(1, 3, 8, 8)},
            masks=torch.zeros(1, 8, 8, dtype=torch.int64),
            average="all",
            aux_weight=0.4,
            ignore_index=255,
        ),
        "UPerNet": lambda t: dict(
            backbone=t.pyramid.features(),
            num_classes=3,
            channels=8,
            aux_channels=8,
            aux_loss=True,
            dropout=0.1,
        ),
    }


def of_data(things):
    return {
        "Augmentation": lambda t: dict(min_scale=0.08, flip=0.5, randaugment=2, magnitude=9, erasing=0.25),
        "CropBetween": lambda t: dict(low=8, high=16),
        "CropMixed": lambda t: dict(side=16, most=0.75),
        "detection_transforms": lambda t: dict(schedule="1x", size=(64, 96)),
        "digit_canvases": lambda t: dict(count=2, seed=0, held_out=False, size=96, digits=2, gap=28),
        "digit_images": lambda t: dict(size=32),
        "digit_scenes": lambda t: dict(count=2, size=96, seed=0, held_out=False, digits=(0, 1), most=2),
        "evaluation_transforms": lambda t: dict(size=32),
        "find_images": lambda t: dict(
            path=t.tree, valid_pct=0.2, split_seed=42, labels=None, evaluate=False
        ),
        "list_images": lambda t: dict(paths=[t.tree]),
        "make_image_tree": lambda t: dict(
            path=t.folder / "made",
            classes=2,
            per_class=1,
            valid_per_class=1,
            size=(8, 6),
            layout="parts",
            quality=95,
            seed=0,
        ),
        "mix_pairs": lambda t: dict(
            images=torch.rand(4, 3, 8, 8),
            targets=torch.tensor([0, 1, 2, 0]),
            classes=3,
            seed=0,
            epoch=0,
            position=0,
            mixup=0.8,
            cutmix=1.0,
            switch=0.5,
        ),
        "cross_pairs": lambda t: dict(count=1, seed=0, size=64, reach=16, rings=3),
        "permutation_signs": lambda t: dict(count=1, seed=0, size=64, marks=3, rings=6, chain=False),
        "PhotometricDistortion": lambda t: dict(
            brightness=32, contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=18
        ),
        "read_mask": lambda t: dict(file=t.mask, classes=3, reduce_zero_label=False),
        "ResizeByRatio": lambda t: dict(short=16, long=32, low=0.5, high=2.0),
        "ResizeToFit": lambda t: dict(short=(16,), long=32),
        "segmentation_transforms": lambda t: dict(side=32),
        "task_set": lambda t: dict(name="textures", part="train", count=2, size=64),
        "textures": lambda t: dict(count=2, seed=0, size=64, majority=0.3, noise=0.5),
    }


def of_training(things):
    from mamba2d.training import Recipe

    logits = torch.rand(3, 16, 16)
    return {
        "ablate_scan": lambda t: dict(model=t.model),
        "draw_detections": lambda t: dict(
            image=logits,
            threshold=0.5,
            categories=["a", "b"],
            objects={
                "boxes": torch.tensor([[1.0, 1.0, 9.0, 9.0]]),
                "labels": torch.tensor([1]),
                "scores": torch.tensor([0.9]),
            },
        ),
        "draw_label_map": lambda t: dict(
            image=logits, label_map=torch.zeros(16, 16, dtype=torch.int64), categories=["a", "b"], alpha=0.6
        ),
        "export_weights": lambda t: dict(
            tensors=t.model.state_dict(), config={"size": "n"}, folder=t.folder
        ),
        "layer_groups": lambda t: dict(model=t.model, weight_decay=0.05),
        "Recipe": lambda t: dict(
            epochs=2,
            lr=1e-3,
            warmup=0.05,
            min_lr=1e-6,
            seed=0,
            schedule=None,
            ema=0.9,
            mixup=0.8,
            cutmix=1.0,
            clip_grad=1.0,
            effective_batch=64,
            drop_path=0.1,
        ),
        "recipe_schedule": lambda t: dict(recipe=Recipe(epochs=2), steps=10),
    }


def of_viz(things):
    pixel = (2, 3)
    return {
        "carried": lambda t: dict(states=t.states, pixel=pixel, channel=1, order="wavefront"),
        "decay_curves": lambda t: dict(response=torch.rand(8, 8), pixel=pixel, reverse=False),
        "decay_length": lambda t: dict(curve=torch.rand(8)),
        "draw_map": lambda t: dict(
            values=torch.rand(4, 4), image_size=(16, 16), title="a", label="b", log=False, limit=None
        ),
        "effective_receptive_field": lambda t: dict(
            model=t.model, images=t.image[None].clone(), stage=-1, blocks=None, pixel=None, probes=1, seed=0
        ),
        "field_radius": lambda t: dict(field=torch.rand(8, 8), fraction=0.5, centre=(3.0, 4.0)),
        "grad_cam": lambda t: dict(model=t.model, image=t.image.clone(), target=1, stage=0),
        "hidden_states": lambda t: dict(
            model=t.model, image=t.image.clone(), stage=0, block=0, scan=0, reverse=None
        ),
        "image_to_rgb": lambda t: dict(image=torch.rand(3, 8, 8)),
        "impulse_map": lambda t: dict(
            states=t.states,
            pixel=pixel,
            channel=1,
            state=0,
            of="state",
            meaning="detached gates",
            order="wavefront",
        ),
        "influence_map": lambda t: dict(
            states=t.states,
            pixel=pixel,
            channel=1,
            state=0,
            of="state",
            meaning="detached gates",
            order="wavefront",
        ),
        "load_image": lambda t: dict(
            image=np.zeros((8, 8, 3), np.uint8), channels=3, size=16, mean=0.5, std=0.2
        ),
        "local_decay_length": lambda t: dict(gate_t=torch.rand(4, 4, 2, 2), gate_l=torch.rand(4, 4, 2, 2)),
        "plot_decay": lambda t: dict(states=t.states, pixel=pixel, channel=1, state=0),
        "plot_gates": lambda t: dict(states=t.states, channel=1, state=0, image=None),
        "plot_grad_cam": lambda t: dict(model=t.model, image=t.image.clone(), target=1, stage=0),
        "plot_influence": lambda t: dict(states=t.states, pixel=pixel, channel=1, state=0, of="state"),
        "plot_receptive_fields": lambda t: dict(
            fields={"a": torch.rand(8, 8)}, centre=(3.0, 4.0), fraction=0.5
        ),
        "plot_states": lambda t: dict(states=t.states, channels=[0, 1], which=(0, 5), image=None),
        "reshape_transform": lambda t: dict(features=torch.rand(1, 4, 8, 8)),
        "scanning_mixers": lambda t: dict(model=t.model),
        "state_composite": lambda t: dict(h=torch.rand(4, 4, 2, 3), clip=0.01),
        "varied_channels": lambda t: dict(h=torch.rand(4, 4, 6, 3), count=2),
    }


def good_calls(things):
    "A call of every function that is not left out."
    calls = []
    for package, make in zip(packages, (of_scan, of_models, of_data, of_training, of_viz), strict=True):
        module = importlib.import_module(f"mamba2d.{package}")
        calls += [Call(name, getattr(module, name), arguments) for name, arguments in make(things).items()]
    return calls


def names_without_a_call(things):
    "Public names that have neither a call nor a reason, and names of both lists that are not public."
    public = {
        name for package in packages for name in importlib.import_module(f"mamba2d.{package}").__all__
    }
    called = {call.name for call in good_calls(things)}
    reasons = {name for names in left_out.values() for name in names.split()}
    return sorted(public - called - reasons), sorted((called | reasons) - public), sorted(called & reasons)
