// O from registers to global memory.
//
// Each warp turns its 16 rows in shared memory of its own, 64 columns at a time, so that eight lanes store 128 neighbouring
// bytes: no other warp is waited for, nor the next tile's loads, and any row count and any 16-byte stride will do. Where
// shared memory is full the four threads of a row exchange values by shuffles instead, which takes three times as many
// instructions.
#pragma once
#include <rtk/wgmma.cuh>

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
            values[c] = first + c < CHUNKS ? Element::pack(o[i] * factor, o[i + 1] * factor) : 0u;
        }
        quad_transpose(values);
        const int column = 8 * (first + static_cast<int>(threadIdx.x % 4));
        if (in_range && column < COLUMNS) store_16_bytes(row + column * ELEMENT_BYTES, values);
    }
}

// 16 rows of 128 bytes, chunks of 16 bytes swizzled by the row: both directions touch every bank once. The area begins at
// a multiple of 128, so that going to another chunk is one exclusive or.
struct TurnedRows {
    static constexpr int COLUMNS = 64;
    static constexpr int BYTES = 16 * COLUMNS * ELEMENT_BYTES;

    static RTK_DEVICE u32 address(u32 area, int row, int chunk) { return area + row * 128 + ((chunk ^ row) % 8) * 16; }
    static RTK_DEVICE u32 to_chunk(u32 address_of_chunk_0, int chunk) { return address_of_chunk_0 ^ (chunk * 16); }
};

// Two chunks of eight columns of 16 rows, as the accumulators hold them: four 8 x 8 matrices, a lane for each row.
RTK_DEVICE void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}
RTK_DEVICE void load_16_bytes(u32 address, u32 (&values)[4]) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                 : "r"(address)
                 : "memory");
}

// A warp's 16 rows: accumulators `o` times the factors of the thread's two rows, to `rows`, of which
// those that exist are stored.
template <class Element, int COLUMNS, int COUNT, class Exists>
RTK_DEVICE void store_rows(const float (&o)[COUNT], const float (&normalizer)[2], u32 turned, unsigned char* rows,
                           i64 row_bytes, Exists exists) {
    constexpr int CHUNKS = COUNT / 4;  // of eight columns, an even number
    const int lane = threadIdx.x % WARP_SIZE;
    const u32 source = TurnedRows::address(turned, lane % 16, lane / 16);
    const u32 destination = TurnedRows::address(turned, lane / 8, lane % 8);
    float factors[2] = {normalizer[0], normalizer[1]};
    rows += lane / 8 * row_bytes + lane % 8 * 16;
#pragma unroll
    for (int first = 0; first < CHUNKS; first += 8) {
        __syncwarp();
        // Packing all columns at once, as ptxas likes to, would take too many registers.
        if (first > 0) {
            keep_below(factors[0], factors[0], turned);
            keep_below(factors[1], factors[1], turned);
        }
#pragma unroll
        for (int c = first; c < first + 8 && c < CHUNKS; c += 2) {
            u32 packed[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                packed[i] = Element::pack(o[4 * c + 2 * i] * factors[i % 2], o[4 * c + 2 * i + 1] * factors[i % 2]);
            }
            store_matrices(TurnedRows::to_chunk(source, c - first), packed[0], packed[1], packed[2], packed[3]);
        }
        __syncwarp();
        const bool stored = 8 * (first + lane % 8) < COLUMNS;
#pragma unroll
        for (int row = 0; row < 16; row += 4) {
            u32 values[4];
            load_16_bytes(TurnedRows::to_chunk(destination, row % 8) + row * 128, values);
            if (stored && exists(row + lane / 8)) {
                store_16_bytes(rows + row * row_bytes + first * 8 * ELEMENT_BYTES, values);
            }
        }
    }
}

}  // namespace rtk
