/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Normally distributed numbers by position: element i of a stream depends on (seed, name, i) alone, so that any number
 * of threads, in any order and in pieces of any size, writes the same bytes.
 *
 * Sixteen bits of a counter hash index a table of the inverse normal distribution that is already scaled and rounded to
 * the dtype: about a nanosecond an element. The tails end at 4.3 standard deviations. f32 interpolates in the table
 * with sixteen bits more, so that its numbers do not repeat.
 */
#ifndef MOE_TOOLS_NORMAL_H
#define MOE_TOOLS_NORMAL_H

#include "moe.h"

struct normal {
    moe_dtype dtype; /* MOE_BF16, MOE_F16 or MOE_F32 */
    uint64_t key;
    uint16_t half[65536]; /* BF16, F16 */
    float full[65537];    /* F32 */
};

/* Elements are normal with this standard deviation. A stream is large; `name` tells the streams of one seed apart. */
void normal_init(struct normal *stream, moe_dtype dtype, double deviation);
void normal_seek(struct normal *stream, uint64_t seed, const char *name);
/* Elements [first, first + count) into `to`; first is a multiple of 4. */
void normal_fill(const struct normal *stream, uint64_t first, int64_t count, void *to);

#endif
