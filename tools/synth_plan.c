/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/synth_plan.h"

#include <stdlib.h>

#include "models/names.h"
#include "tools/cli.h"

uint64_t synth_tensor_bytes(const struct moe_st_write_tensor *tensor)
{
    return (uint64_t)tensor->shape[0] * (uint64_t)tensor->shape[1] * moe_dtype_size(tensor->dtype);
}

static bool add_tensor(struct synth_plan *plan, const struct moe_config *config, enum synth_stream stream, int64_t rows,
                       int64_t columns, enum moe_role role, int32_t layer, int32_t expert)
{
    if (plan->count == plan->room) {
        size_t room = plan->room ? 2 * plan->room : 64;
        void *tensors = realloc(plan->tensors, room * sizeof plan->tensors[0]);
        if (tensors)
            plan->tensors = tensors;
        void *streams = realloc(plan->streams, room * sizeof plan->streams[0]);
        if (streams)
            plan->streams = streams;
        if (!tensors || !streams)
            return false;
        plan->room = room;
    }
    char name[MOE_MAX_TENSOR_NAME];
    moe_tensor_name(config->family->naming, MOE_FORM_PER_EXPERT, role, layer, expert, name);
    struct moe_st_write_tensor *tensor = &plan->tensors[plan->count];
    *tensor = (struct moe_st_write_tensor){strdup(name), config->layer.dtype, 2, {rows, columns}, NULL};
    plan->streams[plan->count] = stream;
    if (!tensor->name)
        return false;
    plan->count++;
    return true;
}

static bool add_layer(struct synth_plan *plan, const struct moe_config *config, int32_t layer)
{
    const moe_layer_desc *desc = &config->layer;
    int64_t h = desc->hidden_size, i = desc->intermediate_size;
    bool ok = add_tensor(plan, config, SYNTH_HIDDEN, desc->num_experts, h, MOE_ROLE_GATE, layer, 0);
    for (int32_t e = 0; ok && e < desc->num_experts; e++)
        ok = add_tensor(plan, config, SYNTH_HIDDEN, i, h, MOE_ROLE_W1, layer, e) &&
             add_tensor(plan, config, SYNTH_INTERMEDIATE, h, i, MOE_ROLE_W2, layer, e) &&
             add_tensor(plan, config, SYNTH_HIDDEN, i, h, MOE_ROLE_W3, layer, e);
    return ok;
}

/* Fills shards up to the limit; a tensor beyond it gets one of its own. */
static bool cut_shards(struct synth_plan *plan, int64_t shard_size)
{
    plan->shards = calloc(plan->count + 1, sizeof plan->shards[0]);
    if (!plan->shards)
        return false;
    uint64_t used = 0;
    plan->shard_count = 1;
    for (size_t i = 0; i < plan->count; i++) {
        uint64_t bytes = synth_tensor_bytes(&plan->tensors[i]);
        if (used > 0 && used + bytes > (uint64_t)shard_size) {
            plan->shards[plan->shard_count++] = i;
            used = 0;
        }
        used += bytes;
        plan->bytes += bytes;
    }
    plan->shards[plan->shard_count] = plan->count;
    return true;
}

int synth_plan_make(struct synth_plan *plan, const struct moe_config *config, int64_t shard_size)
{
    /* Checked first, because the list of tensors alone could be larger than memory. */
    const moe_layer_desc *desc = &config->layer;
    uint64_t total;
    if (__builtin_mul_overflow(cli_layer_bytes(desc), (uint64_t)config->num_layers, &total) || total > INT64_MAX ||
        (uint64_t)config->num_layers * (uint64_t)desc->num_experts > 10000000)
        return cli_fail(CLI_EXIT_USAGE, "synth: %d layers of %d experts are more than can be written",
                        config->num_layers, desc->num_experts);
    for (int32_t layer = 0; layer < config->num_layers; layer++) {
        if (moe_config_layer_is_sparse(config, layer) && !add_layer(plan, config, layer))
            return cli_fail_memory();
    }
    if (plan->count == 0)
        return cli_fail(CLI_EXIT_USAGE,
                        "synth: none of the first %d layers is an MoE layer (decoder_sparse_step is %d), expected more "
                        "--layers",
                        config->num_layers, config->sparse_step);
    return cut_shards(plan, shard_size) ? CLI_GO : cli_fail_memory();
}

void synth_plan_free(struct synth_plan *plan)
{
    for (size_t i = 0; i < plan->count; i++)
        free((char *)plan->tensors[i].name);
    free(plan->tensors);
    free(plan->streams);
    free(plan->shards);
}
