// What only debug builds do. In all others everything here is empty.
//
// RTK_SPIN_LIMIT_NS: a wait that lasts longer stops the kernel with the name of what it waits for, instead of hanging the
// device. RTK_RANDOM_DELAYS: warps sleep for random times around barriers, so that an order that is only usually right
// shows; results must not change by a bit.
#pragma once
#include <rtk/ptx.cuh>

namespace rtk {

// The name of what is waited for: up to eight characters in a register pair, told by a single store, because debug builds
// must not need more registers than others.
struct Name {
    u64 characters = 0;

    template <int SIZE>
    constexpr Name(const char (&text)[SIZE]) {  // NOLINT: a literal is meant to convert
        static_assert(SIZE <= 9, "at most eight characters");
        for (int i = 0; i + 1 < SIZE; ++i) characters |= u64(static_cast<unsigned char>(text[i])) << 8 * i;
    }
};

#ifdef RTK_SPIN_LIMIT_NS
// Host memory that outlives the kernel: the library sets it when it loads a debug build, and reads the name after a trap.
// (assert() and printf() would be calls, and a call anywhere serializes every wgmma as well.)
extern "C" __device__ volatile u64* rtk_trap_report = nullptr;

RTK_DEVICE u32 nanoseconds_low() {
    u32 now;
    asm volatile("mov.u32 %0, %globaltimer_lo;" : "=r"(now));
    return now;
}

struct SpinLimit {
    const u32 start = nanoseconds_low();

    RTK_DEVICE void check(Name name) const {
        if (nanoseconds_low() - start < RTK_SPIN_LIMIT_NS) return;
        if (rtk_trap_report != nullptr) *rtk_trap_report = name.characters;
        __threadfence_system();
        // A store to address 0 ends the kernel at once. (A trap instruction makes ptxas run out of registers for wgmma.)
        asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(0u) : "memory");
    }
};
#else
struct SpinLimit {
    RTK_DEVICE void check(Name) const {}
};
#endif

// One time in four, up to four microseconds. The same for all threads of a warp that are here: they stay together.
RTK_DEVICE void random_delay() {
#ifdef RTK_RANDOM_DELAYS
    u32 random = static_cast<u32>(clock64()) * 2654435761u ^ (blockIdx.x * 0x9e3779b9u + threadIdx.x / WARP_SIZE);
    random = (random ^ (random >> 15)) * 0x2c1b3c6du;
    const u32 here = __activemask();
    random = __shfl_sync(here, random ^ (random >> 13), __ffs(here) - 1);
    if (random % 4 == 0) __nanosleep(random >> 20);
#endif
}

}  // namespace rtk
