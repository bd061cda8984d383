"""The CUDA kernels with borders equal the float64 loop, and tiles of an image one scan: without a GPU."""
import shutil

import pytest
import torch
from emulated_cuda import emulate, output_tolerances, tolerances

from mamba2d.scan import (
    cuda,
    operator,
    random_problem,
    selective_scan_2d,
    selective_scan_2d_naive,
    selective_scan_2d_ref,
)
from mamba2d.scan.reference import ScanBorders, ScanTensors, relative_error

names = ScanTensors._fields
bf16, fp16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
state_tolerances = {f64: 1e-11, f32: 1e-5, bf16: 1e-5, fp16: 1e-5}

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ to compile the kernels with")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulated(folder, monkeypatch):
    emulate(monkeypatch, folder)


def in_float64(tensors):
    "Leaves in float64 with the same values."
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def draw_borders(problem, seed=3):
    "Random states above and to the left of an image, or gradients of its last row and column."
    b, h, w, e = problem["x"].shape
    n = problem["A_t"].shape[1]
    generator = torch.Generator().manual_seed(seed)
    dtype = f64 if problem["x"].dtype == f64 else f32
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((b, w, e, n), (b, h, e, n))]


# ------------------------------------------------------------------------------------ against the loop

def check_case(shape, dtype, *, has_top, has_left, returned=True, softplus=True, reverse=False, states=False,
               **kind):
    "The kernels' outputs and gradients against the loop; `returned`: those of the last row and column too."
    problem = random_problem(shape, dtype=dtype, delta_softplus=softplus, requires_grad=False, **kind)
    tensors = ScanTensors(*[problem.get(name) for name in names])
    top, left = draw_borders(problem)
    before = ScanBorders(top if has_top else None, left if has_left else None)
    incoming = ScanBorders(*draw_borders(problem, seed=4) if returned else (None, None))
    grad_y = torch.randn(shape[:4], generator=torch.Generator().manual_seed(1)).to(dtype)
    flags = dict(delta_softplus=softplus, reverse=reverse)

    y, h, bottom, right, saved = cuda.cuda_forward_with_borders(
        tensors, before, **flags, return_states=states, return_borders=returned, for_backward=True)
    grads = cuda.cuda_backward_with_borders(grad_y, tensors, before, saved, grad_borders=incoming, **flags)

    leaves = in_float64((*tensors, *before))
    expected_y, expected_h, *expected_borders = loop(leaves, **flags)
    assert relative_error(y, expected_y) < output_tolerances[dtype]
    assert not states or relative_error(h, expected_h) < state_tolerances[dtype]
    loss = (expected_y * grad_y.double()).sum()
    if returned:
        for found, expected, grad in zip((bottom, right), expected_borders, incoming, strict=True):
            assert relative_error(found, expected) < state_tolerances[dtype]
            loss = loss + (expected * grad.double()).sum()
    expected_grads = gradients_of(loss, leaves)
    for name, found, expected in zip((*names, "top", "left"), grads, expected_grads, strict=True):
        if expected is None:
            assert not found.numel(), name
        else:
            assert relative_error(found, expected) < tolerances[dtype], name


def loop(leaves, **flags):
    "y, the states, the last row and the last column of them, pixel by pixel."
    *tensors, bias_t, bias_l, top, left = leaves
    return selective_scan_2d_naive(
        *tensors, delta_bias_t=bias_t, delta_bias_l=bias_l, initial_top=top, initial_left=left,
        return_states=True, return_borders=True, **flags)


def gradients_of(loss, leaves):
    "The gradient of each leaf, None for None."
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(loss, wanted, materialize_grads=True))
    return [None if leaf is None else next(grads) for leaf in leaves]


four_cases = [(True, True), (True, False), (False, True), (False, False)]  # whether top and left are given


@pytest.mark.parametrize("has_top, has_left", four_cases)
@pytest.mark.parametrize("shape, dtype, options", [
    # sums on the tensor cores, copies in the background, three tiles, three strips, two channel groups
    ((1, 18, 17, 24, 16), bf16, dict(reverse=True)),
    ((2, 9, 10, 20, 16), f32, dict(states=True)),
])
def test_borders_equal_the_loop(emulated, shape, dtype, options, has_top, has_left):
    check_case(shape, dtype, has_top=has_top, has_left=has_left, **options)


@pytest.mark.parametrize("shape, dtype, options", [
    ((1, 9, 12, 16, 16), bf16, dict(strided=True, optional=False)),
    ((1, 67, 3, 5, 4), f32, dict(reverse=True)),  # strips that follow each other
    ((1, 67, 6, 5, 16), bf16, {}),  # ... with four columns staged together
    ((1, 10, 9, 5, 3), f64, dict(softplus=False, reverse=True)),
])
def test_other_kernels_take_borders(emulated, shape, dtype, options):
    check_case(shape, dtype, has_top=True, has_left=True, **options)


def test_given_states_without_returned_borders(emulated):
    check_case((1, 9, 10, 24, 16), bf16, has_top=True, has_left=True, returned=False)


slow_shapes = ((1, 1, 9, 6), (1, 9, 1, 6), (2, 8, 8, 17), (1, 16, 9, 5), (1, 35, 6, 9), (1, 1, 1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [bf16, fp16, f32, f64])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 12, 16, 20, 64, 130, 256])
def test_borders_for_all_numbers_of_states(emulated, n, dtype):
    if dtype == f64 and n > 64:
        pytest.skip("the shared memory of an H100 has room for fewer states in float64")
    for k, shape in enumerate(slow_shapes if n in (3, 16) else slow_shapes[2:4]):
        for m, (has_top, has_left) in enumerate(four_cases[:2] if n in (3, 16) else four_cases[:1]):
            reverse = (k + m) % 2 == 1
            check_case((*shape, n), dtype, has_top=has_top, has_left=has_left, reverse=reverse)


# ------------------------------------------------------------------------------------ tiles of one image

def tile_arguments(arguments, rows, columns):
    "The tensors of a part of an image; A, D and biases are those of the whole."
    return [t[:, rows, columns] if t is not None and t.dim() == 4 else t for t in arguments]


def slices_of(size, cuts):
    edges = [0, *cuts, size]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


class Tiles:
    "An image cut at rows and columns, scanned tile by tile in the order of the scan."

    def __init__(self, arguments, cuts, reverse):
        rows, columns = (slices_of(arguments[0].shape[k + 1], cuts[k]) for k in range(2))
        self.arguments, self.options = arguments, dict(delta_softplus=True, reverse=reverse)
        self.rows, self.columns = (rows[::-1], columns[::-1]) if reverse else (rows, columns)
        self.saved, self.before = {}, {}

    def tile(self, rows, columns):
        return ScanTensors(*tile_arguments(self.arguments, rows, columns))

    def forward(self):
        "y; a tile receives the borders of those before it."
        bottoms, y = {}, torch.empty_like(self.arguments[0])
        options = dict(self.options, return_states=False, return_borders=True, for_backward=True)
        for i, rows in enumerate(self.rows):
            right = None
            for j, columns in enumerate(self.columns):
                tensors, before = self.tile(rows, columns), ScanBorders(bottoms.get(j), right)
                y[:, rows, columns], _, bottoms[j], right, self.saved[i, j] = cuda.cuda_forward_with_borders(
                    tensors, before, **options)
                self.before[i, j] = before
        return y

    def backward(self, grad_y):
        "The gradients of the eleven inputs; a tile receives those of its borders from the tiles behind it."
        grads = [torch.zeros_like(t, dtype=f64) for t in self.arguments]
        of_tops = {}
        for i, rows in reversed(list(enumerate(self.rows))):
            of_left = None
            for j, columns in reversed(list(enumerate(self.columns))):
                found = cuda.cuda_backward_with_borders(
                    grad_y[:, rows, columns], self.tile(rows, columns), self.before[i, j], self.saved[i, j],
                    grad_borders=ScanBorders(of_tops.get(j), of_left), **self.options)
                for total, part in zip(tile_arguments(grads, rows, columns), found[:11], strict=True):
                    total += part
                of_tops[j], of_left = (grad if grad.numel() else None for grad in found[11:])
        return grads


@pytest.mark.parametrize("cuts", [((9,), (10,)), ((8,), ()), ((), (8, 9)), ((1, 12), (16,))])
@pytest.mark.parametrize("reverse", [False, True])
def test_tiles_equal_one_scan(emulated, cuts, reverse):
    problem = random_problem((2, 18, 17, 20, 16), dtype=f32, requires_grad=False)
    arguments = [problem[name] for name in names]
    grad_y = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(1))
    expected, _, saved = cuda.cuda_forward(*arguments, True, reverse, False, True)
    expected_grads = cuda.cuda_backward(grad_y, *arguments, saved, True, reverse)
    tiles = Tiles(arguments, cuts, reverse)
    y = tiles.forward()
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()
    for name, found, wanted in zip(names, tiles.backward(grad_y), expected_grads, strict=True):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


# ------------------------------------------------------------------------------------ through the operator

@pytest.fixture
def emulated_operator(emulated, monkeypatch):
    "Within a test scans of CPU tensors run on the emulated CUDA kernels."
    kernels = operator._kernels["cuda"]
    able = kernels._replace(unsupported_reason=lambda x, A_t: None, status=lambda: (True, ""))
    monkeypatch.setitem(operator._kernels, "cpu", able)


def scan_and_gradients(scan, problem, before, weights, dtype):
    "The outputs of a scan in `dtype`, and its gradients of all inputs."
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in (problem | before).items()}
    outputs = scan(**leaves, delta_softplus=True, return_borders=True)
    loss = sum((output * weight.to(dtype)).sum() for output, weight in zip(outputs, weights, strict=True))
    return outputs, torch.autograd.grad(loss, list(leaves.values()))


def test_the_operator_runs_the_kernels(emulated_operator):
    problem = random_problem((2, 9, 10, 20, 16), dtype=f32, requires_grad=False)
    top, left = draw_borders(problem)
    weights = torch.randn_like(problem["x"]), *draw_borders(problem, seed=4)
    for before in (dict(initial_top=top, initial_left=left), dict(initial_left=left)):
        found = scan_and_gradients(selective_scan_2d, problem, before, weights, f32)
        expected = scan_and_gradients(selective_scan_2d_ref, problem, before, weights, f64)
        for value, wanted in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
            assert relative_error(value, wanted) < tolerances[f32]


def test_the_operator_knows_what_the_kernels_keep(emulated_operator):
    problem = random_problem((1, 9, 10, 20, 16), dtype=f32, requires_grad=False)
    top, left = draw_borders(problem)
    arguments = *[problem[name] for name in names], top, left, True, False, True, True, True, "auto"
    scan = operator.scan_operators.scan_borders_forward
    report = torch.library.opcheck(scan, arguments, test_utils=("test_schema", "test_faketensor"))
    assert set(report.values()) == {"SUCCESS"}
