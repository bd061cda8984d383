"""Scans by tiles that are killed and resume, whose memory is bounded, and over two processes."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import one_thread, run_program, run_twice

from mamba2d.large import create_map, open_map, scan_in_tiles
from mamba2d.models.blocks import SelectiveScan

in_child = {**os.environ, **one_thread}


# The arguments: the folder, where to die ("write": the pixels are written and the borders are not; "put": the
# borders are written and old ones not yet deleted; "never"), and at which tile.
scanning = """
import os, signal, sys
import torch
from mamba2d.large import scan_in_tiles, tiles
from mamba2d.models.blocks import SelectiveScan

folder, where, when = sys.argv[1], sys.argv[2], int(sys.argv[3])
count = 0

def deadly(function):
    def call(*args, **kwargs):
        global count
        done = function(*args, **kwargs)
        count += 1
        if count == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return call

if where == "write":
    tiles.write_window = deadly(tiles.write_window)
elif where == "put":
    written = tiles.write_atomically
    tiles.write_atomically = deadly(written)
torch.manual_seed(0)
scan, computed = SelectiveScan(32, 2, reverse=True), []
scan.x_proj.register_forward_pre_hook(lambda *_: computed.append(1))
scan_in_tiles(scan, f"{folder}/scene.npy", f"{folder}/output.npy", tile=(5, 6), folder=f"{folder}/run")
print(len(computed))
"""


def scan_in_child(folder, where="never", when=0):
    """The number of tiles that a process computes of the scene in a folder; it may be killed.

    Each is a process of its own: products of matrices have other last bits with another number of threads."""
    code, out, err = run_program(scanning, folder, where, when)
    assert code == (0 if where == "never" else -signal.SIGKILL), err
    return int(out or 0)


@pytest.mark.parametrize(("where", "when"), [("write", 1), ("write", 7), ("put", 9)])
def test_killed_and_resumed(tmp_path, where, when):
    "A run that is killed and called again gives what a run in one go gives, bit for bit."
    image = np.random.default_rng(0).standard_normal((17, 15, 32), dtype=np.float32)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
        np.save(folder / "scene.npy", image)
    scan_in_child(killed, where, when)
    # of 12 tiles; "write": the last one counts as not done; "put": the journal was written before the tiles
    assert scan_in_child(killed) == 12 - (when - 1)
    assert scan_in_child(whole) == 12
    assert np.array_equal(np.load(killed / "output.npy"), np.load(whole / "output.npy"))
    assert [path.name for path in (killed / "run" / "output_borders").iterdir()] == ["complete"]


measuring = """
import json, re, sys
from pathlib import Path
import torch
from mamba2d.large import create_map, scan_in_tiles
from mamba2d.models.blocks import SelectiveScan

def peak():
    # of this program: what getrusage says includes the process that has started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.manual_seed(0)
scan, folder = SelectiveScan(32, 2), sys.argv[1]
found = []
for name, height, width, tile in (("small", 128, 128, 32), ("tall", 4096, 128, 32), ("large", 256, 256, 256)):
    source = create_map(f"{folder}/{name}.npy", (height, width, 32))
    scan_in_tiles(scan, source, f"{folder}/{name}_output.npy", tile=tile)
    found.append(peak())
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux keeps this number")
def test_memory_grows_with_the_tile_and_not_with_the_image(tmp_path):
    "An image 32 times as high takes the memory of the small one; a larger tile takes more."
    done = subprocess.run([sys.executable, "-c", measuring, tmp_path], env=in_child, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    small, tall, large = json.loads(done.stdout)  # peaks, bytes
    tall_map, large_map = 4 * 4096 * 128 * 32, 4 * 256 * 256 * 32
    assert tall - small < tall_map / 4, (small, tall, large)
    assert large - tall > 2 * large_map, (small, tall, large)  # a tile of that size, several times


def test_two_processes_scan_one_image():
    "Outputs and gradients of two processes equal those of one."
    code, out, err = run_twice(Path(__file__).with_name("distributed_scan.py"))
    assert code == 0, err
    assert out.count("worst difference") == 2


def test_zarr_folders(tmp_path):
    "A map in a zarr folder is read and written as one in a file; its pieces are the tiles."
    pytest.importorskip("zarr", reason='pip install "mamba2d[large]"')
    torch.manual_seed(0)
    scan, image = SelectiveScan(32, 2), torch.randn(17, 15, 32)
    source = create_map(tmp_path / "scene.zarr", image.shape, tile=(4, 4))
    source[:] = image.numpy()
    target = scan_in_tiles(scan, tmp_path / "scene.zarr", tmp_path / "output.zarr", tile=(5, 6),
                           folder=tmp_path / "run", devices=["cpu"] * 2)
    assert target.chunks[:2] == (5, 6)
    found = open_map(tmp_path / "output.zarr")[:]
    assert np.array_equal(found, scan_in_tiles(scan, image, tile=(5, 6)))
    with pytest.raises(ValueError, match=r"tile must be a multiple of the pieces of target, \(4, 4\)"):
        other = create_map(tmp_path / "other.zarr", image.shape, tile=(4, 4))
        scan_in_tiles(scan, image, other, tile=(5, 6), devices=["cpu"] * 2)
    # one tile along the rows: the pieces are as high as the map, lower than the tile
    made = scan_in_tiles(scan, image, tmp_path / "wide.zarr", tile=(20, 6), devices=["cpu"] * 2)
    assert made.chunks[:2] == (17, 6)
    assert np.array_equal(made[:], scan_in_tiles(scan, image, tile=(20, 6)))
