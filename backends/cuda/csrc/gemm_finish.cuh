// What a tile's sums become, each in one block of the cluster that has found them.
#pragma once

#include "activation.cuh"
#include "gemm_block.cuh"
#include "product.cuh"

namespace lmi {

// What four results need beside their sums, on its way: those of weight rows n and n + 8, for rows
// m and m + 1 of x.
struct GemmTerms {
  float scale[2][2] = {{1, 1}, {1, 1}};         // of the output, and of what it gates
  uint32_t bias[2][2] = {}, residual[2][2] = {};  // the latter for m and m + 1

  __device__ void read_from(const GemmParams& p, int n, int m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int output = n + i * 8;
      if (output >= p.outputs) continue;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (j < 1 + p.gated) {
          if (p.scale) scale[i][j] = p.scale[output + j * p.upper];
          if (p.bias.data) bias[i][j] = read(p.bias, output + j * p.upper);
        }
        if (p.residual.data && m + j < p.rows) {
          residual[i][j] = read(p.residual, static_cast<int64_t>(m + j) * p.outputs + output);
        }
      }
    }
  }
};

// Scale, bias, activation or gate, and residual.
__device__ inline void put(const GemmParams& p, const GemmTerms& terms, int n, int m,
                           const float4& sums, const float4& gated) {
  const float y[2][2] = {{sums.x, sums.y}, {sums.z, sums.w}};
  const float by[2][2] = {{gated.x, gated.y}, {gated.z, gated.w}};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int output = n + i * 8;
    const float bias[2] = {widen(terms.bias[i][0], p.bias.type),
                           widen(terms.bias[i][1], p.bias.type)};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (output >= p.outputs || m + j >= p.rows) continue;
      float value = activate(y[i][j] * terms.scale[i][0] + bias[0], p.activation);
      if (p.gated) value *= by[i][j] * terms.scale[i][1] + bias[1];
      store(p.out, p.out_type, static_cast<int64_t>(m + j) * p.outputs + output,
            value + widen(terms.residual[i][j], p.residual.type));
    }
  }
}

// The results of a tile that this block finishes, four at a time: a pair of x's rows, and weight
// rows g and g + 8 of a warp's sixteen.
template <typename G>
struct Finish {
  static constexpr int WIDTH_LOG2 = 6, OF_PAIR = 1 << WIDTH_LOG2;  // fours of a pair of rows
  static_assert(OF_PAIR == GEMM_WARPS * 8);

  const GemmParams& p;
  const Share& share;
  // Powers of two: pairs that a block finishes, and results of a pair, of which two fours become
  // one if gated.
  int pairs_log2, width_log2;

  __device__ Finish(const GemmParams& p, const Share& share)
      : p(p),
        share(share),
        pairs_log2(__ffs(G::ROWS / 2 / p.splits) - 1),
        width_log2(WIDTH_LOG2 - p.gated) {}

  __device__ int in_pair(int i) const { return i & ((1 << width_log2) - 1); }
  __device__ int pair(int i) const { return i >> width_log2; }
  __device__ int own() const { return 1 << (pairs_log2 + width_log2); }
  __device__ int row(int i) const { return 2 * ((share.rank << pairs_log2) + pair(i)); }
  __device__ int output(int i, unsigned tile) const {
    return tile * (p.gated ? HALF : 2 * HALF) + in_pair(i) / 8 * 16 + in_pair(i) % 8;
  }

  __device__ void read_terms(GemmTerms& terms, int i, unsigned tile) const {
    if (i < own()) terms.read_from(p, output(i, tile), row(i));
  }

  // A thread's sums to the blocks that finish them.
  __device__ void send_sums(const GemmMemory& memory, const float (&sums)[G::SUMS]) const {
    const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
    for (int j = 0; j < G::SUMS / 4; ++j) {
      const unsigned pair = j * 4 + t, block = pair >> pairs_log2;
      const unsigned its = (share.rank << pairs_log2) + (pair & ((1 << pairs_log2) - 1));
      const int at = its * OF_PAIR + threadIdx.x / 32 * 8;
      float own[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) own[i] = sums[j * 4 + i] / ONE<typename G::T, typename G::W>;
      send(in_block(memory.parts + at + lane / 4, block), own, in_block(memory.sent, block));
    }
  }

  // Always in the same order.
  __device__ float4 add_up(const float4* parts) const {
    float4 sum = parts[0];
#pragma unroll 4
    for (unsigned block = 1; block < p.splits; ++block) {
      const float4 more = parts[(block << pairs_log2) * OF_PAIR];
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    return sum;
  }

  __device__ void operator()(const GemmMemory& memory, GemmTerms& terms, unsigned tile) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < own(); i += GEMM_WARPS * 32) {
      if (i >= GEMM_WARPS * 32) terms = {}, read_terms(terms, i, tile);
      const float4* parts = memory.parts + pair(i) * OF_PAIR + in_pair(i);
      const float4 sums = add_up(parts);
      put(p, terms, output(i, tile), row(i), sums, p.gated ? add_up(parts + OF_PAIR / 2) : sums);
    }
  }
};

}  // namespace lmi
