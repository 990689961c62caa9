// Single instructions that CUDA C++ has no name for.
#pragma once
#include <rtk/types.cuh>

namespace rtk {

// An address in the shared window, as the asynchronous units want it.
RTK_DEVICE u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Same value in every lane, and the compiler knows it: branches on it are uniform.
RTK_DEVICE int warp_uniform(int value) {
    return __shfl_sync(0xffffffffu, value, 0);
}

RTK_DEVICE bool elect_one() {
    u32 elected;
    asm volatile(
        "{ .reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.b32 %0, 1, 0, p; }"
        : "=r"(elected));
    return elected != 0;
}

// Moves registers between warpgroups. All four warps of the warpgroup must execute it.
template <int REGISTERS>
RTK_DEVICE void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
RTK_DEVICE void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Named barriers: `sync` waits for `threads` arrivals, its own included; `arrive` only counts.
RTK_DEVICE void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
RTK_DEVICE void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A value in global memory, read here and now: the kernel before on the stream may have written it while this one was
// there already.
RTK_DEVICE int load_global(const int* address) {
    int value;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// Programmatic dependent launch: waits for the end of the kernel before on the stream; nothing in global memory may be
// touched earlier. From then on the next kernel may start blocks where there is room for them, and waits for the end of
// this one in turn. (Setting a block up while the kernel before ends saves 0.5 us a call.)
RTK_DEVICE void wait_for_kernel_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// A word whose lowest bits are set: none for a count of zero or less, all for 32 or more.
RTK_DEVICE u32 low_bits(int count) {
    u32 bits;
    asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(bits) : "r"(max(count, 0)));
    return bits;
}
RTK_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
RTK_DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
RTK_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

RTK_DEVICE float negative_infinity() {
    return __int_as_float(0xff800000);
}

}  // namespace rtk
