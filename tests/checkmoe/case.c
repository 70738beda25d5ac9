/* SPDX-License-Identifier: Apache-2.0 */
/* From a seed to a layer and a batch. Most cases are small: bugs live at the edges, and the edges are cheap. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#include "tests/checkmoe/checkmoe.h"

uint64_t random_u64(struct random *random)
{
    uint64_t z = random->state += UINT64_C(0x9e3779b97f4a7c15);

    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

int64_t random_between(struct random *random, int64_t low, int64_t high)
{
    return low + (int64_t)(random_u64(random) % (uint64_t)(high - low + 1));
}

bool random_one_in(struct random *random, int64_t n)
{
    return random_between(random, 1, n) == 1;
}

double random_unit(struct random *random)
{
    return (double)(random_u64(random) >> 11) * 0x1p-53;
}

float random_normal(struct random *random)
{
    uint64_t bits = random_u64(random);
    int64_t sum = (int64_t)(bits & 0xffff) + (int64_t)(bits >> 16 & 0xffff) + (int64_t)(bits >> 32 & 0xffff) +
                  (int64_t)(bits >> 48);

    return (float)(sum - 2 * 0xffff) * (1.7320508f / 65536); /* four uniform numbers have a variance of 1/3 */
}

#define PICK(random, ...)                                                                                              \
    (int64_t[]){__VA_ARGS__}[random_between(random, 0, sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t) - 1)]

static int64_t draw_tokens(struct random *random, bool gpu)
{
    if (gpu && random_one_in(random, 4))
        return PICK(random, 129, 255, 256, 257, 511, 512, 513, 1000, 1025, 2047);
    if (gpu && random_one_in(random, 4)) /* what decode is for, and what its FFN routes itself */
        return random_between(random, 1, PICK(random, 16, 300));
    if (random_one_in(random, 3))
        return PICK(random, 0, 1, 1, 2, 3, 4);
    if (random_one_in(random, 2))
        return random_between(random, 1, 40);
    return PICK(random, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 512, 599);
}

/* Whole tiles, whole vectors, and sizes that are neither. */
static int64_t draw_width(struct random *random)
{
    switch (random_between(random, 0, 7)) {
    case 0:
    case 1:
        return 64 * random_between(random, 1, 8);
    case 2:
    case 3:
        return 8 * random_between(random, 1, 40);
    case 4:
        return 32 * random_between(random, 1, 4) + PICK(random, -1, 0, 1);
    case 5:
        return PICK(random, 1, 2, 3, 7);
    default:
        return random_between(random, 1, 150);
    }
}

/* What the tensor cores' paths take, multiples of eight: often none of 16, 64 or 128, which their tiles are. */
static int64_t draw_width_of_eights(struct random *random)
{
    switch (random_between(random, 0, 3)) {
    case 0:
        return 64 * random_between(random, 1, 9) + PICK(random, 0, 0, 8);
    case 1:
        return 8 * random_between(random, 1, 48);
    case 2:
        return PICK(random, 8, 16, 24, 32, 40, 72, 120, 128, 136, 192, 200, 256);
    default:
        return PICK(random, 64, 64, 128, 136, 264, 320, 520, 1000);
    }
}

/* One sum of a layer long and its rows few, so that a path which splits sums has many parts of one to add. */
static void draw_long_sums(struct test_case *c, struct random *random)
{
    const int64_t longer = 64 * random_between(random, 20, 100) + PICK(random, 0, 0, 8);
    const int64_t shorter = 8 * random_between(random, 1, 20);
    const bool second = random_one_in(random, 2); /* of the two GEMMs */

    c->hidden = second ? shorter : longer;
    c->intermediate = second ? longer : shorter;
    c->experts = (int32_t)random_between(random, 1, 6);
    c->top_k = c->top_k < c->experts ? c->top_k : c->experts;
    c->tokens = PICK(random, 1, 2, 3, 8, 9, 17, 40);
}

/* So many tokens that the gate has a kernel of its own for them, with little else to do. */
static void draw_many_logits(struct test_case *c, struct random *random)
{
    c->level = (enum level)PICK(random, LEVEL_FORWARD, LEVEL_STEPS);
    c->gate_dtype = c->dtype;
    c->hidden = 8 * random_between(random, 65, 150);
    c->tokens = (1 << 20) / c->hidden + random_between(random, 1, 300);
    c->intermediate = 8 * random_between(random, 1, 3);
    c->experts = (int32_t)PICK(random, 32, 33, 40, 60, 64, 65, 128);
    c->top_k = c->slots = (int32_t)random_between(random, 1, 3);
}

/* The second sum so long, and experts of so many rows, that prefill cuts its last items, whole tiles of tokens and
 * bands of weights among them. It is not shrunk, though it costs up to some seconds; `small`: as little as can be. */
static void draw_cut_items(struct test_case *c, struct random *random, bool small)
{
    const bool longest = random_one_in(random, 4), many = random_one_in(random, 2);

    c->hidden = 8 * random_between(random, 8, small ? 17 : 65);
    if (small && random_one_in(random, 2)) /* so many that both blocks of a pair have rows of w2 */
        c->hidden += 256;
    c->intermediate = 64 * (longest ? 96 : small ? 40 : random_between(random, 40, 48)) + PICK(random, -8, 0, 8);
    c->experts = small ? PICK(random, 1, 1, 4) : (int32_t)random_between(random, many ? 6 : 1, many ? 12 : 3);
    c->top_k = c->slots = (int32_t)random_between(random, 1, c->experts < 3 ? c->experts : 3);
    c->tokens = small ? PICK(random, 1, 40, 200, 225, 256) : PICK(random, 100, 192, 193, 225, 256, 257, 400) / c->slots;
    c->max_sms = PICK(random, 0, 0, 10, 17);
}

/* Keeps what kind of number a width is. */
static int64_t halve_width(int64_t width)
{
    int64_t step = width % 64 == 0 ? 64 : width % 8 == 0 ? 8 : 1;
    int64_t half = width / 2 / step * step;

    return half > 0 ? half : step;
}

static moe_dtype draw_dtype(struct random *random)
{
    return (moe_dtype)PICK(random, MOE_BF16, MOE_BF16, MOE_F16, MOE_F32);
}

const char *const layout_names[LAYOUTS] = {
    [MOE_LAYOUT_AUTO] = "both", [MOE_LAYOUT_ROW_MAJOR] = "row-major", [MOE_LAYOUT_PACKED] = "packed"};

static const char *const routings[] = {"random",       "random",      "zipf",      "one expert",
                                       "same experts", "few experts", "no expert", "bad ids",
                                       "duplicates",   "last expert", "edges",     "edges"};
static const char *const gatings[] = {"random", "random", "equal", "ties", "huge", "tiny", "special"};
static const char *const activations[] = {"random", "random", "random", "far gates"};

/* Halves one size after the other until the layer is within its cost. */
static void shrink(struct test_case *c, struct random *random, int64_t work, int64_t elements)
{
    const int64_t results = 8000000; /* of all experts, which are held in fp64 */
    int64_t pairs = c->tokens * (c->slots > c->top_k ? c->slots : c->top_k);

    while (3 * c->hidden * c->intermediate * c->experts > elements || 3 * c->hidden * c->intermediate * pairs > work ||
           pairs * c->hidden > results) {
        switch (random_between(random, 0, 3)) {
        case 0:
            c->tokens = (c->tokens + 1) / 2;
            break;
        case 1:
            c->hidden = halve_width(c->hidden);
            break;
        case 2:
            c->intermediate = halve_width(c->intermediate);
            break;
        default:
            c->experts = (c->experts + 1) / 2;
            c->top_k = c->top_k < c->experts ? c->top_k : c->experts;
            c->slots = (c->slots + 1) / 2;
        }
        pairs = c->tokens * (c->slots > c->top_k ? c->slots : c->top_k);
    }
}

static bool is(const char *a, const char *b)
{
    return strcmp(a, b) == 0;
}

void case_draw(struct test_case *c, uint64_t seed, struct case_kind kind)
{
    struct random random = {seed};
    /* multiply-adds of the experts, and elements of w13 and w2 */
    int64_t work = kind.gpu ? 20000000 : 2000000, elements = kind.gpu ? 2000000 : 600000;
    const bool eights = (kind.gpu && !random_one_in(&random, 4)) || kind.cut;
    const int64_t step = eights ? 8 : 1;

    memset(c, 0, sizeof *c);
    c->seed = seed;
    c->level = (enum level)PICK(&random, LEVEL_EXPERTS, LEVEL_EXPERTS, LEVEL_FORWARD, LEVEL_STEPS);
    if (random_one_in(&random, 12)) {
        work *= kind.gpu ? 30 : 6;
        elements *= 4;
    }
    if (kind.small) {
        work = 150000;
        elements = 60000;
    }
    c->dtype = eights ? (moe_dtype)PICK(&random, MOE_BF16, MOE_BF16, MOE_F16) : draw_dtype(&random);
    c->io_dtype = random_one_in(&random, 3) ? draw_dtype(&random) : c->dtype;
    c->gate_dtype = random_one_in(&random, 4) ? draw_dtype(&random) : c->dtype;
    c->logits_dtype = random_one_in(&random, 4) ? draw_dtype(&random) : c->dtype;
    c->topk_weight_dtype = random_one_in(&random, 4) ? draw_dtype(&random) : MOE_F32;
    c->ids_dtype = random_one_in(&random, 3) ? MOE_I64 : MOE_I32;
    c->renormalize = (int32_t)random_between(&random, 0, 1);
    c->max_sms = (int32_t)PICK(&random, 0, 0, 0, 1, 2, 3, 17);
    c->outputs_given = !random_one_in(&random, 4);
    c->misaligned = random_one_in(&random, 4);
    c->repeats = random_one_in(&random, 12) ? 5 : 2;
    c->spare_tokens = random_one_in(&random, 4) ? random_between(&random, 1, 40) : 0;

    c->tokens = draw_tokens(&random, kind.gpu);
    c->hidden = eights ? draw_width_of_eights(&random) : draw_width(&random);
    c->intermediate = eights ? draw_width_of_eights(&random) : draw_width(&random);
    c->experts = (int32_t)PICK(&random, 1, 2, 3, 4, 7, 8, 8, 16, 31, 33, 40, 60, 64, 65, 128, 129, 160, 255, 256, 512);
    const int64_t most = PICK(&random, 16, 32);
    c->top_k = (int32_t)random_between(&random, 1, c->experts < most ? c->experts : most);
    c->slots = c->top_k;
    if (random_one_in(&random, 4)) /* a caller may bring more slots than the layer has, even than it has experts */
        c->slots = (int32_t)random_between(&random, 1, random_one_in(&random, 4) ? MOE_MAX_TOP_K : 20);

    if (kind.cut || (!kind.small && eights && random_one_in(&random, 40))) {
        draw_cut_items(c, &random, kind.small);
    } else if (!kind.small && kind.gpu && eights && random_one_in(&random, 40)) {
        draw_many_logits(c, &random);
    } else if (!kind.small && random_one_in(&random, 40)) { /* as many experts and slots as there may be */
        c->experts = (int32_t)PICK(&random, 129, 160, 255, 256, 257, 512, 1000, MOE_MAX_EXPERTS);
        c->top_k = (int32_t)random_between(&random, 1, PICK(&random, 32, MOE_MAX_TOP_K));
        c->slots = random_one_in(&random, 2) ? MOE_MAX_TOP_K : c->top_k;
        c->tokens = random_between(&random, 1, 20);
        c->hidden = step * random_between(&random, 1, 24 / step);
        c->intermediate = step * random_between(&random, 1, 3);
    } else if (!kind.small && random_one_in(&random, 150)) { /* plans of many blocks */
        c->tokens = random_between(&random, 2000, kind.gpu ? 120000 : 12000);
        c->hidden = eights ? 8 : random_between(&random, 1, 8);
        c->intermediate = step * random_between(&random, 1, 4);
        c->experts = c->experts < 16 ? c->experts : 16;
        c->top_k = c->top_k < c->experts ? c->top_k : c->experts;
        c->slots = c->slots < 16 ? c->slots : 16;
    } else if (kind.small && random_one_in(&random, 10)) { /* many experts, which shrinking would leave few of */
        c->experts = (int32_t)PICK(&random, 129, 160, 255, 256);
        c->tokens = random_between(&random, 1, 20);
        c->hidden = c->intermediate = 8;
    } else {
        if (!kind.small && eights && random_one_in(&random, 25))
            draw_long_sums(c, &random);
        shrink(c, &random, work, elements);
    }
    do
        c->routing = routings[random_between(&random, 0, sizeof routings / sizeof routings[0] - 1)];
    while (kind.cut && is(c->routing, "no expert"));
    c->gating = gatings[random_between(&random, 0, sizeof gatings / sizeof gatings[0] - 1)];
    c->layout = (moe_layout)PICK(&random, MOE_LAYOUT_AUTO, MOE_LAYOUT_ROW_MAJOR, MOE_LAYOUT_PACKED);
    c->config = (uint32_t)random_u64(&random);
    c->activation = activations[random_between(&random, 0, sizeof activations / sizeof activations[0] - 1)];
}

/* `scale` times normal numbers, rounded to dtype. From PERIOD elements on they repeat: quickly made, and no wrong
 * offset of a power of two finds the same number. */
static void *make_matrix(struct random *random, int64_t count, moe_dtype dtype, double scale)
{
    enum { PERIOD = 20000003 }; /* a prime */
    const size_t size = moe_dtype_size(dtype);
    const int64_t made = count < PERIOD ? count : PERIOD;
    char *data = must_alloc((size_t)count * size);

    for (int64_t i = 0; i < made; i++)
        moe_store_f32(data, dtype, i, random_normal(random) * (float)scale);
    for (int64_t i = made, part; i < count; i += part) {
        part = count - i < PERIOD ? count - i : PERIOD;
        memcpy(data + (size_t)i * size, data, (size_t)part * size);
    }
    return data;
}

static int64_t zipf(struct random *random, int32_t experts)
{
    double unit = random_unit(random);
    int64_t rank = (int64_t)(unit * unit * unit * unit * experts); /* a quarter power law: the first take most */

    return rank * 7 % experts;
}

static int64_t draw_id(struct random *random, const struct test_case *c, int64_t token, int32_t slot)
{
    int32_t last = c->experts - 1;

    if (is(c->routing, "zipf"))
        return zipf(random, c->experts);
    if (is(c->routing, "one expert"))
        return c->seed % (uint64_t)c->experts;
    if (is(c->routing, "same experts"))
        return (slot * 3 + (int64_t)(c->seed % 5)) % c->experts;
    if (is(c->routing, "few experts")) /* the others stay empty, at the ends as well */
        return random_between(random, last / 3, (last + 1) / 2);
    if (is(c->routing, "no expert"))
        return -1;
    if (is(c->routing, "bad ids") && random_one_in(random, 2))
        return PICK(random, -1, c->experts, INT32_MIN, INT32_MAX, c->experts + 1, -c->experts);
    if (is(c->routing, "duplicates"))
        return (token + slot / 2) % c->experts;
    if (is(c->routing, "last expert"))
        return last;
    return random_between(random, 0, last);
}

/* Ids of all pairs, such that experts have as many rows as fill a tile, one less or one more, as long as there are
 * pairs. Those that are left have no expert. */
static void make_edges(struct random *random, const struct test_case *c, int32_t *ids)
{
    static const int64_t edges[] = {7,   8,   9,   15,  16,  17,  31,  32,  33,  63,  64,  65,  95,  96,  97,
                                    127, 128, 129, 191, 192, 193, 208, 209, 225, 255, 256, 257, 511, 512, 513};
    const int64_t pairs = c->tokens * c->slots;
    int64_t used = 0;

    for (int32_t e = 0; e < c->experts && pairs - used >= edges[0]; e++) {
        int64_t fit = 1, end;

        while (fit < (int64_t)(sizeof edges / sizeof edges[0]) && edges[fit] <= pairs - used)
            fit++;
        if (random_one_in(random, 6) && c->experts > 1) /* an empty one between */
            continue;
        for (end = used + edges[random_between(random, 0, fit - 1)]; used < end; used++)
            ids[used] = e;
    }
    while (used < pairs)
        ids[used++] = -1;
    for (int64_t i = pairs - 1; i > 0; i--) {
        const int64_t other = random_between(random, 0, i);
        const int32_t id = ids[i];

        ids[i] = ids[other];
        ids[other] = id;
    }
}

static void make_routing(struct test_case *c, struct random *random)
{
    int64_t pairs = c->tokens * c->slots;
    int32_t *edges = is(c->routing, "edges") ? must_alloc((size_t)pairs * sizeof(int32_t)) : NULL;

    c->ids = must_alloc((size_t)pairs * sizeof(int64_t));
    c->weights = must_alloc((size_t)pairs * sizeof(float));
    if (edges != NULL)
        make_edges(random, c, edges);
    for (int64_t i = 0; i < pairs; i++) {
        int64_t id = edges != NULL ? edges[i] : draw_id(random, c, i / c->slots, (int32_t)(i % c->slots));

        if (c->ids_dtype == MOE_I64) {
            if (is(c->routing, "bad ids") && random_one_in(random, 8))
                id += random_one_in(random, 2) ? INT64_C(1) << 32
                                               : -(INT64_C(1) << 32); /* must not be taken for its low half */
            ((int64_t *)c->ids)[i] = id;
        } else {
            ((int32_t *)c->ids)[i] = (int32_t)id;
        }
        c->weights[i] = (float)(0.05 + random_unit(random));
        if (random_one_in(random, 10))
            c->weights[i] = random_one_in(random, 2) ? 0 : -c->weights[i];
    }
    free(edges);
}

static void make_logits(struct test_case *c, struct random *random)
{
    c->logits = must_alloc((size_t)c->tokens * c->experts * sizeof(float));
    for (int64_t i = 0; i < c->tokens * c->experts; i++) {
        float value = random_normal(random) * 2;

        if (is(c->gating, "equal"))
            value = 0.75f;
        else if (is(c->gating, "ties"))
            value = (float)random_between(random, -2, 2);
        else if (is(c->gating, "huge"))
            value *= 1e30f;
        else if (is(c->gating, "tiny"))
            value *= 1e-30f;
        else if (is(c->gating, "special") && random_one_in(random, 3))
            value = (float[]){NAN, INFINITY, -INFINITY, -0.0f}[random_between(random, 0, 3)];
        c->logits[i] = moe_round_f32(value, c->logits_dtype);
    }
}

/*
 * Half of the features, never an expert's first, get a gate far from zero, the same for all tokens: one column of the
 * hidden states is all ones, and the gate's row has a weight there beside which its other terms vanish. So no sum
 * overflows on its way.
 *
 * Below zero, down to -3e38 (f16: -57344), silu is zero, and a fast one leaves 1e-16. The features that stay as they
 * are give the row its size; what a wrong silu makes of such a gate, a share of it or NaN, or of the feature beside it,
 * shows against that.
 *
 * Above zero silu is the gate itself, and up's row shrinks by the power of two that the gate has. So these acts are as
 * large as others: they count by their relative error, hide nothing and do not overflow. The power ends where up's
 * weights would no longer be normal numbers (in f16 some are not).
 */
static void make_far_gates(struct test_case *c, struct random *random)
{
    const bool f16 = c->dtype == MOE_F16;
    const int64_t hidden = c->hidden, width = c->intermediate, column = random_between(random, 0, hidden - 1);

    for (int64_t t = 0; t < c->tokens; t++)
        moe_store_f32(c->input, c->io_dtype, t * hidden + column, 1);
    for (int64_t feature = 0; feature < c->experts * width; feature++) {
        const int64_t gate = feature / width * 2 * width + feature % width, up = gate + width;
        const int sign = (int)PICK(random, 0, 0, -1, 1);
        const int64_t last = sign < 0 ? (f16 ? 15 : 127) : (f16 ? 8 : 100);
        /* a third of them near 2^6, beyond which exponentials overflow */
        const int exponent = (int)random_between(random, 5, PICK(random, 7, last, last));

        if (sign == 0 || feature % width == 0)
            continue;
        moe_store_f32(c->w13, c->dtype, gate * hidden + column,
                      (float)ldexp(sign * (1 + 0.75 * random_unit(random)), exponent));
        for (int64_t i = up * hidden; sign > 0 && i < (up + 1) * hidden; i++)
            moe_store_f32(c->w13, c->dtype, i, ldexpf(moe_load_f32(c->w13, c->dtype, i), -exponent));
    }
}

void case_fill(struct test_case *c)
{
    struct random random = {c->seed ^ UINT64_C(0x5bd1e995)};
    int64_t width = c->tokens * c->hidden;
    double x_scale = random_one_in(&random, 4) ? (random_one_in(&random, 2) ? 4 : 0.3) : 1;
    double gate_scale = is(c->gating, "huge") ? 20 : is(c->gating, "tiny") ? 1e-3 : 1;
    size_t gate_row = (size_t)c->hidden * moe_dtype_size(c->gate_dtype);

    /* Weights shrink with the length of the sum, so that gate and up stay near 1 and f16 does not overflow. */
    c->input = make_matrix(&random, width, c->io_dtype, x_scale);
    c->x = must_alloc((size_t)width * moe_dtype_size(c->dtype));
    c->gate = make_matrix(&random, c->experts * c->hidden, c->gate_dtype, gate_scale / sqrt((double)c->hidden));
    c->w13 = make_matrix(&random, c->experts * 2 * c->intermediate * c->hidden, c->dtype, 1 / sqrt((double)c->hidden));
    c->w2 = make_matrix(&random, c->experts * c->hidden * c->intermediate, c->dtype, 1 / sqrt((double)c->intermediate));
    make_routing(c, &random);
    make_logits(c, &random);
    if (is(c->activation, "far gates"))
        make_far_gates(c, &random);
    moe_convert(c->x, c->dtype, c->input, c->io_dtype, width);
    if (is(c->gating, "equal")) /* equal rows give equal logits, whatever x is */
        for (int32_t e = 1; e < c->experts; e++)
            memcpy((char *)c->gate + e * gate_row, c->gate, gate_row);
    if (is(c->gating, "ties"))
        for (int32_t e = 1; e < c->experts; e += 2)
            memcpy((char *)c->gate + e * gate_row, (char *)c->gate + e / 4 * gate_row, gate_row);
}

void case_free(struct test_case *c)
{
    void *all[] = {c->input, c->x, c->gate, c->w13, c->w2, c->ids, c->weights, c->logits};

    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        free(all[i]);
    c->input = c->x = c->gate = c->w13 = c->w2 = c->ids = NULL;
    c->weights = c->logits = NULL;
}

void case_print(const struct test_case *c, FILE *file)
{
    static const char *const levels[] = {"experts", "forward", "steps"};

    fprintf(file,
            "%s tokens=%" PRId64 " hidden=%" PRId64 " intermediate=%" PRId64
            " experts=%d top_k=%d slots=%d dtype=%s io=%s "
            "gate=%s logits=%s weights=%s ids=%s renormalize=%d max_sms=%d layout=%s%s%s, routing: %s, gating: %s, "
            "activation: %s",
            levels[c->level], c->tokens, c->hidden, c->intermediate, c->experts, c->top_k, c->slots,
            moe_dtype_name(c->dtype), moe_dtype_name(c->io_dtype), moe_dtype_name(c->gate_dtype),
            moe_dtype_name(c->logits_dtype), moe_dtype_name(c->topk_weight_dtype), moe_dtype_name(c->ids_dtype),
            c->renormalize, c->max_sms, layout_names[c->layout], c->misaligned ? " misaligned" : "",
            c->outputs_given ? "" : " outputs=NULL", c->routing, c->gating, c->activation);
}

moe_layer_desc case_desc(const struct test_case *c)
{
    moe_layer_desc desc = moe_layer_desc_init(c->dtype);

    desc.hidden_size = c->hidden;
    desc.intermediate_size = c->intermediate;
    desc.num_experts = c->experts;
    desc.top_k = c->top_k;
    desc.gate_dtype = c->gate_dtype;
    desc.logits_dtype = c->logits_dtype;
    desc.topk_weight_dtype = c->topk_weight_dtype;
    desc.renormalize = c->renormalize;
    return desc;
}

int32_t expert_of(const void *ids, moe_dtype ids_dtype, int64_t i, int32_t experts)
{
    int64_t id = ids_dtype == MOE_I64 ? ((const int64_t *)ids)[i] : ((const int32_t *)ids)[i];

    return id >= 0 && id < experts ? (int32_t)id : -1;
}
