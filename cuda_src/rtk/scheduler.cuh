// Hands out output tiles (block of queries, head, batch) to the blocks of a persistent grid.
//
// Heads are taken in groups whose K and V fit in L2 together; within a group the query blocks go from last to first,
// which under a causal mask is longest first, so that the short ones fill the end of the wave.
#pragma once
#include <rtk/pipeline.cuh>

namespace rtk {

struct OutputTile {
    int m_block;
    int head;
    int batch;
};

struct TileSchedule {
    int num_m_blocks;
    int num_heads;
    int num_heads_total;  // heads times batch
    int heads_per_group;

    RTK_DEVICE int num_tiles() const { return num_m_blocks * num_heads_total; }

    RTK_DEVICE OutputTile operator[](int index) const {
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
// STATIC: every gridDim.x-th one; nothing to communicate. DYNAMIC: the next one not yet taken, from a counter in global
// memory, which balances tiles of unequal length. The producer thread asks the counter once this tile's loads are issued,
// a few KV tiles before the consumers are done with it, and tells them through a ring in shared memory. (Asking when the
// tile begins would let a block that is busy for long keep the next one waiting.)
//
// The counter is zero before a launch and after it, so that nobody need clear it: a block takes its first tile unasked
// and asks until there is none left, which makes num_tiles questions in all (num_tiles - gridDim.x with an answer,
// gridDim.x without), and the last of them wraps the counter to zero. The grid has at most num_tiles blocks.
enum Scheduler { STATIC = 0, DYNAMIC = 1 };

struct TileRing {
    static constexpr int STAGES = 2;
    RingBarriers<STAGES> barriers;
    int tile[STAGES];
};

template <int SCHEDULER>
struct TileProducer {
    TileRing& ring;
    u32* counter;
    RingPosition<TileRing::STAGES> position;

    // Calls `run` for each tile of this block, until the tiles are used up.
    template <class Run>
    RTK_DEVICE void for_each(int num_tiles, Run run) {
        int tile = blockIdx.x;
        while (true) {
            if constexpr (SCHEDULER == DYNAMIC) {
                wait_empty(ring.barriers, position, "tile emp");
                ring.tile[position.stage] = tile;
                ring.barriers.full[position.stage].arrive();
                position.advance();
            }
            if (tile >= num_tiles) break;
            run(tile);
            tile = gridDim.x + (SCHEDULER == DYNAMIC ? static_cast<int>(atomicInc(counter, num_tiles - 1)) : tile);
        }
    }
};

template <int SCHEDULER>
struct TileConsumer {
    TileRing& ring;
    RingPosition<TileRing::STAGES> position;

    template <class Run>
    RTK_DEVICE void for_each(int num_tiles, Run run) {
        int tile = blockIdx.x;
        while (true) {
            if constexpr (SCHEDULER == DYNAMIC) {
                wait_full(ring.barriers, position, "tile ful");
                // Read by the lane that hands the stage back.
                if (threadIdx.x % WARP_SIZE == 0) tile = ring.tile[position.stage];
                tile = warp_uniform(tile);
                release(ring.barriers, position);
                position.advance();
            }
            if (tile >= num_tiles) break;
            run(tile);
            tile += gridDim.x;
        }
    }
};

}  // namespace rtk
