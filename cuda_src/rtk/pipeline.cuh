// A ring of shared-memory stages between one producer thread and the consumer warps.
#pragma once
#include <rtk/barrier.cuh>

namespace rtk {

// Barriers of a ring: the producer fills a stage after `empty`, consumers read it after `full`.
template <int STAGES>
struct RingBarriers {
    Barrier full[STAGES];
    Barrier empty[STAGES];

    RTK_DEVICE void init(int consumer_warps) {
        for (int stage = 0; stage < STAGES; ++stage) {
            full[stage].init(1);
            empty[stage].init(consumer_warps);
        }
    }
};

// Where one side of the ring stands: the stage it uses next and the parity of that stage's current round.
template <int STAGES>
struct RingPosition {
    int stage = 0;
    u32 phase = 0;

    RTK_DEVICE void advance() {
        if constexpr (STAGES == 1) {
            phase ^= 1;
        } else if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

template <int STAGES>
RTK_DEVICE void wait_full(RingBarriers<STAGES>& ring, const RingPosition<STAGES>& position, Name name) {
    ring.full[position.stage].wait(position.phase, name);
}

// In the first round every stage is empty already: waiting for the parity before the first passes at once.
template <int STAGES>
RTK_DEVICE void wait_empty(RingBarriers<STAGES>& ring, const RingPosition<STAGES>& position, Name name) {
    ring.empty[position.stage].wait(position.phase ^ 1, name);
}

// One lane of every consumer warp hands the stage back, since each warp of a wgmma reads it on its own. By then every lane
// must have seen that it was full, because a parity tells a round only from the next one: a wgmma between sees to that.
template <int STAGES>
RTK_DEVICE void release(RingBarriers<STAGES>& ring, const RingPosition<STAGES>& position) {
    if (threadIdx.x % WARP_SIZE == 0) ring.empty[position.stage].arrive();
}

// The same where the stage is not read.
template <int STAGES>
RTK_DEVICE void let_go_by(RingBarriers<STAGES>& ring, RingPosition<STAGES>& position, Name name) {
    wait_full(ring, position, name);
    __syncwarp();
    release(ring, position);
    position.advance();
}

}  // namespace rtk
