/* SPDX-License-Identifier: Apache-2.0 */
/* Items of the prefill path's wgmma kernel (kernels/cuda/prefill/items.h), for prefill_ring.py. One layer at a time. */
#include "tests/unit/item_table.h"

int32_t model_setup(int32_t groups, const int32_t *offsets, int32_t bands1, int32_t bands2, int32_t blocks,
                    int32_t joint, int32_t most_slices, int32_t room, int32_t workers, bool memory_bound);
int32_t model_count(void);
int32_t model_cut(void);
void model_item(int32_t number, int32_t block, int32_t *to);

static struct moe_items items;
static struct moe_item_table table;

/* `offsets` [groups + 1] stays the caller's and must outlive the layer. Returns its tiles. */
int32_t model_setup(int32_t groups, const int32_t *offsets, int32_t bands1, int32_t bands2, int32_t blocks,
                    int32_t joint, int32_t most_slices, int32_t room, int32_t workers, bool memory_bound)
{
    items = moe_items_make(groups, 192, bands1, bands2, blocks, joint);
    items.most_slices = most_slices;
    items.room = room;
    items.workers = workers;
    items.memory_bound = memory_bound;
    fill_table(&items, offsets, &table);
    return table.tile[items.entries];
}

int32_t model_count(void)
{
    return moe_items_count(&items);
}

int32_t model_cut(void)
{
    return table.cut;
}

/* The fields that prefill_ring.py names, in its order. */
void model_item(int32_t number, int32_t block, int32_t *to)
{
    const struct moe_item item = moe_items_at(&items, number, block);
    const int32_t fields[] = {item.rows,  item.tile, item.band, item.gemm2, item.shared,
                              item.joint, item.idle, item.cut,  item.slice, item.slices};
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++)
        to[i] = fields[i];
}
