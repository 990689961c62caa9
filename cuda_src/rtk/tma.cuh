// Tiles from global to shared memory by the tensor memory accelerator.
//
// A tile of `rows` x `columns` elements is kept as slabs of SLAB columns, one behind the other; within a slab each row
// is SLAB * 2 bytes (32, 64 or 128) and the 16-byte chunks are swizzled by that width, which is what the wgmma
// descriptors of <rtk/wgmma.cuh> expect. Columns and rows outside the tensor arrive as zeros.
#pragma once
#include <rtk/barrier.cuh>

namespace rtk {

struct alignas(64) TensorMap {
    char opaque[128];
};

RTK_DEVICE void prefetch_tensor_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Coordinates are (column, row, head, batch), in elements.
RTK_DEVICE void tma_load_slab(void* destination, const TensorMap& map, Barrier& full, int column, int row, int head,
                              int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(destination)),
        "l"(&map), "r"(shared_address(&full)), "r"(column), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

template <int ROWS, int COLUMNS, int SLAB>
struct TileLayout {
    static constexpr int SLABS = ceil_div<COLUMNS, SLAB>;
    static constexpr int ROW_BYTES = SLAB * ELEMENT_BYTES;
    static constexpr int SLAB_BYTES = ROWS * ROW_BYTES;
    static constexpr int BYTES = SLABS * SLAB_BYTES;
    static_assert(SLAB == 16 || SLAB == 32 || SLAB == 64, "a slab is 16, 32 or 64 columns: one swizzle width");
    static_assert(ROWS % 8 == 0, "the swizzle pattern repeats every eight rows: a slab must end with one");
};

// The whole tile starting at `row`; announces its bytes on `full` first.
template <class Layout, int SLAB>
RTK_DEVICE void tma_load_tile(unsigned char* destination, const TensorMap& map, Barrier& full, int row, int head,
                              int batch) {
    full.arrive_expect_bytes(Layout::BYTES);
#pragma unroll
    for (int slab = 0; slab < Layout::SLABS; ++slab) {
        tma_load_slab(destination + slab * Layout::SLAB_BYTES, map, full, slab * SLAB, row, head, batch);
    }
}

}  // namespace rtk
