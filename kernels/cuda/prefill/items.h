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
 */
#ifndef MOE_KERNELS_CUDA_PREFILL_ITEMS_H
#define MOE_KERNELS_CUDA_PREFILL_ITEMS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/packed.h"

enum {
    MOE_BAND_ROWS = 2 * MOE_PACKED_ROWS, /* of weights */
    MOE_ROW_STEP = 16,                   /* rows of tokens are multiplied in multiples of this */
    MOE_ITEM_PART = 16,
    MOE_ITEM_TABLE = 512, /* entries at most */
};

/* Through the table a tile's group is found. An entry stands for 2^shift groups: one as long as there is room for all
 * of them, eight of 4096. Among those the group is found by their counts. The table takes 2 KB, whatever the groups, so
 * that the kernel's shared memory has room for as many stages with all of them. */
struct moe_items {
    const int32_t *offsets;    /* [groups + 1], the plan's */
    const int32_t *first_tile; /* [entries + 1]: tiles of all groups before an entry's; then of all */
    int32_t groups, entries, shift;
    int32_t nmax;
    int32_t bands1, bands2; /* of w13 and w2 */
};

struct moe_item {
    int32_t row;  /* the first of its rows in the plan */
    int32_t rows; /* 1 to nmax; the kernel has 0 for: there are no more items */
    int32_t tile, group, band;
    bool gemm2;
};

/* Without the arrays. The number of items must fit in 31 bits. */
static inline struct moe_items moe_items_make(int32_t groups, int32_t nmax, int32_t bands1, int32_t bands2)
{
    struct moe_items items = {NULL, NULL, groups, groups, 0, nmax, bands1, bands2};
    while (items.entries > MOE_ITEM_TABLE)
        items.entries = ((groups - 1) >> ++items.shift) + 1;
    return items;
}

/* As few as can be. */
static MOE_HOST_DEVICE inline int32_t moe_items_tiles(int32_t count, int32_t nmax)
{
    return (int32_t)(((uint32_t)count + nmax - 1) / nmax);
}

/* Where a group's tile begins among its rows: tiles are of nearly the same size, the first ones a step longer. */
static MOE_HOST_DEVICE inline int32_t moe_items_first_row(int32_t count, int32_t tiles, int32_t tile)
{
    const int32_t steps = (int32_t)(((uint32_t)count + MOE_ROW_STEP - 1) / MOE_ROW_STEP);
    const int32_t longer = steps % tiles, before = steps / tiles * tile + (tile < longer ? tile : longer);
    return before < steps ? before * MOE_ROW_STEP : count;
}

/* Tiles of an entry's groups: what the table is made of. */
static MOE_HOST_DEVICE inline int32_t moe_items_entry_tiles(const struct moe_items *items, int32_t entry)
{
    const int32_t first = entry << items->shift, left = items->groups - first;
    const int32_t groups = left < 1 << items->shift ? left : 1 << items->shift;
    int32_t tiles = 0;
    for (int32_t g = first; g < first + groups; g++)
        tiles += moe_items_tiles(items->offsets[g + 1] - items->offsets[g], items->nmax);
    return tiles;
}

static MOE_HOST_DEVICE inline int32_t moe_items_count(const struct moe_items *items)
{
    return items->first_tile[items->entries] * (items->bands1 + items->bands2);
}

static MOE_HOST_DEVICE inline struct moe_item moe_items_at(const struct moe_items *items, int32_t number)
{
    const int32_t items1 = items->first_tile[items->entries] * items->bands1;
    const bool gemm2 = number >= items1;
    const int32_t bands = gemm2 ? items->bands2 : items->bands1, at = gemm2 ? number - items1 : number;
    const int32_t tile = at / bands; /* one of the same group */

    /* The last entry that begins with this tile or before: others that begin with the same one have no tiles. */
    int32_t entry = 0, end = items->entries;
    while (end - entry > 1) {
        const int32_t middle = (entry + end) / 2;
        if (items->first_tile[middle] <= tile)
            entry = middle;
        else
            end = middle;
    }
    int32_t group = entry << items->shift, before = items->first_tile[entry], first, count, own;
    for (;; group++, before += own) {
        first = items->offsets[group];
        count = items->offsets[group + 1] - first;
        own = moe_items_tiles(count, items->nmax);
        if (tile - before < own)
            break;
    }

    const int32_t in_group = at - before * bands, part = in_group / (MOE_ITEM_PART * bands) * MOE_ITEM_PART;
    const int32_t in_part = in_group - part * bands, left = own - part;
    const int32_t height = left < MOE_ITEM_PART ? left : (int32_t)MOE_ITEM_PART;
    const int32_t mine = part + in_part % height, row = moe_items_first_row(count, own, mine);
    struct moe_item item;
    item.row = first + row;
    item.rows = moe_items_first_row(count, own, mine + 1) - row;
    item.tile = before + mine;
    item.group = group;
    item.band = in_part / height;
    item.gemm2 = gemm2;
    return item;
}

#endif
