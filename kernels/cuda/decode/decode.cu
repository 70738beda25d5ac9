// SPDX-License-Identifier: Apache-2.0
// The decode path's FFN: which of its kernels runs, and where things lie in its scratch memory. Configuration 1 is that
// of compute capability 9.0, configuration 2 that of mma.sync.
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/tiles.h"
#include "kernels/cuda/decode/decode.cuh"
#include "kernels/cuda/decode/mma.cuh"
#include "kernels/cuda/decode/route.cuh"
#include "kernels/cuda/decode/wgmma.cuh"

namespace
{

const char *const names[] = {"wgmma", "mma"};
enum { WGMMA = 1, MMA };

size_t aligned(uint64_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

int32_t config_of(const struct moe_call *call)
{
    return call->config > 0 ? call->config : moe_decode_config(call);
}

moe_decode_gemm gemm_of(int64_t rows, int64_t cols, int32_t workers, int32_t before)
{
    const int32_t bands = (int32_t)moe_ceil_div(rows, MOE_PACKED_ROWS), blocks = (int32_t)moe_packed_blocks(cols);
    return {moe_work_gemm_make(blocks, workers, before), bands, moe_divisor_make(bands)};
}

// Whether there may be partial sums, where the FFN routes. What is cut depends on the number of tiles, which the host
// knows of one token: its ids differ.
bool may_cut(const struct moe_call *call, const moe_decode_args *args)
{
    for (const moe_decode_gemm &gemm : args->gemm)
        if (call->tokens > 1 || moe_work_make(&gemm.work, call->slots * gemm.bands).pieces > 0)
            return true;
    return false;
}

// Where things lie in scratch memory. First comes what must be zero, and what is passed only where it is. That memory
// is there in any case: so what is enough for one configuration is for the other, and what is for many tokens is for
// few.
void carve(const struct moe_call *call, moe_decode_args *args, size_t *bytes, size_t *zeroed)
{
    char *scratch = (char *)call->scratch;
    size_t used = 0;
    const auto take = [&](uint64_t size) {
        char *at = scratch != NULL ? scratch + used : NULL;
        used += aligned(size);
        return at;
    };
    const auto act_of = [&](int64_t tokens) {
        return aligned((uint64_t)(tokens * call->slots) * call->intermediate * moe_dtype_size(call->dtype));
    };
    const auto passed_sums_of = [&](int32_t rows) {
        return aligned((uint64_t)2 * args->workers * MOE_SLOT_PARTS * MOE_PASSING_QUADS * (rows / 2) * sizeof(float4));
    };

    // Few tokens' slots are small: so GEMM 2 has its own. Twice as many tokens' take as much without.
    const bool few = call->tokens <= MOE_ROUTED_TOKENS;
    args->gemm2_slots = few ? args->workers : 0;
    const uint64_t slots = (uint64_t)args->workers * (few ? 2 : 1);

    args->taken = (int32_t *)take(sizeof(int32_t));
    args->slot_state = (int32_t *)take((uint64_t)2 * args->workers * MOE_SLOT_PARTS * sizeof(int32_t));
    args->claimed = (int32_t *)take((uint64_t)args->workers * sizeof(int32_t));
    args->paced = (int32_t *)take(sizeof(int32_t));
    args->finished = (int32_t *)take(moe_max_tiles(call->tokens * call->slots, args->groups, 1 << args->most_log2) *
                                     sizeof(int32_t));
    const bool fewest = call->tokens <= MOE_PASSED_TOKENS, passes = fewest && config_of(call) == WGMMA;
    const size_t act = act_of(call->tokens), most = 2 * act_of(MOE_PASSED_TOKENS);
    args->passed = passes ? take(act) : NULL;
    const size_t sums = passed_sums_of(args->passed_rows);
    args->passed_sums = take(sums);
    *zeroed = used;
    if (fewest && !passes)
        take(act);
    else if (!fewest && act < most)
        take(most - act);
    take(passed_sums_of(MOE_PASSED_ROWS) - sums);
    args->sums = (float *)take((slots * MOE_PACKED_ROWS << args->most_log2) * sizeof(float));
    *bytes = used;
}

} // namespace

void moe_decode_prepare(const struct moe_call *call, moe_decode_args *args, size_t *bytes, size_t *zeroed)
{
    args->x = call->x;
    args->row_token = call->plan.plan.row_token;
    args->act = call->act;
    args->down = call->down;
    args->w13 = (const char *)call->w13.data;
    args->w2 = (const char *)call->w2.data;
    args->offsets = call->plan.plan.offsets;
    args->groups = call->plan.groups;
    args->hidden = (int32_t)call->hidden;
    args->intermediate = (int32_t)call->intermediate;
    args->most_log2 = 3;
    while (1 << args->most_log2 < MOE_DECODE_TOKENS && 1 << args->most_log2 < call->tokens)
        args->most_log2++;
    args->workers = call->max_sms > 0 && call->max_sms < call->exec->sms ? call->max_sms : call->exec->sms;
    args->guess = 0; // until a kernel does
    args->gemm[0] = gemm_of(2 * call->intermediate, call->hidden, args->workers, 0);
    args->gemm[1] = gemm_of(call->hidden, call->intermediate, args->workers, 2); // GEMM 1 reads twice as much
    args->passed_rows = call->ffn_routes && may_cut(call, args) ? (call->tokens <= 2 ? 2 : MOE_PASSED_ROWS) : 0;
    carve(call, args, bytes, zeroed);
}

const char *moe_decode_config_name(int32_t config)
{
    return config <= MMA ? names[config - 1] : NULL;
}

int32_t moe_decode_config(const struct moe_call *call)
{
    return moe_has_wgmma(call->exec->compute_capability) ? WGMMA : MMA;
}

moe_status moe_decode_config_check(const struct moe_exec *exec, int32_t config, struct moe_error *why)
{
    if (config == MMA)
        return moe_decode_mma_check(exec, why);
    if (moe_has_wgmma(exec->compute_capability))
        return MOE_OK;
    return moe_fail(why, MOE_ERROR_UNSUPPORTED,
                    "decode configuration '%s' needs a GPU of compute capability 9.0, and a build for it",
                    names[config - 1]);
}

size_t moe_scratch_decode(const struct moe_call *call)
{
    moe_decode_args args;
    size_t bytes, zeroed;
    moe_decode_prepare(call, &args, &bytes, &zeroed);
    return bytes;
}

size_t moe_zeroed_decode(const struct moe_call *call)
{
    moe_decode_args args;
    size_t bytes, zeroed;
    moe_decode_prepare(call, &args, &bytes, &zeroed);
    return zeroed;
}

bool moe_decode_routes(const struct moe_call *call)
{
    return config_of(call) == WGMMA && moe_decode_wgmma_routes(call);
}

moe_status moe_ffn_decode(const struct moe_call *call)
{
    const int32_t config = config_of(call);
    moe_decode_args args;
    size_t bytes, zeroed;
    moe_status status = moe_decode_config_check(call->exec, config, call->error);
    if (status != MOE_OK || call->tokens == 0)
        return status;
    moe_decode_prepare(call, &args, &bytes, &zeroed);

    // Rows are found by their number times the chunks of 16 bytes in a row; items are counted in 32 bits.
    const int64_t tiles = moe_max_tiles(call->tokens * call->slots, args.groups, 1 << args.most_log2);
    const int64_t bands =
        moe_ceil_div(2 * call->intermediate, MOE_PACKED_ROWS) + moe_ceil_div(call->hidden, MOE_PACKED_ROWS);
    const int64_t longest = call->hidden > call->intermediate ? call->hidden : call->intermediate;
    if (call->tokens * call->slots > INT32_MAX - MOE_DECODE_TOKENS ||
        call->tokens * call->slots * (longest / 8) > UINT32_MAX ||
        tiles * bands + 4 * (int64_t)args.workers > INT32_MAX)
        return moe_fail(call->error, MOE_ERROR_UNSUPPORTED,
                        "path 'decode': %lld tokens in a layer of %lld x %lld are too many: split the batch",
                        (long long)call->tokens, (long long)call->hidden, (long long)call->intermediate);
    return config == MMA ? moe_ffn_decode_mma(call, args) : moe_ffn_decode_wgmma(call, args);
}
