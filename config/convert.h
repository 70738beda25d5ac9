/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bf16, f16 and f32: how single elements are read, rounded and written, once for the whole library. Everything here is
 * round to nearest even, keeps infinities, signed zeros and subnormals, and turns a NaN into a quiet NaN of the same
 * sign. dtype is MOE_BF16, MOE_F16 or MOE_F32 throughout.
 */
#ifndef MOE_CONFIG_CONVERT_H
#define MOE_CONFIG_CONVERT_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "moe.h"

static inline bool moe_dtype_is_float(moe_dtype dtype)
{
    return dtype == MOE_BF16 || dtype == MOE_F16 || dtype == MOE_F32;
}

static inline uint32_t moe_f32_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float moe_f32_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* bf16 is the upper half of an f32. */
static inline float moe_f32_from_bf16(uint16_t bits)
{
    return moe_f32_from_bits((uint32_t)bits << 16);
}

static inline uint16_t moe_bf16_from_f32(float value)
{
    uint32_t bits = moe_f32_bits(value);

    if ((bits & 0x7fffffffu) > 0x7f800000u) /* the quiet bit, lest a NaN whose upper half is empty become infinity */
        return (uint16_t)(bits >> 16 | 0x40u);
    /* Half a unit, less one where the kept part is even; a carry into the exponent is the right next number. */
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float moe_f32_from_f16(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 0x3ffu;

    if (exponent == 0) /* zero and subnormals: multiples of 2^-24 */
        return moe_f32_from_bits(sign | moe_f32_bits((float)fraction * 0x1p-24f));
    if (exponent == 31)
        return moe_f32_from_bits(sign | 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0u));
    return moe_f32_from_bits(sign | (exponent + 127 - 15) << 23 | fraction << 13);
}

static inline uint16_t moe_f16_from_f32(float value)
{
    uint32_t bits = moe_f32_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;

    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= moe_f32_bits(65520.0f)) /* halfway between the largest f16 and the one that would follow */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude <
        moe_f32_bits(0x1p-14f)) /* subnormal: between 0.5 and 1 an f32 steps by 2^-24 too, so + rounds for us */
        return (uint16_t)(sign | (moe_f32_bits(moe_f32_from_bits(magnitude) + 0.5f) - moe_f32_bits(0.5f)));
    magnitude += 0xfffu + (magnitude >> 13 & 1u);
    return (uint16_t)(sign | (magnitude - ((uint32_t)(127 - 15) << 23)) >> 13);
}

/* array[i] as f32, exactly. */
static inline float moe_load_f32(const void *array, moe_dtype dtype, int64_t i)
{
    switch (dtype) {
    case MOE_BF16:
        return moe_f32_from_bf16(((const uint16_t *)array)[i]);
    case MOE_F16:
        return moe_f32_from_f16(((const uint16_t *)array)[i]);
    default:
        return ((const float *)array)[i];
    }
}

/* array[i] = value, rounded. */
static inline void moe_store_f32(void *array, moe_dtype dtype, int64_t i, float value)
{
    switch (dtype) {
    case MOE_BF16:
        ((uint16_t *)array)[i] = moe_bf16_from_f32(value);
        break;
    case MOE_F16:
        ((uint16_t *)array)[i] = moe_f16_from_f32(value);
        break;
    default:
        ((float *)array)[i] = value;
    }
}

/* The nearest number of `dtype`, still as f32. */
static inline float moe_round_f32(float value, moe_dtype dtype)
{
    switch (dtype) {
    case MOE_BF16:
        return moe_f32_from_bf16(moe_bf16_from_f32(value));
    case MOE_F16:
        return moe_f32_from_f16(moe_f16_from_f32(value));
    default:
        return value;
    }
}

/* to[i] = from[i] for i < count, rounded where the dtypes differ. The arrays do not overlap. */
void moe_convert(void *to, moe_dtype to_dtype, const void *from, moe_dtype from_dtype, int64_t count);

/* The sum of a[i] * b[i] for i < count, in double: what every reference multiplies with. */
double moe_dot(const void *a, moe_dtype a_dtype, const void *b, moe_dtype b_dtype, int64_t count);

#endif
