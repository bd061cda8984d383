"""What the warps of a block tell each other orders all their accesses to shared memory, whoever is faster.

compute-sanitizer's racecheck cannot follow two warps that wait for each other (`csrc/RACES.md`).
Here the rows of the backward pass and the warps of the forward pass are programs, in the order of the
kernels. A program is a sequence of events:

- ("read", place) and ("write", place);
- ("barrier", number): two warps meet at a named barrier, and both wait. The forward pass does so, and the
  backward pass on compute capability 7.5;
- ("announce", message) and ("receive", message, number): the backward pass on later cards. The receiver waits
  until the message of that number (from 0) has been announced; the announcer waits for nobody. In the kernel
  an mbarrier carries the message.

Vector clocks find the accesses that nothing orders.
"""
from collections import defaultdict
from dataclasses import dataclass

import pytest

span = 8  # columns of a tile
strip_rows = 8  # rows of a tile


class DeadlockError(Exception):
    "Every program that has not ended waits."


class VectorClocks:
    "What each of several programs knows that the others have done, and the accesses that nothing orders."

    def __init__(self, count):
        self.clocks = [[int(k == p) for k in range(count)] for p in range(count)]
        self.reads = defaultdict(dict)  # place -> program -> its clock at its last read since the last write
        self.writes = {}  # place -> (program, its clock) of the last write
        self.races = []

    def learn(self, p, clocks):
        "Program p knows from here on what is known by these clocks."
        self.clocks[p] = [max(pair) for pair in zip(self.clocks[p], clocks, strict=True)]
        self.clocks[p][p] += 1

    def pass_barrier(self, p, q):
        "Two programs pass a barrier: both know from here on what each has done."
        clocks_of_p = self.clocks[p]
        self.learn(p, self.clocks[q])
        self.learn(q, clocks_of_p)

    def access(self, p, kind, place):
        "Program p reads or writes a place; two accesses, one of them a write, have to be ordered."
        before = dict([self.writes[place]]) if place in self.writes else {}
        if kind == "write":
            for q, clock in self.reads[place].items():
                before[q] = max(clock, before.get(q, 0))
        for q, clock in before.items():
            if self.clocks[p][q] < clock:
                self.races.append((kind, place, p, q))
        if kind == "write":
            self.writes[place] = p, self.clocks[p][p]
            self.reads[place] = {}
        else:
            self.reads[place][p] = self.clocks[p][p]


# ------------------------------------------------------------------------- named barriers: both warps wait

def races_at_barriers(programs):
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
                clocks.pass_barrier(p, waiting.pop(what))
            else:
                waiting[what] = p
        if not progressed:
            raise DeadlockError
    return clocks.races


def forward_warp(w, warps, cols):
    "What warp w of the forward pass does to the two places through which it passes its last row down."
    for j in range(cols):
        if w > 0:
            yield "barrier", w
            yield "read", (w - 1, j % 2)
        if w + 1 < warps:
            yield "write", (w, j % 2)
            yield "barrier", w + 1


def row_at_barriers(r, rows, cols, tiles):
    "What row r of the backward pass does to the tile of states on compute capability 7.5."
    is_last = r == rows - 1
    for _ in range(tiles):
        yield "write", (r, -1)
        if r == 0:
            yield from (("write", (-1, j)) for j in range(cols))
        yield "read", (r, -1)
        yield from states_at_barriers(r, cols, is_last)
        yield from adjoint_at_barriers(r, cols, is_last)


def states_at_barriers(r, cols, is_last):
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


def adjoint_at_barriers(r, cols, is_last):
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


def rows_at_barriers(rows, cols):
    return [row_at_barriers(r, rows, cols, tiles=3) for r in range(rows)]


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("cols", [1, 2, 3, 8])
def test_backward_pass_at_barriers(rows, cols):
    assert not races_at_barriers(rows_at_barriers(rows, cols))


@pytest.mark.parametrize("warps", range(1, 9))
def test_forward_pass(warps):
    assert not races_at_barriers([forward_warp(w, warps, 9) for w in range(warps)])


def test_a_missing_barrier_is_found():
    def without_barrier(program):
        return (event for event in program if event != ("barrier", 4))

    assert len(races_at_barriers([without_barrier(row) for row in rows_at_barriers(8, 8)])) == 123


def test_one_place_for_all_columns_is_found():
    def with_one_place(program):
        return ((kind, what if kind == "barrier" else what[0]) for kind, what in program)

    assert len(races_at_barriers([with_one_place(forward_warp(w, 4, 9)) for w in range(4)])) == 24


def test_a_warp_that_never_comes_to_a_barrier_is_a_deadlock():
    programs = rows_at_barriers(8, 8)
    programs[5] = iter(())
    with pytest.raises(DeadlockError):
        races_at_barriers(programs)


# ------------------------------------------------------------------------- mbarriers: the announcer goes on

class MbarrierClocks(VectorClocks):
    """Vector clocks of programs that signal through mbarriers.

    An mbarrier shows only whether the number of its messages is odd. So a message must not come before the
    last one has been received, and a receiver must not come before the message before its own has been
    announced.
    """

    def __init__(self, count):
        super().__init__(count)
        self.announced = defaultdict(list)  # message -> (program, all its clocks) of each time
        self.received = {}  # (message, number) -> (program, its clock)
        self.latest = {}  # mbarrier -> (message, number)

    @staticmethod
    def mbarrier(message):
        "The mbarrier of a message: those down to a row and up from it alternate at one."
        return message[:2]  # of (row, column, direction), row and column

    def announce(self, p, message):
        "Program p announces a message, without waiting."
        mbarrier = self.mbarrier(message)
        if mbarrier in self.latest and self.latest[mbarrier] in self.received:
            q, clock = self.received[self.latest[mbarrier]]
            if self.clocks[p][q] < clock:
                self.races.append(("parity", message, p, q))
        self.latest[mbarrier] = message, len(self.announced[message])
        self.announced[message].append((p, self.clocks[p][:]))
        self.clocks[p][p] += 1

    def receive(self, p, message, number):
        "Program p receives a message for the time of that number; returns False where it has to wait."
        if len(self.announced[message]) <= number:
            return False
        if self.latest[self.mbarrier(message)] != (message, number):
            self.races.append(("parity", message, p, self.announced[message][-1][0]))
        if number > 0:
            q, clocks = self.announced[message][number - 1]
            if self.clocks[p][q] < clocks[q]:
                self.races.append(("parity", message, p, q))
        self.learn(p, self.announced[message][number][1])
        self.received[message, number] = p, self.clocks[p][p]
        return True

    def step(self, p, kind, *what):
        "Program p takes a step; returns False where it has to wait."
        if kind == "receive":
            return self.receive(p, *what)
        if kind == "announce":
            self.announce(p, *what)
        else:
            self.access(p, kind, *what)
        return True


def races_at_mbarriers(programs):
    "Run programs that signal through mbarriers, and return the accesses that nothing orders."
    clocks = MbarrierClocks(len(programs))
    events = [next(program, None) for program in programs]
    while any(events):
        progressed = False
        for p, program in enumerate(programs):
            if events[p] and clocks.step(p, *events[p]):
                events[p] = next(program, None)
                progressed = True
        if not progressed:
            raise DeadlockError
    return clocks.races


@dataclass(frozen=True)
class Strip:
    "A strip of the image, whose tiles a block takes from right to left."
    rows: int
    widths: tuple[int, ...]  # of its tiles; only the first, at the right border, can be narrower than `span`
    mma: bool  # the sums run on the tensor cores
    above: bool  # whether there is a strip above, and below
    below: bool
    given: bool = False  # no strip lies above, but states that the image was given

    def programs(self):
        return [MbarrierRow(self, r).program() for r in range(self.rows)]


class MbarrierRow:
    """What row r of the backward pass does, in the order of csrc/cuda/scan_bwd.cu.

    Places: (r, j) is the state of row r at column j; ("above", buffer, j) and ("below", j) hold what comes
    from the strips above and below; ("carry", t, j) is memory that the strips share, at column j of tile t.
    Tiles are counted in the order in which they are taken: t = 0 is the rightmost one, which has the largest
    number in the kernel.
    """

    def __init__(self, strip, r):
        self.strip = strip
        self.r = r
        self.is_last = r == strip.rows - 1
        # each row copies some columns for row 0
        self.copies_above = strip.mma and (strip.above or strip.given)
        self.reports = strip.mma and strip.above  # the strip above hears of each tile
        self.copies_below = strip.mma and strip.below  # the upper rows copy two columns each for the last one

    def program(self):
        for t in range(len(self.strip.widths)):
            yield from self.begin(t)
            yield from self.states(t)
            if self.copies_below and self.r < strip_rows // 2:
                yield from self.copy_below(t)
            yield from self.adjoint(t)
            if self.reports and self.r == 0:
                yield "announce", ("sent",)
        yield from self.report_sent(len(self.strip.widths))

    def neighbour(self, t, row, j, direction):
        "Receive the message between row - 1 and row at column j, which only tiles of enough columns have."
        return "receive", (row, j, direction), sum(width > j for width in self.strip.widths[:t])

    def state_above(self, t, j):
        "The place of the state above column j."
        if self.r > 0:
            return self.r - 1, j
        return "above", self.buffer(t) if self.strip.mma else 0, j

    def buffer(self, t):
        "Which of the two buffers holds the states above tile t."
        return (len(self.strip.widths) - 1 - t) % 2

    def copy_above(self, t):
        "Copy this row's columns of the states above tile t."
        return (("write", ("above", self.buffer(t), j)) for j in range(self.r, span, self.strip.rows))

    def begin(self, t):
        "Phase 1 of tile t. Copies of the states above may have begun earlier; they end here."
        if self.copies_above:
            yield from self.copy_above(t)
            yield from (("announce", ("above", j)) for j in range(self.r, span, self.strip.rows))
        elif not self.strip.mma and self.r == 0:
            yield from (("write", ("above", 0, j)) for j in range(self.strip.widths[t]))
        yield from self.report_sent(t)

    def report_sent(self, t):
        "The last row tells the strip above, on behalf of row 0, that the tile before t is in memory."
        if self.reports and self.is_last and t > 0:
            yield "receive", ("sent",), t - 1
            yield from (("read", ("carry", t - 1, j)) for j in range(self.strip.widths[t - 1]))

    def states(self, t):
        "The first sweep over tile t: the states, from left to right."
        cols = self.strip.widths[t]
        for j in range(cols):
            if self.r > 0:
                yield self.neighbour(t, self.r, j, "down")
            elif self.copies_above:
                yield "receive", ("above", j), t
            yield "read", self.state_above(t, j)
            yield "write", (self.r, j)
            if not self.is_last:
                yield "announce", (self.r + 1, j, "down")
        if self.is_last and not self.strip.mma:
            yield from self.take_from_below(t, cols - 1)

    def copy_below(self, t):
        "Copy two columns of what the strip below has sent, where tile t has them."
        columns = span - 1 - self.r, span // 2 - 1 - self.r
        for j in columns:
            if j < self.strip.widths[t]:
                yield "read", ("carry", t, j)
                yield "write", ("below", j)
        yield from (("announce", ("below", j)) for j in columns)

    def take_from_below(self, t, j):
        "Without tensor cores the last row puts what the strip below has sent, or zeros, into its own place."
        if self.strip.below:
            yield "read", ("carry", t, j)
        yield "write", (self.r, j)

    def adjoint(self, t):
        "The second sweep over tile t: the adjoint, from right to left."
        cols, mma = self.strip.widths[t], self.strip.mma
        for j in reversed(range(cols)):
            yield "read", self.state_above(t, j)
            if not mma:
                yield "read", (self.r, j - 1)
            yield from self.adjoint_of_below(t, j)
            yield from self.send_up(t, j)
            if mma:
                yield "read", (self.r, j - 1)
            elif self.is_last and j > 0:
                yield from self.take_from_below(t, j - 1)
            if self.copies_above and j == min(1, cols - 1) and t + 1 < len(self.strip.widths):
                yield from self.copy_above(t + 1)

    def adjoint_of_below(self, t, j):
        "Wait for the adjoint of the row below at column j, and read it."
        if not self.is_last:
            yield self.neighbour(t, self.r + 1, j, "up")
            yield "read", (self.r + 1, j)
        elif self.strip.mma:
            if self.copies_below:
                yield "receive", ("below", j), t
            yield "read", ("below", j)
        else:
            yield "read", (self.r, j)

    def send_up(self, t, j):
        "Send the adjoint at column j to the row above, or to the strip above."
        if self.r > 0:
            yield "write", (self.r, j)
            yield "announce", (self.r, j, "up")
        elif self.strip.above or self.strip.given:
            yield "write", ("carry" if self.strip.above else "gradient", t, j)


@pytest.mark.parametrize("widths", [(1, 8, 8, 8), (3, 8, 8), (8, 8, 8, 8), (5,), (1,)])
@pytest.mark.parametrize("above, given", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("rows", range(1, strip_rows + 1))
@pytest.mark.parametrize("mma", [False, True])
def test_backward_pass_at_mbarriers(mma, rows, above, given, widths):
    for below in (False, True) if rows == strip_rows else (False,):
        assert not races_at_mbarriers(Strip(rows, widths, mma, above, below, given).programs())


def full_strip():
    "The programs of a strip between two others, on the tensor cores."
    return Strip(strip_rows, (8, 8, 8), mma=True, above=True, below=True).programs()


def without(program, message, kinds=("announce", "receive")):
    "The program with what it does for that message taken away."
    return (event for event in program if event[0] not in kinds or event[1] != message)


@pytest.mark.parametrize("message", [(4, 3, "down"), ("below", 7), ("above", 2)])
def test_a_missing_mbarrier_is_found(message):
    assert len(races_at_mbarriers([without(row, message) for row in full_strip()])) == 3


def test_a_missing_mbarrier_for_given_states_is_found():
    strip = Strip(strip_rows, (8, 8, 8), mma=True, above=False, below=True, given=True)
    assert len(races_at_mbarriers([without(row, ("above", 2)) for row in strip.programs()])) == 3


def test_a_missing_mbarrier_for_the_strip_above_is_found():
    races = races_at_mbarriers([without(row, ("sent",)) for row in full_strip()])
    assert len(races) == 24
    assert {place[0] for _, place, _, _ in races} == {"carry"}


@pytest.mark.parametrize("message", [(4, 3, "down"), (4, 3, "up"), ("below", 7), ("above", 2), ("sent",)])
def test_a_message_that_is_never_announced_is_a_deadlock(message):
    with pytest.raises(DeadlockError):
        races_at_mbarriers([without(row, message, kinds=("announce",)) for row in full_strip()])


# An mbarrier of its own, to see that the check of parities works: what the announcer and the receiver do.
twice = [("announce", ("data",)), ("announce", ("data",))]
first, second = (("receive", ("data",), number) for number in range(2))


def parity_faults(announcer, receiver):
    races = races_at_mbarriers([iter(announcer), iter(receiver)])
    return [race for race in races if race[0] == "parity"]


def test_messages_in_turn_have_the_right_parity():
    announcer = [twice[0], ("receive", ("answer",), 0), twice[1]]
    assert not parity_faults(announcer, [first, ("announce", ("answer",)), second])


def test_a_writer_two_phases_ahead_is_found():
    assert parity_faults(twice, [("read", "another place"), first, second])  # the reader comes later
    assert parity_faults([twice[0], ("read", "another place"), twice[1]], [first, second])  # it comes in time


def test_a_reader_two_phases_ahead_is_found():
    assert parity_faults(twice, [second])  # it may come before the first message, and take it for the second
