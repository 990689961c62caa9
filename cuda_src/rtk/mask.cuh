// Which keys a query may see, which KV tiles a block of queries therefore visits, and which of those need masking.
//
// Query row i sees key j when i + diagonal_left <= j <= i + diagonal_right and first_key <= j < end_key. Causal masks,
// sliding windows and either alignment are all of this form; the two diagonals are computed on the host. The range of
// keys is that of the array, or with Config::KV_RANGES each sequence's own, read from device memory.
#pragma once
#include <rtk/ptx.cuh>

namespace rtk {

// Everything the kernel knows of one sequence pair.
struct SequenceExtent {
    int seqlen_q;
    int first_key;  // used when Config::KV_RANGES; otherwise 0
    int end_key;
    int diagonal_left;   // used when Config::MASK_LEFT
    int diagonal_right;  // used when Config::MASK_RIGHT
};

// The extent of one sequence of the batch, whose keys lie at kv_first[batch] to kv_end[batch] of the arrays; null is the
// arrays' own bound. What lies outside the arrays is not in the range whatever the numbers say.
template <class Config>
RTK_DEVICE SequenceExtent sequence_extent(const SequenceExtent& arrays, const int* kv_first, const int* kv_end,
                                          int batch) {
    SequenceExtent extent = arrays;
    if constexpr (Config::KV_RANGES) {
        if (kv_first != nullptr) extent.first_key = min(max(0, load_global(kv_first + batch)), arrays.end_key);
        if (kv_end != nullptr) extent.end_key = min(max(0, load_global(kv_end + batch)), arrays.end_key);
    }
    return extent;
}

// Whether some row of a tile may begin to see keys right of the tile's first one.
template <class Config>
constexpr bool masked_on_the_left = Config::MASK_LEFT || Config::KV_RANGES;

// KV tiles [begin, end) are visited from right to left. Tiles in [clear_begin, clear_end) need no mask for any of the
// ROWS rows asked about: a block's, or a consumer's. Some of these may lie before the first query or behind the last.
struct KvTiles {
    int begin;
    int end;
    int clear_begin;
    int clear_end;
};

template <class Config, int ROWS>
RTK_DEVICE KvTiles visible_kv_tiles(const SequenceExtent& extent, int begin_row) {
    constexpr int N = Config::BLOCK_N;
    const int first_row = max(begin_row, 0);
    const int last_row = min(begin_row + ROWS, extent.seqlen_q) - 1;
    KvTiles tiles;
    int visible = extent.end_key;    // keys that the last row may see
    int clear = extent.end_key / N;  // tiles that the first row sees whole, on the right
    tiles.begin = tiles.clear_begin = 0;
    if constexpr (Config::MASK_RIGHT) {
        visible = max(0, min(visible, last_row + extent.diagonal_right + 1));
        clear = min(clear, max(0, first_row + extent.diagonal_right + 1) / N);
    }
    tiles.end = first_row <= last_row ? ceil_div_rt(visible, N) : 0;
    tiles.clear_end = clear;
    if constexpr (masked_on_the_left<Config>) {
        int first_visible = extent.first_key, first_clear = extent.first_key;  // to the first row, to the last
        if constexpr (Config::MASK_LEFT) {
            first_visible = max(first_visible, first_row + extent.diagonal_left);
            first_clear = max(first_clear, last_row + extent.diagonal_left);
        }
        tiles.begin = first_visible / N;
        tiles.clear_begin = ceil_div_rt(first_clear, N);
    }
    return tiles;
}

// How many of a thread's scores of a row lie in the tile's first columns: of every eight columns it holds the first two,
// counted from its own first column.
RTK_DEVICE int scores_in(int columns) {
    columns = max(columns, 0);
    return columns / 8 * 2 + min(columns % 8, 2);
}

// Sets the scores of invisible keys to -inf. `row` is the thread's first row, `column` its first column of the tile. A row's
// scores are chosen by the bits of a word, seven of which become predicates in one instruction, where comparing columns
// would take one for each.
template <class Config, int COUNT>
RTK_DEVICE void mask_scores(float (&scores)[COUNT], const SequenceExtent& extent, int row, int column) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int end = extent.end_key - column;
        if constexpr (Config::MASK_RIGHT) end = min(end, row + 8 * r + extent.diagonal_right + 1 - column);
        int begin = row + 8 * r + extent.diagonal_left - column;
        if constexpr (Config::KV_RANGES) begin = max(Config::MASK_LEFT ? begin : 0, extent.first_key - column);
        const int end_score = scores_in(end), begin_score = masked_on_the_left<Config> ? scores_in(begin) : 0;
#pragma unroll
        for (int word = 0; word < COUNT / 2; word += 32) {
            const u32 visible =
                low_bits(end_score - word) & ~(masked_on_the_left<Config> ? low_bits(begin_score - word) : 0);
#pragma unroll
            for (int i = word; i < word + 32 && i < COUNT / 2; ++i) {
                if (!(visible >> (i - word) & 1)) scores[i / 2 * 4 + 2 * r + i % 2] = negative_infinity();
            }
        }
    }
}

}  // namespace rtk
