// mbarriers in shared memory: threads (and the TMA unit, by bytes) arrive, others wait for a phase to complete.
#pragma once
#include <rtk/ptx.cuh>

namespace rtk {

struct Barrier {
    u64 state;

    RTK_DEVICE void init(int arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
    }

    RTK_DEVICE void arrive() {
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
    RTK_DEVICE void wait(u32 parity) {
#ifdef RTK_SPIN_LIMIT_NS
        // Debug builds: a wait that cannot end traps instead of hanging the device.
        const u64 start = global_nanoseconds();
        while (!try_wait(parity)) {
            if (global_nanoseconds() - start > RTK_SPIN_LIMIT_NS) __trap();
        }
#else
        while (!try_wait(parity)) {
        }
#endif
    }
};

// Makes barrier initialisation visible to the TMA unit; one thread calls it before the block's barrier.
RTK_DEVICE void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace rtk
