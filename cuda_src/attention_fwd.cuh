// Attention forward: O = softmax(scale * Q K^T) V for one pass over the keys (FlashAttention-3, arXiv:2407.08608).
//
// A persistent block has one producer warpgroup and up to four consumer warpgroups of 64 query rows each. The producer
// brings the block's Q rows and the visible K and V tiles, right to left, into shared memory by TMA. Each consumer
// multiplies S = Q K^T, turns S into probabilities P and accumulates O += P V, where the product of one KV tile runs
// under the softmax of the next (section 3.2), and the consumers may take turns at the tensor cores (section 3.1).
//
// Consumers share K and V but nothing else: each sees only the KV tiles that its own rows see, and gets its next rows of
// Q when it is done with these, so that one may be a few tiles ahead of another, as far as the stages reach.
#pragma once
#include <rtk/epilogue.cuh>
#include <rtk/mask.cuh>
#include <rtk/pipeline.cuh>
#include <rtk/scheduler.cuh>
#include <rtk/softmax.cuh>
#include <rtk/tma.cuh>
#include <rtk/wgmma.cuh>

namespace rtk {

struct AttentionFwdParams {
    TensorMap q, k, v;
    unsigned char* o;
    float* lse;           // (batch, heads, seqlen_q), or null
    u32* tile_counter;    // zero before the launch and after it; Scheduler::DYNAMIC only
    const int* kv_first;  // (batch,) or null, where the keys of each sequence begin, and where they end;
    const int* kv_end;    // Config::KV_RANGES only
    i64 o_batch_bytes, o_head_bytes, o_row_bytes;
    TileSchedule schedule;
    SequenceExtent extent;  // of the arrays
    int heads_per_kv;       // query heads that share one head of K and V
    float scale;            // softmax_scale
    float scale_log2;       // what the softmax multiplies scores by, times log2(e)
    float softcap;
};

// Constants that follow from a configuration.
template <class Config>
struct AttentionFwdTraits {
    using Element = typename ElementOf<Config::BF16>::type;
    static constexpr int CONSUMERS = Config::NUM_CONSUMER_WARPGROUPS;
    static constexpr int WARPS = CONSUMERS * WARPGROUP_SIZE / WARP_SIZE;  // of the consumers
    static constexpr int HEAD_DIM = ceil_div<Config::HEAD_DIM, 16> * 16;  // as the instructions see it
    static constexpr int HEAD_DIM_V = ceil_div<Config::HEAD_DIM_V, 16> * 16;
    // Registers a thread: what the producer gives up the consumers take.
    static constexpr int PRODUCER_REGISTERS = CONSUMERS == 4 ? 24 : CONSUMERS == 3 ? 32 : 40;
    static constexpr int CONSUMER_REGISTERS = CONSUMERS == 4 ? 112 : CONSUMERS == 3 ? 160 : 232;
    // Costs more than it spares where the exponentials bind: see docs/kernel-notes.md.
    static constexpr bool SPLIT_SOFTMAX = HEAD_DIM_V > 64;
    // How large P may become: below what its type holds, and sums of 2^17 products with V below 1e28 are finite.
    static constexpr int TOLERANCE_LOG2 = Config::BF16 ? 16 : 12;
    // How small a row's largest P may be, where that spares finding maxima: float16 has no exponents to give away.
    static constexpr int SLACK_LOG2 = Config::BF16 ? 32 : 0;

    using QTile = TileLayout<CONSUMER_ROWS, HEAD_DIM, Config::SLAB_QK>;  // of one consumer
    using KTile = TileLayout<Config::BLOCK_N, HEAD_DIM, Config::SLAB_QK>;
    using VTile = TileLayout<Config::BLOCK_N, HEAD_DIM_V, Config::SLAB_V>;

    static_assert(Config::BLOCK_M == CONSUMER_ROWS * CONSUMERS, "each consumer warpgroup owns 64 query rows");
    static_assert(Config::BLOCK_N % 16 == 0 && Config::BLOCK_N <= 256, "BLOCK_N is a multiple of 16 up to 256");
    static_assert(Config::HEAD_DIM % 8 == 0 && Config::HEAD_DIM <= 256, "HEAD_DIM is a multiple of 8 up to 256");
    static_assert(Config::HEAD_DIM_V % 8 == 0 && Config::HEAD_DIM_V <= 256, "HEAD_DIM_V is a multiple of 8 up to 256");
    static_assert(HEAD_DIM % Config::SLAB_QK == 0 || Config::SLAB_QK == 64, "narrow slabs must divide the head");
    static_assert(HEAD_DIM_V % Config::SLAB_V == 0 || Config::SLAB_V == 64, "narrow slabs must divide the head");
    static_assert(!Config::PINGPONG || CONSUMERS > 1, "ping-pong needs two consumer warpgroups");
};

// What a block works on next: a block of queries of one head, the KV tiles that some row of it sees, and the keys that
// its sequence has.
struct OutputTile {
    int head;
    int batch;
    int first_row;  // negative where the block begins before the first query
    int kv_begin;
    int kv_end;
    int first_key;
    int end_key;

    RTK_DEVICE bool any_keys() const { return kv_begin < kv_end; }
};

template <class Config>
RTK_DEVICE OutputTile output_tile(const AttentionFwdParams& params, int index) {
    const TilePlace place = params.schedule[index];
    const SequenceExtent extent = sequence_extent<Config>(params.extent, params.kv_first, params.kv_end, place.batch);
    const int first_row = place.m_block * Config::BLOCK_M - params.schedule.rows_before;
    const KvTiles tiles = visible_kv_tiles<Config, Config::BLOCK_M>(extent, first_row);
    return {place.head, place.batch, first_row, tiles.begin, tiles.end, extent.first_key, extent.end_key};
}

constexpr int align_to_swizzle(int bytes) {
    return (bytes + 1023) / 1024 * 1024;
}

template <class Config>
struct AttentionFwdShared {
    using T = AttentionFwdTraits<Config>;
    static constexpr int K_BYTES = align_to_swizzle(T::KTile::BYTES);
    static constexpr int V_BYTES = align_to_swizzle(T::VTile::BYTES);

    unsigned char q[T::CONSUMERS][align_to_swizzle(T::QTile::BYTES)];
    unsigned char k[Config::STAGES][K_BYTES];
    unsigned char v[Config::STAGES][V_BYTES];
    RingBarriers<1> q_ring[T::CONSUMERS];
    RingBarriers<Config::STAGES> k_ring;
    RingBarriers<Config::STAGES> v_ring;
    TileRing<OutputTile> tile_ring;
};

// Behind them, where that much is left, the consumers' warps turn their rows of O.
template <class Config>
struct TurnedArea {
    static constexpr int LARGEST_BYTES = 227 << 10;
    static constexpr int WANTED_BYTES = AttentionFwdTraits<Config>::WARPS * TurnedRows::BYTES;
    static constexpr int BLOCK_BYTES = (sizeof(AttentionFwdShared<Config>) + 127) / 128 * 128;
    static constexpr int BYTES = BLOCK_BYTES + WANTED_BYTES <= LARGEST_BYTES ? WANTED_BYTES : 0;

    static RTK_DEVICE u32 address(AttentionFwdShared<Config>& shared, int warp) {
        return shared_address(&shared) + BLOCK_BYTES + warp * TurnedRows::BYTES;
    }
};

// --- producer --------------------------------------------------------------------------------------------------------

// One thread that loads K and V.
template <class Config>
struct AttentionFwdProducer {
    using T = AttentionFwdTraits<Config>;
    const AttentionFwdParams& params;
    AttentionFwdShared<Config>& shared;
    RingPosition<Config::STAGES> k, v;

    RTK_DEVICE void load_k(int n_block, int kv_head, int batch) {
        wait_empty(shared.k_ring, k, "k empty");
        tma_load_tile<typename T::KTile, Config::SLAB_QK>(shared.k[k.stage], params.k, shared.k_ring.full[k.stage],
                                                          n_block * Config::BLOCK_N, kv_head, batch);
        k.advance();
    }
    RTK_DEVICE void load_v(int n_block, int kv_head, int batch) {
        wait_empty(shared.v_ring, v, "v empty");
        tma_load_tile<typename T::VTile, Config::SLAB_V>(shared.v[v.stage], params.v, shared.v_ring.full[v.stage],
                                                         n_block * Config::BLOCK_N, kv_head, batch);
        v.advance();
    }

    RTK_DEVICE void run_tile(const OutputTile& tile) {
        if (!tile.any_keys()) return;
        const int kv_head = tile.head / params.heads_per_kv;
        int n_block = tile.kv_end - 1;
        load_k(n_block, kv_head, tile.batch);
        // K runs one tile ahead of V, as the consumers do.
        for (; n_block > tile.kv_begin; --n_block) {
            load_k(n_block - 1, kv_head, tile.batch);
            load_v(n_block, kv_head, tile.batch);
        }
        load_v(n_block, kv_head, tile.batch);
    }
};

// Warps that load the consumers' rows of Q, one for each consumer where there are as many: a consumer that is ahead gets
// its next rows while another still reads its own.
template <class Config>
struct AttentionFwdQueryProducer {
    using T = AttentionFwdTraits<Config>;
    static constexpr int WARPS = min_ct(T::CONSUMERS, WARPGROUP_SIZE / WARP_SIZE - 1);
    const AttentionFwdParams& params;
    AttentionFwdShared<Config>& shared;
    const int warp;
    RingPosition<1> q;

    RTK_DEVICE void run_tile(const OutputTile& tile) {
        if (!tile.any_keys()) return;
        for (int consumer = warp; consumer < T::CONSUMERS; consumer += WARPS) {
            auto& ring = shared.q_ring[consumer];
            wait_empty(ring, q, "q empty");
            if (elect_one()) {
                tma_load_tile<typename T::QTile, Config::SLAB_QK>(shared.q[consumer], params.q, ring.full[q.stage],
                                                                  tile.first_row + consumer * CONSUMER_ROWS, tile.head,
                                                                  tile.batch);
            }
        }
        q.advance();
    }
};

// --- consumer --------------------------------------------------------------------------------------------------------

template <class Config>
struct AttentionFwdConsumer {
    using T = AttentionFwdTraits<Config>;
    using Element = typename T::Element;
    static constexpr int S_COUNT = Config::BLOCK_N / 2;
    static constexpr int O_COUNT = T::HEAD_DIM_V / 2;

    const AttentionFwdParams& params;
    AttentionFwdShared<Config>& shared;
    const int warpgroup;
    const int row_in_block;  // the first of this thread's two rows
    const int column;        // its first column in a tile of scores
    RingPosition<1> q;
    RingPosition<Config::STAGES> k, v;
    SequenceExtent extent;
    int last_block;  // the last KV tile that this consumer sees
    OnlineSoftmax<T::TOLERANCE_LOG2, T::SLACK_LOG2> softmax;
    float o[O_COUNT];
    u32 p[S_COUNT / 2];

    RTK_DEVICE AttentionFwdConsumer(const AttentionFwdParams& params, AttentionFwdShared<Config>& shared, int warpgroup)
        : params(params),
          shared(shared),
          warpgroup(warpgroup),
          row_in_block(warpgroup * CONSUMER_ROWS + threadIdx.x % WARPGROUP_SIZE / WARP_SIZE * 16 +
                       threadIdx.x % WARP_SIZE / 4),
          column(threadIdx.x % 4 * 2) {
        softmax.scale_log2 = params.scale_log2;
    }

    // Taking turns: a warpgroup issues its products, then lets the next one issue while its own softmax runs.
    RTK_DEVICE void wait_turn() {
        if constexpr (Config::PINGPONG) {
            random_delay();
            named_barrier_sync(1 + warpgroup, 2 * WARPGROUP_SIZE);
        }
    }
    RTK_DEVICE void pass_turn() {
        if constexpr (Config::PINGPONG) {
            named_barrier_arrive(1 + (warpgroup + 1 == T::CONSUMERS ? 0 : warpgroup + 1), 2 * WARPGROUP_SIZE);
        }
    }

    RTK_DEVICE Descriptor k_tile() const {
        return SlabDescriptor<Config::SLAB_QK>::k_major(shared_address(shared.k[k.stage]));
    }

    // Issues S = Q K^T.
    RTK_DEVICE void multiply_qk(float (&s)[S_COUNT], const Descriptor& keys) {
        const Descriptor q_tile = SlabDescriptor<Config::SLAB_QK>::k_major(shared_address(shared.q[warpgroup]));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < T::HEAD_DIM / 16; ++step) {
            const int slab = step * 16 / Config::SLAB_QK;
            const int within = step * 16 % Config::SLAB_QK * ELEMENT_BYTES;
            Wgmma<Element, Config::BLOCK_N>::ss(s, q_tile.at(slab * T::QTile::SLAB_BYTES + within),
                                                keys.at(slab * T::KTile::SLAB_BYTES + within), step > 0);
        }
        wgmma_commit();
    }

    // Issues O += P V.
    RTK_DEVICE void multiply_pv() {
        const Descriptor v_tile =
            SlabDescriptor<Config::SLAB_V>::mn_major(shared_address(shared.v[v.stage]), T::VTile::SLAB_BYTES);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Config::BLOCK_N / 16; ++step) {
            Wgmma<Element, T::HEAD_DIM_V>::rs(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                                              v_tile.at(step * 16 * T::VTile::ROW_BYTES));
        }
        wgmma_commit();
    }

    // The one place where a score is touched between the two products.
    RTK_DEVICE void modify_scores(float (&s)[S_COUNT], const OutputTile& tile, int n_block, bool masked) {
        if constexpr (Config::SOFTCAP) {
            // cap * tanh(scale * s / cap), with tanh(x) = 1 - 2 / (1 + exp(2x)): tanh.approx is too coarse for fp16.
            const float inner = params.scale / params.softcap * 2.0f * LOG2_E;
#pragma unroll
            for (int i = 0; i < S_COUNT; ++i) {
                s[i] = params.softcap - 2.0f * params.softcap * reciprocal_approx(1.0f + exp2_approx(s[i] * inner));
            }
        } else if constexpr (Config::PRESCALE) {
            // A scale of zero or less would turn the maximum around.
#pragma unroll
            for (int i = 0; i < S_COUNT; ++i) s[i] *= params.scale;
        }
        if (masked) {
            mask_scores<Config>(s, extent, tile.first_row + row_in_block, n_block * Config::BLOCK_N + column);
        }
    }

    // S of the first KV tile, with nothing in flight.
    RTK_DEVICE void first_step(const OutputTile& tile, int n_block, bool masked) {
        float s[S_COUNT];
        wait_full(shared.k_ring, k, "k full");
        const Descriptor keys = k_tile();
        wait_turn();
        multiply_qk(s, keys);
        pass_turn();
        wgmma_wait<0>();
        pin_registers(s);
        release_k(n_block);
        modify_scores(s, tile, n_block, masked);
        softmax.find_maxima(s);
        softmax.exponentiate(s, 0);
        softmax.exponentiate(s, 1);
        pack_pairs<Element>(s, p);
    }

    // S of this KV tile and O += P V of the one before run together, and this one's softmax under the latter.
    template <bool MASKED>
    RTK_DEVICE void next_step(const OutputTile& tile, int n_block) {
        float s[S_COUNT];
        wait_full(shared.k_ring, k, "k full");
        const Descriptor keys = k_tile();
        wait_turn();
        multiply_qk(s, keys);
        wait_full(shared.v_ring, v, "v full");
        multiply_pv();
        pass_turn();
        wgmma_wait<1>();
        pin_registers(s);
        release_k(n_block);
        modify_scores(s, tile, n_block, MASKED);
        softmax.raise_maxima(s);
        if constexpr (T::SPLIT_SOFTMAX) {
            // One row's exponentials run under the product, the other's hide the packing that must wait for it.
            softmax.exponentiate(s, 0);
            keep_wait_below(softmax.row_sum[0], shared_address(&shared));
            wgmma_wait<0>();
            keep_below(softmax.offset[1], softmax.row_sum[0], shared_address(&shared));
            softmax.exponentiate(s, 1);
        } else {
            softmax.exponentiate(s, 0);
            softmax.exponentiate(s, 1);
            wgmma_wait<0>();
        }
        pin_registers(o);
        pin_registers(p);
        release(shared.v_ring, v);
        v.advance();
        pack_pairs<Element>(s, p);
        if (softmax.raised) rescale();
    }

    RTK_DEVICE void last_product() {
        wait_full(shared.v_ring, v, "v full");
        multiply_pv();
        wgmma_wait<0>();
        pin_registers(o);
        release(shared.v_ring, v);
        v.advance();
    }

    // Hands K back, and with its last tile Q.
    RTK_DEVICE void release_k(int n_block) {
        release(shared.k_ring, k);
        k.advance();
        if (n_block == last_block) {
            release(shared.q_ring[warpgroup], q);
            q.advance();
        }
    }

    RTK_DEVICE void rescale() {
#pragma unroll
        for (int i = 0; i < O_COUNT; ++i) o[i] *= softmax.correction[i / 2 % 2];
    }

    // Lets tiles go by that only other consumers of the block see.
    RTK_DEVICE void skip(int count) {
        for (; count > 0; --count) {
            wait_turn();
            pass_turn();
            let_go_by(shared.k_ring, k, "k full");
            let_go_by(shared.v_ring, v, "v full");
        }
    }

    RTK_DEVICE void run_tile(const OutputTile& tile) {
        extent = params.extent;
        if constexpr (Config::KV_RANGES) extent.first_key = tile.first_key, extent.end_key = tile.end_key;
        const KvTiles tiles =
            visible_kv_tiles<Config, CONSUMER_ROWS>(extent, tile.first_row + warpgroup * CONSUMER_ROWS);
        const bool sees_any = tiles.begin < tiles.end;
        softmax.reset();
#pragma unroll
        for (int i = 0; i < O_COUNT; ++i) o[i] = 0.0f;
        if (sees_any) {
            skip(tile.kv_end - tiles.end);
            run_steps(tile, tiles);
        } else if (tile.any_keys()) {
            let_go_by(shared.q_ring[warpgroup], q, "q full");
        }
        write_rows(tile);
        skip((sees_any ? tiles.begin : tile.kv_end) - tile.kv_begin);
    }

    RTK_DEVICE void run_steps(const OutputTile& tile, const KvTiles& tiles) {
        last_block = tiles.begin;
        int n_block = tiles.end - 1;
        const auto masked = [&] { return n_block >= tiles.clear_end || n_block < tiles.clear_begin; };
        wait_full(shared.q_ring[warpgroup], q, "q full");
        first_step(tile, n_block, masked());
        --n_block;
        if constexpr (masked_on_the_left<Config>) {
            for (; n_block >= tiles.begin; --n_block) {
                if (masked()) {
                    next_step<true>(tile, n_block);
                } else {
                    next_step<false>(tile, n_block);
                }
            }
        } else {
            if constexpr (Config::MASK_RIGHT) {
                for (; n_block >= max(tiles.begin, tiles.clear_end); --n_block) next_step<true>(tile, n_block);
            }
            for (; n_block >= tiles.begin; --n_block) next_step<false>(tile, n_block);
        }
        last_product();
    }

    // Writes LSE and O.
    RTK_DEVICE void write_rows(const OutputTile& tile) {
        float normalizer[2], lse[2];
        softmax.finish(normalizer, lse);
        const int lane_row = threadIdx.x % WARP_SIZE / 4;
        const int first = tile.first_row + row_in_block - lane_row;  // of the warp's 16 rows
        const auto exists = [&](int row) {
            return static_cast<u32>(first + row) < static_cast<u32>(params.extent.seqlen_q);
        };
        if (params.lse != nullptr && threadIdx.x % 4 == 0) {
            const i64 head = static_cast<i64>(tile.batch) * params.schedule.num_heads + tile.head;
            float* rows = params.lse + head * params.extent.seqlen_q + first;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (exists(lane_row + 8 * r)) rows[lane_row + 8 * r] = lse[r];
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            // A row that saw no key is 0 whatever was multiplied into it: its tile may hold a NaN.
            if (normalizer[r] == 0.0f) clear_row(r);
        }
        unsigned char* rows =
            params.o + tile.batch * params.o_batch_bytes + tile.head * params.o_head_bytes + first * params.o_row_bytes;
        if constexpr (TurnedArea<Config>::BYTES > 0) {
            const u32 turned = TurnedArea<Config>::address(shared, threadIdx.x / WARP_SIZE % T::WARPS);
            store_rows<Element, Config::HEAD_DIM_V>(o, normalizer, turned, rows, params.o_row_bytes, exists);
        } else {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = lane_row + 8 * r;
                store_row<Element, Config::HEAD_DIM_V>(o, r, normalizer[r], rows + row * params.o_row_bytes,
                                                       exists(row));
            }
        }
    }

    RTK_DEVICE void clear_row(int row) {
#pragma unroll
        for (int i = 0; i < O_COUNT; ++i) {
            if (i / 2 % 2 == row) o[i] = 0.0f;
        }
    }
};

// --- kernel ----------------------------------------------------------------------------------------------------------

template <class Config, int SHARED_BYTES>
RTK_DEVICE void attention_fwd(const AttentionFwdParams& params) {
    using T = AttentionFwdTraits<Config>;
    static_assert(TurnedArea<Config>::BLOCK_BYTES + TurnedArea<Config>::BYTES == SHARED_BYTES,
                  "host and device disagree on shared memory");
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    auto& shared = *reinterpret_cast<AttentionFwdShared<Config>*>(shared_memory);

    if (threadIdx.x == 0) {
        prefetch_tensor_map(params.q);
        prefetch_tensor_map(params.k);
        prefetch_tensor_map(params.v);
        for (auto& ring : shared.q_ring) ring.init(WARPGROUP_SIZE / WARP_SIZE);
        shared.k_ring.init(T::WARPS);
        shared.v_ring.init(T::WARPS);
        shared.tile_ring.barriers.init(T::WARPS + AttentionFwdQueryProducer<Config>::WARPS);
        fence_barrier_init();
    }
    __syncthreads();
    wait_for_kernel_before();

    const int warpgroup = warp_uniform(threadIdx.x / WARPGROUP_SIZE);
    if (warpgroup == 0) {
        release_registers<T::PRODUCER_REGISTERS>();
        const int warp = warp_uniform(threadIdx.x / WARP_SIZE);
        if (warp > 0) {
            if (warp > AttentionFwdQueryProducer<Config>::WARPS) return;
            AttentionFwdQueryProducer<Config> producer{params, shared, warp - 1};
            TileConsumer<OutputTile>{shared.tile_ring}.for_each(
                [&](const OutputTile& tile) { producer.run_tile(tile); });
        } else if (elect_one()) {
            AttentionFwdProducer<Config> producer{params, shared};
            TileProducer<Config::SCHEDULER, OutputTile>{shared.tile_ring, params.tile_counter}.for_each(
                params.schedule.num_tiles(), [&](int index) { return output_tile<Config>(params, index); },
                [&](const OutputTile& tile) { producer.run_tile(tile); });
        }
    } else {
        claim_registers<T::CONSUMER_REGISTERS>();
        AttentionFwdConsumer<Config> consumer(params, shared, warpgroup - 1);
        if (warpgroup == T::CONSUMERS) consumer.pass_turn();
        TileConsumer<OutputTile>{shared.tile_ring}.for_each([&](const OutputTile& tile) { consumer.run_tile(tile); });
        if (warpgroup == 1) consumer.wait_turn();  // takes back the turn that was left over
    }
}

}  // namespace rtk
