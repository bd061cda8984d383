"""Hidden states, influence, decay and receptive fields: as tensors, as figures, and to click on."""
from .states import (
    carried, decay_curves, decay_length, DecayCurves, effective_receptive_field, field_radius,
    hidden_states, HiddenStates, impulse_map, Influence, influence_map, local_decay_length,
    scanning_mixers, state_composite,
)
from .plots import (
    animate_wavefront, draw_architecture, draw_map, image_to_rgb, mark_pixel, plot_composite,
    plot_decay, plot_gates, plot_influence, plot_receptive_fields, plot_states, varied_channels,
)
from .gradcam import grad_cam, plot_grad_cam, reshape_transform
from .explorer import ExplorerFigure, load_image, StateExplorer

__all__ = [
    "animate_wavefront", "carried", "decay_curves", "decay_length", "DecayCurves",
    "draw_architecture", "draw_map", "effective_receptive_field", "ExplorerFigure", "field_radius",
    "grad_cam", "hidden_states", "HiddenStates", "image_to_rgb", "impulse_map", "Influence",
    "influence_map", "load_image", "local_decay_length", "mark_pixel", "plot_composite", "plot_decay",
    "plot_gates", "plot_grad_cam", "plot_influence", "plot_receptive_fields", "plot_states",
    "reshape_transform", "scanning_mixers", "state_composite", "StateExplorer", "varied_channels",
]
