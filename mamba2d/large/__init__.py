"""Images larger than the memory: scans and networks by tiles, maps in files, several processes."""
from .arrays import create_map, open_map, Window
from .tiles import scan_in_tiles, scan_tile, Tile, tile_grid
from .network import block_tile, features_in_tiles, TiledFeatures
from .processes import pipeline_speedup, split_mixer, split_scan
from .dense import segment_in_tiles

__all__ = [
    "block_tile", "create_map", "features_in_tiles", "open_map", "pipeline_speedup",
    "scan_in_tiles", "scan_tile", "segment_in_tiles", "split_mixer", "split_scan", "Tile",
    "tile_grid", "TiledFeatures", "Window",
]
