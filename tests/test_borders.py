"""Scans of pieces of an image, on every backend of this machine: tilings, shapes, dtypes, derivatives."""
from itertools import product

import pytest
import torch

from mamba2d.scan import available_backends, random_problem, scan_backend, selective_scan_2d
from mamba2d.scan.reference import (
    gradients_with_borders,
    random_borders,
    relative_error,
    selective_scan_2d_naive,
    selective_scan_2d_ref,
)

backends = [name for name in available_backends() if name != "cuda"]
softplus = dict(delta_softplus=True)
given = [dict(row=row, column=column) for row in (True, False) for column in (True, False)]


def cuts(length, count):
    "Slices that cut `length` into `count` parts of the same size, as nearly as it goes."
    ends = [round(k * length / count) for k in range(count + 1)]
    return [slice(start, end) for start, end in zip(ends[:-1], ends[1:], strict=True)]


def scan_pieces(problem, rows, columns, reverse):
    "y and the sides (bottom, right) of an image that is scanned piece by piece."
    order = -1 if reverse else 1
    sides, last_columns, lines = {}, [], []
    for row in rows[::order]:
        right, line = None, []
        for column in columns[::order]:
            piece = {k: v[:, row, column] if v.dim() == 4 else v for k, v in problem.items()}
            y, sides[column.start], right = selective_scan_2d(
                **piece, initial_top=sides.get(column.start), initial_left=right, delta_softplus=True,
                reverse=reverse, return_borders=True)
            line.append(y)
        last_columns.append(right)
        lines.append(torch.cat(line[::order], 2))
    bottom = torch.cat([sides[column.start] for column in columns], 1)
    return torch.cat(lines[::order], 1), bottom, torch.cat(last_columns[::order], 1)


def largest_error(value, expected):
    "The largest difference, relative to the largest magnitude."
    return ((value - expected).abs().max() / expected.abs().max()).item()


tilings = {
    "2 x 2": (cuts(37, 2), cuts(45, 2)),
    "1 x 5": (cuts(37, 1), cuts(45, 5)),
    "4 x 1": (cuts(37, 4), cuts(45, 1)),
    "rows of one pixel": (cuts(37, 37), cuts(45, 1)),
    "uneven": ([slice(0, 1), slice(1, 18), slice(18, 37)], [slice(0, 33), slice(33, 34), slice(34, 45)]),
}


@pytest.mark.parametrize("name", tilings)
@pytest.mark.parametrize("backend", backends)
def test_pieces_equal_one_scan(backend, name):
    "y and the sides agree to 1e-6 of the largest magnitude, every gradient to 1e-5, from both corners."
    rows, columns = tilings[name]
    problem = random_problem((2, 37, 45, 9, 5), dtype=torch.float32)
    for reverse in (False, True):
        with scan_backend(backend):
            expected = selective_scan_2d(
                **problem, delta_softplus=True, reverse=reverse, return_borders=True)
            found = scan_pieces(problem, rows, columns, reverse)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(output.shape, generator=generator) for output in expected]
        for value, wanted in zip(found, expected, strict=True):
            assert largest_error(value, wanted) < 1e-6
        grads = [torch.autograd.grad(outputs, list(problem.values()), weights)
                 for outputs in (found, expected)]
        for key, value, wanted in zip(problem, *grads, strict=True):
            assert largest_error(value, wanted) < 1e-5, key


@pytest.mark.skipif("cpu" not in backends, reason="the CPU kernel cannot be built here")
def test_a_cut_changes_no_bit_of_the_output():
    "The kernel computes a state from the same numbers in the same order, wherever the image is cut."
    problem = random_problem((1, 37, 45, 9, 5), dtype=torch.float32, requires_grad=False)
    with scan_backend("cpu"):
        expected = selective_scan_2d(**problem, delta_softplus=True, return_borders=True)
        found = scan_pieces(problem, *tilings["uneven"], False)
    assert all(torch.equal(value, wanted) for value, wanted in zip(found, expected, strict=True))


shapes = [
    # (B, H, W, E, N): lines, one pixel, tiles of the kernel and one pixel more, vectors that are not full
    (2, 1, 1, 1, 1), (2, 1, 40, 5, 3), (1, 40, 1, 5, 3), (1, 16, 32, 16, 16), (2, 17, 33, 17, 5),
    (1, 33, 65, 8, 2), (3, 5, 4, 33, 4), (1, 3, 4, 3, 256),
]


def in_float64(tensors):
    "The same values in float64, as leaves of their own."
    return {key: value if value is None else value.detach().double().requires_grad_()
            for key, value in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", backends)
def test_against_the_reference_in_float64(backend, dtype):
    "Outputs, sides and all gradients, for whatever is given before the image."
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 1e-2)
    for seed, shape in enumerate(shapes):
        problem = random_problem(shape, seed=seed, dtype=dtype, strided=seed % 2 == 1, optional=seed % 3 > 0)
        borders = random_borders(problem, **given[seed % 4])
        exact, exact_borders = in_float64(problem), in_float64(borders)
        options = dict(delta_softplus=True, reverse=seed % 4 in (1, 2))
        with scan_backend(backend):
            outputs, grads = gradients_with_borders(selective_scan_2d, problem, borders, **options)
        expected, expected_grads = gradients_with_borders(
            selective_scan_2d_ref, exact, exact_borders, **options)
        where = f"{shape}, {options}"
        assert outputs[0].dtype == dtype and outputs[1].dtype == outputs[2].dtype != torch.bfloat16
        for value, wanted in zip(outputs, expected, strict=True):
            assert relative_error(value, wanted) < tolerance, where
        for key, grad in grads.items():
            assert grad.dtype == (problem | borders)[key].dtype
            assert relative_error(grad, expected_grads[key]) < tolerance, f"{key} of {where}"


@pytest.mark.parametrize("backend", backends)
def test_sides_in_other_dtypes(backend):
    "A side may be in any float dtype; float64 decides the arithmetic, as in the other tensors."
    problem = random_problem((1, 5, 40, 3, 4), dtype=torch.float32)
    for dtype, of_states in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        borders = {k: v.detach().to(dtype).requires_grad_() for k, v in random_borders(problem).items()}
        with scan_backend(backend):
            outputs, grads = gradients_with_borders(selective_scan_2d, problem, borders, **softplus)
        expected, expected_grads = gradients_with_borders(
            selective_scan_2d_naive, problem, borders, **softplus)
        assert [output.dtype for output in outputs] == [torch.float32, of_states, of_states]
        assert max(map(relative_error, outputs, expected)) < 1e-5
        for key in grads:
            assert grads[key].dtype == expected_grads[key].dtype
            assert relative_error(grads[key], expected_grads[key]) < 1e-2


@pytest.mark.parametrize("backend", backends)
def test_gradcheck(backend):
    "Against finite differences, with initial states and gradients that enter through the sides."
    for reverse, which in zip((False, True, True, False), given, strict=True):
        problem = random_problem((1, 2, 3, 2, 2))
        values = problem | {k: v for k, v in random_borders(problem, **which).items() if v is not None}

        def scan(*tensors, names=tuple(values), reverse=reverse):
            return selective_scan_2d(**dict(zip(names, tensors, strict=True)), delta_softplus=True,
                                     reverse=reverse, return_borders=True)

        with scan_backend(backend):
            assert torch.autograd.gradcheck(scan, list(values.values()))


def test_more_states_than_kernels_take():
    "Beyond 256 states the reference runs, and a forced kernel refuses."
    problem = random_problem((1, 2, 3, 2, 257), dtype=torch.float32)
    borders = random_borders(problem)
    outputs, grads = gradients_with_borders(selective_scan_2d, problem, borders, **softplus)
    expected, expected_grads = gradients_with_borders(selective_scan_2d_naive, problem, borders, **softplus)
    assert max(map(relative_error, outputs, expected)) < 1e-5
    assert max(relative_error(grads[key], expected_grads[key]) for key in grads) < 1e-5
    if "cpu" in backends:
        with scan_backend("cpu"), pytest.raises(RuntimeError, match="at most 256 states, got 257"):
            selective_scan_2d(**problem, **borders)


@pytest.mark.skipif("cpu" not in backends, reason="the CPU kernel cannot be built here")
def test_threads_change_no_bit():
    "The number of threads changes nothing, forward and backward."
    problem = random_problem((2, 40, 70, 40, 16), dtype=torch.float32)
    borders, threads, results = random_borders(problem), torch.get_num_threads(), []
    for count in (1, 3, 1, 2):
        torch.set_num_threads(count)
        outputs, grads = gradients_with_borders(selective_scan_2d, problem, borders, **softplus)
        results.append((*outputs, *grads.values()))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", backends)
def test_without_borders_the_same_bits(backend):
    "To ask for the sides, or for the states, changes no bit of the output and of the gradients."
    problem = random_problem((2, 18, 35, 9, 5), dtype=torch.float32)
    weights = torch.randn(problem["x"].shape, generator=torch.Generator().manual_seed(0))
    with scan_backend(backend):
        results = []
        for options in (dict(), dict(return_borders=True), dict(return_borders=True, return_states=True)):
            y = selective_scan_2d(**problem, delta_softplus=True, **options)
            y = y[0] if options else y
            results.append((y, *torch.autograd.grad(y, list(problem.values()), weights)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_states_and_sides_come_in_this_order():
    "y, h, bottom, right; the sides are the last states in the direction of the scan."
    problem = random_problem((1, 18, 35, 3, 4), dtype=torch.float32)
    for backend, reverse in product(backends, (False, True)):
        with scan_backend(backend):
            y, h, bottom, right = selective_scan_2d(
                **problem, delta_softplus=True, reverse=reverse, return_states=True, return_borders=True)
        last = 0 if reverse else -1
        assert torch.equal(bottom, h[:, last]) and torch.equal(right, h[:, :, last])
        assert bottom.requires_grad and right.requires_grad and not h.requires_grad


@pytest.mark.parametrize("backend", backends)
def test_compiled_in_one_graph(backend):
    "Forward and backward, with sizes that may change."
    problem = random_problem((1, 3, 4, 2, 3), dtype=torch.float32)
    borders = random_borders(problem)
    with scan_backend(backend):
        expected, expected_grads = gradients_with_borders(selective_scan_2d, problem, borders, **softplus)
        torch._dynamo.reset()
        compiled = torch.compile(selective_scan_2d, fullgraph=True, backend="aot_eager", dynamic=True)
        outputs, grads = gradients_with_borders(compiled, problem, borders, **softplus)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(grads, expected_grads)
