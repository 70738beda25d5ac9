/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One MoE layer of a Hugging Face checkpoint, run on eight tokens: the whole of what a program needs.
 *
 *     cc forward.c $(pkg-config --cflags --libs libmoe) -o forward && ./forward MODEL_DIR [LAYER]
 */
#include <moe.h>
#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 8 };

static moe_context *ctx;

/* Every call that can fail returns a status; the context knows what went wrong. */
static void check(moe_status status)
{
    char text[1024];
    if (status == MOE_OK)
        return;
    moe_last_error(ctx, text, sizeof text);
    fprintf(stderr, "forward: %s\n", text[0] ? text : moe_status_string(status));
    exit(EXIT_FAILURE);
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: forward MODEL_DIR [LAYER]\n");
        return EXIT_FAILURE;
    }
    int layer_number = argc > 2 ? atoi(argv[2]) : 0;

    /* The first GPU if it works, else the CPU. The layer keeps its own copy of the weights. */
    moe_checkpoint *checkpoint;
    moe_layer *layer;
    check(moe_context_create(NULL, &ctx));
    check(moe_checkpoint_open(ctx, argv[1], &checkpoint));
    check(moe_layer_load(checkpoint, layer_number, NULL, &layer));
    moe_checkpoint_close(checkpoint);

    moe_layer_desc desc = moe_layer_desc_init(MOE_BF16);
    check(moe_layer_describe(layer, &desc));
    size_t count = (size_t)TOKENS * (size_t)desc.hidden_size;
    float *x = malloc(count * sizeof *x), *y = malloc(count * sizeof *y);
    int32_t *ids = malloc(TOKENS * (size_t)desc.top_k * sizeof *ids);
    if (!x || !y || !ids)
        check(MOE_ERROR_OUT_OF_MEMORY);
    for (size_t i = 0; i < count; i++)
        x[i] = (float)((i * 2654435761u >> 8) % 2048) / 1024 - 1; /* anything between -1 and 1 */

    /* Hidden states, output and workspace live where the layer runs; on the CPU that is plain memory. */
    moe_limits limits = moe_limits_init();
    size_t workspace_bytes;
    void *workspace, *input, *output, *chosen;
    limits.max_tokens = TOKENS;
    check(moe_workspace_size(layer, &limits, &workspace_bytes));
    check(moe_buffer_alloc(ctx, workspace_bytes, &workspace));
    check(moe_buffer_alloc(ctx, count * sizeof *x, &input));
    check(moe_buffer_alloc(ctx, count * sizeof *y, &output));
    check(moe_buffer_alloc(ctx, TOKENS * (size_t)desc.top_k * sizeof *ids, &chosen));
    check(moe_copy_in(ctx, input, x, count * sizeof *x, NULL));

    moe_batch batch = moe_batch_init();
    batch.tokens = TOKENS;
    batch.dtype = MOE_F32; /* converted where it is not the layer's */
    batch.hidden_states = input;
    batch.output = output;
    batch.topk_ids_out = chosen;
    check(moe_forward(layer, &batch, workspace, workspace_bytes, NULL));

    check(moe_copy_out(ctx, y, output, count * sizeof *y, NULL));
    check(moe_copy_out(ctx, ids, chosen, TOKENS * (size_t)desc.top_k * sizeof *ids, NULL));
    for (int t = 0; t < TOKENS; t++) {
        printf("token %d: experts", t);
        for (int k = 0; k < desc.top_k; k++)
            printf(" %d", ids[t * desc.top_k + k]);
        printf(", output %g %g %g ...\n", y[(size_t)t * (size_t)desc.hidden_size],
               desc.hidden_size > 1 ? y[(size_t)t * (size_t)desc.hidden_size + 1] : 0,
               desc.hidden_size > 2 ? y[(size_t)t * (size_t)desc.hidden_size + 2] : 0);
    }

    moe_buffer_free(ctx, chosen);
    moe_buffer_free(ctx, output);
    moe_buffer_free(ctx, input);
    moe_buffer_free(ctx, workspace);
    free(ids);
    free(y);
    free(x);
    moe_layer_destroy(layer);
    moe_context_destroy(ctx);
    return EXIT_SUCCESS;
}
