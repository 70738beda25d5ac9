/* SPDX-License-Identifier: Apache-2.0 */
/* Packed weights: made by the library from the case's row-major ones, and compared with what tests/unit/packer.h makes
 * of them, padding included, before they are used and afterwards. */
#include <stdlib.h>

#include "tests/checkmoe/checkmoe.h"
#include "tests/unit/packer.h"

static bool check_part(struct checker *checker, const struct test_case *c, const void *device, bool w13)
{
    const int64_t rows = w13 ? 2 * c->intermediate : c->hidden, cols = w13 ? c->hidden : c->intermediate;
    const uint16_t *matrices = w13 ? c->w13 : c->w2;
    const size_t expert_bytes = 2 * packer_pack(NULL, 1, rows, cols, w13, NULL);
    const size_t bytes = expert_bytes * (size_t)c->experts;
    uint8_t *got = must_alloc(bytes);
    uint16_t *expected = must_alloc(expert_bytes);
    bool fine = check_call(checker, moe_copy_out(checker->ctx, got, device, bytes, NULL), "copying from the device");

    if (fine && checker->broken == BREAK_PACKED && !w13) {
        got[bytes - 1] ^= 1;
        checker->planted = true;
    }
    for (int32_t e = 0; fine && e < c->experts; e++) {
        const uint8_t *expert = got + (size_t)e * expert_bytes;

        packer_pack(matrices + e * rows * cols, 1, rows, cols, w13, expected);
        if (memcmp(expert, expected, expert_bytes) != 0) {
            check_fail(checker, "packed %s of expert %d differs from byte %zu of %zu on", w13 ? "w13" : "w2", e,
                       first_difference(expert, expected, expert_bytes), expert_bytes);
            fine = false;
        }
    }
    free(got);
    free(expected);
    return fine;
}

bool check_packed(struct checker *checker, const struct test_case *c, const moe_layer *packed)
{
    return check_part(checker, c, packed->weights.w13, true) && check_part(checker, c, packed->weights.w2, false);
}

bool make_layers(struct checker *checker, const struct test_case *c, int gate, int w13, int w2, moe_layer **layer,
                 moe_layer **packed)
{
    const char *op = checker->op;
    struct arena *arena = &checker->arena;
    moe_layer_desc desc = case_desc(c);
    moe_layer_weights weights = moe_layer_weights_init();

    *packed = NULL;
    weights.gate = gate >= 0 ? arena_device(arena, gate) : NULL;
    weights.w13 = arena_device(arena, w13);
    weights.w2 = arena_device(arena, w2);
    if (!check_call(checker, moe_layer_create(checker->ctx, &desc, &weights, layer), "moe_layer_create"))
        return false;
    if (checker->layout != MOE_LAYOUT_PACKED)
        return true;

    checker->op = "moe_layer_pack";
    bool fine = check_call(checker, arena_send(arena, 0xff), "copying to the device") &&
                check_call(checker, moe_layer_pack(*layer, packed), checker->op) &&
                check_call(checker, arena_fetch(arena), "copying from the device") && check_arena(checker, 0) &&
                check_packed(checker, c, *packed);
    checker->op = op;
    return fine;
}
