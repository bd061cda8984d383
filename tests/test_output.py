"""Commands whose output nobody takes: the reader has left, the disk is full, the files are closed."""
import json
import os
import subprocess
import sys

import pytest

quick = "train --fast-dev-run --batch-size 8 --image-size 16 --workers 0 --device cpu"


@pytest.mark.parametrize("ending", ("| head -c 1", ">/dev/full 2>&1", ">&- 2>&-"))
def test_a_training_needs_no_reader(tmp_path, ending):
    command = f'set -o pipefail; "$0" -W ignore -m mamba2d.cli {quick} --out "$1" {ending}'
    done = subprocess.run(["bash", "-c", command, sys.executable, tmp_path], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stderr.count("Error"), done.stderr
    assert "loss" in json.loads((tmp_path / "settings.json").read_text())["result"]
    assert (tmp_path / "checkpoints/last.pth").exists()
