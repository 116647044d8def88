// How a warp multiplies sixteen weight rows with eight rows of x: on tensor cores for half types,
// with fused multiply-adds for float32.
//
// A warp works on units of 16 weight rows by 128 bytes. Lane (g, t) = (lane / 4, lane % 4) holds
// chunks t and t + 4, of 16 bytes, of rows g and g + 8. Which features these are is the same for
// weights and x, so their order does not matter; it is chosen such that both are read in 16 bytes.
// Results have the layout of mma's C: out[0], out[1]: row g, x rows 2t and 2t + 1; out[2], out[3]:
// row g + 8.
#pragma once

#include "common.cuh"

namespace lmi {

constexpr int UNIT_BYTES = 128;

template <typename W>
constexpr int UNIT = UNIT_BYTES / sizeof(W);  // features

// Where x's features at, at + 1, ... at + 7 lie in shared memory. A lane has 16 int8 features in
// one chunk, but reads x in two: these are put apart, so that reads do not collide.
template <typename X, typename W>
__device__ inline int place(int at) {
  if constexpr (sizeof(X) == 2 && sizeof(W) == 1) {
    return (at & ~63) + (at / 8 % 2) * 32 + (at / 16 % 4) * 8;
  } else {
    return at;
  }
}

// x & mask | bits in one instruction, which the compiler makes two of when both are constants.
__device__ inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t found;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(found) : "r"(x), "r"(mask), "r"(bits));
  return found;
}

// Two of the four bytes, those that `selector` puts lowest in either half, as a pair of X, in units of
// ONE.
__device__ inline uint32_t expand(uint32_t bytes, uint32_t selector, int8_t, __half) {
  // 0x6400 is 1024, whose last bit is 1: a byte put below it adds its value.
  const uint32_t biased = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, selector);
  const uint32_t offset = 0x64806480u;  // 1024 + 128
  const __half2 value = __hsub2(reinterpret_cast<const __half2&>(biased),
                                reinterpret_cast<const __half2&>(offset));
  return reinterpret_cast<const uint32_t&>(value);
}

__device__ inline uint32_t expand(uint32_t bytes, uint32_t selector, int8_t, __nv_bfloat16) {
  // A byte alone is a bfloat16 of 2^-133 for each unit, subnormal or not: one fused multiply-add
  // scales it and takes off the offset that has made it positive.
  const uint32_t biased = __byte_perm(bytes ^ 0x80808080u, 0u, selector);
  const uint32_t factor = 0x7f007f00u, offset = 0xc000c000u;  // 2^127, and -128 of ONE
  const __nv_bfloat162 value = __hfma2(reinterpret_cast<const __nv_bfloat162&>(biased),
                                       reinterpret_cast<const __nv_bfloat162&>(factor),
                                       reinterpret_cast<const __nv_bfloat162&>(offset));
  return reinterpret_cast<const uint32_t&>(value);
}

// What a code of 1 becomes by `expand`.
template <typename X, typename W>
constexpr float ONE =
    std::is_same_v<X, __nv_bfloat16> && std::is_same_v<W, int8_t> ? 1 / 64.0f : 1.0f;

// e4m3 has half's layout and bfloat16's but for fewer bits of exponent and mantissa: moved to where
// theirs are, a value is too small by the difference of the exponents' biases, subnormal or not.
template <typename X>
__device__ inline uint32_t expand(uint32_t bytes, uint32_t selector, __nv_fp8_e4m3, X) {
  const uint32_t high = __byte_perm(bytes, 0u, (selector << 4 & 0xffff) | 4);  // in high bytes
  if constexpr (std::is_same_v<X, __half>) {
    const uint32_t moved = and_or(high >> 1, 0x3f803f80u, high & 0x80008000u);
    const uint32_t factor = 0x5c005c00u;  // 2^8
    const __half2 value = __hmul2(reinterpret_cast<const __half2&>(moved),
                                  reinterpret_cast<const __half2&>(factor));
    return reinterpret_cast<const uint32_t&>(value);
  } else {
    const uint32_t moved = and_or(high >> 4, 0x07f007f0u, high & 0x80008000u);
    const uint32_t factor = 0x7b807b80u;  // 2^120
    const __nv_bfloat162 value = __hmul2(reinterpret_cast<const __nv_bfloat162&>(moved),
                                         reinterpret_cast<const __nv_bfloat162&>(factor));
    return reinterpret_cast<const uint32_t&>(value);
  }
}

// Eight bytes as eight of X, in units of ONE.
template <typename X, typename W>
__device__ inline uint4 widened(uint32_t first, uint32_t second) {
  return make_uint4(expand(first, 0x4140, W(), X()), expand(first, 0x4342, W(), X()),
                    expand(second, 0x4140, W(), X()), expand(second, 0x4342, W(), X()));
}

__device__ inline float4 widen4(uint32_t four, int8_t) {
  const char4 bytes = reinterpret_cast<const char4&>(four);
  return make_float4(bytes.x, bytes.y, bytes.z, bytes.w);
}

__device__ inline float4 widen4(uint32_t four, __nv_fp8_e4m3) {
  const uint32_t low = expand(four, 0x4140, __nv_fp8_e4m3(), __half());
  const uint32_t high = expand(four, 0x4342, __nv_fp8_e4m3(), __half());
  const float2 a = widen(reinterpret_cast<const __half2&>(low));
  const float2 b = widen(reinterpret_cast<const __half2&>(high));
  return make_float4(a.x, a.y, b.x, b.y);
}

template <typename X>
__device__ inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<X, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// A lane's chunks: of row g, and of row g + 8.
struct Chunks {
  uint4 low[2], high[2];
};

// x of a half type; NT times eight rows.
template <typename X_, typename W_, int NT>
struct TensorProduct {
  using X = X_;
  using W = W_;
  static constexpr int AT_ONCE = 2;  // blocks on a processor that registers must allow
  // A product waits for the one before it that adds to the same sums: a single one wants two.
  static constexpr int CHAINS = NT == 1 ? 2 : 1;
  float sums[CHAINS][NT][4] = {};

  // Rows g and g + 8, eight features a lane; `x`: the same of rows n * 8 + g.
  __device__ void multiply8(const uint4& low, const uint4& high, const uint4 (&x)[NT]) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      mma<X>(sums[0][n], low.x, high.x, low.y, high.y, x[n].x, x[n].y);
      mma<X>(sums[CHAINS - 1][n], low.z, high.z, low.w, high.w, x[n].z, x[n].w);
    }
  }

  // The same of features that lie at `b` in row 0 of x.
  __device__ void add8(const uint4& low, const uint4& high, const X* b, int stride, int rows) {
    uint4 x[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      // Above the last row: copies of it, not used.
      x[n] = *reinterpret_cast<const uint4*>(b + min(n * 8 + threadIdx.x % 32 / 4, rows - 1) * stride);
    }
    multiply8(low, high, x);
  }

  // x: the unit's first feature in row 0.
  __device__ void add(const Chunks& w, const X* x, int stride, int rows) {
    x += threadIdx.x % 4 * 8;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint4 &low = w.low[c], &high = w.high[c];
      if constexpr (sizeof(W) == 2) {
        add8(low, high, x + c * 32, stride, rows);
      } else {
        add8(widened<X, W>(low.x, low.y), widened<X, W>(high.x, high.y), x + c * 64, stride, rows);
        add8(widened<X, W>(low.z, low.w), widened<X, W>(high.z, high.w), x + c * 64 + 32, stride, rows);
      }
    }
  }

  __device__ void finish(float (&out)[NT][4]) const {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[n][i] = sums[0][n][i] + (CHAINS > 1 ? sums[CHAINS - 1][n][i] : 0);
        out[n][i] /= ONE<X, W>;  // a power of two: exact, and a multiplication
      }
    }
  }
};

// x of float32.
template <typename W_, int NT>
struct PlainProduct {
  using X = float;
  using W = W_;
  static constexpr int AT_ONCE = 2;
  float sums[NT * 8][2] = {};

  // Rows g and g + 8, four features a lane, which lie at `b` in row 0 of x.
  __device__ void add4(const float4& low, const float4& high, const float* b, int stride,
                       int rows) {
#pragma unroll
    for (int n = 0; n < NT * 8; ++n) {
      if (n >= rows) break;
      const float4 x = *reinterpret_cast<const float4*>(b + n * stride);
      sums[n][0] += low.x * x.x + low.y * x.y + low.z * x.z + low.w * x.w;
      sums[n][1] += high.x * x.x + high.y * x.y + high.z * x.z + high.w * x.w;
    }
  }

  __device__ void add(const Chunks& w, const float* x, int stride, int rows) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint4 &low = w.low[c], &high = w.high[c];
      if constexpr (sizeof(W) == 4) {
        add4(reinterpret_cast<const float4&>(low), reinterpret_cast<const float4&>(high),
             x + c * 16 + t * 4, stride, rows);
      } else {
        const float* b = x + c * 64 + t * 16;
        add4(widen4(low.x, W()), widen4(high.x, W()), b, stride, rows);
        add4(widen4(low.y, W()), widen4(high.y, W()), b + 4, stride, rows);
        add4(widen4(low.z, W()), widen4(high.z, W()), b + 8, stride, rows);
        add4(widen4(low.w, W()), widen4(high.w, W()), b + 12, stride, rows);
      }
    }
  }

  __device__ void finish(float (&out)[NT][4]) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < NT * 8; ++n) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float sum = sums[n][side];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (n % 8 / 2 == t) out[n / 8][side * 2 + n % 2] = sum;
      }
    }
  }
};

}  // namespace lmi
