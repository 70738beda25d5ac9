/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A product (ops.h), for the vectors of the including file, which defines before
 *
 *   PER_UNIT                                     elements of the depth in a unit
 *   units_mac(acc, w, x)                         acc + w * x, unit by unit
 *   units_load(p, dtype), units_load_part(p, dtype, elements)   LANES units from memory; the part is filled with zeros
 *   DOT_ROWS(tokens)                             rows that dot() takes at a time
 *
 * and gets `static const struct moe_cpu_product product`.
 *
 * Loops over small constant counts are unrolled by the compiler, so that the arrays of vectors live in registers.
 */
#include "kernels/cpu/ops.h"

enum { STEP = LANES * PER_UNIT /* elements of a vector of units */ };

/* LANES units of a row from element k on, zeros where it has ended. */
INLINE vf row_units(const void *row, moe_dtype dtype, int64_t k, int64_t depth)
{
    const char *from = (const char *)row + (size_t)k * moe_dtype_size(dtype);

    if (k + STEP <= depth)
        return units_load(from, dtype);
    return k < depth ? units_load_part(from, dtype, (int)(depth - k)) : vf_set(0);
}

INLINE int64_t padded_units(int64_t depth)
{
    return (depth + PER_UNIT * MOE_CPU_PAD - 1) / (PER_UNIT * MOE_CPU_PAD) * MOE_CPU_PAD;
}

static void pack_panel(float *to, const void *const *rows, int32_t count, moe_dtype dtype, int64_t depth)
{
    const int64_t units = padded_units(depth);

    for (int64_t u = 0; u < units; u += LANES)
        for (int32_t first = 0; first < 2 * LANES; first += LANES) {
            vf v[LANES];
            for (int i = 0; i < LANES; i++)
                v[i] = first + i < count ? row_units(rows[first + i], dtype, u * PER_UNIT, depth) : vf_set(0);
            vf_transpose(v);
            for (int i = 0; i < LANES; i++)
                vf_store(to + (u + i) * 2 * LANES + first, v[i]);
        }
}

/* Where bf16 weights will become fp32, x takes the order in which they are unpacked: even elements, then odd ones. */
static void pack_few(float *to, const void *const *rows, int32_t count, moe_dtype dtype, moe_dtype w_dtype,
                     int64_t depth)
{
    const int64_t units = padded_units(depth), block = moe_cpu_dot_units(count);
    const bool pairs = PER_UNIT == 1 && w_dtype == MOE_BF16;

    for (int64_t from = 0; from < units; from += block) {
        const int64_t end = from + block < units ? from + block : units;
        const int64_t paired = end < depth ? end : depth; /* what dot() takes as pairs ends here */
        for (int32_t i = 0; i < count; i++) {
            int64_t u = from;
            for (; pairs && u + 2 * LANES <= paired; u += 2 * LANES, to += 2 * LANES) {
                vf a = row_units(rows[i], dtype, u, depth), b = row_units(rows[i], dtype, u + LANES, depth);
                vf_part_pair(&a, &b);
                vf_store(to, a);
                vf_store(to + LANES, b);
            }
            for (; u < end; u += LANES, to += LANES)
                vf_store(to, row_units(rows[i], dtype, u * PER_UNIT, depth));
        }
    }
}

/* How many of `tokens` rows are multiplied together: as many as there are registers for, in groups of like size. */
INLINE int32_t first_few(int32_t tokens)
{
    const int32_t groups = (tokens + MOST_DOT_TOKENS - 1) / MOST_DOT_TOKENS;
    return (tokens + groups - 1) / groups;
}

static void pack_rows(float *to, const void *const *rows, int32_t count, moe_dtype dtype, moe_dtype w_dtype,
                      int64_t depth)
{
    for (int32_t i = 0, few; i < count; i += few) {
        few = first_few(count - i);
        pack_few(to + i * padded_units(depth), rows + i, few, dtype, w_dtype, depth);
    }
}

INLINE void load_rows(float *block, const struct moe_cpu_weights *w, int32_t rows, int64_t depth, moe_dtype dtype)
{
    const size_t size = dtype == MOE_F32 ? 4 : 2;

    for (int32_t r = 0; r < rows; r++) {
        const char *row = w->data + (size_t)r * w->row_bytes;
        float *to = block + r * MOE_CPU_STRIDE;
        int64_t k = 0;

        for (; k + STEP <= depth; k += STEP)
            vf_store(to + k / PER_UNIT, units_load(row + (size_t)k * size, dtype));
        for (; k % (PER_UNIT * MOE_CPU_PAD) != 0 || k < depth; k += STEP)
            vf_store(to + k / PER_UNIT,
                     k < depth ? units_load_part(row + (size_t)k * size, dtype, (int)(depth - k)) : vf_set(0));
    }
}

static void load(float *block, const struct moe_cpu_weights *w, int32_t rows, int64_t depth)
{
    switch (w->dtype) {
    case MOE_BF16:
        load_rows(block, w, rows, depth, MOE_BF16);
        break;
#if PER_UNIT == 1
    case MOE_F16:
        load_rows(block, w, rows, depth, MOE_F16);
        break;
    default:
        load_rows(block, w, rows, depth, MOE_F32);
#else
    default:
        break;
#endif
    }
}

/* Sums of a block of the depth begin at zero and are added to c at its end: shorter chains, smaller errors. */
static void tile(float *c, int64_t ldc, const float *block, const float *panel, int64_t units, bool add,
                 const struct moe_cpu_ahead *ahead)
{
    vf acc[BLOCK_ROWS][2];

    for (int r = 0; r < BLOCK_ROWS; r++)
        for (int v = 0; v < 2; v++)
            acc[r][v] = vf_set(0);
    for (int64_t u = 0; u < units; u += MOE_CPU_PAD) {
        if (ahead->data != NULL) {
            uintptr_t line = (uintptr_t)ahead->data + (size_t)u * ahead->unit_bytes;
            for (int r = 0; r < BLOCK_ROWS; r++, line += ahead->row_bytes)
                __builtin_prefetch((const void *)line, 0, 2);
        }
        for (int i = 0; i < MOE_CPU_PAD; i++) {
            vf x[2];
            for (int v = 0; v < 2; v++)
                x[v] = vf_load(panel + ((u + i) * 2 + v) * LANES);
            for (int r = 0; r < BLOCK_ROWS; r++) {
                vf w = vf_set(block[r * MOE_CPU_STRIDE + u + i]);
                for (int v = 0; v < 2; v++)
                    acc[r][v] = units_mac(acc[r][v], w, x[v]);
            }
        }
    }
    for (int r = 0; r < BLOCK_ROWS; r++)
        for (int v = 0; v < 2; v++) {
            float *to = c + r * ldc + v * LANES;
            vf_store(to, add ? vf_add(vf_load(to), acc[r][v]) : acc[r][v]);
        }
}

/* Fetches `bytes` from address `next` on into the second-level cache. A prefetch does not fault: the address may be
 * past the weights, which is why it is a number. */
INLINE void fetch(uintptr_t next, const int bytes, const int every)
{
    for (int line = 0; line < bytes; line += every * 64)
        __builtin_prefetch((const void *)(next + (uintptr_t)line), 0, 2);
}

/* Brings weights that will be needed soon into the first-level cache so that they, and not x, are the next to leave. */
INLINE void fetch_once(const char *w)
{
    __builtin_prefetch((const void *)((uintptr_t)w + 512), 0, 0);
}

/* One weight row of each of `rows` streams, `stride` bytes apart, by all tokens. Meanwhile as many bytes as it reads
 * are fetched from `next` on. */
INLINE void dot_block(float *c, int64_t ldc, const char *w, size_t stride, uintptr_t next, const float *x,
                      int64_t x_stride, int64_t depth, bool add, moe_dtype dtype, const int rows, const int tokens)
{
    const size_t size = dtype == MOE_F32 ? 4 : 2;
    const int every = tokens <= 4 ? 2 : 1; /* lines: with less to compute, the processor's own prefetcher keeps up */
    vf acc[32];
    int64_t k = 0;

    for (int i = 0; i < 32; i++)
        acc[i] = vf_set(0);
#if PER_UNIT == 1
    /* Shift and mask make two vectors of a load, cheaper than widening half a vector twice. */
    for (; dtype == MOE_BF16 && k + 2 * STEP <= depth; k += 2 * STEP) {
        vf wv[8][2];
        fetch(next, rows * 2 * STEP * 2, every);
        next += (uintptr_t)(rows * 2 * STEP * 2);
        for (int r = 0; r < rows; r++) {
            const char *from = w + (size_t)r * stride + (size_t)k * size;
            if (tokens > 4)
                fetch_once(from);
            vf_load_pair(&wv[r][0], &wv[r][1], from);
        }
        for (int half = 0; half < 2; half++)
            for (int t = 0; t < tokens; t++) {
                vf xv = vf_load(x + t * x_stride + k + half * LANES);
                for (int r = 0; r < rows; r++)
                    acc[r * tokens + t] = units_mac(acc[r * tokens + t], wv[r][half], xv);
            }
    }
#endif
    for (; k + STEP <= depth; k += STEP) {
        vf wv[8];
        fetch(next, rows * STEP * (int)size, every);
        next += (uintptr_t)(rows * STEP) * size;
        for (int r = 0; r < rows; r++) {
            const char *from = w + (size_t)r * stride + (size_t)k * size;
            if (tokens > 4)
                fetch_once(from);
            wv[r] = units_load(from, dtype);
        }
        for (int t = 0; t < tokens; t++) {
            vf xv = vf_load(x + t * x_stride + k / PER_UNIT);
            for (int r = 0; r < rows; r++)
                acc[r * tokens + t] = units_mac(acc[r * tokens + t], wv[r], xv);
        }
    }
    if (k < depth)
        for (int r = 0; r < rows; r++) {
            vf wv = units_load_part(w + (size_t)r * stride + (size_t)k * size, dtype, (int)(depth - k));
            for (int t = 0; t < tokens; t++)
                acc[r * tokens + t] = units_mac(acc[r * tokens + t], wv, vf_load(x + t * x_stride + k / PER_UNIT));
        }
    float sums[32];
    for (int i = 0; i < rows * tokens; i += 4)
        vf_sum4(sums + i, acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            c[r * ldc + t] = add ? c[r * ldc + t] + sums[r * tokens + t] : sums[r * tokens + t];
}

/*
 * The rows of a region are read as DOT_ROWS streams, each of consecutive rows: a vector of x serves all of them. The
 * depth is gone through in blocks, so that the first-level cache holds the tokens beside the weights that pass. Blocks
 * and streams are no order for prefetchers, so the weights come from the second level, into which the region after
 * this one is fetched from its begin to its end.
 */
INLINE void dot_region(float *c, int64_t ldc, const struct moe_cpu_weights *w, int64_t rows, const float *x,
                       int64_t depth, uintptr_t next, moe_dtype dtype, const int tokens)
{
    const int streams = DOT_ROWS(tokens);
    const int64_t span = rows / streams, whole = span * streams;
    const int64_t block = moe_cpu_dot_units(tokens) * PER_UNIT;
    const size_t size = dtype == MOE_F32 ? 4 : 2;

    for (int64_t k = 0; k < depth; k += block) {
        const int64_t count = depth - k < block ? depth - k : block;
        const int64_t x_stride = padded_units(count);
        const float *xk = x + k / PER_UNIT * tokens;
        const char *wk = w->data + (size_t)k * size;

        for (int64_t r = 0; r < span; r++, next += (size_t)(streams * count) * size)
            dot_block(c + r * ldc, ldc * span, wk + (size_t)r * w->row_bytes, w->row_bytes * (size_t)span, next, xk,
                      x_stride, count, k > 0, dtype, streams, tokens);
        for (int64_t r = whole; r < rows; r++, next += (size_t)count * size)
            dot_block(c + r * ldc, ldc, wk + (size_t)r * w->row_bytes, 0, next, xk, x_stride, count, k > 0, dtype, 1,
                      tokens);
    }
}

INLINE void dot_any(float *c, int64_t ldc, const struct moe_cpu_weights *w, int64_t rows, const float *x,
                    int32_t tokens, int64_t depth, uintptr_t next, moe_dtype dtype)
{
    switch (tokens) {
#define CASE(n)                                                                                                        \
    case n:                                                                                                            \
        dot_region(c, ldc, w, rows, x, depth, next, dtype, n);                                                         \
        break;
        CASE(1)
        CASE(2)
#if MOST_DOT_TOKENS > 2
        CASE(3)
        CASE(4)
#endif
#if MOST_DOT_TOKENS > 4
        CASE(5)
        CASE(6)
        CASE(7)
        CASE(8)
#endif
#undef CASE
    default:
        break;
    }
}

static void dot_few(float *c, int64_t ldc, const struct moe_cpu_weights *w, int64_t rows, const float *x,
                    int32_t tokens, int64_t depth, uintptr_t next)
{
    switch (w->dtype) {
    case MOE_BF16:
        dot_any(c, ldc, w, rows, x, tokens, depth, next, MOE_BF16);
        break;
#if PER_UNIT == 1
    case MOE_F16:
        dot_any(c, ldc, w, rows, x, tokens, depth, next, MOE_F16);
        break;
    default:
        dot_any(c, ldc, w, rows, x, tokens, depth, next, MOE_F32);
#else
    default:
        break;
#endif
    }
}

/* A region is read from memory for the first few tokens, for the others it is in the second-level cache. */
static void dot(float *c, int64_t ldc, const struct moe_cpu_weights *w, int64_t rows, const float *x, int32_t tokens,
                int64_t depth, const char *next)
{
    const int64_t streams = DOT_ROWS(first_few(tokens)), turns = (int64_t)(MOE_CPU_DOT_REGION / w->row_bytes) / streams;
    const int64_t step = turns > 1 ? turns * streams : streams;

    for (int64_t r = 0; r < rows; r += step) {
        const struct moe_cpu_weights region = {w->data + (size_t)r * w->row_bytes, w->row_bytes, w->dtype};
        const char *after = r + step < rows ? region.data + (size_t)step * w->row_bytes : next;
        for (int32_t t = 0, few; t < tokens; t += few) {
            few = first_few(tokens - t);
            dot_few(c + r * ldc + t, ldc, &region, rows - r < step ? rows - r : step, x + t * padded_units(depth), few,
                    depth, (uintptr_t)after);
        }
    }
}

static const struct moe_cpu_product product = {PER_UNIT, pack_panel, pack_rows, load, tile, dot};
