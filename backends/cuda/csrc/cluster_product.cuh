// A product of up to sixteen rows in a step, shared by the blocks of a cluster.
//
// Sixteen rows of x do not fit beside rings of a useful depth. A cluster's blocks therefore have a
// slice of the features each, of all rows and of the same tiles; where even that is too much, they go
// through their slices in several passes. A team of warps has a tile. Its sums go to the blocks of the
// cluster that finish them, each some rows of x, while the next tile is under way.
#pragma once

#include "exchange.cuh"
#include "multiply.cuh"

namespace lmi {

// Put the block's slice of the rows of x into shared memory, normalized if there is a norm, zeros up to
// a whole unit. A warp does a row.
template <typename X, typename W>
__device__ void stage_slice(const LinearParams& p, int begin, int end, X* to, Exchange& exchange) {
  constexpr int N = AT_A_TIME<X>, STEP = 32 * 8;
  const int row = threadIdx.x / 32, own = threadIdx.x % 32 * 8, rank = blockIdx.x % CLUSTER;
  const bool has_norm = p.norm_weight.data;
  if (row < p.rows) {
    const X* x = static_cast<const X*>(p.x.data) + static_cast<int64_t>(row) * p.weights.inputs;
    const int features = end - begin, stride = row_stride<X>(features);
    const int padded = stride - 64 / static_cast<int>(sizeof(X));
    const bool again = padded > N * STEP;  // a lane has more features than `some`
    Raw<X> some[N], weight[N];
    const auto read = [&](int base) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (base + i * STEP < features) some[i].read(x + begin + base + i * STEP);
      }
    };
    const auto read_weight = [&](int base) {
#pragma unroll
      for (int i = 0; has_norm && i < N; ++i) {
        if (base + i * STEP >= features) continue;
        weight[i].read(static_cast<const X*>(p.norm_weight.data) + begin + base + i * STEP);
      }
    };
    // Sum `of` each feature, which its mean is taken off.
    const auto sum_up = [&](float mean, auto of) {
      float sum = 0;
#pragma unroll 1
      for (int base = own; base < features; base += N * STEP) {
        if (again) read(base);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float values[8];
          some[i].unpack(values);
          if (base + i * STEP >= features) continue;
#pragma unroll
          for (float value : values) sum += of(value - mean);
        }
      }
      return warp_sum(sum);
    };
    if (!again) read(own), read_weight(own);
    Normal by;
    if (has_norm) {
      Moments found{};
      if (p.norm_bias.data && features > 0) {
        found.mean = __fdividef(sum_up(0, [](float x) { return x; }), features);
      }
      found.squares = sum_up(found.mean, [](float x) { return x * x; });
      by = combine(exchange, exchange.norms, row, rank, found, p);
      if (!p.norm_bias.data) by.shift = 0;
    }
#pragma unroll 1
    for (int base = own; base < padded; base += N * STEP) {
      if (again) read(base), read_weight(base);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int at = base + i * STEP;
        if (at >= padded) break;
        float values[8] = {};
        if (at < features) {
          some[i].unpack(values);
          Raw<X> bias;
          if (p.norm_bias.data) bias.read(static_cast<const X*>(p.norm_bias.data) + begin + at);
          if (has_norm) apply(by, weight[i], bias, values);
        }
        store8(to + row * stride + place<X, W>(at), values);
      }
    }
  }
}

// The sums of a team's tiles on their way between the blocks of a cluster. Of NT times eight rows of x
// every block finishes an equal share, and a lane two results: those of a pair of weight rows.
template <int NT>
class TeamSums {
 public:
  static constexpr int OF_WARP = NT * 8;  // pieces of four sums that a warp sends to each block
  // Bytes of shared memory that all teams want.
  static constexpr int BYTES = 2 * CLUSTER * OF_WARP * STEP_WARPS * static_cast<int>(sizeof(float4));

  // Before the first of `tiles` tiles.
  __device__ TeamSums(Exchange& exchange, const Weights& w, float4* parts, int tiles)
      : exchange_(exchange),
        warps_(w.warps),
        team_(threadIdx.x / 32 / w.warps),
        turn_(exchange.turns[team_]),
        end_(turn_ + tiles) {
    parts_ = parts + team_ * warps_ * 2 * CLUSTER * OF_WARP;
    if (tells()) {
#pragma unroll 1
      for (unsigned i = turn_; i != end_ && i != turn_ + 2; ++i) expect(i);
    }
  }

  // Whether this warp finishes the team's tiles; which row of x a lane does, and which weight rows.
  __device__ bool finishes() const { return own() == 0 && lane() < OF_WARP * 2; }
  __device__ int m() const { return (rank() * NT + lane() / 2 % NT) * 2 + lane() % 2; }
  __device__ int g() const { return lane() / (2 * NT); }

  // Of the last tile sent, once all blocks' parts are here: the lane's two sums.
  __device__ float2 receive() {
    const unsigned turn = turn_ - 1;
    exchange_.sums[team_][turn % 2].wait_for_cluster(phase_of(turn));
    float2 sum = make_float2(0, 0);
    if (finishes()) {
      const auto* from = reinterpret_cast<const float*>(place(turn) + lane() / 2 % NT * 8 + g());
#pragma unroll 2
      for (int i = 0; i < CLUSTER * warps_; ++i) {
        sum.x += from[i * OF_WARP * 4 + lane() % 2], sum.y += from[i * OF_WARP * 4 + lane() % 2 + 2];
      }
    }
    __syncwarp();  // everybody has read what others may now overwrite
    if (tells() && turn + 2 < end_) expect(turn + 2);
    return sum;
  }

  // The warp's sums of a tile, behind `receive` of the one before.
  __device__ void send_all(const float (&sums)[NT][4]) {
    const int t = lane() % 4, g = lane() / 4;
    float4* to = place(turn_) + (rank() * warps_ + own()) * OF_WARP;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int pair = n * 4 + t;  // of rows of x
      send(in_block(to + pair % NT * 8 + g, pair / NT), sums[n],
           in_block(&exchange_.sums[team_][turn_ % 2], pair / NT));
    }
    ++turn_;
  }

  // Behind the last `receive`; then the block comes together before its next product.
  __device__ void end() const {
    if (tells()) exchange_.turns[team_] = turn_;
  }

 private:
  static __device__ int lane() { return threadIdx.x % 32; }
  static __device__ int rank() { return blockIdx.x % CLUSTER; }
  __device__ int own() const { return threadIdx.x / 32 % warps_; }  // which of its team's warps
  __device__ bool tells() const { return own() == 0 && lane() == 0; }
  __device__ float4* place(unsigned turn) const {
    return parts_ + turn % 2 * (CLUSTER * warps_ * OF_WARP);
  }
  __device__ void expect(unsigned turn) {
    exchange_.sums[team_][turn % 2].arrive_and_expect(CLUSTER * warps_ * OF_WARP *
                                                      static_cast<int>(sizeof(float4)));
  }

  Exchange& exchange_;
  float4* parts_;
  int warps_, team_;
  unsigned turn_, end_;
};

// Where a lane keeps what it has of its tiles from earlier passes.
__device__ inline float2* kept(float2* held, int tile, int tile_step) {
  return held + tile / tile_step * 32 + threadIdx.x % 32;
}

// The block's part of a product. `wait`: until x is there. `parts`: TeamSums' bytes; `held`, for several
// passes: 32 for each of the cluster's tiles.
template <typename Product, int NT, typename S, typename Wait>
__device__ void multiply_in_cluster(const LinearParams& p, int passes, bool staged, S& weights,
                                    typename Product::X* x, float4* parts, float2* held,
                                    Exchange& exchange, Wait wait) {
  using X = typename Product::X;
  using W = typename Product::W;
  const Weights& w = p.weights;
  Part part(w, blockIdx.x, gridDim.x);
  const int team = threadIdx.x / 32 / w.warps, teams = STEP_WARPS / w.warps;
  const int first = part.tile + team * part.tile_step, step = teams * part.tile_step;
  const int tiles = first < w.tiles ? (w.tiles - first + step - 1) / step : 0;
  TeamSums<NT> team_sums(exchange, w, parts, tiles * passes);
  int last = -1;  // the tile whose sums have been sent
  const auto terms_of_last = [&] {
    Terms terms;
    if (last >= 0 && team_sums.finishes()) {
      terms = read_terms(p, last, team_sums.g(), team_sums.m());
    }
    return terms;
  };
  const auto finish = [&](const Terms& terms, int pass) {
    if (last < 0) return;
    float2 sum = team_sums.receive();
    if (!team_sums.finishes()) return;
    if (passes > 1) {
      float2* of_tile = kept(held, last, part.tile_step);
      if (pass > 0) sum.x += of_tile->x, sum.y += of_tile->y;
      *of_tile = sum;
    }
    if (pass == passes - 1) put(p, last, team_sums.g(), team_sums.m(), terms, sum);
  };
  wait();
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    const int begin = min((pass * CLUSTER + part.split) * w.slice, w.inputs);
    const int end = min(begin + w.slice, w.inputs), stride = row_stride<X>(end - begin);
    if (pass > 0) __syncthreads();  // the last pass' x has been read
    if (!staged) stage_slice<X, W>(p, begin, end, x, exchange);
    __syncthreads();
#pragma unroll 1
    for (int tile = first; tile < w.tiles; tile += step) {
      const Terms terms = terms_of_last();  // they are on their way meanwhile
      Product product;
#pragma unroll 1
      for (int f = threadIdx.x / 32 % w.warps * UNIT<W>; f < end - begin; f += w.warps * UNIT<W>) {
        product.add(weights.next(), x + f, stride, NT * 8);  // of rows that are none as well
      }
      float sums[NT][4];
      product.finish(sums);
      finish(terms, tile == first ? pass - 1 : pass);
      team_sums.send_all(sums);
      last = tile;
    }
  }
  finish(terms_of_last(), passes - 1);
  team_sums.end();
  if (threadIdx.x == 0 && !staged && p.norm_weight.data) ++exchange.norms;
}

}  // namespace lmi
