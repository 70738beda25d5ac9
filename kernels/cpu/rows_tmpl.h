/* SPDX-License-Identifier: Apache-2.0 */
/* What is not a product (ops.h), for the vectors of the including file: `fill_rows` puts it into the table. */
#include "kernels/cpu/ops.h"

/* to[token][row] = c[row][token] for LANES of each, or silu(c) * up, where less may be wanted. */
INLINE void write_square(char *to, moe_dtype dtype, int64_t stride, const float *c, const float *up, int64_t ldc,
                         int64_t rows, int64_t tokens)
{
    const size_t size = dtype == MOE_F32 ? 4 : 2;
    vf v[LANES];

    for (int r = 0; r < LANES; r++) {
        v[r] = vf_load(c + r * ldc);
        if (up != NULL)
            v[r] = vf_mul(vf_silu(v[r]), vf_load(up + r * ldc));
    }
    vf_transpose(v);
    for (int t = 0; t < LANES; t++) {
        if (t >= tokens)
            break;
        char *row = to + (size_t)(t * stride) * size;
        if (rows >= LANES)
            vf_store_as(row, dtype, v[t]);
        else
            vf_store_part(row, dtype, v[t], (int)rows);
    }
}

INLINE void write_all(char *to, moe_dtype dtype, int64_t stride, const float *c, const float *up, int64_t ldc,
                      int64_t rows, int64_t tokens)
{
    const size_t size = dtype == MOE_F32 ? 4 : 2;

    for (int64_t t = 0; t < tokens; t += LANES)
        for (int64_t r = 0; r < rows; r += LANES)
            write_square(to + (size_t)(t * stride + r) * size, dtype, stride, c + r * ldc + t,
                         up != NULL ? up + r * ldc + t : NULL, ldc, rows - r, tokens - t);
}

static void silu(void *to, moe_dtype dtype, int64_t stride, const float *gate, const float *up, int64_t ldc,
                 int64_t rows, int64_t tokens)
{
    switch (dtype) {
    case MOE_BF16:
        write_all(to, MOE_BF16, stride, gate, up, ldc, rows, tokens);
        break;
    case MOE_F16:
        write_all(to, MOE_F16, stride, gate, up, ldc, rows, tokens);
        break;
    default:
        write_all(to, MOE_F32, stride, gate, up, ldc, rows, tokens);
    }
}

static void write_plain(float *to, int64_t stride, const float *c, int64_t ldc, int64_t rows, int64_t tokens)
{
    write_all((char *)to, MOE_F32, stride, c, NULL, ldc, rows, tokens);
}

INLINE void combine_as(char *to, moe_dtype dtype, const float *down, int64_t stride, const int32_t *slot_row,
                       const float *row_weight, int32_t slots, int64_t n)
{
    const size_t size = dtype == MOE_F32 ? 4 : 2;

    for (int64_t i = 0; i < n; i += LANES) {
        int part = n - i >= LANES ? LANES : (int)(n - i);
        vf sum = vf_set(0);
        for (int32_t s = 0; s < slots; s++) {
            if (slot_row[s] < 0)
                continue;
            const float *row = down + slot_row[s] * stride + i;
            vf v = part == LANES ? vf_load(row) : vf_load_part(row, MOE_F32, part);
            sum = vf_fma(vf_set(row_weight[slot_row[s]]), v, sum);
        }
        if (part == LANES)
            vf_store_as(to + (size_t)i * size, dtype, sum);
        else
            vf_store_part(to + (size_t)i * size, dtype, sum, part);
    }
}

static void combine(void *to, moe_dtype dtype, const float *down, int64_t stride, const int32_t *slot_row,
                    const float *row_weight, int32_t slots, int64_t n)
{
    switch (dtype) {
    case MOE_BF16:
        combine_as(to, MOE_BF16, down, stride, slot_row, row_weight, slots, n);
        break;
    case MOE_F16:
        combine_as(to, MOE_F16, down, stride, slot_row, row_weight, slots, n);
        break;
    default:
        combine_as(to, MOE_F32, down, stride, slot_row, row_weight, slots, n);
    }
}

static void convert(void *to, moe_dtype to_dtype, const void *from, moe_dtype from_dtype, int64_t n)
{
    const size_t to_size = moe_dtype_size(to_dtype), from_size = moe_dtype_size(from_dtype);
    int64_t i = 0;

    for (; i + LANES <= n; i += LANES)
        vf_store_as((char *)to + (size_t)i * to_size, to_dtype,
                    vf_load_as((const char *)from + (size_t)i * from_size, from_dtype));
    vf_store_part((char *)to + (size_t)i * to_size, to_dtype,
                  vf_load_part((const char *)from + (size_t)i * from_size, from_dtype, (int)(n - i)), (int)(n - i));
}

static void fill_rows(struct moe_cpu_ops *ops)
{
    ops->silu = silu;
    ops->write = write_plain;
    ops->combine = combine;
    ops->convert = convert;
}
