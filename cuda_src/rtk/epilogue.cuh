// O and LSE from registers to global memory.
//
// The four threads of a row exchange values so that each holds eight neighbouring columns and stores 16 bytes: no
// shared memory, hence no wait of the next tile's loads on this tile's output, any row count and any 16-byte stride.
#pragma once
#include <rtk/ptx.cuh>

namespace rtk {

// Thread t of a quad passes values[c] to thread c and keeps what the others have for it: a 4 x 4 transpose.
RTK_DEVICE void quad_transpose(u32 (&values)[4]) {
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const u32 sent = upper ? values[i] : values[i + step];
            const u32 received = __shfl_xor_sync(0xffffffffu, sent, step);
            if (upper) {
                values[i] = received;
            } else {
                values[i + step] = received;
            }
        }
    }
}

RTK_DEVICE void store_16_bytes(unsigned char* destination, const u32 (&values)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(destination), "r"(values[0]), "r"(values[1]),
                 "r"(values[2]), "r"(values[3])
                 : "memory");
}

// One of the thread's two rows: accumulators `o` times `factor`, to `row`, where COLUMNS of 8 * chunks are stored.
template <class Element, int COLUMNS, int COUNT>
RTK_DEVICE void store_row(const float (&o)[COUNT], int which, float factor, unsigned char* row, bool in_range) {
    constexpr int CHUNKS = COUNT / 4;  // of eight columns
#pragma unroll
    for (int first = 0; first < CHUNKS; first += 4) {
        u32 values[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int i = 4 * (first + c) + 2 * which;
            // A row that saw no key is 0 whatever was multiplied into it: its tile may hold a NaN.
            values[c] = first + c < CHUNKS && factor != 0.0f ? Element::pack(o[i] * factor, o[i + 1] * factor) : 0u;
        }
        quad_transpose(values);
        const int column = 8 * (first + static_cast<int>(threadIdx.x % 4));
        if (in_range && column < COLUMNS) store_16_bytes(row + column * ELEMENT_BYTES, values);
    }
}

}  // namespace rtk
