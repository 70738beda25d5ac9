/* SPDX-License-Identifier: Apache-2.0 */
/*
 * All buffers of a run stand in one block of device memory, with guard bands between. The block is filled with one byte
 * (0xff: NaN in every float format, -1 in integers; another one in the second run), so that a read of memory that
 * nobody wrote shows as a result that is no number or that changes, and a stray write as a guard that does.
 */
#include <stdlib.h>

#include "tests/checkmoe/checkmoe.h"

void arena_begin(struct arena *arena, moe_context *ctx)
{
    arena->ctx = ctx;
    arena->used = GUARD_BYTES;
    arena->count = 0;
}

int arena_add(struct arena *arena, const char *name, size_t bytes, const void *initial, size_t offset)
{
    size_t begin = (arena->used + 255) / 256 * 256 + offset;

    arena->regions[arena->count] = (struct region){name, begin, bytes, initial};
    arena->used = begin + bytes + GUARD_BYTES;
    return arena->count++;
}

moe_status arena_ready(struct arena *arena)
{
    size_t wanted = arena->used + arena->used / 2;

    if (arena->used <= arena->capacity)
        return MOE_OK;
    arena_free(arena);
    moe_status status = moe_buffer_alloc(arena->ctx, wanted, (void **)&arena->device);
    if (status != MOE_OK)
        return status;
    arena->image = must_alloc(wanted);
    arena->before = must_alloc(wanted);
    arena->capacity = wanted;
    return MOE_OK;
}

moe_status arena_send(struct arena *arena, uint8_t poison)
{
    memset(arena->image, poison, arena->used);
    for (int i = 0; i < arena->count; i++) {
        const struct region *region = &arena->regions[i];

        if (region->initial != NULL && region->bytes > 0)
            memcpy(arena->image + region->offset, region->initial, region->bytes);
    }
    arena_keep(arena);
    return moe_copy_in(arena->ctx, arena->device, arena->image, arena->used, NULL);
}

moe_status arena_fetch(struct arena *arena)
{
    return moe_copy_out(arena->ctx, arena->image, arena->device, arena->used, NULL);
}

void arena_keep(struct arena *arena)
{
    memcpy(arena->before, arena->image, arena->used);
}

moe_status arena_write(struct arena *arena, int region, const void *data)
{
    const struct region *to = &arena->regions[region];

    if (to->bytes == 0)
        return MOE_OK;
    memcpy(arena->image + to->offset, data, to->bytes);
    memcpy(arena->before + to->offset, data, to->bytes);
    return moe_copy_in(arena->ctx, arena->device + to->offset, data, to->bytes, NULL);
}

void *arena_device(const struct arena *arena, int region)
{
    return arena->device + arena->regions[region].offset;
}

void *arena_host(const struct arena *arena, int region)
{
    return arena->image + arena->regions[region].offset;
}

void arena_free(struct arena *arena)
{
    moe_buffer_free(arena->ctx, arena->device);
    free(arena->image);
    free(arena->before);
    arena->device = NULL;
    arena->image = arena->before = NULL;
    arena->capacity = 0;
}
