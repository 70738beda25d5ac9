/* SPDX-License-Identifier: Apache-2.0 */
/* On a GPU: packed weights are, byte for byte and padding included, what packing on the host gives, whether a layer was
 * packed or loaded so; and where packed weights may go. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/names.h"
#include "models/safetensors.h"
#include "moe.h"
#include "tests/unit/files.h"
#include "tests/unit/packer.h"

enum { SKIP = 77, MAX_EXPERTS = 9 };

static moe_context *ctx;

static const struct shape {
    int32_t experts;
    int64_t hidden, intermediate;
} shapes[] = {
    {1, 8, 8},     {3, 40, 24},     {9, 136, 72}, /* a last band of 64 rows and a block of 8 columns */
    {4, 256, 192}, {2, 2056, 1544},               /* experts larger than a buffer of the loader */
};

/* A layer's weights in host memory, bf16, and what they are packed. */
struct weights {
    moe_layer_desc desc;
    size_t gate_bytes, w13_bytes, w2_bytes, packed_w13_bytes, packed_w2_bytes;
    uint16_t *gate, *w13, *w2, *packed_w13, *packed_w2;
};

static uint16_t *noise(size_t bytes, uint64_t seed)
{
    uint16_t *values = malloc(bytes);
    assert_non_null(values);
    for (size_t i = 0; i < bytes / 2; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        values[i] = (uint16_t)(seed >> 40) | 1; /* padding alone is zero */
    }
    return values;
}

static uint16_t *packed(const uint16_t *canonical, int32_t experts, int64_t rows, int64_t cols, bool w13, size_t *bytes)
{
    *bytes = packer_pack(canonical, experts, rows, cols, w13, NULL) * 2;
    uint16_t *values = malloc(*bytes);
    assert_non_null(values);
    packer_pack(canonical, experts, rows, cols, w13, values);
    return values;
}

static struct weights make_weights(const struct shape *s)
{
    struct weights w = {.desc = moe_layer_desc_init(MOE_BF16)};
    w.desc.hidden_size = s->hidden;
    w.desc.intermediate_size = s->intermediate;
    w.desc.num_experts = s->experts;
    w.desc.top_k = 1;
    w.gate_bytes = (size_t)(s->experts * s->hidden) * 2;
    w.w2_bytes = (size_t)(s->experts * s->hidden * s->intermediate) * 2;
    w.w13_bytes = 2 * w.w2_bytes;
    w.gate = noise(w.gate_bytes, 1);
    w.w13 = noise(w.w13_bytes, 2);
    w.w2 = noise(w.w2_bytes, 3);
    w.packed_w13 = packed(w.w13, s->experts, 2 * s->intermediate, s->hidden, true, &w.packed_w13_bytes);
    w.packed_w2 = packed(w.w2, s->experts, s->hidden, s->intermediate, false, &w.packed_w2_bytes);
    return w;
}

static void free_weights(struct weights *w)
{
    uint16_t *const all[] = {w->gate, w->w13, w->w2, w->packed_w13, w->packed_w2};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

static void check(moe_status status)
{
    char text[1024];
    moe_last_error(ctx, text, sizeof text);
    if (status != MOE_OK)
        fail_msg("%s: %s", moe_status_string(status), text);
}

static void refused(moe_status got, moe_status status, const char *word)
{
    char text[1024];
    moe_last_error(ctx, text, sizeof text);
    if (got != status || strstr(text, word) == NULL)
        fail_msg("got '%s' with text '%s', expected a text with '%s'", moe_status_string(got), text, word);
}

static void *upload(const void *host, size_t bytes)
{
    void *device;
    check(moe_buffer_alloc(ctx, bytes, &device));
    check(moe_copy_in(ctx, device, host, bytes, NULL));
    return device;
}

/* Memory that is allocated next is likely this, and not zero. */
static void soil(size_t bytes)
{
    char *host = malloc(bytes);
    assert_non_null(host);
    memset(host, 0xA5, bytes);
    moe_buffer_free(ctx, upload(host, bytes));
    free(host);
}

static void check_bytes(const void *device, const void *expected, size_t bytes, const char *what)
{
    char *got = malloc(bytes);
    assert_non_null(got);
    check(moe_copy_out(ctx, got, device, bytes, NULL));
    for (size_t i = 0; i < bytes; i++)
        if (got[i] != ((const char *)expected)[i])
            fail_msg("%s: byte %zu of %zu differs", what, i, bytes);
    free(got);
}

static void check_layer(const moe_layer *layer, const struct weights *w, moe_layout layout)
{
    const bool is_packed = layout == MOE_LAYOUT_PACKED;
    moe_layer_weights at = moe_layer_weights_init();
    moe_layer_desc desc = moe_layer_desc_init(MOE_F32);
    check(moe_layer_weights_get(layer, &at));
    assert_int_equal(at.layout, layout);
    check_bytes(at.gate, w->gate, w->gate_bytes, "gate");
    check_bytes(at.w13, is_packed ? w->packed_w13 : w->w13, is_packed ? w->packed_w13_bytes : w->w13_bytes, "w13");
    check_bytes(at.w2, is_packed ? w->packed_w2 : w->w2, is_packed ? w->packed_w2_bytes : w->w2_bytes, "w2");
    check(moe_layer_describe(layer, &desc));
    assert_int_equal(desc.hidden_size, w->desc.hidden_size);
    assert_int_equal(desc.intermediate_size, w->desc.intermediate_size);
    assert_int_equal(desc.dtype, MOE_BF16);
}

static moe_layer *row_major_layer(const struct weights *w, void *parts[3])
{
    moe_layer *layer;
    moe_layer_weights weights = moe_layer_weights_init();
    weights.gate = parts[0] = upload(w->gate, w->gate_bytes);
    weights.w13 = parts[1] = upload(w->w13, w->w13_bytes);
    weights.w2 = parts[2] = upload(w->w2, w->w2_bytes);
    check(moe_layer_create(ctx, &w->desc, &weights, &layer));
    return layer;
}

static void free_parts(void *parts[3])
{
    for (int i = 0; i < 3; i++)
        moe_buffer_free(ctx, parts[i]);
}

static void layer_pack(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct weights w = make_weights(&shapes[i]);
        void *parts[3];
        moe_layer *rows = row_major_layer(&w, parts), *copy;
        soil(w.packed_w13_bytes);
        check(moe_layer_pack(rows, &copy));
        check_layer(rows, &w, MOE_LAYOUT_ROW_MAJOR);
        moe_layer_destroy(rows);
        free_parts(parts); /* the copy needs none of it */
        check_layer(copy, &w, MOE_LAYOUT_PACKED);
        moe_layer_destroy(copy);
        free_weights(&w);
    }
}

static void write_config(const struct weights *w)
{
    char text[512];
    const int length = snprintf(
        text, sizeof text,
        "{\"model_type\": \"mixtral\", \"hidden_size\": %lld, \"intermediate_size\": %lld, \"num_local_experts\": %d, "
        "\"num_experts_per_tok\": 1, \"num_hidden_layers\": 1, \"hidden_act\": \"silu\", \"dtype\": \"bfloat16\"}",
        (long long)w->desc.hidden_size, (long long)w->desc.intermediate_size, (int)w->desc.num_experts);
    files_write("config.json", text, (size_t)length);
}

/* Writes the weights as a checkpoint in one of the two forms that checkpoints have. */
static void write_checkpoint(const struct weights *w, enum moe_form form)
{
    const int64_t E = w->desc.num_experts, H = w->desc.hidden_size, I = w->desc.intermediate_size;
    struct moe_st_write_tensor tensors[1 + 3 * MAX_EXPERTS];
    static char names[1 + 3 * MAX_EXPERTS][MOE_MAX_TENSOR_NAME];
    size_t count = 0;
    struct moe_error err;
#define ADD(role, expert, values, rank, ...)                                                                           \
    do {                                                                                                               \
        moe_tensor_name(MOE_NAMING_MIXTRAL, form, role, 0, expert, names[count]);                                      \
        tensors[count] = (struct moe_st_write_tensor){names[count], MOE_BF16, rank, {__VA_ARGS__}, values};            \
        count++;                                                                                                       \
    } while (0)
    ADD(MOE_ROLE_GATE, 0, w->gate, 2, E, H);
    if (form == MOE_FORM_STACKED) {
        ADD(MOE_ROLE_DOWN, 0, w->w2, 3, E, H, I);
        ADD(MOE_ROLE_GATE_UP, 0, w->w13, 3, E, 2 * I, H);
    } else {
        for (int32_t e = 0; e < E; e++) {
            ADD(MOE_ROLE_W1, e, w->w13 + e * 2 * I * H, 2, I, H);
            ADD(MOE_ROLE_W2, e, w->w2 + e * H * I, 2, H, I);
            ADD(MOE_ROLE_W3, e, w->w13 + (2 * e + 1) * I * H, 2, I, H);
        }
    }
#undef ADD
    write_config(w);
    if (moe_st_write(files_path("model.safetensors"), tensors, count, &err) != MOE_OK)
        fail_msg("%s", err.text);
}

static void loading(void **state)
{
    (void)state;
    const moe_layout wanted[] = {MOE_LAYOUT_AUTO, MOE_LAYOUT_PACKED, MOE_LAYOUT_ROW_MAJOR};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct weights w = make_weights(&shapes[i]);
        for (int form = 0; form < MOE_FORM_COUNT; form++) {
            moe_checkpoint *checkpoint;
            write_checkpoint(&w, (enum moe_form)form);
            check(moe_checkpoint_open(ctx, files_directory, &checkpoint));
            for (int k = 0; k < 3; k++) {
                moe_load_options options = moe_load_options_init();
                moe_layer *layer;
                options.layout = wanted[k];
                soil(w.packed_w13_bytes);
                check(moe_layer_load(checkpoint, 0, &options, &layer));
                check_layer(layer, &w, wanted[k] != MOE_LAYOUT_AUTO ? wanted[k] : MOE_LAYOUT_PACKED);
                moe_layer_destroy(layer);
            }
            moe_checkpoint_close(checkpoint);
        }
        free_weights(&w);
    }
}

/* Packed pointers make a layer, paths refuse what they cannot read, and there is nothing to pack twice. */
static void uses(void **state)
{
    (void)state;
    struct weights w = make_weights(&shapes[1]);
    void *parts[3];
    moe_layer *rows = row_major_layer(&w, parts), *copy, *borrowed, *none;
    moe_layer_weights at = moe_layer_weights_init();
    moe_path path;
    check(moe_layer_pack(rows, &copy));
    check(moe_layer_weights_get(copy, &at));
    check(moe_layer_create(ctx, &w.desc, &at, &borrowed));
    check_layer(borrowed, &w, MOE_LAYOUT_PACKED);
    check(moe_path_choose(borrowed, MOE_PATH_AUTO, 512, &path, NULL, 0));
    assert_int_equal(path, MOE_PATH_PREFILL);
    refused(moe_path_choose(borrowed, MOE_PATH_SIMPLE, 512, &path, NULL, 0), MOE_ERROR_UNSUPPORTED,
            "path 'simple' reads row-major weights; this layer's are packed");
    refused(moe_layer_pack(borrowed, &none), MOE_ERROR_INVALID_ARGUMENT, "packed already");
    assert_null(none);
    /* A program that knows no layouts must not take the pointers for row-major. */
    at.size = offsetof(moe_layer_weights, layout);
    refused(moe_layer_weights_get(borrowed, &at), MOE_ERROR_UNSUPPORTED, "packed");
    check(moe_layer_weights_get(rows, &at));

    moe_layer_weights no_gate = moe_layer_weights_init();
    no_gate.w13 = parts[1];
    no_gate.w2 = parts[2];
    moe_layer_destroy(copy);
    check(moe_layer_create(ctx, &w.desc, &no_gate, &none));
    check(moe_layer_pack(none, &copy));
    check(moe_layer_weights_get(copy, &no_gate));
    assert_null(no_gate.gate);
    moe_layer_destroy(none);

    moe_layer_desc wide = w.desc;
    wide.dtype = MOE_F32;
    wide.hidden_size = wide.intermediate_size = 8;
    check(moe_layer_create(ctx, &wide, &at, &none));
    moe_layer_destroy(borrowed);
    refused(moe_layer_pack(none, &borrowed), MOE_ERROR_UNSUPPORTED, "bf16 or f16");
    moe_layer *const all[] = {rows, copy, none};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        moe_layer_destroy(all[i]);
    free_parts(parts);
    free_weights(&w);
}

int main(void)
{
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CUDA;
    if (moe_context_create(&options, &ctx) != MOE_OK)
        return SKIP;
    const struct CMUnitTest tests[] = {cmocka_unit_test(layer_pack), cmocka_unit_test(loading), cmocka_unit_test(uses)};
    int failed = cmocka_run_group_tests(tests, files_setup, files_teardown);
    moe_context_destroy(ctx);
    return failed;
}
