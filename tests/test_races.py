"""The barriers inside a block of the CUDA kernels order all accesses to shared memory, whoever is faster.

compute-sanitizer's racecheck cannot follow named barriers of two warps (see `nbs/04_scan.cuda`, "Races"). Here
the rows of the backward pass and the warps of the forward pass are programs: sequences of ("read" or "write",
place) and ("barrier", number), in the order of the kernels. Vector clocks find the accesses that no barrier
orders.
"""
from collections import defaultdict

import pytest


def backward_row(r, rows, cols, tiles):
    "What row r of the backward pass does to the tile of states."
    is_last = r == rows - 1
    for _ in range(tiles):
        yield "write", (r, -1)
        if r == 0:
            yield from (("write", (-1, j)) for j in range(cols))
        yield "read", (r, -1)
        yield from states_again(r, cols, is_last)
        yield from adjoint(r, cols, is_last)
        if r == 0:
            yield from (("write", (-1, j)) for j in range(cols))  # the next tile's come early


def states_again(r, cols, is_last):
    "The first sweep of a row over a tile: the states, from left to right."
    for j in range(cols):
        if r > 0:
            yield "barrier", r
        yield "read", (r - 1, j)
        yield "write", (r, j)
        if not is_last:
            yield "barrier", r + 1
    if is_last:
        yield "write", (r, cols - 1)


def adjoint(r, cols, is_last):
    "The second sweep of a row over a tile: the adjoint, from right to left."
    for j in reversed(range(cols)):
        yield "read", (r - 1, j)
        yield "read", (r, j - 1)
        if not is_last:
            yield "barrier", r + 1
        yield "read", (r, j) if is_last else (r + 1, j)
        if r > 0:
            yield "write", (r, j)
            yield "barrier", r
        if is_last and j > 0:
            yield "write", (r, j - 1)


def forward_warp(w, warps, cols):
    "What warp w of the forward pass does to the two places through which it passes its last row down."
    for j in range(cols):
        if w > 0:
            yield "barrier", w
            yield "read", (w - 1, j % 2)
        if w + 1 < warps:
            yield "write", (w, j % 2)
            yield "barrier", w + 1


class VectorClocks:
    "What each of several programs knows that the others have done, and the accesses that nothing orders."

    def __init__(self, count):
        self.clocks = [[int(k == p) for k in range(count)] for p in range(count)]
        self.reads = defaultdict(dict)  # place -> program -> its clock at its last read since the last write
        self.writes = {}  # place -> (program, its clock) of the last write
        self.races = []

    def meet(self, p, q):
        "Two programs pass a barrier: both know from here on what each has done."
        joint = [max(pair) for pair in zip(self.clocks[p], self.clocks[q])]
        for program in (p, q):
            self.clocks[program] = joint[:]
            self.clocks[program][program] += 1

    def access(self, p, kind, place):
        "Program p reads or writes a place; two accesses, one of them a write, have to be ordered."
        before = dict([self.writes[place]]) if place in self.writes else {}
        if kind == "write":
            for q, clock in self.reads[place].items():
                before[q] = max(clock, before.get(q, 0))
        for q, clock in before.items():
            if q != p and self.clocks[p][q] < clock:
                self.races.append((kind, place, p, q))
        if kind == "write":
            self.writes[place], self.reads[place] = (p, self.clocks[p][p]), {}
        else:
            self.reads[place][p] = self.clocks[p][p]


def races(programs):
    "Run programs whose barriers join two of them, and return the accesses that nothing orders."
    clocks = VectorClocks(len(programs))
    waiting = {}  # barrier -> the program that waits at it
    active = list(range(len(programs)))
    while active:
        progressed = False
        for p in list(active):
            if p in waiting.values():
                continue
            progressed = True
            kind, what = next(programs[p], (None, None))
            if kind is None:
                active.remove(p)
            elif kind != "barrier":
                clocks.access(p, kind, what)
            elif what in waiting:
                clocks.meet(p, waiting.pop(what))
            else:
                waiting[what] = p
        assert progressed, "deadlock"
    return clocks.races


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("cols", [1, 2, 3, 8])
def test_backward_pass(rows, cols):
    assert not races([backward_row(r, rows, cols, 3) for r in range(rows)])


@pytest.mark.parametrize("warps", range(1, 9))
def test_forward_pass(warps):
    assert not races([forward_warp(w, warps, 9) for w in range(warps)])


def test_a_missing_barrier_is_found():
    def without_barrier(program):
        return (event for event in program if event != ("barrier", 4))

    assert len(races([without_barrier(backward_row(r, 8, 8, 3)) for r in range(8)])) == 120


def test_one_place_for_all_columns_is_found():
    def with_one_place(program):
        return ((kind, what if kind == "barrier" else what[0]) for kind, what in program)

    assert len(races([with_one_place(forward_warp(w, 4, 9)) for w in range(4)])) == 24
