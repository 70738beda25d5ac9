/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the blocks of the prefill path's wgmma kernel work on, by number. In plain C, so that it can be tested without a
 * GPU.
 *
 * The rows of each group are cut into tiles of up to `nmax` tokens. An item is one tile times one band of weight rows,
 * over the whole of K, in GEMM 1 or in GEMM 2. All items of GEMM 1 come first: so what an item of GEMM 2 reads is the
 * result of items with lower numbers. Items that follow each other run at the same time and should share what they
 * read: in a group, up to MOE_ITEM_PART tiles go through all bands together, the tiles of one band following each
 * other.
 *
 * A group with one tile is done as soon as its weights have come from memory, one with many keeps the tensor cores busy
 * with weights that have come long ago. One kind after the other would take the sum of both times: so the items of
 * groups with one tile are spread evenly among the others.
 *
 * Two blocks of a cluster can take an item together: two tiles of a group with the same band, whose weights each block
 * brings half of for both; or where a tile is left over two bands of it, whose tokens each brings part of for both. The
 * two tiles of a group of up to `joint` rows they take as one, each with half of the band's rows, which has measured
 * faster.
 *
 * As items are long, workers would end up to an item apart. So the last items of GEMM 2 can be cut into slices of K:
 * first comes the first slice of each, then the second of each, and so on. Whoever has the last one adds the others'
 * sums to its own, in the order of slices, whenever they came. They have lower numbers, so that this waits for nothing
 * that comes later either. How many are cut follows from how many items there are (moe_items_finish).
 */
#ifndef MOE_KERNELS_CUDA_PREFILL_ITEMS_H
#define MOE_KERNELS_CUDA_PREFILL_ITEMS_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/packed.h"

enum {
    MOE_BAND_ROWS = 2 * MOE_PACKED_ROWS, /* of weights */
    MOE_ROW_STEP = 16,                   /* tiles are cut at multiples of so many rows of their group */
    MOE_ITEM_PART = 16,                  /* tiles of a group that go through its bands together */
    MOE_ITEM_TABLE = 256,                /* entries at most */
};

/* Through the table a tile's group is found, without a look at memory as long as an entry stands for one group. That is
 * so if there is room for all of them; else each entry stands for 2^shift groups, 16 of 4096, among which the offsets
 * tell. First come the entries with more tiles than groups, then the others. The table takes 2.3 KB, whatever the
 * groups, so that the kernel's shared memory has room for as many stages with all of them. */
struct moe_item_table {
    int32_t tile[MOE_ITEM_TABLE + 1]; /* of all entries before it; then of all */
    int32_t row[MOE_ITEM_TABLE + 1];  /* the first of each entry, in the order of groups; then the end of all */
    int32_t first;                    /* tiles of the entries that come first */
    uint32_t share;                /* of tiles that the others have, in units of 2^-32, rounded up; 0: nothing to mix */
    int32_t cut, slices;           /* so many of GEMM 2's last items, into so many slices each */
    uint8_t order[MOE_ITEM_TABLE]; /* which one, in the order of groups, each entry is */
};

static_assert(MOE_ITEM_TABLE <= UINT8_MAX + 1, "the order has a byte for each");

struct moe_items {
    const int32_t *offsets; /* [groups + 1], the plan's */
    const struct moe_item_table *table;
    int32_t groups, entries, shift;
    int32_t nmax;
    int32_t bands1, bands2; /* of w13 and w2 */
    int32_t blocks;         /* that take an item together: 1 or 2 */
    int32_t joint;          /* rows of a group up to which two blocks take its two tiles as one; 0: they never do */
    int32_t most_slices;    /* of an item that is cut; 1: none is */
    int32_t room;           /* slices, of all items that are cut, whose sums can be left for whoever has the last one */
    int32_t workers;        /* blocks, or pairs of them, that take items */
    bool memory_bound;      /* most groups have one tile */
};

struct moe_item {
    int32_t row;  /* the first of its rows in the plan */
    int32_t rows; /* 1 to nmax, or to joint; 0: nothing (moe_items_at), or in the kernel: there are no more items */
    int32_t tile, group, band;
    bool gemm2;
    bool once;            /* no other tile needs these weights */
    bool shared;          /* by two blocks: the other one has the same band, of another tile */
    bool joint;           /* of two blocks each has half of the band. `tile` is the first of the two that are one */
    bool idle;            /* it is the other block's, and this one only goes along */
    bool early;           /* in the kernel: the next item is taken some time before this one ends */
    int32_t cut;          /* which of the items that are cut; -1: it is whole */
    int8_t slice, slices; /* and which slice of it, of how many */
};

/* Without the arrays, and nothing is cut. The number of items must fit in 31 bits. `joint` is at most 2 * nmax, and 0
 * for one block. */
static inline struct moe_items moe_items_make(int32_t groups, int32_t nmax, int32_t bands1, int32_t bands2,
                                              int32_t blocks, int32_t joint)
{
    struct moe_items items = {NULL, NULL, groups, groups, 0, nmax, bands1, bands2, blocks, joint, 1, 0, 1, false};
    while (items.entries > MOE_ITEM_TABLE)
        items.entries = ((groups - 1) >> ++items.shift) + 1;
    return items;
}

/* As few as can be. */
static MOE_HOST_DEVICE inline int32_t moe_items_tiles(int32_t count, int32_t nmax)
{
    return (int32_t)(((uint32_t)count + nmax - 1) / nmax);
}

/* Of a group's rows those of one of its tiles: tiles are of nearly the same size, the first ones a step longer. */
struct moe_item_rows {
    int32_t first, count;
};

static MOE_HOST_DEVICE inline struct moe_item_rows moe_items_rows(int32_t count, int32_t tiles, int32_t tile)
{
    const uint32_t steps = ((uint32_t)count + MOE_ROW_STEP - 1) / MOE_ROW_STEP, each = steps / (uint32_t)tiles;
    const int32_t longer = (int32_t)(steps - each * (uint32_t)tiles); /* tiles */
    const uint32_t before = each * (uint32_t)tile + (uint32_t)(tile < longer ? tile : longer);
    const uint32_t first = before * MOE_ROW_STEP, most = (each + (tile < longer)) * MOE_ROW_STEP;
    const uint32_t left = (uint32_t)count - first;
    const struct moe_item_rows rows = {(int32_t)first, (int32_t)(most < left ? most : left)};
    return rows;
}

/* How many groups an entry, by number, stands for. */
static MOE_HOST_DEVICE inline int32_t moe_items_entry_groups(const struct moe_items *items, int32_t entry)
{
    const int32_t left = items->groups - (entry << items->shift);
    return left < 1 << items->shift ? left : 1 << items->shift;
}

/* Tiles of an entry's groups: what the table is made of. */
static MOE_HOST_DEVICE inline int32_t moe_items_entry_tiles(const struct moe_items *items, int32_t entry)
{
    const int32_t first = entry << items->shift, groups = moe_items_entry_groups(items, entry);
    int32_t tiles = 0;
    for (int32_t g = first; g < first + groups; g++)
        tiles += moe_items_tiles(items->offsets[g + 1] - items->offsets[g], items->nmax);
    return tiles;
}

/* Whether an entry with so many tiles is one of the first in the table. */
static MOE_HOST_DEVICE inline bool moe_items_is_first(const struct moe_items *items, int32_t entry, int32_t tiles)
{
    return tiles > moe_items_entry_groups(items, entry);
}

/* Where item `at` of a GEMM is in the order of the table. Of the items before it those of the other entries have their
 * share, rounded down; it is one of theirs if with it that is one more. */
static MOE_HOST_DEVICE inline uint32_t moe_items_mix(const struct moe_items *items, int32_t of_tile, uint32_t at)
{
    const uint32_t share = items->table->share;
    const uint32_t others = (uint32_t)((uint64_t)at * share >> 32);
    const bool is_other = (uint32_t)((uint64_t)(at + 1) * share >> 32) > others;
    return is_other ? (uint32_t)(items->table->first * of_tile) + others : at - others;
}

/* Items of a tile; of two blocks, half of what two tiles have in common. */
static MOE_HOST_DEVICE inline int32_t moe_items_of_tile(int32_t bands, int32_t blocks)
{
    return blocks == 2 ? (bands + 1) / 2 : bands;
}

/* Completes a table of so many tiles, of which the first entries have `first`.
 *
 * When all workers have had the same number of GEMM 2's items, those that are left over keep only some of them busy. So
 * as many items are cut, or more, into as many slices as there is room for then, but into two at least; where there is
 * not room even for that, as many as there is room for. If nearly all workers have one of those left over, only drift
 * is to be made good: a quarter as many items as workers are cut. Or none if memory is the limit: when some workers
 * have ended, the others have its speed to themselves. Of two blocks also items past an odd number of bands count,
 * which are nothing. */
static MOE_HOST_DEVICE inline void moe_items_finish(const struct moe_items *items, struct moe_item_table *table,
                                                    uint32_t tiles, uint32_t first)
{
    const uint64_t others = tiles - first;
    table->first = (int32_t)first;
    table->share = first > 0 && others > 0 ? (uint32_t)(((others << 32) + tiles - 1) / tiles) : 0;

    table->cut = 0;
    table->slices = 1;
    if (items->most_slices == 1)
        return;
    const int32_t count = (int32_t)tiles * moe_items_of_tile(items->bands2, items->blocks);
    const int32_t left = count % items->workers;
    int32_t slices = items->most_slices, most = items->workers / 4;
    if (left > 0 && left < items->workers - items->workers / 8) {
        while (slices > 2 && items->room / (slices - 1) < left)
            slices--;
        most = items->workers;
    } else if (items->memory_bound) {
        slices = 1;
    }
    int32_t cut = slices > 1 ? items->room / (slices - 1) : 0;
    cut = cut < most ? cut : most;
    table->cut = cut < count ? cut : count;
    table->slices = slices;
}

/* Each slice counts for itself. */
static MOE_HOST_DEVICE inline int32_t moe_items_count(const struct moe_items *items)
{
    const int32_t more = items->most_slices > 1 ? items->table->cut * (items->table->slices - 1) : 0;
    return items->table->tile[items->entries] *
               (moe_items_of_tile(items->bands1, items->blocks) + moe_items_of_tile(items->bands2, items->blocks)) +
           more;
}

/* Of 32 entries, from `entry` on and `step` apart, how many begin with item `at` of a GEMM or before. On the device by
 * a whole warp, a lane for each. */
static MOE_HOST_DEVICE inline int32_t moe_items_begun(const struct moe_items *items, int32_t of_tile, uint32_t at,
                                                      int32_t entry, int32_t step)
{
#ifdef __CUDA_ARCH__
    uint32_t lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane)); /* so that what follows from it takes no registers elsewhere */
    const int32_t own = entry + (int32_t)lane * step;
    const bool begun = own < items->entries && (uint32_t)(items->table->tile[own] * of_tile) <= at;
    return __popc(__ballot_sync(0xffffffffu, begun));
#else
    int32_t begun = 0;
    for (int32_t own = entry; own < entry + 32 * step && own < items->entries; own += step)
        begun += (uint32_t)(items->table->tile[own] * of_tile) <= at;
    return begun;
#endif
}

/* The last entry that begins with this item or before: others that begin with the same one have no tiles. */
static MOE_HOST_DEVICE inline int32_t moe_items_entry(const struct moe_items *items, int32_t of_tile, uint32_t at)
{
    int32_t entry = 0;
    static_assert(MOE_ITEM_TABLE <= 32 * 32, "two steps find any entry");
    for (int32_t step = 32; step > 0; step /= 32)
        entry += (moe_items_begun(items, of_tile, at, entry, step) - 1) * step;
    return entry;
}

/* What block `block` has of an item; rows is 0 if that is nothing, for any of them. Items come one after another from
 * here, and loading waits for each: hence few divisions. On the device by a whole warp. */
static MOE_HOST_DEVICE inline struct moe_item moe_items_at(const struct moe_items *items, int32_t number, int32_t block)
{
    const int32_t blocks = items->blocks;
    const int32_t items1 = items->table->tile[items->entries] * moe_items_of_tile(items->bands1, blocks);
    struct moe_item item;
    item.gemm2 = number >= items1;
    const int32_t bands = item.gemm2 ? items->bands2 : items->bands1, of_tile = moe_items_of_tile(bands, blocks);
    item.cut = -1;
    item.slice = 0;
    item.slices = 1;
    if (item.gemm2) {
        number -= items1;
        const int32_t cut = items->most_slices > 1 ? items->table->cut : 0;
        const int32_t whole = items->table->tile[items->entries] * of_tile - cut;
        if (cut > 0 && number >= whole) {
            item.slices = (int8_t)items->table->slices;
            for (item.cut = number - whole; item.cut >= cut; item.slice++)
                item.cut -= cut;
            number = whole + item.cut;
        }
    }
    const uint32_t at = moe_items_mix(items, of_tile, (uint32_t)number);

    const int32_t entry = moe_items_entry(items, of_tile, at), place = items->table->order[entry];
    int32_t tile = items->table->tile[entry], own = items->table->tile[entry + 1] - tile;
    item.group = place << items->shift;
    if (items->shift > 0)
        for (;; item.group++, tile += own) {
            own = moe_items_tiles(items->offsets[item.group + 1] - items->offsets[item.group], items->nmax);
            if ((uint32_t)((tile + own) * of_tile) > at)
                break;
        }

    /* As many tiles side by side as there are blocks, with every band, also one past an odd number of them. What is
     * left is a tile with two bands side by side. */
    const uint32_t abreast = (uint32_t)(own / blocks), length = (uint32_t)(of_tile * blocks),
                   in_group = at - (uint32_t)(tile * of_tile);
    const uint32_t most = (uint32_t)(MOE_ITEM_PART / blocks), of_part = most * length;
    int32_t mine;
    item.shared = in_group < abreast * length;
    item.once = own == 1;
    item.idle = item.early = false;
    if (item.shared) {
        const uint32_t part = in_group < of_part ? 0 : in_group / of_part, in_part = in_group - part * of_part;
        const uint32_t first = part * most, left = abreast - first, height = left < most ? left : most;
        const uint32_t band = in_part / height;
        item.band = (int32_t)band;
        mine = (int32_t)(first + in_part - band * height) * blocks + block;
    } else {
        item.band = (int32_t)(in_group - abreast * length) * blocks + block;
        item.idle = item.band >= bands;
        item.band -= item.idle;
        mine = own - 1;
    }
    const int32_t *row = items->shift > 0 ? items->offsets + item.group : items->table->row + place;
    const int32_t count = row[1] - row[0];
    struct moe_item_rows rows = moe_items_rows(count, own, mine);
    item.joint = blocks == 2 && own == 2 && count <= items->joint;
    if (item.joint) {
        rows.first = mine = 0;
        rows.count = count;
        item.once = true;
        item.shared = false;
    }
    item.tile = tile + mine;
    item.row = row[0] + rows.first;
    item.rows = item.band < bands ? rows.count : 0;
    return item;
}

#endif
