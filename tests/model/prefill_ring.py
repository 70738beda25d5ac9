#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs a model of the blocks of prefill's wgmma kernel, in random orders, and looks for what hangs or mixes stages up.

    prefill_ring.py ITEMS [--seeds FIRST LAST]          ITEMS: items.c, as a shared object

What the warps of a block wait for (kernels/cuda/prefill/wgmma_load.cuh and wgmma_multiply.cuh) rests on a few barriers
in shared memory of which one can only ask for a phase's parity: who is two phases behind takes the one for the other.
Whether that can happen depends on timing that no GPU shows at will. Here each loading warp and each multiplying
warpgroup is a generator that yields what it waits for, a schedule drawn from the seed picks who goes on, some of them
slow, and copies are complete when the schedule says so. What loads and multiplies follows the kernel's functions of the
same names, step by step: who changes those changes these. Arrivals at the other block of a pair come there some time
later, in the order in which they were sent; were they to overtake each other, EMPTY would get too many. Not in the
model: lanes, each of which waits for itself, the order of memory, and the barriers by which a pair's first block sends
numbers (here a list).

Each seed draws a layer and a grid, and must come to its end with every item done once, of its own operands. Then known
mistakes are made in the model, and each must be found, or the model could not tell a right protocol from a wrong one.
"""
import argparse
import ctypes
import random
import sys

STAGES, SLOTS, NUMBERS, WARPS = 4, 2, 8, 4
ROW_STEP, BAND_ROWS, TILE_ROWS, JOINT = 16, 256, 128, 256
SUM_STAGES, SUM_STEPS, JOINT_SUM_STEPS, SUM_UNIT = 4, 3, 4, 4096
ROW_BYTES = 128
OWN, LENT, UNSETTLED = range(3)
FIELDS = "rows tile band gemm2 shared joint idle cut slice slices".split()

MISTAKES = {
    "short slices": "a slice of an item that is cut has fewer blocks of K than there are loading warps",
    "one arrives for all": "who gathers waits for a lent stage of GEMM 1, but the stage's own warp arrives for all",
    "told too soon": "a slot is written when the loading warps are done with it, whoever multiplies",
    "sent unwritten": "a stage that was lent is passed on before the tile in it has been written",
    "other first": "in the second block of a pair, of a stage that was lent the first one hears first",
}


class Wrong(Exception):
    pass


def expect(condition, *what):
    if not condition:
        raise Wrong(*what)


class Barrier:
    """An mbarrier: a phase is over when all have arrived and all bytes said to come have come."""

    def __init__(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, times=1, expected=0):
        expect(self.pending >= times, "too many arrivals")
        self.bytes += expected
        self.pending -= times
        self._turn()

    def complete(self, count):
        self.bytes -= count
        self._turn()

    def _turn(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count

    def waiting(self, parity):
        """What a thread that waits for the phase of this parity asks for."""
        return lambda: self.phase % 2 != parity


class Place:
    def __init__(self, size):
        self.size, self.at, self.parity = size, 0, 0

    def next(self):
        self.at += 1
        if self.at == self.size:
            self.at, self.parity = 0, self.parity ^ 1


class Item:
    def __init__(self, layer, number, block):
        self.number = number
        self.early = False
        if number >= layer.count:
            for field in FIELDS:
                setattr(self, field, 0)
            self.cut = -1
            return
        values = (ctypes.c_int32 * len(FIELDS))()
        layer.model.model_item(number, block, values)
        for field, value in zip(FIELDS, values):
            setattr(self, field, value)

    @property
    def steps(self):
        return -(-self.rows // ROW_STEP)


class Layer:
    """What is drawn from a seed, and what all blocks share."""

    def __init__(self, model, seed, mistake):
        self.model, self.mistake = model, mistake
        self.random = random.Random(seed)
        draw = self.random.choice
        self.blocks = draw([1, 2])  # that take an item together
        self.ordered = self.blocks == 2 or draw([False, True])
        rows = [draw([0, 1, 16, 30, 100, 192, 193, 200, 208, 225, 256, 257, 300, 400, 600])
                for _ in range(draw([1, 2, 3, 5, 8]))]
        self.offsets = (ctypes.c_int32 * (len(rows) + 1))(*(sum(rows[:i]) for i in range(len(rows) + 1)))
        self.hidden = draw([64, 128, 192, 256, 320, 384, 448, 512, 600])
        self.intermediate = draw([64, 96, 128, 160, 200, 256, 320])
        self.k1, self.k2 = self.random.randint(1, 9), self.random.randint(1, 9)  # blocks of K, whatever the sizes
        self.memory_bound = self.random.random() < 0.3
        most_slices, room = 1, 0
        if self.ordered and (draw([False, True]) or mistake == "short slices"):
            most_slices, room = draw([2, 3, 4]), draw([0, 1, 2, 5, 10, 100])
            few, many = (most_slices, 7) if mistake == "short slices" else (8 * most_slices, 40)
            self.k2 = self.random.randint(few, many)
        self.clusters = draw([1, 1, 2, 3, 5])
        self.bands1 = -(-2 * self.intermediate // BAND_ROWS)
        self.tiles = model.model_setup(
            len(rows), self.offsets, self.bands1, -(-self.hidden // BAND_ROWS), self.blocks,
            JOINT if self.blocks == 2 and draw([False, True]) else 0, most_slices, room, self.clusters,
            self.memory_bound)
        self.count = model.model_count()
        self.taken = 0
        self.finished, self.all_finished = [0] * (self.tiles + 1), 0
        self.summed = {}  # of slices that are cut, warps that have left their sums
        self.copies = []  # on their way: what to do when they are complete
        self.results = []
        self.slow = draw([0, 0.1, 0.5])  # how often who has come a step further pauses

    def weight_rows(self, item):
        return self.hidden if item.gemm2 else 2 * self.intermediate

    def has_weights(self, item, half, rank):
        first = rank * TILE_ROWS + half * TILE_ROWS // 2 if item.joint else half * TILE_ROWS
        return not item.idle and item.band * BAND_ROWS + first < self.weight_rows(item)


class Stages:
    """Those of an item (item_stages in wgmma_block.cuh)."""

    def __init__(self, layer, item):
        total = layer.k2 if item.gemm2 else layer.k1
        self.first, self.blocks, self.sums = 0, total, 0
        self.lent = max(2, WARPS - total) if item.gemm2 else 1
        if item.cut < 0:
            return
        each = -(-total // item.slices)
        self.first = item.slice * each
        self.blocks = min(each, total - self.first)
        if item.slice < item.slices - 1:
            self.lent = 0
        else:
            self.sums = item.slice * SUM_STAGES


class Block:
    def __init__(self, layer, rank):
        self.layer, self.rank = layer, rank
        self.full = [Barrier(1 if layer.ordered else 1 + 32 * WARPS) for _ in range(STAGES)]
        self.empty = [Barrier(8 * layer.blocks) for _ in range(STAGES)]
        self.written = [Barrier(8) for _ in range(STAGES)]
        self.slot_full = [Barrier(1) for _ in range(SLOTS)]
        self.slot_empty = [Barrier(128 if layer.mistake == "told too soon" else 384) for _ in range(SLOTS)]
        self.items = [None] * SLOTS
        self.numbers = []  # of items, from the pair's first block
        self.next = None
        self.content = [{} for _ in range(STAGES)]
        self.pair = [self]
        self.sent = []  # arrivals on their way to the other block

    def tell_empty(self, block, stage, times):
        """Arrives on EMPTY of this block or of the other one."""
        if block is self:
            block.empty[stage].arrive(times)
            return
        self.sent.append(lambda: block.empty[stage].arrive(times))
        self.layer.copies.append(lambda: self.sent.pop(0)())


class Part:
    """A loading warp, or a multiplying warpgroup."""

    def __init__(self, block):
        self.block, self.layer = block, block.layer
        self.stage, self.slot = Place(STAGES), Place(SLOTS)

    def pause(self):
        return self.layer.random.random() < self.layer.slow


class Loader(Part):
    def __init__(self, block, warp):
        super().__init__(block)
        self.warp = warp
        self.state, self.lent_parity, self.tile = OWN, 0, -1
        self.results_there = False

    def copy(self, blocks, stage, key, value, count, arrivals=0):
        """To a stage of these blocks; when it is complete, `count` bytes are there, or so many threads arrive."""
        for block in blocks:
            def complete(block=block):
                block.content[stage][key] = value
                if arrivals:
                    block.full[stage].arrive(arrivals)
                else:
                    block.full[stage].complete(count)
            self.layer.copies.append(complete)

    def send_tile(self):
        if self.state != LENT:
            return
        if self.layer.mistake != "sent unwritten":
            yield self.block.written[self.warp].waiting(self.lent_parity)
        self.lent_parity ^= 1
        yield from self.give_back()
        self.state = UNSETTLED if self.tile >= 0 else OWN

    def give_back(self):
        first = 0 if self.layer.mistake == "other first" else self.block.rank
        for block in self.block.pair[first:] + self.block.pair[:first]:
            self.block.tell_empty(block, self.warp, 8)
            if self.pause():
                yield None

    def settle(self):
        if self.state == UNSETTLED:
            self.layer.finished[self.tile] += 1
            self.layer.all_finished += 1
            self.state = OWN

    def lend(self, item, part):
        self.block.content[self.stage.at]["lent"] = (item.number, part)
        self.tile = -1 if item.gemm2 or item.idle else item.tile
        self.state = LENT
        self.block.full[self.stage.at].arrive()

    def await_results(self, item):
        layer = self.layer
        self.results_there = layer.all_finished == layer.tiles * layer.bands1
        if not self.results_there:
            parts = 2 if layer.blocks == 2 and item.joint else 1
            yield lambda: layer.finished[item.tile] >= layer.bands1 * parts

    def load_operands(self, item, k, gathered):
        layer, block, at = self.layer, self.block, self.stage.at
        paired, value = layer.blocks == 2, (item.number, k)
        shared = paired and item.shared
        packed = -(-layer.weight_rows(item) // 64) * 64
        weights = [min(TILE_ROWS, max(0, packed - item.band * BAND_ROWS - m * TILE_ROWS)) * ROW_BYTES for m in (0, 1)]
        steps = 0 if gathered else item.steps
        tiles = [block.rank] if item.joint else [0, 1]
        block.full[at].arrive(1, sum(weights[m] for m in tiles) + steps * ROW_STEP * ROW_BYTES)
        for m in [block.rank] if shared else tiles:
            if weights[m]:
                self.copy(block.pair if shared else [block], at, ("weights", m), value, weights[m])
        first, end = 0, steps
        if paired and not shared:
            split = min(steps, (steps + 7) // 8 * 4)
            first, end = (0, split) if block.rank == 0 else (split, steps)
        for step in range(first, end):
            self.copy([block] if shared else block.pair, at, ("tokens", step), value, ROW_STEP * ROW_BYTES)

    def load_sums(self, item, at):
        layer, block = self.layer, self.block
        most, size = (JOINT_SUM_STEPS, 1) if item.joint else (SUM_STEPS, 2)
        count = min(max(item.steps - at % SUM_STAGES * most, 0), most) * size * SUM_UNIT
        there = [half for half in (0, 1) if count and layer.has_weights(item, half, block.rank)]
        if there:
            yield lambda: layer.summed.get((item.cut, block.rank), 0) == 8 * (item.slices - 1)
        block.full[self.stage.at].arrive(1, count * len(there))
        for half in there:
            self.copy([block], self.stage.at, ("sums", half), (item.number, at), count)
        self.state, self.tile = LENT, -1

    def load_sums_and_lend(self, item):
        of = Stages(self.layer, item)
        for i in range(of.sums + of.lent):
            if self.warp == self.stage.at:
                yield from self.send_tile()
                expect(self.state == OWN, "a tile has not been sent or settled")
                yield self.block.empty[self.stage.at].waiting(self.stage.parity ^ 1)
                if i < of.sums:
                    yield from self.load_sums(item, i)
                else:
                    self.lend(item, i - of.sums)
            self.stage.next()

    def load(self, item):
        layer, block = self.layer, self.block
        there = item.rows > 0
        gathered = there and not layer.ordered and not item.gemm2
        of = Stages(layer, item)
        first, end = (of.first, of.first + of.blocks) if there else (0, 0)
        stop = end + (of.lent if of.sums == 0 else 0) if there else STAGES
        ready = not item.gemm2 or self.results_there
        take_at = max(end - 2 * STAGES, first) if item.early else min(end, stop - 1)
        for k in range(first, stop):
            at = self.stage.at
            own = self.warp == at
            if own:
                self.settle()
                yield from self.send_tile()
                if not ready or k >= end:
                    self.settle()
                if not ready and there:
                    yield from self.await_results(item)
                ready = True
            if there:
                if self.warp == 0 and k == take_at:
                    self.take()
                if own or not layer.ordered:
                    yield block.empty[at].waiting(self.stage.parity ^ 1)
                if not own and layer.ordered:
                    self.settle()
                if own and k >= end:
                    self.lend(item, k - end)
                elif own:
                    self.load_operands(item, k, gathered)
                if gathered and k < end:
                    self.copy([block], at, ("gathered", self.warp), (item.number, k), 0, arrivals=32)
                elif not layer.ordered and layer.mistake != "one arrives for all":
                    block.full[at].arrive(32)
                elif not layer.ordered and own:
                    block.full[at].arrive(32 * WARPS)
            self.stage.next()
            if self.pause():
                yield None
        if there and item.cut >= 0 and item.slice == item.slices - 1:
            yield from self.load_sums_and_lend(item)

    def take(self):
        if self.block.rank == 0:
            expect(self.block.next is None, "two items taken at once")
            self.block.next = self.layer.taken
            self.layer.taken += 1

    def tell(self):
        layer, block = self.layer, self.block
        while True:
            if block.rank > 0:
                yield lambda: block.numbers
                number = block.numbers.pop(0)
            else:
                number, block.next = block.next, None
            expect(number is not None, "no item has been taken")
            item = Item(layer, number, block.rank)
            if number >= layer.count or layer.blocks == 1 or item.rows > 0:
                break
            self.take()
        item.early = not layer.memory_bound and number + 2 * layer.clusters < layer.count
        if layer.blocks == 2 and block.rank == 0:
            block.pair[1].numbers.append(number)
            expect(len(block.pair[1].numbers) <= NUMBERS, "the second block is too far behind")
        yield block.slot_empty[self.slot.at].waiting(self.slot.parity ^ 1)
        block.items[self.slot.at] = item
        block.slot_full[self.slot.at].arrive()

    def run(self):
        more = True
        while more:
            if self.warp == 0:
                yield from self.tell()
            yield self.block.slot_full[self.slot.at].waiting(self.slot.parity)
            item = self.block.items[self.slot.at]
            more = item.rows > 0
            yield from self.load(item)
            self.block.slot_empty[self.slot.at].arrive(32)
            self.slot.next()
        expect(self.state == OWN, "a tile was left in its stage")


class Multiplier(Part):
    def __init__(self, block, half):
        super().__init__(block)
        self.half = half

    def wait_full(self):
        yield self.block.full[self.stage.at].waiting(self.stage.parity)
        if self.pause():
            yield None

    def release(self):
        for block in self.block.pair:
            self.block.tell_empty(block, self.stage.at, 4)

    def pass_back(self):
        self.block.written[self.stage.at].arrive(4)

    def pass_back_sums(self):
        self.pass_back()

    def go_along(self, blocks, lent):
        for i in range(blocks + lent):
            yield from self.wait_full()
            if i < blocks:
                self.release()
            else:
                self.pass_back()
            self.stage.next()

    def say_summed(self, item):
        key = (item.cut, self.block.rank)
        self.layer.summed[key] = self.layer.summed.get(key, 0) + 4

    def holds(self, key, value):
        content = self.block.content[self.stage.at]
        expect(content.get(key) == value, f"{key} of a stage: {content.get(key)} for {value}")

    def multiply(self, item, of, gathered):
        for k in range(of.first, of.first + of.blocks):
            yield from self.wait_full()
            self.holds(("weights", self.block.rank if item.joint else self.half), (item.number, k))
            for part in range(WARPS if gathered else item.steps):
                self.holds(("gathered" if gathered else "tokens", part), (item.number, k))
            self.release()
            self.stage.next()

    def add_sums(self, item, of):
        most = JOINT_SUM_STEPS if item.joint else SUM_STEPS
        for at in range(of.sums):
            yield from self.wait_full()
            if item.steps > at % SUM_STAGES * most:
                self.holds(("sums", self.half), (item.number, at))
            self.pass_back_sums()
            self.stage.next()

    def finish(self, item, of):
        part = self.half if item.gemm2 else 0
        yield from self.go_along(0, part)
        yield from self.wait_full()
        self.holds("lent", (item.number, part))
        self.pass_back()
        self.stage.next()
        yield from self.go_along(0, of.lent - 1 - part)

    def run(self):
        layer, block = self.layer, self.block
        while True:
            yield block.slot_full[self.slot.at].waiting(self.slot.parity)
            item = block.items[self.slot.at]
            if layer.mistake != "told too soon":
                block.slot_empty[self.slot.at].arrive(128)
            self.slot.next()
            if item.rows == 0:
                break
            of = Stages(layer, item)
            if not layer.has_weights(item, self.half, block.rank):
                yield from self.go_along(of.blocks, of.sums + of.lent)
            else:
                yield from self.multiply(item, of, not layer.ordered and not item.gemm2)
                if of.lent:
                    yield from self.add_sums(item, of)
                    yield from self.finish(item, of)
                    layer.results.append((item.number, block.rank, self.half))
            if of.lent == 0:
                self.say_summed(item)


def schedule(layer, parts):
    """Until all have ended: in each round some go on that can, some more seldom than others, and copies complete."""
    waits = {part: None for part in parts}
    share = {part: layer.random.choice([1, 1, 1, 0.1]) for part in parts}
    while waits:
        moved = False
        for everyone in (False, True):
            for part, condition in list(waits.items()):
                if not everyone and layer.random.random() > share[part]:
                    continue
                if condition is not None and not condition():
                    continue
                moved = True
                try:
                    waits[part] = next(part)
                except StopIteration:
                    del waits[part]
            if moved:
                break
        if layer.copies:
            moved = True
            for _ in range(layer.random.randint(0, len(layer.copies))):
                layer.copies.pop(layer.random.randrange(len(layer.copies)))()
        expect(moved or not waits, f"{len(waits)} of {len(parts)} wait for ever")


def run(model, seed, mistake=None):
    layer = Layer(model, seed, mistake)
    parts = []
    for _ in range(layer.clusters):
        pair = [Block(layer, rank) for rank in range(layer.blocks)]
        pair[0].next = layer.taken
        layer.taken += 1
        for block in pair:
            block.pair = pair
            parts += [Loader(block, warp).run() for warp in range(WARPS)]
            parts += [Multiplier(block, half).run() for half in (0, 1)]
    schedule(layer, parts)
    results = []
    for number in range(layer.count):
        for rank in range(layer.blocks):
            item = Item(layer, number, rank)
            whole = item.cut < 0 or item.slice == item.slices - 1
            results += [(number, rank, half) for half in (0, 1)
                        if item.rows > 0 and whole and layer.has_weights(item, half, rank)]
    expect(sorted(layer.results) == results, "not every item was done once")
    expect(layer.all_finished == layer.tiles * layer.bands1, "not all results of GEMM 1 were told")
    return layer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("items")
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 1000))
    args = parser.parse_args()
    model = ctypes.CDLL(args.items)
    seeds = range(*args.seeds)
    done = {"items": 0, "gathered": 0, "paired": 0, "cut": 0}
    for seed in seeds:
        try:
            layer = run(model, seed)
        except Wrong as wrong:
            sys.exit(f"seed {seed}: {wrong}")
        done["items"] += layer.count
        done["gathered"] += not layer.ordered
        done["paired"] += layer.blocks == 2
        done["cut"] += model.model_cut() > 0
    print(f"{len(seeds)} layers:", ", ".join(f"{count} {name}" for name, count in done.items()))
    if 0 in done.values():
        sys.exit("not every kind of layer was drawn")
    missed = []
    for mistake, what in MISTAKES.items():
        for seed in seeds:
            try:
                run(model, seed, mistake)
            except Wrong as wrong:
                print(f"found at seed {seed}: {what}: {wrong}")
                break
        else:
            missed.append(f"not found: {what}")
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
