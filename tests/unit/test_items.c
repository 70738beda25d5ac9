/* SPDX-License-Identifier: Apache-2.0 */
/* The prefill path's items by number: each tile of tokens meets each band of both GEMMs exactly once, in an order in
 * which nothing waits for what comes later, groups with one tile spread evenly among the others; the tiles cut up the
 * plan's rows without a gap; and where the last items are cut each slice of them comes once, and its last one last. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "kernels/cuda/common/tiles.h"
#include "kernels/cuda/prefill/items.h"
#include "tests/unit/item_table.h"

/* What is known of a tile from the first item that had it. */
struct tile {
    int32_t row, rows, group;
    int32_t bands[2]; /* seen so far */
};

/* The order: GEMMs, groups, parts of a group's tiles, bands, tiles. */
static bool follows(const struct moe_item *a, const struct moe_item *b, int32_t first_tile)
{
    if (a->gemm2 != b->gemm2 || a->group != b->group)
        return a->gemm2 != b->gemm2 ? b->gemm2 : a->group < b->group;
    const int32_t part_a = (a->tile - first_tile) / MOE_ITEM_PART, part_b = (b->tile - first_tile) / MOE_ITEM_PART;
    if (part_a != part_b || a->band != b->band)
        return part_a != part_b ? part_a < part_b : a->band < b->band;
    return a->tile < b->tile;
}

static int by_row(const void *a, const void *b)
{
    const struct tile *one = a, *other = b;
    if (one->row == other->row)
        return (one->rows > other->rows) - (one->rows < other->rows);
    return one->row > other->row ? 1 : -1;
}

/* Two tiles that are one: all rows are the first one's. */
static bool is_joint(int32_t rows, int32_t nmax, int32_t joint)
{
    return rows > nmax && rows <= joint;
}

static void check_rows(const int32_t *offsets, int32_t groups, int32_t nmax, int32_t joint, struct tile *tiles,
                       int32_t count)
{
    int32_t tile = 0;
    qsort(tiles, (size_t)count, sizeof *tiles, by_row);
    for (int32_t g = 0; g < groups; g++) {
        int32_t row = offsets[g], most = 0, least = INT32_MAX;
        const int32_t first = tile;
        if (is_joint(offsets[g + 1] - row, nmax, joint)) {
            assert_true(tile + 1 < count && tiles[tile].group == g && tiles[tile + 1].group == g);
            assert_true(tiles[tile].row == row && tiles[tile].rows == offsets[g + 1] - row);
            assert_true(tiles[tile + 1].row == offsets[g + 1] && tiles[tile + 1].rows == 0);
            tile += 2;
            continue;
        }
        for (; tile < count && tiles[tile].group == g; tile++) {
            assert_int_equal(tiles[tile].row, row);
            assert_int_equal((row - offsets[g]) % MOE_ROW_STEP, 0);
            assert_in_range(tiles[tile].rows, 1, nmax);
            const int32_t steps = (tiles[tile].rows + MOE_ROW_STEP - 1) / MOE_ROW_STEP;
            most = steps > most ? steps : most;
            least = steps < least ? steps : least;
            row += tiles[tile].rows;
        }
        assert_int_equal(row, offsets[g + 1]);
        assert_int_equal(tile - first, (row - offsets[g] + nmax - 1) / nmax);
        assert_true(tile == first || most - least <= 1);
    }
    assert_int_equal(tile, count);
}

/* Two blocks have two tiles of a group with the same band, or as one, each with half of the band; or a tile with two
 * bands; or the second one goes along. */
static void check_pair(const struct moe_item *a, const struct moe_item *b, int32_t bands)
{
    assert_false(a->idle);
    assert_true(a->gemm2 == b->gemm2 && a->group == b->group && a->shared == b->shared && a->joint == b->joint);
    if (a->shared) {
        assert_true(a->band == b->band && a->tile + 1 == b->tile && !b->idle && !a->joint);
        return;
    }
    assert_true(a->tile == b->tile && a->row == b->row && a->rows == b->rows);
    if (a->joint) {
        assert_true(a->band == b->band && !b->idle && a->once);
    } else {
        assert_int_equal(b->band, b->idle ? a->band : a->band + 1);
        assert_true(!b->idle || a->band == bands - 1);
    }
}

static void check_items_of(const int32_t *offsets, int32_t groups, int32_t nmax, int32_t bands1, int32_t bands2,
                           int32_t blocks, int32_t joint)
{
    struct moe_item_table table;
    struct moe_items items = moe_items_make(groups, nmax, bands1, bands2, blocks, joint);
    assert_in_range(items.entries, 1, MOE_ITEM_TABLE);
    fill_table(&items, offsets, &table);
    const int32_t count = moe_items_count(&items), tiles = table.tile[items.entries];
    const size_t bands = (size_t)(bands1 + bands2);
    assert_int_equal(count, tiles * ((bands1 + blocks - 1) / blocks + (bands2 + blocks - 1) / blocks));
    assert_true(tiles <= moe_max_tiles(offsets[groups], groups, nmax));

    struct tile *known = calloc((size_t)tiles + 1, sizeof *known);
    bool *seen = calloc((size_t)tiles * bands + 1, sizeof *seen);
    assert_true(known != NULL && seen != NULL);
    struct moe_item last_of[2] = {{.group = -1}, {.group = -1}}; /* of those that come first in the table, of others */
    int32_t first_tile[2] = {0, 0};                              /* of its group */
    int32_t so_far[2] = {0, 0};                                  /* items */
    for (int32_t at = 0; at < count * blocks; at++) {
        const int32_t number = at / blocks, block = at % blocks;
        const struct moe_item item = moe_items_at(&items, number, block);
        /* Past an odd number of bands there is nothing for two tiles. */
        assert_true(item.rows > 0 ||
                    (blocks == 2 && (item.shared || item.joint) && (item.gemm2 ? bands2 : bands1) % 2 == 1));
        if (block == 1) {
            const struct moe_item other = moe_items_at(&items, number, 0);
            assert_true((item.rows > 0) == (other.rows > 0));
            if (item.rows > 0)
                check_pair(&other, &item, item.gemm2 ? bands2 : bands1);
        }
        if (item.rows == 0 || item.idle)
            continue;
        assert_in_range(item.tile, 0, tiles - 1);
        assert_in_range(item.group, 0, groups - 1);
        assert_in_range(item.band, 0, (item.gemm2 ? bands2 : bands1) - 1);
        /* A block's half of the band stands for one of the two tiles with all of it. */
        const int32_t group_rows = offsets[item.group + 1] - offsets[item.group];
        assert_int_equal(item.joint, is_joint(group_rows, nmax, joint));
        const int32_t own = item.tile + (item.joint ? block : 0);
        struct tile *tile = &known[own];
        bool *once = &seen[(size_t)own * bands + (size_t)(item.gemm2 ? bands1 : 0) + (size_t)item.band];
        assert_false(*once);
        *once = true;

        /* What GEMM 2 reads has been taken by then. */
        if (item.gemm2)
            assert_int_equal(tile->bands[0], bands1);
        if (tile->bands[0] == 0) {
            tile->row = item.row + (own > item.tile ? item.rows : 0);
            tile->rows = own > item.tile ? 0 : item.rows;
            tile->group = item.group;
        }
        tile->bands[item.gemm2]++;
        assert_int_equal(item.row + (own > item.tile ? item.rows : 0), tile->row);
        assert_int_equal(own > item.tile ? 0 : item.rows, tile->rows);
        assert_int_equal(item.group, tile->group);

        if (block == 1)
            continue;
        const int other = !comes_first(&items, item.group >> items.shift);
        const struct moe_item last = last_of[other];
        if (item.group != last.group)
            first_tile[other] = item.tile;
        /* A tile that is left over comes after all pairs of its group. */
        const bool left_over = item.group == last.group && item.gemm2 == last.gemm2 && last.shared && !item.shared;
        if (last.group >= 0)
            assert_true(left_over ? last.tile < item.tile : follows(&last, &item, first_tile[other]));
        last_of[other] = item;
        assert_int_equal(item.once, item.joint || moe_items_tiles(group_rows, nmax) == 1);

        /* Both kinds are always as far as each other, to within an item. */
        so_far[other]++;
        if (blocks == 1) {
            const int32_t tiles_of[2] = {table.first, tiles - table.first};
            const int64_t ahead = (int64_t)so_far[0] * tiles_of[1] - (int64_t)so_far[1] * tiles_of[0];
            assert_true(ahead >= 0 && ahead < tiles);
        }
    }
    for (size_t i = 0; i < (size_t)tiles * bands; i++)
        assert_true(seen[i]);
    check_rows(offsets, groups, nmax, joint, known, tiles);
    free(seen);
    free(known);
}

/* With some items cut the others are what they were, and a slice is the item that it is cut from. */
static void check_cut(const int32_t *offsets, int32_t groups, int32_t bands2, int32_t blocks, int32_t most_slices,
                      int32_t room, int32_t workers, bool memory_bound)
{
    struct moe_item_table table, table_with;
    struct moe_items items = moe_items_make(groups, 192, 2, bands2, blocks, blocks == 2 ? 256 : 0), with = items;
    fill_table(&items, offsets, &table);
    with.most_slices = most_slices;
    with.room = room;
    with.workers = workers;
    with.memory_bound = memory_bound;
    fill_table(&with, offsets, &table_with);
    const int32_t count = moe_items_count(&items), cut = table_with.cut, slices = table_with.slices;
    const int32_t count2 = table.tile[items.entries] * moe_items_of_tile(bands2, blocks);

    assert_in_range(slices, 1, most_slices);
    assert_true(cut == 0 || slices > 1);
    assert_true(cut <= count2 && cut * (slices - 1) <= room);
    /* What is left over is cut if there is room for it. */
    const int32_t left = count2 % workers;
    if (most_slices > 1 && left > 0 && left <= room && left < workers - workers / 8)
        assert_true(cut >= left);
    if (memory_bound && left == 0)
        assert_int_equal(cut, 0);

    assert_int_equal(moe_items_count(&with), count + cut * (slices - 1));
    for (int32_t number = 0; number < moe_items_count(&with); number++) {
        const int32_t behind = number - (count - cut); /* those that are whole */
        const int32_t whole = behind >= 0 ? count - cut + behind % cut : number;
        for (int32_t block = 0; block < blocks; block++) {
            const struct moe_item item = moe_items_at(&with, number, block), same = moe_items_at(&items, whole, block);
            assert_true(same.cut == -1 && same.slice == 0 && same.slices == 1);
            assert_int_equal(item.cut, behind >= 0 ? behind % cut : -1);
            assert_int_equal(item.slice, behind >= 0 ? behind / cut : 0);
            assert_int_equal(item.slices, behind >= 0 ? slices : 1);
            assert_true(item.gemm2 == same.gemm2 && item.group == same.group && item.tile == same.tile);
            assert_true(item.band == same.band && item.row == same.row && item.rows == same.rows);
            assert_true(item.shared == same.shared && item.joint == same.joint && item.idle == same.idle);
            assert_true(item.once == same.once && (behind < 0 || item.gemm2));
        }
    }
}

static void check_items(const int32_t *offsets, int32_t groups, int32_t nmax, int32_t bands1, int32_t bands2)
{
    check_items_of(offsets, groups, nmax, bands1, bands2, 1, 0);
    check_items_of(offsets, groups, nmax, bands1, bands2, 2, 0);
    check_items_of(offsets, groups, nmax, bands1, bands2, 2, nmax / 3 * 4);
}

static uint32_t next_random(uint32_t *state)
{
    *state = *state * 1664525 + 1013904223;
    return *state >> 8;
}

/* Counts of all kinds, a third of them none. */
static void every_band_once(void **state)
{
    (void)state;
    static const int32_t group_counts[] = {1, 2, 3, 8, 60, 128, 255, 256, 257, 512, 513, 1000, 1024, 1025, 4095, 4096};
    static const int32_t bands[][2] = {{1, 1}, {2, 3}, {6, 8}, {7, 1}};
    static const int32_t most_rows[] = {0, 1, 20, 400, 5000};
    int32_t *offsets = malloc((4096 + 1) * sizeof *offsets);
    uint32_t random = 1;
    assert_non_null(offsets);
    for (size_t i = 0; i < sizeof group_counts / sizeof *group_counts; i++)
        for (size_t k = 0; k < sizeof bands / sizeof *bands; k++)
            for (size_t m = 0; m < sizeof most_rows / sizeof *most_rows; m++) {
                const int32_t groups = group_counts[i], most = groups > 128 ? most_rows[m] / 8 : most_rows[m];
                offsets[0] = 0;
                for (int32_t g = 0; g < groups; g++) {
                    const bool empty = next_random(&random) % 3 == 0;
                    offsets[g + 1] = offsets[g] + (empty ? 0 : (int32_t)(next_random(&random) % (most + 1)));
                }
                check_items(offsets, groups, next_random(&random) % 2 ? 128 : 192, bands[k][0], bands[k][1]);
            }
    free(offsets);
}

/* All rows in one group, the first, the last or one between. */
static void one_group_has_all(void **state)
{
    (void)state;
    static const int32_t rows[] = {1, 15, 16, 17, 128, 129, 168, 169, 192, 193, 256, 257, 384, 385, 3072, 3073, 10000};
    static const int32_t group_counts[] = {1, 2, 63, 256, 1003};
    int32_t offsets[1003 + 1];
    for (size_t n = 0; n < sizeof group_counts / sizeof *group_counts; n++)
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
            for (int32_t third = 0; third < 3; third++) {
                const int32_t groups = group_counts[n], owner = (groups - 1) * third / 2;
                for (int32_t g = 0; g <= groups; g++)
                    offsets[g] = g > owner ? rows[i] : 0;
                check_items(offsets, groups, 192, 3, 2);
                check_items(offsets, groups, 128, 1, 4);
            }
}

static void last_items_are_cut(void **state)
{
    (void)state;
    static const int32_t rows[] = {200, 0, 1000, 30, 257, 192, 0, 500}; /* of groups in turn */
    static const int32_t rooms[] = {0, 1, 5, 16, 33, 132};
    static const int32_t group_counts[] = {1, 2, 8, 300};
    static const int32_t workers[] = {1, 2, 7, 66, 132};
    int32_t offsets[300 + 1] = {0};
    for (int32_t g = 0; g < 300; g++)
        offsets[g + 1] = offsets[g] + rows[g % 8];
    for (size_t n = 0; n < sizeof group_counts / sizeof *group_counts; n++)
        for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++)
            for (size_t w = 0; w < sizeof workers / sizeof *workers; w++)
                for (int32_t slices = 1; slices <= 4; slices++)
                    for (int32_t kind = 0; kind < 4; kind++)
                        check_cut(offsets, group_counts[n], 1 + (int32_t)(n + w) % 3, 1 + kind % 2, slices, rooms[i],
                                  workers[w], kind >= 2);
    static const int32_t nothing[] = {0, 0, 0};
    check_cut(nothing, 2, 3, 1, 4, 33, 132, false);

    /* 24 tiles of 16 bands for 132 workers: 120 in the last round, so a quarter of 132, in as many slices as may be. */
    struct moe_item_table table;
    struct moe_items items = moe_items_make(8, 192, 112, 16, 1, 0);
    items.most_slices = 4;
    items.room = items.workers = 132;
    int32_t even[8 + 1];
    for (int32_t g = 0; g <= 8; g++)
        even[g] = g * 512;
    fill_table(&items, even, &table);
    assert_true(table.cut == 33 && table.slices == 4);
    /* 9 tiles: 12 left over. With a tile more 28, for which the room is enough only in two slices. */
    for (int32_t more = 0; more < 2; more++) {
        for (int32_t g = 0; g <= 8; g++)
            even[g] = g * 180 + (g > 0 ? 100 : 0) + (more && g > 4 ? 100 : 0);
        items.room = 54;
        fill_table(&items, even, &table);
        assert_true(more ? table.cut == 54 && table.slices == 2 : table.cut == 18 && table.slices == 4);
    }
    /* 12 left over again, with more room than there are workers, and with less than is needed. */
    for (int32_t g = 0; g <= 8; g++)
        even[g] = g * 180 + (g > 0 ? 100 : 0);
    items.room = 400;
    fill_table(&items, even, &table);
    assert_true(table.cut == 132 && table.slices == 4);
    items.room = 7;
    fill_table(&items, even, &table);
    assert_true(table.cut == 7 && table.slices == 2);
    /* 8 tiles: nearly all workers have one, which is as good as all if memory is the limit. */
    for (int32_t g = 0; g <= 8; g++)
        even[g] = g * 180;
    items.room = 54;
    for (int bound = 0; bound < 2; bound++) {
        items.memory_bound = bound;
        fill_table(&items, even, &table);
        assert_int_equal(table.cut, bound ? 0 : 18);
    }
    /* Seven eighths of the workers are nearly all of them: 116 of 132, not 115. */
    const int32_t one_group[] = {0, 192};
    for (int32_t left = 115; left <= 116; left++) {
        items = moe_items_make(1, 192, 2, left, 1, 0);
        items.most_slices = 2;
        items.room = items.workers = 132;
        fill_table(&items, one_group, &table);
        assert_int_equal(table.cut, left == 115 ? 115 : 33);
    }
}

/* As many rows as there can be. */
static void sums_fit(void **state)
{
    (void)state;
    const int32_t offsets[] = {0, 0, INT32_MAX};
    struct moe_item_table table;
    struct moe_items items = moe_items_make(2, 192, 64, 64, 1, 0);
    fill_table(&items, offsets, &table);
    const int32_t tiles = table.tile[2], count = moe_items_count(&items);
    assert_int_equal(tiles, INT32_MAX / 192 + 1);
    assert_int_equal(count, tiles * 128);
    for (int gemm2 = 0; gemm2 < 2; gemm2++) {
        const struct moe_item first = moe_items_at(&items, gemm2 * (count / 2), 0);
        const struct moe_item last = moe_items_at(&items, (gemm2 + 1) * (count / 2) - 1, 0);
        assert_true(first.tile == 0 && first.row == 0 && first.band == 0 && first.gemm2 == gemm2);
        assert_true(last.tile == tiles - 1 && last.band == 63 && last.gemm2 == gemm2 && last.group == 1);
        assert_int_equal(last.row, INT32_MAX - last.rows);
        assert_in_range(last.rows, 1, 192);
    }

    /* Of 1.4 billion items 64 belong to the first group, spread among the others'. */
    const int32_t mixed[] = {0, 100, INT32_MAX};
    fill_table(&items, mixed, &table);
    assert_int_equal(moe_items_count(&items), (table.first + 1) * 128);
    for (uint32_t i = 0; i < 64; i++) {
        const uint32_t next = (uint32_t)(((uint64_t)(i + 1) << 32) / table.share);
        bool found = false;
        for (uint32_t at = next - 2; at < next + 2 && at < (uint32_t)(table.first + 1) * 64; at++) {
            const struct moe_item item = moe_items_at(&items, (int32_t)at, 0);
            assert_true(item.group == 1 || (!found && item.band == (int32_t)i && item.rows == 100));
            found |= item.group == 0;
        }
        assert_true(found);
    }
}

/* One long group among short ones, and the other way round. */
static void kinds_are_mixed(void **state)
{
    (void)state;
    for (int32_t groups = 2; groups <= 256; groups *= 2)
        for (int32_t odd = 0; odd < groups; odd += groups / 2)
            for (int reversed = 0; reversed < 2; reversed++) {
                int32_t offsets[256 + 1] = {0};
                for (int32_t g = 0; g < groups; g++)
                    offsets[g + 1] = offsets[g] + ((g == odd) != (reversed == 1) ? 3000 : 20);
                check_items(offsets, groups, 192, 6, 8);
            }
    /* As many items of the long group as of the short ones: in turns. */
    const int32_t offsets[] = {0, 10, 394, 404};
    struct moe_item_table table;
    struct moe_items items = moe_items_make(3, 192, 2, 1, 1, 0);
    fill_table(&items, offsets, &table);
    static const int32_t order[] = {1, 0, 1, 0, 1, 2, 1, 2, 1, 0, 1, 2};
    assert_int_equal(moe_items_count(&items), 12);
    for (int32_t i = 0; i < 12; i++)
        assert_int_equal(moe_items_at(&items, i, 0).group, order[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_band_once), cmocka_unit_test(one_group_has_all),
                                       cmocka_unit_test(kinds_are_mixed), cmocka_unit_test(last_items_are_cut),
                                       cmocka_unit_test(sums_fit)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
