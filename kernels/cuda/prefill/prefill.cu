// SPDX-License-Identifier: Apache-2.0
// The prefill path's FFN: which of its kernels runs, with which tile. Configurations are numbered through: first the
// tiles of compute capability 9.0, then those of mma.sync, headed by one that leaves the tile to the device.
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/prefill/mma.cuh"
#include "kernels/cuda/prefill/wgmma.cuh"

static int32_t wgmma_tiles()
{
    int32_t tiles = 0;
    while (moe_wgmma_tile_name(tiles + 1) != NULL)
        tiles++;
    return tiles;
}

const char *moe_prefill_config_name(int32_t config)
{
    const int32_t tiles = wgmma_tiles();
    if (config <= tiles)
        return moe_wgmma_tile_name(config);
    return config == tiles + 1 ? "mma" : moe_mma_tile_name(config - tiles - 1);
}

int32_t moe_prefill_config(const struct moe_call *call)
{
    return moe_has_wgmma(call->exec->compute_capability) ? moe_wgmma_tile(call) : wgmma_tiles() + 1;
}

moe_status moe_prefill_config_check(const struct moe_exec *exec, int32_t config, struct moe_error *why)
{
    const int32_t tiles = wgmma_tiles();
    if (config > tiles)
        return moe_mma_tile_check(exec, config - tiles - 1, why);
    if (moe_has_wgmma(exec->compute_capability))
        return MOE_OK;
    return moe_fail(why, MOE_ERROR_UNSUPPORTED,
                    "prefill configuration '%s' needs a GPU of compute capability 9.0, and a build for it",
                    moe_wgmma_tile_name(config));
}

size_t moe_scratch_prefill(const struct moe_call *call)
{
    return moe_scratch_prefill_wgmma(call);
}

size_t moe_zeroed_prefill(const struct moe_call *call)
{
    return moe_zeroed_prefill_wgmma(call);
}

moe_status moe_ffn_prefill(const struct moe_call *call)
{
    const int32_t tiles = wgmma_tiles(), config = call->config > 0 ? call->config : moe_prefill_config(call);
    const moe_status status = moe_prefill_config_check(call->exec, config, call->error);
    if (status != MOE_OK)
        return status;
    return config > tiles ? moe_ffn_prefill_mma(call, config - tiles - 1) : moe_ffn_prefill_wgmma(call, config);
}
