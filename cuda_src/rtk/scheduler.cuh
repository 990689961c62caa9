// Hands out output tiles (block of queries, head, batch) to the blocks of a persistent grid.
//
// Where the query blocks do not divide the rows, one of them is partly empty: under a mask on the right the first, which
// sees the fewest keys, otherwise the last.
//
// Heads are taken in groups whose K and V fit in L2 together; within a group the query blocks go from last to first,
// which under a causal mask is longest first, so that the short ones fill the end of the wave.
#pragma once
#include <rtk/pipeline.cuh>

namespace rtk {

struct TilePlace {
    int m_block;
    int head;
    int batch;
};

struct TileSchedule {
    int num_m_blocks;
    int num_heads;
    int num_heads_total;  // heads times batch
    int heads_per_group;
    int rows_before;  // by which the first query block begins before the first query

    RTK_DEVICE int num_tiles() const { return num_m_blocks * num_heads_total; }

    RTK_DEVICE TilePlace operator[](int index) const {
        const int group_tiles = heads_per_group * num_m_blocks;
        const int first_head = index / group_tiles * heads_per_group;
        const int heads = min(heads_per_group, num_heads_total - first_head);
        const int within = index % group_tiles;
        const int head = first_head + within % heads;
        return {num_m_blocks - 1 - within / heads, head % num_heads, head / num_heads};
    }
};

// How a persistent block comes by its tiles.
//
// STATIC: every gridDim.x-th one. DYNAMIC: the next one not yet taken, from a counter in global memory, which balances
// tiles of unequal length. The producer thread works a tile out once the loads of the one before are issued, a few KV
// tiles before the consumers are done with that, and tells them through a ring in shared memory. (Asking the counter
// when the tile before begins would let a block that is busy for long keep the next one waiting.)
//
// The counter is zero before a launch and after it, so that nobody need clear it: a block takes its first tile unasked
// and asks until there is none left, which makes num_tiles questions in all (num_tiles - gridDim.x with an answer,
// gridDim.x without), and the last of them wraps the counter to zero. The grid has at most num_tiles blocks.
enum Scheduler { STATIC = 0, DYNAMIC = 1 };

// Tile: a struct of ints, the first of which, `head`, is negative where there is no tile any more.
template <class Tile>
struct TileRing {
    static constexpr int STAGES = 4;  // warps may be so many tiles apart
    RingBarriers<STAGES> barriers;
    alignas(16) Tile tile[STAGES];
};

template <int SCHEDULER, class Tile>
struct TileProducer {
    TileRing<Tile>& ring;
    u32* counter;
    RingPosition<TileRing<Tile>::STAGES> position;

    RTK_DEVICE void publish(const Tile& tile) {
        wait_empty(ring.barriers, position, "tile emp");
        ring.tile[position.stage] = tile;
        ring.barriers.full[position.stage].arrive();
        position.advance();
    }

    // Calls `run` with what `make` makes of each index of this block, until the tiles are used up.
    template <class Make, class Run>
    RTK_DEVICE void for_each(int num_tiles, Make make, Run run) {
        int index = blockIdx.x;
        while (index < num_tiles) {
            const Tile tile = make(index);
            publish(tile);
            run(tile);
            index = gridDim.x + (SCHEDULER == DYNAMIC ? static_cast<int>(atomicInc(counter, num_tiles - 1)) : index);
        }
        publish(Tile{-1});
    }
};

// One warp that is told the tiles.
template <class Tile>
struct TileConsumer {
    TileRing<Tile>& ring;
    RingPosition<TileRing<Tile>::STAGES> position;

    // The tile, known to be the same in all lanes, and its stage back to the producer: read by the lane that hands it back.
    RTK_DEVICE Tile take() {
        wait_full(ring.barriers, position, "tile ful");
        constexpr int WORDS = sizeof(Tile) / sizeof(int);
        const int* source = reinterpret_cast<const int*>(&ring.tile[position.stage]);
        Tile tile;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            reinterpret_cast<int*>(&tile)[i] = warp_uniform(threadIdx.x % WARP_SIZE == 0 ? source[i] : 0);
        }
        release(ring.barriers, position);
        position.advance();
        return tile;
    }

    // Calls `run` with each tile until there is none.
    template <class Run>
    RTK_DEVICE void for_each(Run run) {
        for (Tile tile = take(); tile.head >= 0; tile = take()) run(tile);
    }
};

}  // namespace rtk
