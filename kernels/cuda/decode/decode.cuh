// SPDX-License-Identifier: Apache-2.0
// The decode path's FFN as its kernels share it: what they are given, how their blocks find their work (work.h), and
// how they wait for each other.
//
// Rows of a group are cut into tiles of up to 1 << most_log2 tokens. A GEMM is a row of bands, MOE_PACKED_ROWS weight
// rows times one tile each: groups one after another, in a group bands, in a band tiles, so that tiles which share
// weights read them at the same time. Items of GEMM 1 come first, those of GEMM 2 follow; blocks take them in order
// from one counter.
//
// Before it is known which groups have rows, block b may guess (args.guess) that band b of GEMM 1 will be used, counted
// through all groups as if each had one tile, and load weights of that. Of groups that have one, the bands guessed come
// first, and each is the first item of its block, which claims it; all other items are taken as above. Who is done with
// GEMM 1 claims, and does, what blocks that have not begun would guess: they may have to wait for its SM. As these
// items are whole bands, which wait for nobody, work.h's promise holds with them.
#ifndef MOE_KERNELS_CUDA_DECODE_DECODE_CUH
#define MOE_KERNELS_CUDA_DECODE_DECODE_CUH

#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/scan.cuh"
#include "kernels/cuda/decode/work.h"
#include "kernels/kernels.h"

// A GEMM, as the walk through its bands needs to know it. By the host.
struct moe_decode_gemm {
    moe_work_gemm work;
    int32_t bands; // of a tile
    moe_divisor by_bands;
};

// What the walk needs first comes first, in as few lines of the cache for constants as can be.
struct moe_decode_args {
    const int32_t *offsets; // [groups + 1]; of no use to a kernel that routes, nor is row_token
    int32_t *taken;         // items so far, of those that have no owner
    int32_t groups;
    int32_t most_log2; // tokens of a tile at most: a power of two, from 8 to MOE_DECODE_TOKENS
    moe_decode_gemm gemm[2];
    int32_t hidden, intermediate;
    int32_t workers;          // blocks of the grid
    int32_t guess;            // blocks of K that a block loads of the band it guesses; 0: none guesses
    const void *x;            // [T][H]
    const int32_t *row_token; // [R]
    void *act, *down;         // [R][I], [R][H], in the layer's dtype
    const char *w13, *w2;     // packed or row-major
    // Scratch memory, as is `taken`; all but `sums` is zero at first, where it is used.
    int32_t *finished;   // [tiles]: how much of GEMM 1 is done of each tile
    int32_t *slot_state; // [slots][MOE_SLOT_PARTS]: of the slots' sums, how far they are
    int32_t *claimed;    // [workers]: how often the band that a block guesses has been claimed; the first gets it
    int32_t *paced;      // blocks of K that all blocks have asked for, of the last ones of their pieces (pace.cuh)
    void *passed;        // [R][I], beside act, for who looks for results where zeros were; NULL: nobody does
    void *passed_sums;   // partial sums likewise: [slots][MOE_SLOT_PARTS][MOE_PASSING_QUADS][passed_rows / 2][4]
    float *sums;         // [slots][MOE_PACKED_ROWS << most_log2]
    int32_t gemm2_slots; // the first slot of GEMM 2, workers behind GEMM 1's; 0: it uses those again
    int32_t passed_rows; // of a tile, up to which its partial sums are passed; 0: none are
};

constexpr int MOE_DECODE_TOKENS = 128; // of a tile at most

constexpr int MOE_GUESSED_GROUPS = 32; // in which the bands lie that are guessed, and the one after them

// Up to so many `passed` is worth what it costs: the zeros, storing twice, and looking again and again.
constexpr int MOE_PASSED_TOKENS = 4;
constexpr int MOE_PASSED_ROWS = 4;    // `passed_rows` at most
constexpr int MOE_PASSING_QUADS = 32; // of threads, to a part of a slot, in each of which one has two tokens' sums

// A slot's sums are written and read by parts of a block, each for itself. READ1: GEMM 2 may use the slot again.
constexpr int MOE_SLOT_PARTS = 2;
enum { MOE_SLOT_FREE, MOE_SLOT_SUM1, MOE_SLOT_READ1, MOE_SLOT_SUM2 };

// Fills args for this call. *bytes: what it takes of scratch memory; *zeroed: how much of that, from the beginning,
// must be zero. With scratch NULL only counts.
void moe_decode_prepare(const struct moe_call *call, moe_decode_args *args, size_t *bytes, size_t *zeroed);

#ifdef __CUDACC__

// One task, as a block's parts tell it to each other.
struct alignas(16) moe_decode_task {
    int32_t rows; // of tokens; 0: there are no more tasks
    int32_t row;  // the first of them in the plan
    int32_t tile; // number of their tile
    int32_t group;
    int32_t band;       // of the group's weights
    int32_t begin, end; // blocks of K
    int8_t gemm2;
    int8_t last;     // of a piece of GEMM 2, behind which there is hardly ever another item
    int16_t guessed; // in a block's first task: so many of its blocks of weights are there; < 0: so many of no use
    int32_t first_slot, slots, own_slot; // work.h, but counted from gemm2_slots on in GEMM 2
    int32_t slot_free;                   // the state in which own_slot can be written to
};

// Where a tile is to be found. As long as no group has more than one (`single`), there is a place for each tile:
// `number` is its group. Otherwise there is one for each group: `number` is how many tiles there are before it. The
// last place is the end of all.
struct alignas(8) moe_decode_place {
    int32_t number, row;
};

// By each warp, before it reads or writes what other kernels do.
static __device__ __forceinline__ void moe_decode_await_plan()
{
    moe_grid_wait();
    moe_grid_launch_dependents(); // the plan is complete when the next kernel starts
}

struct moe_decode_band {
    int32_t group, band; // of its weights
};

// That with this number, if there is one tile in each group.
static __device__ __forceinline__ moe_decode_band moe_decode_band_of(const moe_decode_gemm &gemm, int32_t number)
{
    const int32_t group = moe_divide(number, gemm.by_bands);
    return {group, number - group * gemm.bands};
}

// Takes an item, and returns its number to the warp's first lane.
static __device__ __forceinline__ int32_t moe_decode_take(const moe_decode_args &args)
{
    uint32_t mine = 0;
    moe_fetch_add_first((uint32_t *)args.taken, 1, &mine);
    return (int32_t)mine;
}

// A block's way through its tasks, which one warp goes. Everything waits for its first steps, from the plan on: so
// they are few instructions, and what they need is in registers by then.
struct moe_decode_walk {
    static constexpr unsigned ALL_LANES = 0xffffffffu;
    const moe_decode_args &args;
    moe_decode_place *const list; // [groups + 1], in shared memory
    const int lane = threadIdx.x % 32;
    moe_decode_gemm gemm; // in which it is
    moe_work work;
    int32_t gemm2 = 0;
    int32_t tiles;
    bool single;
    int32_t first = 0, items; // the GEMM's first item, and where they end
    int32_t first_slot = 0;   // of the GEMM
    int32_t item, at = 0;
    int32_t own = 0;     // so many items, the first ones, belong to those who have guessed them
    int32_t held = -1;   // the item to go on with after one that was left by its owner; -1: none
    int32_t guessed = 0; // of the next task

    // Before moe_decode_await_plan().
    __device__ __forceinline__ moe_decode_walk(const moe_decode_args &a, moe_decode_place *places)
        : args(a), list(places), gemm(a.gemm[0])
    {
        moe_read_now(gemm.work.blocks);
        moe_read_now(gemm.work.workers);
        moe_read_now(gemm.work.before);
        moe_read_now(gemm.work.most_over);
        moe_read_now(gemm.work.by_blocks.magic);
        moe_read_now(gemm.work.by_blocks.shift);
        moe_read_now(gemm.work.by_workers.magic);
        moe_read_now(gemm.work.by_workers.shift);
        moe_read_now(gemm.bands);
        moe_read_now(gemm.by_bands.magic);
        moe_read_now(gemm.by_bands.shift);
    }

    // After it. Returns the tokens of the largest tile.
    __device__ __forceinline__ int32_t start()
    {
        const int32_t most = 1 << args.most_log2;
        const int32_t mine = args.guess > 0 ? claim(blockIdx.x) : moe_decode_take(args);
        int32_t largest = find_tiles<true>();
        single = !__any_sync(ALL_LANES, largest > most);
        if (__builtin_expect(!single, 0))
            largest = min(find_tiles<false>(), most);
        const int32_t got = __shfl_sync(ALL_LANES, mine, 0);
        largest = start(got, largest);
        if (args.guess > 0)
            look_at_guess(got == 0); // it was no item, but how often the block's own one had been claimed
        return largest;
    }

    // The same with what takes time done: the first item taken, the list filled, the tiles counted and `single` known.
    // Of `largest` the largest of all lanes counts.
    __device__ __forceinline__ int32_t start(int32_t first_item, int32_t largest)
    {
        largest = __reduce_max_sync(ALL_LANES, largest);
        begin();
        item = first_item;
        return largest;
    }

    // Returns, to the first lane, how many have claimed before what block b guesses.
    __device__ __forceinline__ int32_t claim(int32_t b) const
    {
        uint32_t before = 0;
        moe_fetch_add_first((uint32_t *)args.claimed + b, 1, &before);
        return (int32_t)before;
    }

    // The item that block b guesses, in all lanes; -1: there is none.
    __device__ __forceinline__ int32_t item_guessed(int32_t b) const
    {
        static_assert(MOE_GUESSED_GROUPS <= 32, "a lane looks at each of the first places");
        if (own == 0)
            return -1;
        const moe_decode_band band = moe_decode_band_of(gemm, b);
        const unsigned at = __ballot_sync(ALL_LANES, lane < tiles && list[lane].number == band.group);
        return at != 0 ? (__ffs((int)at) - 1) * gemm.bands + band.band : -1;
    }

    // How many items have owners, and which is the block's first: its own one, if it has `claimed` that, or another.
    __device__ __forceinline__ void look_at_guess(bool claimed)
    {
        const moe_decode_band end = moe_decode_band_of(gemm, args.workers);
        const int32_t group = single && lane < tiles ? list[lane].number : INT32_MAX;
        own = __popc(__ballot_sync(ALL_LANES, group < end.group)) * gemm.bands +
              (__any_sync(ALL_LANES, group == end.group) ? end.band : 0);
        if (own > work.whole)
            own = 0;
        item = item_guessed(blockIdx.x);
        guessed = claimed && item >= 0 ? args.guess : -args.guess;
        if (guessed < 0)
            item = own + __shfl_sync(ALL_LANES, moe_decode_take(args), 0);
    }

    // Claims an item whose owner has not begun. -1: there is none.
    __device__ __forceinline__ int32_t left_by_owner() const
    {
        if (own == 0)
            return -1;
        bool any = false;
#pragma unroll 4
        for (int32_t b = lane; b < args.workers; b += 32)
            any |= __ldcg(args.claimed + b) == 0;
        if (__builtin_expect(!__any_sync(ALL_LANES, any), 1))
            return -1;
        for (int32_t b0 = 0; b0 < args.workers; b0 += 32) {
            const bool unclaimed = b0 + lane < args.workers && __ldcg(args.claimed + b0 + lane) == 0;
            for (unsigned of = __ballot_sync(ALL_LANES, unclaimed); of != 0; of &= of - 1) {
                const int32_t b = b0 + __ffs((int)of) - 1, left = item_guessed(b);
                if (left >= 0 && __shfl_sync(ALL_LANES, claim(b), 0) == 0)
                    return left;
            }
        }
        return -1;
    }

    // Of GEMM 2. Past the last item as well, for who has had no piece.
    __device__ __forceinline__ bool in_last_piece() const
    {
        return gemm2 && item - first >= work.whole && work.pieces > 0;
    }

    __device__ __forceinline__ void begin()
    {
        work = moe_work_make(&gemm.work, tiles * gemm.bands);
        items = first + moe_work_items(&work);
    }

    // Fills the list and counts the tiles, of which there is one for each group that has rows, if SINGLE. Returns the
    // rows of the largest of this lane's groups.
    static constexpr int EACH = 4; // groups of a lane, which follow each other
    template <bool SINGLE> __device__ __forceinline__ int32_t find_tiles()
    {
        const int32_t groups = args.groups, end = args.offsets[groups];
        const int32_t *from = args.offsets + lane * EACH;
        int32_t largest = 0;
        tiles = 0;
#pragma unroll 1
        for (int g = lane * EACH; g - lane * EACH < groups; g += 32 * EACH, from += 32 * EACH) {
            int32_t offset[EACH + 1], own[EACH], sum = 0, place = tiles;
#pragma unroll
            for (int i = 0; i <= EACH; i++)
                offset[i] = g + i <= groups ? from[i] : 0;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int32_t rows = offset[i + 1] - offset[i]; // past the last group none, or less
                largest = max(largest, rows);
                own[i] = SINGLE ? rows > 0 : (max(rows, 0) + (1 << args.most_log2) - 1) >> args.most_log2;
                sum += own[i];
            }
            if (SINGLE) { // numbers below 8: three words of bits are there sooner than five shuffles
                tiles += __reduce_add_sync(ALL_LANES, sum);
#pragma unroll
                for (int bit = 1; bit <= EACH; bit *= 2)
                    place += __popc(__ballot_sync(ALL_LANES, sum & bit) & ((1u << lane) - 1)) * bit;
            } else {
                const int32_t inclusive = moe_scan_warp(sum);
                tiles += __shfl_sync(ALL_LANES, inclusive, 31);
                place += inclusive - sum;
            }
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                if (SINGLE && own[i] > 0)
                    list[place] = {g + i, offset[i]};
                if (!SINGLE && g + i < groups)
                    list[g + i] = {place, offset[i]};
                place += own[i];
            }
        }
        list[SINGLE ? tiles : groups] = {tiles, end};
        __syncwarp();
        return largest;
    }

    // The last group whose first tile is not past this one.
    __device__ int group_of(int32_t tile) const
    {
        static_assert(MOE_MAX_EXPERTS <= 32 * 1024, "three steps find any group");
        int g = 0;
        for (int step = args.groups > 1024 ? 1024 : args.groups > 32 ? 32 : 1; step > 0; step /= 32) {
            const int at = g + lane * step;
            const bool before = at < args.groups && list[at].number <= tile;
            g += (__popc(__ballot_sync(ALL_LANES, before)) - 1) * step;
        }
        return g;
    }

    // task.rows is 0 at the end. Before it takes another item it calls wait(), which comes back when that is needed:
    // who has taken an item early does it late.
    template <typename Wait> __device__ void next(moe_decode_task &task, Wait wait)
    {
        moe_task t;
        for (;;) {
            task.rows = 0;
            if (__builtin_expect(item >= items, 0)) {
                if (gemm2)
                    return;
                const int32_t left = left_by_owner(); // before it waits for any
                if (left >= 0) {
                    held = item;
                    item = left;
                    continue;
                }
                gemm2 = 1;
                gemm = args.gemm[1];
                first_slot = args.gemm2_slots;
                first = items;
                begin();
                continue;
            }
            if (moe_work_task(&work, item - first, at, &t))
                break;
            at = 0;
            wait();
            if (held >= 0) {
                item = held;
                held = -1;
                continue;
            }
            item = own + __shfl_sync(ALL_LANES, moe_decode_take(args), 0);
        }
        at++;
        task.guessed = (int16_t)guessed;
        guessed = 0;
        const int32_t tile = moe_divide(t.band, gemm.by_bands); // where a group has one
        if (__builtin_expect(single, 1)) {
            const moe_decode_place place = list[tile];
            task.row = place.row;
            task.rows = list[tile + 1].row - place.row;
            task.tile = tile;
            task.group = place.number;
            task.band = t.band - tile * gemm.bands;
        } else {
            const int g = group_of(tile);
            const moe_decode_place place = list[g], after = list[g + 1];
            const int32_t rows = after.row - place.row, count = after.number - place.number; // of tiles
            const int32_t in_group = t.band - place.number * gemm.bands;
            const int32_t band = in_group / count, mine = in_group - band * count;
            const int32_t size = rows / count, longer = rows - size * count; // so many tiles have one row more
            task.row = place.row + mine * size + (mine < longer ? mine : longer);
            task.rows = size + (mine < longer);
            task.tile = place.number + mine;
            task.group = g;
            task.band = band;
        }
        task.begin = t.begin;
        task.end = t.end;
        task.gemm2 = gemm2;
        task.last = in_last_piece();
        task.first_slot = first_slot + t.first_slot;
        task.slots = t.slots;
        task.own_slot = t.own_slot < 0 ? -1 : first_slot + t.own_slot;
        // Before GEMM 2 leaves sums where GEMM 1 did those must have been read.
        task.slot_free = MOE_SLOT_FREE;
        if (__builtin_expect(gemm2 && first_slot == 0 && t.own_slot >= 0, 0)) {
            const moe_work work1 = moe_work_make(&args.gemm[0].work, tiles * args.gemm[0].bands);
            if (moe_work_leaves(&work1, t.own_slot))
                task.slot_free = MOE_SLOT_READ1;
        }
    }
};

#endif

#endif
