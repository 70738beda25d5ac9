/* SPDX-License-Identifier: Apache-2.0 */
/* The plan in plain C: a counting sort of all (token, slot) pairs by group. */
#include <string.h>

#include "router/router.h"

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* The CUDA form keeps counts for ranges of pairs or a tally, the plain form needs nothing; a workspace serves both. */
size_t moe_plan_scratch_bytes(int64_t tokens, int32_t slots, int32_t groups)
{
    int64_t blocks = ceil_div(tokens * slots, MOE_PLAN_BLOCK), counts, tally;

    counts = (blocks < MOE_PLAN_BLOCKS ? blocks : MOE_PLAN_BLOCKS) * groups;
    tally = groups <= MOE_TALLY_EXPERTS ? ceil_div(tokens, MOE_TALLY_RANGE) * ceil_div(groups, 4) : 0;
    return (size_t)(counts > tally ? counts : tally) * sizeof(int32_t);
}

/* The group that pair i (= token * slots + slot) goes to; -1: none. */
static int32_t group_of(const struct moe_plan_args *args, int64_t i)
{
    int64_t id = args->ids_dtype == MOE_I64 ? ((const int64_t *)args->ids)[i] : ((const int32_t *)args->ids)[i];

    if (id < 0 || id >= args->experts)
        return -1;
    return args->expert_group ? args->expert_group[id] : (int32_t)id;
}

void moe_plan_ref(const struct moe_plan_args *args)
{
    const struct moe_plan *plan = &args->plan;
    int64_t pairs = args->tokens * args->slots;

    if (args->zeroed_bytes > 0)
        memset(args->zeroed, 0, args->zeroed_bytes);
    memset(plan->counts, 0, (size_t)args->groups * sizeof plan->counts[0]);
    for (int64_t i = 0; i < pairs; i++) {
        int32_t group = group_of(args, i);

        if (group >= 0)
            plan->counts[group]++;
    }

    plan->offsets[0] = 0;
    for (int32_t g = 0; g < args->groups; g++)
        plan->offsets[g + 1] = plan->offsets[g] + plan->counts[g];

    /* Pairs are placed in their own order, so rows of a group stand in token order. The counts start again from zero
     * and say, while this runs, how many rows of each group are placed. */
    memset(plan->counts, 0, (size_t)args->groups * sizeof plan->counts[0]);
    for (int64_t i = 0; i < pairs; i++) {
        int32_t group = group_of(args, i), row;

        if (group < 0) {
            plan->slot_row[i] = -1;
            continue;
        }
        row = plan->offsets[group] + plan->counts[group]++;
        plan->row_token[row] = (int32_t)(i / args->slots);
        plan->row_slot[row] = (int32_t)(i % args->slots);
        plan->row_weight[row] = args->weights[i];
        plan->slot_row[i] = row;
    }
}
