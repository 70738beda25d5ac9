// SPDX-License-Identifier: Apache-2.0
// A block of decode's FFN for compute capability 9.0 (wgmma.cu): its warps, what lies where in its shared memory, what
// it is given, and the way through notes and stages that all of its parts go.
#ifndef MOE_KERNELS_CUDA_DECODE_WGMMA_BLOCK_CUH
#define MOE_KERNELS_CUDA_DECODE_WGMMA_BLOCK_CUH

#include "kernels/cuda/common/hopper.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/decode/decode.cuh"
#include "kernels/cuda/decode/route.cuh"

namespace
{

constexpr int WARPGROUP = 128, MULTIPLIERS = 2; // warpgroups
static_assert(MULTIPLIERS == MOE_SLOT_PARTS, "each sees to its part of a slot");
constexpr int LOADERS = WARPGROUP; // threads that bring tokens: the first ones

// Warps, in this order.
constexpr int FIRST_MULTIPLIER = LOADERS / 32, WEIGHT_LOADER = FIRST_MULTIPLIER + MULTIPLIERS * WARPGROUP / 32;
constexpr int WALKER = WEIGHT_LOADER + 1, FIRST_HERALD = WALKER + 1; // a herald for each multiplying warpgroup
constexpr int WARPS = FIRST_HERALD + MULTIPLIERS, THREADS = WARPS * 32;

// Named barriers: of each multiplying warpgroup one, then two of the block that writes the plan.
enum { OWN_PIECE = 1, PLAN_WRITTEN = OWN_PIECE + MULTIPLIERS, CHOICE_MADE };

constexpr int ROW_BYTES = MOE_PACKED_ROW_BYTES, COLS = MOE_PACKED_COLS, TILE_BYTES = MOE_PACKED_TILE_BYTES;

// Stages at most. The ring takes what shared memory there is; where tiles are small this is where it ends.
constexpr int MAX_STAGES = 12;
// Of these, whose weights may be under way at a time. 64 KB are enough to keep memory busy; with twice that in all
// blocks the queues to it fill up, and it delivers up to a tenth less. Where a block has few stages of GEMM 2, whoever
// is early with GEMM 1 fills the ring more slowly, for GEMM 2 has to wait for the others, and most of theirs is still
// to come.
constexpr uint32_t UNDER_WAY = 4, UNDER_WAY_EARLY = 3;
// Before the routing is known there are fewer: it reads its logits and its instructions from the same memory.
constexpr uint32_t UNDER_WAY_GUESSED = 3;
constexpr int64_t FEW_STAGES = 16;
constexpr int NOTES = 8; // tasks that the walker may be ahead of the last of the others
constexpr int LEAD = 12; // blocks before the end of an item when the next one is taken
constexpr int MAILS = 4; // that a herald may be behind

// What a herald is to tell: `slots` states of this part of slots that follow each other are `value` now, or without
// any, the number at `address` has grown by it. address NULL: the end.
struct alignas(16) mail {
    int32_t *address;
    int32_t value, slots;
};

// Shared memory: barriers, notes, mails, the largest tile, the blocks asked for, the first item (where the kernel
// routes), the pace, the list of places, where the kernel routes the choice of experts, and from the next multiple of
// 1024 on the ring: the weights of all stages, whose places do not depend on the largest tile, then the tokens of all,
// and behind it the finished tiles of both multiplying warpgroups.
constexpr int WEIGHTS_FULL = 0, TOKENS_FULL = WEIGHTS_FULL + MAX_STAGES * 8, EMPTY = TOKENS_FULL + MAX_STAGES * 8;
constexpr int NOTE_FULL = EMPTY + MAX_STAGES * 8, NOTE_EMPTY = NOTE_FULL + NOTES * 8;
constexpr int MAIL_FULL = NOTE_EMPTY + NOTES * 8, MAIL_EMPTY = MAIL_FULL + MULTIPLIERS * MAILS * 8;
constexpr int MEASURED = MAIL_EMPTY + MULTIPLIERS * MAILS * 8, CHOSEN = MEASURED + 8, FIRST_ROWS = CHOSEN + 8;
constexpr int NOTE = (FIRST_ROWS + 8 + 15) / 16 * 16;
constexpr int MAIL = NOTE + NOTES * sizeof(moe_decode_task);
constexpr int LARGEST = MAIL + MULTIPLIERS * MAILS * sizeof(mail), ASKED = LARGEST + 4, FIRST_ITEM = ASKED + 4;
constexpr int PACE = FIRST_ITEM + 4, PLACES = (PACE + 4 + 7) / 8 * 8;

// Widths of tiles, in tokens: 8, or a multiple of 16. A stage's tokens are multiplied by so many.
constexpr int WIDTHS = MOE_DECODE_TOKENS / 16 + 1;

__host__ __device__ constexpr int width_of(int rows)
{
    return rows <= 8 ? 0 : (rows + 15) / 16;
}

__host__ __device__ constexpr int tokens_of(int width)
{
    return width == 0 ? 8 : width * 16;
}

// A GEMM's packed weights, as they are copied. Places are counted in halves of a tile: in 32 bits, up to 32 TB.
constexpr uint32_t HALF_BYTES = TILE_BYTES / 2;

struct band_weights {
    const char *data;
    uint32_t expert, band; // halves from one to the next
    int32_t last;          // band of an expert
    uint32_t last_bytes;   // of a block of that
};

struct wgmma_args {
    moe_decode_args decode;
    band_weights weights[2];
    CUtensorMap w13_rows, w2_rows; // row-major weights, in the order of the packed layout
    moe_gate_args gate;            // for a kernel that routes, and its plan
    moe_plan plan;
    int packed;
    int32_t fetch;        // tiles of a band to fetch before the routing is known
    int32_t fewest_tiles; // from this number on, 32 for which the first task is worked out by then
    uint32_t early;       // stages under way of who is early
    int32_t ring_begin;
    uint8_t stages[WIDTHS]; // of a ring, for tiles of each width
};

// Where the choice of experts begins, and the ring, behind a choice of so many bytes.
__host__ __device__ constexpr int choice_begin(int groups)
{
    return (PLACES + (groups + 1) * (int)sizeof(moe_decode_place) + 15) / 16 * 16;
}

__host__ __device__ constexpr int ring_begin(int groups, int choice)
{
    return (choice_begin(groups) + choice + 1023) / 1024 * 1024;
}

static_assert((227 * 1024 - ring_begin(MOE_MAX_EXPERTS, 0) - MULTIPLIERS * MOE_DECODE_TOKENS * ROW_BYTES) /
                      (TILE_BYTES + MOE_DECODE_TOKENS * ROW_BYTES) >=
                  UNDER_WAY,
              "with fewer stages a barrier could be a round ahead of who looks back at it");

// Whether results are passed from GEMM 1 to GEMM 2 without anybody who says that they are there. They are stored where
// zeros were and are never zero themselves, so who needs them looks for them. That saves up to a microsecond, which is
// much for few tokens.
__device__ __forceinline__ bool is_passed(const moe_decode_args &args)
{
    return args.passed != NULL;
}

// One of the block's threads or warps on its way through notes and stages.
struct follower {
    const wgmma_args &args;
    const uint32_t shared; // the block's memory
    moe_ring_place stage, note;
    uint32_t stages;
    uint32_t tokens_ring; // the first stage's tokens
    uint32_t piece;       // bytes of a stage's tokens, and of a finished tile

    __device__ follower(const wgmma_args &a, uint32_t s) : args(a), shared(s)
    {
    }

    // The ring's measures follow from the largest tile, which the walker has found before it looks for the first task.
    // Where the kernel routes the loader of weights does not wait for that: it counts the same tokens itself.
    __device__ __forceinline__ void measure()
    {
        moe_barrier_wait(shared + MEASURED, 0);
        measure(*reinterpret_cast<const int32_t *>(__cvta_shared_to_generic(shared + LARGEST)));
    }

    __device__ __forceinline__ void measure(int32_t largest)
    {
        const uint32_t width = width_of(largest);
        stages = args.stages[width];
        tokens_ring = shared + args.ring_begin + stages * TILE_BYTES;
        piece = tokens_of(width) * ROW_BYTES;
    }

    __device__ uint32_t weights() const
    {
        return shared + args.ring_begin + stage.at * TILE_BYTES;
    }

    __device__ uint32_t tokens() const
    {
        return tokens_ring + stage.at * piece;
    }

    // Of a multiplying warpgroup.
    __device__ uint32_t finished_tile(int half) const
    {
        return tokens_ring + (stages + half) * piece;
    }

    __device__ uint32_t weights_full() const
    {
        return shared + WEIGHTS_FULL + stage.at * 8;
    }

    __device__ uint32_t tokens_full() const
    {
        return shared + TOKENS_FULL + stage.at * 8;
    }

    __device__ uint32_t empty() const
    {
        return shared + EMPTY + stage.at * 8;
    }

    __device__ const moe_decode_task *note_at() const
    {
        return reinterpret_cast<const moe_decode_task *>(__cvta_shared_to_generic(shared + NOTE)) + note.at;
    }

    // How many blocks of weights have been asked for, of all tasks so far and of what was guessed. Only counted by
    // atomics.
    __device__ int32_t *asked() const
    {
        return reinterpret_cast<int32_t *>(__cvta_shared_to_generic(shared + ASKED));
    }

    // How many stages may be under way in the last piece (pace.cuh). Only by atomics as well.
    __device__ uint32_t *pace() const
    {
        return reinterpret_cast<uint32_t *>(__cvta_shared_to_generic(shared + PACE));
    }

    // Where the kernel routes: known when the choice is.
    __device__ int32_t *first_item() const
    {
        return reinterpret_cast<int32_t *>(__cvta_shared_to_generic(shared + FIRST_ITEM));
    }

    __device__ moe_decode_choice choice() const
    {
        const int32_t experts = args.decode.groups;
        int32_t *const at = reinterpret_cast<int32_t *>(__cvta_shared_to_generic(shared + choice_begin(experts)));
        int32_t *const first = at + moe_routed_experts(experts);
        return {reinterpret_cast<uint32_t *>(at), first, reinterpret_cast<int2 *>(first + moe_routed_experts(experts))};
    }

    // By whole warps. False: there is nothing left.
    __device__ __forceinline__ bool next(moe_decode_task &task)
    {
        moe_barrier_wait(shared + NOTE_FULL + note.at * 8, note.parity);
        task = *note_at();
        moe_barrier_arrive(shared + NOTE_EMPTY + note.at * 8); // each lane for itself
        __syncwarp();
        note.next(NOTES);
        return task.rows > 0;
    }
};

} // namespace

#endif
