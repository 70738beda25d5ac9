/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The packed layout of a stack of matrices [experts][rows][cols] of 16-bit elements: every 64 columns of 128 rows are
 * one contiguous tile of 16 KB, which is byte for byte what the tensor cores want in shared memory, so that one bulk
 * copy brings it and copies in a row read memory front to back.
 *
 *   expert        one after another, moe_packed_expert_bytes apart
 *   row band      128 rows, one after another; the last one of an expert may have 64
 *   column block  64 columns of the band's rows, one after another
 *   row           128 bytes
 *   chunk         16 bytes (8 elements); chunk c of row r stands at place c ^ (r % 8)
 *
 * Rows are padded with zeros to a multiple of 64, columns too. In w13 gate and up rows alternate in groups of eight:
 * packed row 16 g + i is gate row 8 g + i for i < 8, else up row 8 g + i - 8. Then gate and up of one intermediate
 * feature meet in one thread, whichever operand of the tensor cores the weights are. Both of w13's halves must be a
 * multiple of eight rows for that, and columns a multiple of eight for whole chunks.
 */
#ifndef MOE_KERNELS_PACKED_H
#define MOE_KERNELS_PACKED_H

#include <stdint.h>

#ifdef __CUDACC__
#define MOE_HOST_DEVICE __host__ __device__
#else
#define MOE_HOST_DEVICE
#endif

enum {
    MOE_PACKED_ROWS = 128,      /* of a band */
    MOE_PACKED_LAST_ROWS = 64,  /* rows are padded to a multiple of this */
    MOE_PACKED_COLS = 64,       /* of a block */
    MOE_PACKED_ROW_BYTES = 128, /* of a row in a block */
    MOE_PACKED_TILE_BYTES = MOE_PACKED_ROWS * MOE_PACKED_ROW_BYTES,
};

static MOE_HOST_DEVICE inline int64_t moe_packed_rows(int64_t rows)
{
    return (rows + MOE_PACKED_LAST_ROWS - 1) / MOE_PACKED_LAST_ROWS * MOE_PACKED_LAST_ROWS;
}

static MOE_HOST_DEVICE inline int64_t moe_packed_blocks(int64_t cols)
{
    return (cols + MOE_PACKED_COLS - 1) / MOE_PACKED_COLS;
}

static MOE_HOST_DEVICE inline uint64_t moe_packed_expert_bytes(int64_t rows, int64_t cols)
{
    return (uint64_t)moe_packed_rows(rows) * (uint64_t)moe_packed_blocks(cols) * MOE_PACKED_ROW_BYTES;
}

/* The packed row of w13's canonical row `row` of `rows` (gate rows, then up rows). */
static MOE_HOST_DEVICE inline int64_t moe_packed_w13_row(int64_t rows, int64_t row)
{
    const int64_t half = rows / 2, up = row >= half, feature = row - up * half;
    return feature / 8 * 16 + up * 8 + feature % 8;
}

/* Where chunk `chunk` (columns from 8 * chunk on) of packed row `row` is, in bytes from its expert's start. */
static MOE_HOST_DEVICE inline uint64_t moe_packed_offset(int64_t rows, int64_t cols, int64_t row, int64_t chunk)
{
    const int64_t band = row / MOE_PACKED_ROWS, left = moe_packed_rows(rows) - band * MOE_PACKED_ROWS;
    const int64_t band_rows = left < MOE_PACKED_ROWS ? left : (int64_t)MOE_PACKED_ROWS;
    const int64_t rows_before =
        band * MOE_PACKED_ROWS * moe_packed_blocks(cols) + chunk / 8 * band_rows + row % MOE_PACKED_ROWS;
    return (uint64_t)(rows_before * MOE_PACKED_ROW_BYTES + (chunk ^ row) % 8 * 16);
}

#endif
