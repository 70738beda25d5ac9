/* SPDX-License-Identifier: Apache-2.0 */
/* Packed weights as kernels/packed.h defines them, written from front to back: what every other way to pack is checked
 * against. Shares nothing with it but the definition. */
#ifndef MOE_TESTS_PACKER_H
#define MOE_TESTS_PACKER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The canonical row that stands at packed row `row`. */
static inline int64_t packer_row(int64_t rows, bool w13, int64_t row)
{
    const int64_t g = row / 16, i = row % 16;
    if (!w13)
        return row;
    return i < 8 ? 8 * g + i : rows / 2 + 8 * g + i - 8;
}

/* Packs `experts` matrices [rows][cols]; returns how many elements it wrote. `packed` NULL: only counts. */
static inline size_t packer_pack(const uint16_t *canonical, int32_t experts, int64_t rows, int64_t cols, bool w13,
                                 uint16_t *packed)
{
    size_t at = 0;
    for (int32_t e = 0; e < experts; e++)
        for (int64_t band = 0; band < (rows + 63) / 64 * 64; band += 128)
            for (int64_t block = 0; block < cols; block += 64)
                for (int64_t row = band; row < band + 128 && row < (rows + 63) / 64 * 64; row++)
                    for (int64_t place = 0; place < 8; place++)
                        for (int64_t i = 0; i < 8; i++, at++) {
                            const int64_t col = block + (place ^ (row % 8)) * 8 + i;
                            if (packed == NULL)
                                continue;
                            packed[at] = row < rows && col < cols
                                             ? canonical[(e * rows + packer_row(rows, w13, row)) * cols + col]
                                             : 0;
                        }
    return at;
}

#endif
