/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/normal.h"

#include <math.h>

#include "config/convert.h"

/* A bijection of 64 bits in which every input bit reaches every output bit (the finaliser of splitmix64). */
static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Of element group `index`; the odd constant spreads neighbouring counters before they are mixed. */
static uint64_t draw(uint64_t key, uint64_t index)
{
    return mix(key + index * 0x9e3779b97f4a7c15u);
}

/* The z in [0, 10] that a normal variable exceeds with probability p <= 0.5, by bisection: exact, and without a table
 * of someone's coefficients. */
static double upper_quantile(double p)
{
    double low = 0, high = 10;
    for (int i = 0; i < 40; i++) {
        double middle = 0.5 * (low + high);
        if (0.5 * erfc(middle / sqrt(2.0)) > p)
            low = middle;
        else
            high = middle;
    }
    return low;
}

void normal_init(struct normal *stream, moe_dtype dtype, double deviation)
{
    stream->dtype = dtype;
    for (int i = 0; i < 32768; i++) {
        float z = (float)(deviation * upper_quantile((i + 0.5) / 65536));
        stream->full[i] = -z;
        stream->full[65535 - i] = z;
    }
    stream->full[65536] = stream->full[65535]; /* what the last entry interpolates to */
    for (int i = 0; i < 65536 && dtype != MOE_F32; i++)
        moe_store_f32(stream->half, dtype, i, stream->full[i]);
}

void normal_seek(struct normal *stream, uint64_t seed, const char *name)
{
    uint64_t key = mix(seed + 1);
    for (; *name; name++)
        key = mix(key ^ (unsigned char)*name);
    stream->key = key;
}

static void fill_half(const struct normal *stream, uint64_t first, int64_t count, uint16_t *to)
{
    for (int64_t i = 0; i < count; i += 4) {
        uint64_t bits = draw(stream->key, (first + (uint64_t)i) / 4);
        int64_t n = count - i < 4 ? count - i : 4;
        for (int64_t j = 0; j < n; j++)
            to[i + j] = stream->half[bits >> 16 * j & 0xffff];
    }
}

static void fill_full(const struct normal *stream, uint64_t first, int64_t count, float *to)
{
    for (int64_t i = 0; i < count; i++) {
        uint64_t at = first + (uint64_t)i;
        uint64_t bits = draw(stream->key, at / 2) >> 32 * (at % 2);
        const float *entry = stream->full + (bits >> 16 & 0xffff);
        to[i] = entry[0] + (entry[1] - entry[0]) * (float)(bits & 0xffff) * 0x1p-16f;
    }
}

void normal_fill(const struct normal *stream, uint64_t first, int64_t count, void *to)
{
    if (stream->dtype == MOE_F32)
        fill_full(stream, first, count, to);
    else
        fill_half(stream, first, count, to);
}
