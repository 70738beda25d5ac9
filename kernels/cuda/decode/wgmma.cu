// SPDX-License-Identifier: Apache-2.0
// The decode path's FFN for compute capability 9.0: one launch that reads the weights of all experts in use, at the
// speed of memory, from the first tile of GEMM 1 to the last of GEMM 2; once, unless an expert has more rows than a
// tile.
//
// What a block does is a stream of stages: 64 columns of 128 weight rows, which one bulk copy brings, and of the tokens
// that they are multiplied with. One warp starts the copies of weights as soon as a stage is free, and nothing but a
// full ring ever holds it up: GEMM 2's weights are on their way while GEMM 1's results are not there yet. Four warps
// bring the tokens, and these do wait. Two warpgroups multiply, each 64 of the weight rows, as the operand m; tokens
// are n, so that few of them waste nothing. What takes a while but nobody must wait for has warps of its own: finding
// the tasks to come, and telling other blocks what is in memory. Before all that it routes, if tokens are few
// (route.cuh).
//
// How long the ring is, and how many tokens a stage has room for, is found on the device: by the largest tile.
#include "kernels/cuda/decode/wgmma.cuh"

#include "kernels/cuda/common/activation.cuh"
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/guess.cuh"
#include "kernels/cuda/common/hopper.cuh"
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/weight_map.h"
#include "kernels/cuda/decode/first.cuh"
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
// Of these, whose weights may be under way at a time. 64 KB are enough to keep memory busy; with twice that the queues
// to it fill up, and it delivers up to a tenth less. Whoever is early with GEMM 1 fills the ring for GEMM 2 more
// slowly, for that has to wait for the others.
constexpr uint32_t UNDER_WAY = 4, UNDER_WAY_EARLY = 2;
// Tiles asked for before the routing is known. With three times as many the routing waits longer for what it reads than
// the weights are there sooner.
constexpr int GUESSED_TILES = 4;
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
// routes), the list of places, where the kernel routes the choice of experts, and from the next multiple of 1024 on the
// finished tiles of both multiplying warpgroups, then the ring.
constexpr int WEIGHTS_FULL = 0, TOKENS_FULL = WEIGHTS_FULL + MAX_STAGES * 8, EMPTY = TOKENS_FULL + MAX_STAGES * 8;
constexpr int NOTE_FULL = EMPTY + MAX_STAGES * 8, NOTE_EMPTY = NOTE_FULL + NOTES * 8;
constexpr int MAIL_FULL = NOTE_EMPTY + NOTES * 8, MAIL_EMPTY = MAIL_FULL + MULTIPLIERS * MAILS * 8;
constexpr int MEASURED = MAIL_EMPTY + MULTIPLIERS * MAILS * 8, CHOSEN = MEASURED + 8, FIRST_ROWS = CHOSEN + 8;
constexpr int NOTE = (FIRST_ROWS + 8 + 15) / 16 * 16;
constexpr int MAIL = NOTE + NOTES * sizeof(moe_decode_task);
constexpr int LARGEST = MAIL + MULTIPLIERS * MAILS * sizeof(mail), ASKED = LARGEST + 4, FIRST_ITEM = ASKED + 4;
constexpr int PLACES = (FIRST_ITEM + 4 + 7) / 8 * 8;

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
    int32_t guess;        // tiles of a band to fetch before the routing is known
    int32_t fewest_tiles; // from this number on, 32 for which the first task is worked out by then
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
    uint32_t stages, stage_bytes;
    uint32_t ring;  // the first stage
    uint32_t piece; // a finished tile's bytes, one to a multiplying warpgroup, right before the ring

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
        piece = tokens_of(width) * ROW_BYTES;
        ring = shared + args.ring_begin + MULTIPLIERS * piece;
        stage_bytes = TILE_BYTES + piece;
        stages = args.stages[width];
    }

    __device__ uint32_t weights() const
    {
        return ring + stage.at * stage_bytes;
    }

    __device__ uint32_t tokens() const
    {
        return weights() + TILE_BYTES;
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

    // How many blocks of weights have been asked for, of all tasks so far. Only counted by atomics.
    __device__ int32_t *asked() const
    {
        return reinterpret_cast<int32_t *>(__cvta_shared_to_generic(shared + ASKED));
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

// ---- Routing, where the kernel does it: all warps, with PER experts a lane ----

__device__ inline bool writes_plan()
{
    return blockIdx.x == gridDim.x - 1;
}

// By each warp, instead of moe_decode_await_plan(): when CHOSEN is complete so is the choice, and the block's first
// item is known. One of the warps `takes` that, and has it returned in its first lane.
template <int PER> __device__ __forceinline__ int32_t choose(const follower &own, bool takes)
{
    int32_t item = 0;
    moe_choose_experts<PER>(own.args.gate, own.choice(), writes_plan(), [&] {
        if (takes)
            item = moe_decode_take(own.args.decode);
    });
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        if (takes)
            *own.first_item() = item;
        moe_barrier_arrive(own.shared + CHOSEN);
    }
    if (!writes_plan())
        moe_grid_launch_dependents();
    return item;
}

// By the multiplying warpgroups of the block that writes the plan, once it knows the experts' first rows: nobody else
// has time. The next kernel reads it without waiting for this one's end: so what all of the block has written of it is
// fenced before the word that lets that one start.
__device__ inline void write_plan(const follower &own)
{
    const int thread = threadIdx.x - LOADERS;
    moe_barrier_wait(own.shared + FIRST_ROWS, 0);
    moe_place_chosen(own.args.gate, own.args.plan, own.choice(), thread, MULTIPLIERS * WARPGROUP);
    __threadfence();
    moe_named_sync(PLAN_WRITTEN, MULTIPLIERS * WARPGROUP);
    moe_grid_launch_dependents();
}

// ---- Finding tasks: a warp ----

template <int PER> struct walker : follower {
    using follower::follower;

    __device__ void run()
    {
        const bool first = threadIdx.x % 32 == 0;
        moe_decode_place *places = reinterpret_cast<moe_decode_place *>(__cvta_shared_to_generic(shared + PLACES));
        moe_decode_walk walk(args.decode, places);
        int32_t largest;
        if constexpr (PER == 0) {
            moe_decode_await_plan();
            largest = walk.start();
        } else {
            largest = start_routed(walk);
        }
        if (first) {
            *reinterpret_cast<int32_t *>(__cvta_shared_to_generic(shared + LARGEST)) = largest;
            moe_barrier_arrive(shared + MEASURED);
        }
        moe_decode_task task;
        for (int32_t told = 0;; told += task.end - task.begin) { // blocks
            walk.next(task, [&] {
                while (first && atomicAdd(asked(), 0) < told - LEAD)
                    ;
                __syncwarp();
            });
            if (first) {
                moe_barrier_wait(shared + NOTE_EMPTY + note.at * 8, note.parity ^ 1);
                *const_cast<moe_decode_task *>(note_at()) = task;
                moe_barrier_arrive(shared + NOTE_FULL + note.at * 8);
            }
            __syncwarp();
            note.next(NOTES);
            if (task.rows == 0)
                return;
        }
    }

    // Makes the list of whatever there is at first, without a result, so that these instructions, too, are in the SM's
    // caches; then of the choice, when the warp has done its part of it and all others theirs. The block that writes
    // the plan writes the counts here.
    __device__ __forceinline__ int32_t start_routed(moe_decode_walk &walk)
    {
        const moe_plan &plan = args.plan;
        const int32_t experts = args.decode.groups;
#pragma unroll 1
        for (bool real = false;; real = true) {
            if (real) {
                choose<PER>(*this, false);
                moe_barrier_wait(shared + CHOSEN, 0);
            }
            const bool writes = real && writes_plan();
            const int32_t largest =
                moe_list_chosen(choice(), experts, walk.list, walk.tiles, [&](int e, int32_t rows, int32_t row) {
                    if (!writes)
                        return;
                    choice().first[e] = row;
                    plan.counts[e] = rows;
                    plan.offsets[e] = row;
                    if (e == experts - 1)
                        plan.offsets[experts] = row + rows;
                });
            if (writes)
                moe_barrier_arrive(shared + FIRST_ROWS); // each lane for itself
            if (real) {
                walk.single = true;
                return walk.start(*first_item(), largest);
            }
        }
    }
};

// ---- Weights: a warp, of which one thread starts the copies ----

template <int PER> struct weight_loader : follower {
    using follower::follower;
    moe_ring_place oldest;  // of the stages whose weights are under way
    uint32_t under_way = 0; // how many these are
    uint32_t early = 0;     // stages filled for GEMM 2, up to the whole ring
    const uint64_t policy = moe_policy_once();
    band_weights source = args.weights[0]; // of the GEMM that the tasks have come to

    __device__ __forceinline__ void load(const moe_decode_task &task)
    {
        if (task.gemm2)
            source = args.weights[1];
        const int first = task.band * MOE_PACKED_ROWS;
        // A box through a tensor map is whole always, what is past the end being zeros.
        const uint32_t bytes = task.band == source.last ? source.last_bytes : TILE_BYTES;
        const uint32_t halves =
            task.group * source.expert + task.band * source.band + task.begin * (bytes / HALF_BYTES);
        const char *from = source.data + (uint64_t)halves * HALF_BYTES;
#pragma unroll 1
        for (int block = task.begin; block < task.end; block++) {
            const bool is_early = task.gemm2 && early < stages;
            early += is_early;
#pragma unroll 1
            for (under_way++; under_way > (is_early ? UNDER_WAY_EARLY : UNDER_WAY); under_way--) {
                moe_barrier_wait(shared + WEIGHTS_FULL + oldest.at * 8, oldest.parity);
                oldest.next(stages);
            }
            moe_barrier_wait(empty(), stage.parity ^ 1);
            if (moe_elect()) {
                const uint32_t full = weights_full();
                moe_barrier_expect(full, bytes);
                if (args.packed)
                    moe_bulk_load(weights(), from, bytes, full, policy);
                else if (task.gemm2)
                    moe_tensor_load_3d(weights(), &args.w2_rows, block * COLS, first, task.group, full, policy);
                else
                    moe_tensor_load_5d(weights(), &args.w13_rows, block * COLS, 0, 0, first / 16, task.group, full,
                                       policy);
                atomicAdd(asked(), 1);
            }
            from += bytes;
            stage.next(stages);
        }
    }

    // Where the kernel routes: of the first task, ahead of its note, what load() needs, and no more. False: GEMM 1 has
    // no task for this block. `item`, the block's first one, is that of the warp's first lane.
    __device__ __forceinline__ bool find_first(int32_t item, moe_decode_task &task)
    {
        const moe_decode_gemm &gemm = args.decode.gemm[0];
        item = __shfl_sync(0xffffffffu, item, 0);
        for (int32_t fewest = args.fewest_tiles;;) {
            moe_decode_first first = moe_first_of(gemm, item, fewest + threadIdx.x % 32);
            moe_barrier_wait(shared + CHOSEN, 0);
            const moe_chosen_experts<PER> experts(choice(), args.decode.groups);
            const int of = experts.count - fewest;
            if (__builtin_expect(of < 0 || of >= 32, 0)) { // once more, with the right number
                fewest = experts.count;
                continue;
            }
            first = moe_first_from(first, of);
            measure(experts.largest);
            task.gemm2 = 0;
            task.group = experts.id(first.tile);
            task.band = first.band;
            task.begin = first.begin;
            task.end = first.end;
            return first.tile >= 0;
        }
    }

    __device__ void run(int32_t item)
    {
        moe_decode_task task;
        bool ahead = false; // of the task's note
        if constexpr (PER > 0)
            ahead = find_first(item, task);
        else
            measure();
        while (ahead || next(task)) {
            load(task);
            if (ahead)
                next(task); // it tells the same, and its place is free again
            ahead = false;
        }
    }
};

// ---- Tokens: a warpgroup ----

template <int MOST, bool ROUTES> struct token_loader : follower {
    using follower::follower;

    // A thread brings the same chunk of every 16th token: rows of x, or rows of act, which are in the plan's order.
    __device__ __forceinline__ void load(const moe_decode_task &task)
    {
        constexpr int STRIDE = LOADERS / 8, EACH = MOST / STRIDE;
        const moe_decode_args &d = args.decode;
        const int chunk = threadIdx.x % 8, first = threadIdx.x / 8;
        const int cols = task.gemm2 ? d.intermediate : d.hidden;
        const int mine = (task.rows - first + STRIDE - 1) / STRIDE;
        const uint32_t row_chunks = cols / 8;
        uint32_t at[EACH]; // where each row begins, in chunks: the host has seen to it that this fits
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (i >= mine)
                break;
            const int n = first + i * STRIDE, row = task.row + n;
            if (task.gemm2)
                at[i] = row * row_chunks;
            else if constexpr (ROUTES)
                at[i] = moe_chosen_token(choice().chosen[task.group], n) * row_chunks;
            else
                at[i] = d.row_token[row] * row_chunks;
        }
        if (task.gemm2) {
            // Each warp looks for itself, so that all of it sees what the multiplying warpgroups have stored.
            while (moe_load_acquire(d.finished + task.tile) < MULTIPLIERS * d.gemm[0].bands)
                ;
        }
        const uint32_t place = first * ROW_BYTES + ((chunk ^ (first & 7)) << 4);
        const char *from = (const char *)(task.gemm2 ? d.act : d.x) + chunk * 16 + (int64_t)task.begin * ROW_BYTES;
        int left = cols - chunk * 8 - task.begin * COLS; // columns from this thread's chunk on
#pragma unroll 1
        for (int block = task.begin; block < task.end; block++) {
            moe_barrier_wait(empty(), stage.parity ^ 1);
            const uint32_t to = tokens() + place;
            const int bytes = left > 0 ? 16 : 0; // past the row's end zeros, as in the weights
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (i < mine)
                    moe_cp_async_to(to + i * STRIDE * ROW_BYTES, left > 0 ? from + at[i] * (uint64_t)16 : from, bytes);
            moe_barrier_arrive_cp_async(tokens_full());
            from += ROW_BYTES;
            left -= COLS;
            stage.next(stages);
        }
    }

    // Rows of act that are passed, with eight chunks each in a block: each lane looks for one chunk, so a warp for four
    // rows at once, of one block or, if the tile has fewer, of several, when the first of these is next.
    __device__ __forceinline__ void load_passed(const moe_decode_task &task)
    {
        constexpr int CHUNKS = COLS / 8, OF_WARP = 32 / CHUNKS, OF_ALL = LOADERS / CHUNKS; // rows at once
        static_assert(OF_ALL >= 8 && MOE_PASSED_TOKENS <= 8, "a tile has at most 8 rows then");
        const moe_decode_args &d = args.decode;
        const int thread = threadIdx.x, chunk = thread % CHUNKS, place = thread / CHUNKS;
        const int log2 = 32 - __clz(task.rows - 1); // places of a block: its rows, rounded up to a power of two
        const int row = place & ((1 << log2) - 1), mine = place >> log2, first = place / OF_WARP * OF_WARP >> log2;
        const int blocks = OF_ALL >> log2; // at once
        const int row_chunks = d.intermediate / 8, column = (task.begin + mine) * CHUNKS + chunk;
        const uint4 *from = (const uint4 *)d.passed + (int64_t)(task.row + row) * row_chunks + column;
        int left = min(row_chunks, task.end * CHUNKS) - column; // chunks from this thread's on
        const bool used = row < task.rows;
        uint4 v = {};
#pragma unroll 1
        for (int block = task.begin; block < task.end; block++) {
            const int turn = (block - task.begin) & (blocks - 1);
            if (turn == first) {
                v = uint4(); // past the row's end zeros, as in the weights
                if (used && left > 0) {
                    do
                        v = moe_load_relaxed(from);
                    while (v.x == 0 || v.y == 0 || v.z == 0 || v.w == 0);
                }
                from += blocks * CHUNKS;
                left -= blocks * CHUNKS;
            }
            moe_barrier_wait(empty(), stage.parity ^ 1);
            if (turn == mine && used)
                *reinterpret_cast<uint4 *>(
                    __cvta_shared_to_generic(tokens() + row * ROW_BYTES + ((chunk ^ (row & 7)) << 4))) = v;
            __syncwarp();
            if (thread % 32 == 0)
                moe_barrier_arrive_as(tokens_full(), 32);
            stage.next(stages);
        }
    }

    __device__ void run()
    {
        moe_decode_task task;
        measure();
        while (next(task)) {
            if (task.gemm2 && is_passed(args.decode))
                load_passed(task);
            else
                load(task);
        }
    }
};

// ---- Telling other blocks: one thread for each multiplying warpgroup ----
//
// A release at the scope of the GPU waits until all that came before is in memory, one or two microseconds. So those
// who store leave a mail, which all their warps sign: what they have stored, or read, comes before the herald's
// release.

struct mailbox {
    const uint32_t shared;
    const int half; // which of the two
    moe_ring_place place;

    __device__ uint32_t full() const
    {
        return shared + MAIL_FULL + (half * MAILS + place.at) * 8;
    }

    __device__ uint32_t empty() const
    {
        return shared + MAIL_EMPTY + (half * MAILS + place.at) * 8;
    }

    __device__ mail *at() const
    {
        return reinterpret_cast<mail *>(__cvta_shared_to_generic(shared + MAIL)) + half * MAILS + place.at;
    }

    // By all of a warpgroup.
    __device__ __forceinline__ void send(int thread, int32_t *address, int32_t value, int32_t slots)
    {
        moe_barrier_wait(empty(), place.parity ^ 1);
        if (thread == 0)
            *at() = {address, value, slots};
        __syncwarp();
        if (thread % 32 == 0)
            moe_barrier_arrive(full());
        place.next(MAILS);
    }

    __device__ void run()
    {
        for (;; place.next(MAILS)) {
            moe_barrier_wait(full(), place.parity);
            const mail m = *at();
            moe_barrier_arrive(empty());
            if (m.address == NULL)
                return;
            if (m.slots == 0)
                moe_add_release(m.address, m.value);
#pragma unroll 1
            for (int i = m.slots - 1; i >= 0; i--)
                moe_store_release(m.address + i * MOE_SLOT_PARTS, m.value);
        }
    }
};

// ---- Multiplying: two warpgroups ----

template <typename T, int MOST> struct multiplier : follower {
    const int half, thread; // which of the two, and which thread in it
    mailbox mails;
    float d[MOST / 2];

    __device__ multiplier(const wgmma_args &a, uint32_t s)
        : follower(a, s), half(__shfl_sync(0xffffffffu, (threadIdx.x - LOADERS) / WARPGROUP, 0)),
          thread(threadIdx.x % WARPGROUP), mails{s, half}
    {
    }

    __device__ void sync() const
    {
        moe_named_sync(OWN_PIECE + half, WARPGROUP);
    }

    __device__ __forceinline__ void release(uint32_t at) const
    {
        if (thread % 32 == 0)
            moe_barrier_arrive(shared + EMPTY + at * 8);
    }

    // d = weights . tokens^T over the task's blocks. A stage's products are awaited when the next one's are under way.
    template <int N> __device__ __forceinline__ void multiply(int blocks)
    {
        uint32_t before = 0;
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            d[i] = 0.0f;
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            const uint32_t a = moe_wgmma_matrix(weights() + half * (TILE_BYTES / MULTIPLIERS));
            const uint32_t b = moe_wgmma_matrix(tokens());
            moe_barrier_wait(weights_full(), stage.parity);
            moe_barrier_wait(tokens_full(), stage.parity);
            moe_fence_async_shared(); // the loading threads' copies of tokens, which the tensor cores might not see yet
            moe_wgmma_fence();
#pragma unroll
            for (int k = 0; k < COLS / 16; k++)
                moe_wgmma<T, N>::run(d, a + k * 2, b + k * 2, 1);
            moe_wgmma_commit();
            if (block > 0) {
                moe_wgmma_wait<1>();
                release(before);
            }
            before = stage.at;
            stage.next(stages);
        }
        moe_wgmma_wait<0>();
        release(before);
    }

    // With the number of tokens, rounded up, known to the compiler. The fewest are tried first: with them there is the
    // least to read, and what instructions a jump passes over does not have to come from memory.
    template <int N = 8> __device__ __forceinline__ void multiply_any(int rows, int blocks)
    {
        if constexpr (N < MOST) {
            if (rows > N) {
                multiply_any<(N < 16 ? 16 : N + 16)>(rows, blocks);
                return;
            }
        }
        multiply<N>(blocks);
    }

    // ---- Partial sums: each thread's registers, four at a time, as they are ----

    __device__ int32_t *slot_state(int slot) const
    {
        return args.decode.slot_state + slot * MOE_SLOT_PARTS + half;
    }

    __device__ float4 *slot_sums(int slot) const
    {
        const int64_t part = (int64_t)(slot * MOE_SLOT_PARTS + half) * (MOE_PACKED_ROWS / MOE_SLOT_PARTS);
        return reinterpret_cast<float4 *>(args.decode.sums + (part << args.decode.most_log2)) + thread;
    }

    // By all of the warpgroup: waits until the slots are in this state. A lane looks at each.
    __device__ __forceinline__ void await(int first, int slots, int32_t state) const
    {
        for (int slot = thread; slot < slots; slot += WARPGROUP)
            while (moe_load_acquire(slot_state(first + slot)) != state)
                ;
        sync();
    }

    __device__ __forceinline__ void leave_sums(const moe_decode_task &task)
    {
        if (task.slot_free != MOE_SLOT_FREE)
            await(task.own_slot, 1, task.slot_free);
        float4 *to = slot_sums(task.own_slot);
#pragma unroll
        for (int q = 0; q < MOST / 8; q++) {
            if (q * 8 >= task.rows)
                break;
            to[q * WARPGROUP] = make_float4(d[4 * q], d[4 * q + 1], d[4 * q + 2], d[4 * q + 3]);
        }
        mails.send(thread, slot_state(task.own_slot), task.gemm2 ? MOE_SLOT_SUM2 : MOE_SLOT_SUM1, 1);
    }

    __device__ __forceinline__ void add_sums(const moe_decode_task &task)
    {
        await(task.first_slot, task.slots, task.gemm2 ? MOE_SLOT_SUM2 : MOE_SLOT_SUM1);
        for (int slot = task.first_slot; slot < task.first_slot + task.slots; slot++) {
            const float4 *from = slot_sums(slot);
#pragma unroll
            for (int q = 0; q < MOST / 8; q++) {
                if (q * 8 >= task.rows)
                    break;
                const float4 v = __ldcg(from + q * WARPGROUP);
                d[4 * q] += v.x;
                d[4 * q + 1] += v.y;
                d[4 * q + 2] += v.z;
                d[4 * q + 3] += v.w;
            }
        }
        if (!task.gemm2)
            mails.send(thread, slot_state(task.first_slot), MOE_SLOT_READ1, task.slots);
    }

    // ---- Results: turned to rows of tokens in shared memory, stored in chunks of 16 bytes ----

    // A warpgroup's piece has a row of 128 bytes for each token, chunk c of row r at place c ^ (r % 8); CHUNKS of
    // them are in use, the first of which belongs to column `column` of `columns`. PASSED: they are passed; else
    // `passed`: they are passed as well, beside where they belong.
    template <int CHUNKS, bool PASSED = false>
    __device__ __forceinline__ void store(const moe_decode_task &task, void *to, int columns, int64_t column,
                                          bool passed = false)
    {
        const uint32_t from = ring - (MULTIPLIERS - half) * piece;
        sync();
#pragma unroll 1
        for (int i = thread; i < task.rows * CHUNKS; i += WARPGROUP) {
            const int chunk = i % CHUNKS, r = i / CHUNKS;
            const int64_t c = column + chunk * 8;
            const uint4 *at = reinterpret_cast<const uint4 *>(
                __cvta_shared_to_generic(from + r * ROW_BYTES + ((chunk ^ (r & 7)) << 4)));
            if (c >= columns)
                continue;
            const int64_t place = (int64_t)(task.row + r) * columns + c;
            if constexpr (PASSED) {
                pass(to, place, *at);
            } else {
                if (passed)
                    pass(args.decode.passed, place, *at);
                *reinterpret_cast<uint4 *>((T *)to + place) = *at;
            }
        }
    }

    // Eight elements for who looks for them where zeros were: with pairs of +0 as -0, which changes no sum but the sign
    // of one that is zero.
    static __device__ __forceinline__ void pass(void *to, int64_t place, const uint4 &v)
    {
        const auto seen = [](uint32_t pair) { return pair != 0 ? pair : 0x80008000u; };
        moe_store_relaxed(reinterpret_cast<uint4 *>((T *)to + place),
                          make_uint4(seen(v.x), seen(v.y), seen(v.z), seen(v.w)));
    }

    // Of each pair of eights of rows one is gate, one up.
    __device__ __forceinline__ void finish_gated(const moe_decode_task &task)
    {
        const uint32_t to = ring - (MULTIPLIERS - half) * piece;
        const int lane = thread % 32, warp = thread / 32;
        sync(); // the last tile has left the piece
#pragma unroll
        for (int q = 0; q < MOST / 8; q++) {
            if (q * 8 >= task.rows)
                break;
            const float *e = d + q * 4;
            const int row = q * 8 + lane % 8;
            moe_stmatrix_trans(to + row * ROW_BYTES + ((warp ^ (row & 7)) << 4),
                               moe_pair(moe_silu_fast(e[0]) * e[2], moe_silu_fast(e[1]) * e[3], T()));
        }
        store<4>(task, args.decode.act, args.decode.intermediate,
                 (int64_t)task.band * (MOE_PACKED_ROWS / 2) + half * 32, is_passed(args.decode));
    }

    __device__ __forceinline__ void finish_down(const moe_decode_task &task)
    {
        const uint32_t to = ring - (MULTIPLIERS - half) * piece;
        const int lane = thread % 32, warp = thread / 32;
        sync(); // the last tile has left the piece
#pragma unroll
        for (int q = 0; q < MOST / 8; q++) {
            if (q * 8 >= task.rows)
                break;
            const float *e = d + q * 4;
            const int row = q * 8 + lane % 8;
            moe_stmatrix_trans(to + row * ROW_BYTES + (((warp * 2 + lane / 8 % 2) ^ (row & 7)) << 4),
                               moe_pair(e[0], e[1], T()), moe_pair(e[2], e[3], T()));
        }
        store<8, MOST == MOE_ROUTED_TOKENS>(task, args.decode.down, args.decode.hidden,
                                            (int64_t)task.band * MOE_PACKED_ROWS + half * 64);
    }

    __device__ void run()
    {
        moe_decode_task task;
        measure();
        while (next(task)) {
            multiply_any(task.rows, task.end - task.begin);
            if (task.slots > 0)
                add_sums(task);
            if (task.own_slot >= 0) {
                leave_sums(task);
            } else if (task.gemm2) {
                finish_down(task);
            } else {
                finish_gated(task);
                if (!is_passed(args.decode))
                    mails.send(thread, args.decode.finished + task.tile, 1, 0);
            }
        }
        mails.send(thread, NULL, 0, 0);
    }
};

// MOST: tokens of a tile. PER > 0: it routes, a token by each warp, with so many experts a lane. Then it leaves half of
// the registers, and enough of shared memory, for a block of the logits' kernel: so it can start while that one runs.
constexpr int BESIDE_BYTES = MOE_LOGITS_SHARED_BYTES + 1024; // which the system reserves for each block
constexpr int PER_OF_MOST = 4, PER_OF_MANY = 8;              // as most layers need it, and more
static_assert(MOE_ROUTED_TOKENS <= WARPS, "a warp for each token");
static_assert((227 * 1024 - BESIDE_BYTES - ring_begin(PER_OF_MANY * 32, moe_routed_bytes(PER_OF_MANY * 32)) -
               MULTIPLIERS * MOE_ROUTED_TOKENS * ROW_BYTES) /
                      (TILE_BYTES + MOE_ROUTED_TOKENS * ROW_BYTES) >=
                  UNDER_WAY,
              "as above");

template <typename T, int MOST, int PER>
__global__ void __launch_bounds__(PER > 0 ? 2 * THREADS : THREADS, 1)
    decode_kernel(const __grid_constant__ wgmma_args args)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char decode_memory[];
    uint32_t shared = moe_shared(decode_memory);
    asm volatile("" : "+r"(shared)); // or it is made anew wherever it is used, of a register that is slow to read
    const int warp = threadIdx.x / 32;
    const bool first_lane = threadIdx.x % 32 == 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < MAX_STAGES; i++) {
            moe_barrier_init(shared + WEIGHTS_FULL + i * 8, 1);
            moe_barrier_init(shared + TOKENS_FULL + i * 8, LOADERS);
            moe_barrier_init(shared + EMPTY + i * 8, MULTIPLIERS * WARPGROUP / 32);
        }
        for (int i = 0; i < NOTES; i++) {
            moe_barrier_init(shared + NOTE_FULL + i * 8, 1);
            moe_barrier_init(shared + NOTE_EMPTY + i * 8, (WEIGHT_LOADER + 1) * 32);
        }
        for (int i = 0; i < MULTIPLIERS * MAILS; i++) {
            moe_barrier_init(shared + MAIL_FULL + i * 8, WARPGROUP / 32);
            moe_barrier_init(shared + MAIL_EMPTY + i * 8, 1);
        }
        moe_barrier_init(shared + MEASURED, 1);
        moe_barrier_init(shared + CHOSEN, WARPS);
        moe_barrier_init(shared + FIRST_ROWS, 32);
        *reinterpret_cast<int32_t *>(decode_memory + ASKED) = 0;
        moe_barrier_init_done();
    }
    if (args.guess > 0 && warp == WEIGHT_LOADER && first_lane)
        moe_fetch_guess(args.decode.w13, args.decode.hidden, args.decode.intermediate, args.decode.groups, blockIdx.x,
                        args.guess);
    if constexpr (PER > 0)
        moe_clear_choice(follower(args, shared).choice(), args.decode.groups);
    if (warp == WALKER && first_lane) { // so that addresses are translated by the time when they are read
        const void *const read_first = PER > 0 ? (const void *)args.gate.logits : args.decode.offsets;
        moe_prefetch_l2((const void *)((uintptr_t)read_first & ~(uintptr_t)15), 16); // logits may be the caller's
        moe_prefetch_l2(args.decode.taken, 16);
        moe_prefetch_l2(args.decode.x, 16);
    }
    __syncthreads();
    if (warp == WALKER) {
        walker<PER>(args, shared).run();
        return;
    }
    int32_t item = 0;
    if constexpr (PER == 0)
        moe_decode_await_plan();
    else
        item = choose<PER>(follower(args, shared), warp == WEIGHT_LOADER);
    if (PER > 0 && writes_plan()) { // all but the walker, of which those who write hear with the first rows
        moe_named_sync(CHOICE_MADE, THREADS - 32);
        if (warp >= FIRST_MULTIPLIER && warp < WEIGHT_LOADER)
            write_plan(follower(args, shared));
    }
    if (warp < FIRST_MULTIPLIER)
        token_loader<MOST, (PER > 0)>(args, shared).run();
    else if (warp < WEIGHT_LOADER)
        multiplier<T, MOST>(args, shared).run();
    else if (warp == WEIGHT_LOADER)
        weight_loader<PER>(args, shared).run(item);
    else if (first_lane)
        mailbox{shared, warp - FIRST_HERALD}.run();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "built for 9.0 without its own instructions this kernel would do nothing: build for 90a"
#endif
}

// packed: whether they are; else blocks are whole always.
band_weights weights_of(const void *data, int64_t rows, int64_t cols, bool packed)
{
    const int64_t halves = moe_packed_rows(rows) / MOE_PACKED_LAST_ROWS, blocks = moe_packed_blocks(cols);
    const uint32_t last_bytes = packed && halves % 2 != 0 ? HALF_BYTES : TILE_BYTES;
    return {(const char *)data, (uint32_t)(halves * blocks), (uint32_t)(2 * blocks), (int32_t)((halves - 1) / 2),
            last_bytes};
}

template <typename T, int MOST, int PER> moe_status launch(const struct moe_call *call, wgmma_args &args)
{
    const int32_t groups = args.decode.groups;
    const int shared = call->exec->shared_bytes - (PER > 0 ? BESIDE_BYTES : 0);
    args.ring_begin = ring_begin(groups, PER > 0 ? moe_routed_bytes(groups) : 0);
    for (int width = 0; width <= MOST / 16; width++) {
        const int piece = tokens_of(width) * ROW_BYTES;
        const int stages = (shared - args.ring_begin - MULTIPLIERS * piece) / (TILE_BYTES + piece);
        args.stages[width] = (uint8_t)(stages < MAX_STAGES ? stages : MAX_STAGES);
    }
    const auto kernel = decode_kernel<T, MOST, PER>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    moe_launch(kernel, args.decode.workers, THREADS, shared, call->stream, call->exec->compute_capability == 90, args);
    return moe_launched(call->error, "ffn decode");
}

template <typename T> moe_status launch(const struct moe_call *call, wgmma_args &args)
{
    if (!call->ffn_routes)
        return launch<T, MOE_DECODE_TOKENS, 0>(call, args);
    return args.decode.groups <= PER_OF_MOST * 32 ? launch<T, MOE_ROUTED_TOKENS, PER_OF_MOST>(call, args)
                                                  : launch<T, MOE_ROUTED_TOKENS, PER_OF_MANY>(call, args);
}

// The fewest of 32 numbers of tiles, one for each expert chosen, among which the right one is: if experts are chosen
// evenly, the number to be expected is in their middle.
int32_t fewest_tiles(const struct moe_call *call)
{
    const double experts = call->gate.experts, others = 1 - call->gate.top_k / experts;
    double unchosen = experts;
    for (int64_t t = 0; t < call->tokens; t++)
        unchosen *= others;
    const int32_t low = (int32_t)(experts - unchosen) - 16;
    return low > call->gate.top_k ? low : call->gate.top_k;
}

} // namespace

bool moe_decode_wgmma_routes(const struct moe_call *call)
{
    return call->tokens > 0 && call->tokens <= MOE_ROUTED_TOKENS && call->gate.top_k <= MOE_ROUTED_TOP_K &&
           call->gate.experts <= PER_OF_MANY * 32 && call->plan.expert_group == NULL;
}

moe_status moe_ffn_decode_wgmma(const struct moe_call *call, const moe_decode_args &decode)
{
    wgmma_args args = {};
    args.decode = decode;
    args.gate = call->gate;
    args.plan = call->plan.plan;
    args.packed = call->w13.layout == MOE_LAYOUT_PACKED;
    args.weights[0] = weights_of(call->w13.data, 2 * call->intermediate, call->hidden, args.packed);
    args.weights[1] = weights_of(call->w2.data, call->hidden, call->intermediate, args.packed);
    args.guess = args.packed ? moe_guessed_tiles(call->tokens * call->slots, decode.groups, GUESSED_TILES) : 0;
    args.fewest_tiles = call->ffn_routes ? fewest_tiles(call) : 0;
    if (!args.packed) {
        moe_status status = moe_map_w13(call, &args.w13_rows);
        if (status == MOE_OK)
            status = moe_map_w2(call, &args.w2_rows);
        if (status != MOE_OK)
            return status;
    }
    return call->dtype == MOE_F16 ? launch<__half>(call, args) : launch<__nv_bfloat16>(call, args);
}
