"""Images larger than the memory: scans and networks by tiles, maps in files, several processes."""
from .arrays import create_map, open_map, Window
from .tiles import scan_in_tiles, scan_tile, Tile, tile_grid

__all__ = [
    "create_map", "open_map", "scan_in_tiles", "scan_tile", "Tile", "tile_grid", "Window",
]
