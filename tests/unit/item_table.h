/* SPDX-License-Identifier: Apache-2.0 */
/* The table of the prefill path's items (kernels/cuda/prefill/items.h), as its kernel makes it. */
#ifndef MOE_TESTS_UNIT_ITEM_TABLE_H
#define MOE_TESTS_UNIT_ITEM_TABLE_H

#include <stdlib.h>

#include "kernels/cuda/prefill/items.h"

static inline bool comes_first(const struct moe_items *items, int32_t entry)
{
    return moe_items_is_first(items, entry, moe_items_entry_tiles(items, entry));
}

/* Of entries that stand for several groups the last one may stand for fewer. `offsets` [groups + 1] and the table must
 * outlive the items. */
static inline void fill_table(struct moe_items *items, const int32_t *offsets, struct moe_item_table *table)
{
    items->offsets = offsets;
    items->table = table;
    int32_t at = 0, tiles = 0, first = 0;
    for (int last = 0; last < 2; last++) {
        for (int32_t entry = 0; entry < items->entries; entry++) {
            if (comes_first(items, entry) == (last == 1))
                continue;
            table->tile[at] = tiles;
            table->order[at++] = (uint8_t)entry;
            table->row[entry] = offsets[entry << items->shift];
            tiles += moe_items_entry_tiles(items, entry);
        }
        if (last == 0)
            first = tiles;
    }
    if (at != items->entries)
        abort();
    table->tile[items->entries] = tiles;
    table->row[items->entries] = offsets[items->groups];
    moe_items_finish(items, table, (uint32_t)tiles, (uint32_t)first);
}

#endif
