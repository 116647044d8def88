// A product of up to sixteen rows in a step, shared by the blocks of a cluster.
//
// Sixteen rows of x do not fit beside rings of a useful depth. So a tile is shared by a team of warps
// from all blocks of a cluster, a few of each, which take units of its features in turns, and a block
// has only that part of x which its warps want: memory is read in pieces as large as where a block has
// a tile to itself, which makes it fast. Where even that part is too large, a block goes through it in
// several passes. A team's sums go to the blocks of the cluster that finish them, each some rows of x,
// while the next tile is under way.
#pragma once

#include "exchange.cuh"
#include "multiply.cuh"

namespace lmi {

// Tiles of which a cluster of so many keeps what it has found: those of all but the last pass, and those
// that teams share, in the end.
inline int held_tiles(const Weights& w, int clusters, int passes) {
  const int left = w.tiles - w.rounds * clusters * BLOCK_TEAMS;
  return ((left + clusters - 1) / clusters + (passes > 1 ? w.rounds : 0)) * BLOCK_TEAMS;
}

// Features that a block's warps of a team take, before it is the next block's turn.
template <typename W>
constexpr int TURN = TEAM_WARPS * UNIT<W>;

// Warps that share a tile: some of every block of a cluster. Neighbouring teams have neighbouring
// tiles.
struct ClusterTeam {
  static constexpr int SIZE = CLUSTER * TEAM_WARPS;

  static __device__ int rank() {
    unsigned found;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(found));
    return found;
  }
  static __device__ int team() { return thread() / 32 / TEAM_WARPS; }   // of the block
  static __device__ int member() { return thread() / 32 % TEAM_WARPS; }  // of the block's
  // Read anew where it is wanted: not to be kept in a register all the time.
  static __device__ int thread() {
    unsigned found;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(found));
    return found;
  }
  static __device__ int own() { return rank() * TEAM_WARPS + member(); }

  static __device__ int cluster() { return blockIdx.x / CLUSTER; }
  static __device__ int clusters() { return gridDim.x / CLUSTER; }
};

// A team's tiles in turn. Those that are left over when all teams have as many come first, and all teams
// of a cluster share each: a cluster then has at most one such tile more than others, in a quarter of
// the time.
class ClusterTiles {
 public:
  // Of the pass that begins at a feature.
  __device__ void begin(const Weights& w, int feature) {
    begin_ = feature, features_ = min(w.inputs - begin_, CLUSTER * w.slice);
    tile_ = all_have(w) + ClusterTeam::cluster(), left_ = tile_ < w.tiles;
    if (!left_) begin_own();
  }
  __device__ void next(const Weights& w) {
    tile_ += ClusterTeam::clusters() * (left_ ? 1 : BLOCK_TEAMS);
    if (left_ && tile_ >= w.tiles) begin_own();
  }
  __device__ bool any(const Weights& w) const { return left_ || tile_ < all_have(w); }

  __device__ int tile() const { return tile_; }
  __device__ int begin() const { return begin_; }
  __device__ int features() const { return features_; }
  // Of a tile that is left, teams take turns of units, too.
  __device__ int first_unit() const {
    return ClusterTeam::own() + (left_ ? ClusterTeam::team() * ClusterTeam::SIZE : 0);
  }
  __device__ int unit_step() const { return ClusterTeam::SIZE * (left_ ? BLOCK_TEAMS : 1); }

  // How many tiles this cluster has of those that are left.
  static __device__ int count_left(const Weights& w) {
    const int left = w.tiles - all_have(w) - ClusterTeam::cluster();
    return left > 0 ? (left + ClusterTeam::clusters() - 1) / ClusterTeam::clusters() : 0;
  }

 private:
  static __device__ int all_have(const Weights& w) {
    return w.rounds * ClusterTeam::clusters() * BLOCK_TEAMS;
  }
  __device__ void begin_own() {
    left_ = false, tile_ = ClusterTeam::cluster() * BLOCK_TEAMS + ClusterTeam::team();
  }

  int begin_, features_, tile_;
  bool left_;
};

// The same of all passes, one after the other.
class PassTiles : public ClusterTiles {
 public:
  __device__ void begin(const Weights& w) { ClusterTiles::begin(w, 0); }
  __device__ void next(const Weights& w) {
    ClusterTiles::next(w);
    const int end = ClusterTiles::begin() + features();
    if (!any(w) && end < w.inputs) ClusterTiles::begin(w, end);
  }
  __device__ int begin() const { return ClusterTiles::begin(); }
};

// Put the block's features of a pass over the rows of x into shared memory, normalized if there is a norm,
// zeros up to a whole turn. A warp does a row.
template <typename X, typename W>
__device__ void stage_turns(const LinearParams& p, int pass, X* to, Exchange& exchange) {
  constexpr int N = AT_A_TIME<X>, STEP = 32 * 8;
  const int row = threadIdx.x / 32, own = threadIdx.x % 32 * 8;
  const bool has_norm = p.norm_weight.data;
  if (row >= p.rows) return;
  const X* x = static_cast<const X*>(p.x.data) + static_cast<int64_t>(row) * p.weights.inputs;
  const int slice = p.weights.slice;
  const int begin = pass * CLUSTER * slice, end = min(p.weights.inputs, begin + CLUSTER * slice);
  const bool again = slice > N * STEP;  // a lane has more features than `some`
  // Where a feature of the block's is in a row.
  const auto in_row = [&](int at) {
    return begin + (at / TURN<W> * CLUSTER + ClusterTeam::rank()) * TURN<W> + at % TURN<W>;
  };
  Raw<X> some[N], weight[N];
  const auto read = [&](Raw<X>(&raw)[N], const void* from, int base) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int at = in_row(base + i * STEP);
      if (base + i * STEP < slice && at < end) raw[i].read(static_cast<const X*>(from) + at);
    }
  };
  // Sum `of` each feature, which its mean is taken off.
  const auto sum_up = [&](float mean, auto of) {
    float sum = 0;
#pragma unroll 1
    for (int base = own; base < slice; base += N * STEP) {
      if (again) read(some, x, base);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float values[8];
        some[i].unpack(values);
        if (base + i * STEP >= slice || in_row(base + i * STEP) >= end) continue;
#pragma unroll
        for (float value : values) sum += of(value - mean);
      }
    }
    return warp_sum(sum);
  };
  if (!again) read(some, x, own);
  if (!again && has_norm) read(weight, p.norm_weight.data, own);
  Normal by;
  if (has_norm) {
    Moments found{};
    // The last turn may not be whole, or not the block's.
    const int turns = (end - begin) / TURN<W>, rest = (end - begin) % TURN<W>;
    const int whole = (turns + CLUSTER - 1 - ClusterTeam::rank()) / CLUSTER;
    found.count = whole * TURN<W> + (turns % CLUSTER == ClusterTeam::rank() ? rest : 0);
    if (p.norm_bias.data && found.count > 0) {
      found.mean = __fdividef(sum_up(0, [](float x) { return x; }), found.count);
    }
    found.squares = sum_up(found.mean, [](float x) { return x * x; });
    by = combine(exchange, row, ClusterTeam::rank(), found, p);
  }
#pragma unroll 1
  for (int base = own; base < slice; base += N * STEP) {
    if (again) read(some, x, base);
    if (again && has_norm) read(weight, p.norm_weight.data, base);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int at = base + i * STEP, from = in_row(at);
      if (at >= slice) break;
      float values[8] = {};
      if (from < end) {
        some[i].unpack(values);
        Raw<X> bias;
        if (p.norm_bias.data) bias.read(static_cast<const X*>(p.norm_bias.data) + from);
        if (has_norm) apply(by, weight[i], bias, values);
      }
      store8(to + row * row_stride<X>(slice) + place<X, W>(at), values);
    }
  }
}

// The sums of a team's tiles on their way between the blocks of a cluster. Of the rows of x every block
// finishes an equal share, and a lane two results: those of a pair of weight rows.
class TeamSums {
 public:
  static constexpr int NT = MOST_CLUSTER_ROWS / 8;
  static constexpr int OF_WARP = NT * 8;  // pieces of four sums that a warp sends to each block
  // A warp finishes a block's share of a tile, and stages a row.
  static_assert(2 * OF_WARP == 32 && CLUSTER == 4 && MOST_CLUSTER_ROWS <= STEP_WARPS);
  static constexpr int OF_TILE = ClusterTeam::SIZE * OF_WARP;  // that a block gets
  // Bytes of shared memory that all teams want.
  static constexpr int BYTES = 2 * BLOCK_TEAMS * OF_TILE * static_cast<int>(sizeof(float4));

  // Before the first of `tiles` tiles.
  __device__ TeamSums(Exchange& exchange, float4* parts, int tiles)
      : exchange_(exchange),
        parts_(parts + ClusterTeam::team() * 2 * OF_TILE),
        turn_(exchange.turns[ClusterTeam::team()]),
        end_(turn_ + tiles) {
    if (ClusterTeam::member() > 0 || lane() > 0) return;
#pragma unroll 1
    for (unsigned i = turn_; i != end_ && i != turn_ + 2; ++i) expect(i);
  }

  // Whether this warp finishes the last tile sent, as a team's do in turns; which row of x a lane does, and
  // which weight rows.
  __device__ bool finishes() const { return by_ == ClusterTeam::member(); }
  __device__ int m() const { return (ClusterTeam::rank() * NT + lane() / 2 % NT) * 2 + lane() % 2; }
  __device__ int g() const { return lane() / (2 * NT); }

  // Of the last tile sent, once all blocks' parts are here: the lane's two sums.
  __device__ float2 receive() {
    const unsigned turn = turn_ - 1;
    arrived(turn).wait_for_cluster(phase_of(turn));
    float2 sum = make_float2(0, 0);
    if (finishes()) {
      const float4* first = place(turn) + lane() / 2 % NT * 8 + g();
      const float* from = reinterpret_cast<const float*>(first) + lane() % 2;
#pragma unroll 4
      for (int i = 0; i < ClusterTeam::SIZE; ++i) {
        sum.x += from[i * OF_WARP * 4], sum.y += from[i * OF_WARP * 4 + 2];
      }
    }
    __syncwarp();  // everybody has read what others may now overwrite
    if (finishes() && lane() == 0 && turn + 2 < end_) expect(turn + 2);
    return sum;
  }

  // The warp's sums of the team's tile number `tile`, behind `receive` of the one before.
  __device__ void send_all(const float (&sums)[NT][4], int tile) {
    const int t = lane() % 4, g = lane() / 4;
    float4* to = place(turn_) + ClusterTeam::own() * OF_WARP;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int pair = n * 4 + t;  // of rows of x
      send(in_block(to + pair % NT * 8 + g, pair / NT), sums[n], in_block(&arrived(turn_), pair / NT));
    }
    ++turn_, by_ = tile % TEAM_WARPS;
  }

  // Behind the last `receive`; then the block comes together before its next product.
  __device__ void end() const {
    if (ClusterTeam::member() == 0 && lane() == 0) exchange_.turns[ClusterTeam::team()] = turn_;
  }

 private:
  static __device__ int lane() { return threadIdx.x % 32; }
  __device__ float4* place(unsigned turn) const { return parts_ + turn % 2 * OF_TILE; }
  __device__ Barrier& arrived(unsigned turn) const {
    return exchange_.sums[ClusterTeam::team()][turn % 2];
  }
  __device__ void expect(unsigned turn) const {
    arrived(turn).arrive_and_expect(OF_TILE * static_cast<int>(sizeof(float4)));
  }

  Exchange& exchange_;
  float4* parts_;
  unsigned turn_, end_;
  int by_ = 0;  // the warp that finishes the last tile sent
};

// The block's part of a product. `wait`: until x is there. `parts`: TeamSums' bytes. `held`: see
// `held_tiles`.
template <typename Product, typename S, typename Wait>
__device__ void multiply_in_cluster(const LinearParams& p, int passes, bool staged, S& weights,
                                    typename Product::X* x, float4* parts, float2* held,
                                    Exchange& exchange, Wait wait) {
  using X = typename Product::X;
  using W = typename Product::W;
  const Weights& w = p.weights;
  const int left = ClusterTiles::count_left(w), stride = row_stride<X>(w.slice);
  TeamSums team_sums(exchange, parts, (w.rounds + left) * passes);
  // What a lane has of a tile that it cannot finish yet.
  const auto held_of = [&](int number, int team) {
    return held + (number * BLOCK_TEAMS + team) * 32 + threadIdx.x % 32;
  };
  int last = -1, number = 0;  // the tile whose sums have been sent, and the next one's
  const auto terms_of_last = [&] {
    Terms terms;
    if (last >= 0 && team_sums.finishes()) {
      terms = read_terms(p, last, team_sums.g(), team_sums.m());
    }
    return terms;
  };
  const auto finish = [&](const Terms& terms, int pass, int which) {
    if (last < 0) return;
    float2 sum = team_sums.receive();
    if (!team_sums.finishes()) return;
    const bool shared = which < left;
    if (passes > 1 || shared) {
      float2* of_tile = held_of(which, ClusterTeam::team());
      if (pass > 0) sum.x += of_tile->x, sum.y += of_tile->y;
      *of_tile = sum;
    }
    if (pass < passes - 1) return;
    if (shared) {
      if (!exchange.is_last_team(which)) return;
      sum = make_float2(0, 0);
#pragma unroll 1
      for (int team = 0; team < BLOCK_TEAMS; ++team) {
        const float2 found = *held_of(which, team);
        sum.x += found.x, sum.y += found.y;
      }
    }
    put(p, last, team_sums.g(), team_sums.m(), terms, sum);
  };
  wait();
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    if (pass > 0) __syncthreads();  // the last pass' x has been read
    if (!staged) stage_turns<X, W>(p, pass, x, exchange);
    __syncthreads();
    ClusterTiles tiles;
    tiles.begin(w, pass * CLUSTER * w.slice);
#pragma unroll 1
    for (number = 0; tiles.any(w); tiles.next(w), ++number) {
      const Terms terms = terms_of_last();  // they are on their way meanwhile
      Product product;
      // In the block's part of x units lie as its warps of a team take them.
      const int first = tiles.first_unit(), step = tiles.unit_step();
      const X* own = x + first / ClusterTeam::SIZE * TURN<W> + ClusterTeam::member() * UNIT<W>;
#pragma unroll 1
      for (int f = first * UNIT<W>; f < tiles.features(); f += step * UNIT<W>) {
        product.add(weights.next(), own, stride, MOST_CLUSTER_ROWS);  // of rows that are none as well
        own += step / ClusterTeam::SIZE * TURN<W>;
      }
      float sums[TeamSums::NT][4];
      product.finish(sums);
      finish(terms, number ? pass : pass - 1, number ? number - 1 : w.rounds + left - 1);
      team_sums.send_all(sums, number);
      last = tiles.tile();
    }
  }
  finish(terms_of_last(), passes - 1, number - 1);
  team_sums.end();
  if (threadIdx.x == 0 && !staged && p.norm_weight.data) ++exchange.norms;
}

}  // namespace lmi
