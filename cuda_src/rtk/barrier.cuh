// mbarriers in shared memory: threads (and the TMA unit, by bytes) arrive, others wait for a phase to complete.
#pragma once
#include <rtk/debug.cuh>

namespace rtk {

struct Barrier {
    u64 state;

    RTK_DEVICE void init(int arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
    }

    RTK_DEVICE void arrive() {
        random_delay();
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
    }

    // One arrival, after which the phase also waits for `bytes` to be written by TMA.
    RTK_DEVICE void arrive_expect_bytes(int bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                     : "memory");
    }

    RTK_DEVICE bool try_wait(u32 parity) {
        u32 done;
        asm volatile(
            "{ .reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.b32 %0, 1, 0, p; }"
            : "=r"(done)
            : "r"(shared_address(this)), "r"(parity)
            : "memory");
        return done != 0;
    }

    // Returns once the phase of this parity has completed: what was written before it is visible after it.
    // `name` is what a debug build reports where the wait does not end.
    RTK_DEVICE void wait(u32 parity, Name name) {
        random_delay();
        if (!try_wait(parity)) {
            const SpinLimit limit;
            do limit.check(name);
            while (!try_wait(parity));
        }
        random_delay();
    }
};

// Makes barrier initialisation visible to the TMA unit; one thread calls it before the block's barrier.
RTK_DEVICE void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace rtk
