"""Reproducible weights for the published detection and segmentation networks, from names alone.

Extends `parity.seeded` (the rule for the backbone) to the names of necks and heads. `names_*.json` hold the
shape of every parameter and buffer. Names in `gains` get the seeded value times the gain, so that scores
differ enough to be compared.
"""
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from parity.seeded import generator
from parity.seeded import seeded_tensor as seeded_backbone_tensor

here = Path(__file__).parent

gains = {
    "rpn_head.rpn_cls.weight": 2.0,
    "rpn_head.rpn_reg.weight": 0.5,
    "roi_head.bbox_head.fc_cls.weight": 4.0,
    "roi_head.bbox_head.fc_reg.weight": 2.0,
    "roi_head.mask_head.conv_logits.weight": 40.0,
    "decode_head.conv_seg.weight": 4.0,
    "auxiliary_head.conv_seg.weight": 4.0,
}


def seeded_tensor(name, shape):
    "One parameter or buffer of a network."
    *_, parent, leaf = "", *name.split(".")
    noise = generator(zlib.crc32(name.encode())).standard_normal(shape)
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if leaf == "running_mean":
        return torch.tensor(0.2 * noise, dtype=torch.float32)
    if leaf == "running_var":
        return torch.tensor(np.exp(0.3 * noise), dtype=torch.float32)
    if leaf == "weight" and parent in ("bn", "gn"):
        return torch.tensor(1 + 0.1 * noise, dtype=torch.float32)
    return seeded_backbone_tensor(name, shape) * gains.get(name, 1.0)


def published_shapes(network):
    'The shapes by published name of a network, such as "maskrcnn_m2d_n" or "upernet_m2d_t".'
    return json.loads((here / f"names_{network}.json").read_text())


def seeded_state_dict(network):
    'The state dict under the published names of a network, such as "maskrcnn_m2d_n".'
    return {name: seeded_tensor(name, tuple(shape)) for name, shape in published_shapes(network).items()}


def seeded_input(shape, seed):
    "A batch of images, already normalised."
    return torch.tensor(generator(int(seed)).standard_normal(tuple(shape)), dtype=torch.float32)
