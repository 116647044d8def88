// Where anything is turned (normalized or rotated), a block does heads of one token: queries, keys and
// values alike. Several lanes do a head, eight features each, and the same of one head after the
// other, so that angles are read once. Else keys and values of all tokens are copied.
#include "write_kv.h"

namespace lmi {
namespace {

constexpr int THREADS = 256, AT_ONCE = 4;  // heads, or words, that a lane reads before it needs any
constexpr int COPIED = THREADS * AT_ONCE;  // words of eight features that a block copies

struct Work {
  WriteKvParams p;
  int count;  // the heads of a token that there is something to do for, the first ones
  int width;  // lanes a head: dim / 8, rounded up to a power of two
};

// What a lane's eight features, from `at` on, are rotated with in half-split layout: feature i goes
// with i + pairs, and the first of the two has the negative sine.
struct Rotation {
  int at, pairs;
  float cos[8], sin[8];

  __device__ Rotation(const WriteKvParams& p, int64_t token, int at) : at(at), pairs(p.pairs) {
    const float* const cosines = p.cos + token * pairs;
    const float* const sines = p.sin + token * pairs;
#pragma unroll
    for (int i = 0; i < 8; ++i) cos[i] = 1, sin[i] = 0;
    if (!pairs) return;
    if (pairs % 8 == 0) {
      if (at >= 2 * pairs) return;
      load8(cosines + at % pairs, cos);
      load8(sines + at % pairs, sin);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (at + i >= 2 * pairs) continue;
        cos[i] = cosines[(at + i) % pairs];
        sin[i] = sines[(at + i) % pairs];
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sin[i] = at + i < pairs ? -sin[i] : sin[i];
  }

  // The feature that goes with feature at + i; itself where nothing is rotated.
  __device__ int partner(int i) const {
    const int own = at + i;
    return own >= 2 * pairs ? own : own < pairs ? own + pairs : own - pairs;
  }

  template <typename T>
  __device__ void read_partners(const T* head, Raw<T>& to) const {
    if (pairs % 8 == 0) return to.read(head + partner(0));
#pragma unroll
    for (int i = 0; i < 8; ++i) reinterpret_cast<T*>(to.bits)[i] = head[partner(i)];
  }
};

__device__ inline float sum_over(float x, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// A lane's features of a query or key, which becomes what it should be; all lanes of a warp come here.
template <typename T>
__device__ void turn(const Work& work, const Rotation& rotation, bool active, Operand norm,
                     const Raw<T>& partners, Raw<T>& raw) {
  float x[8], partner[8];
  raw.unpack(x);
  partners.unpack(partner);
  if (work.p.q_norm.data || work.p.k_norm.data) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += active ? x[i] * x[i] : 0;
    const float factor = rsqrtf(sum_over(squares, work.width) / work.p.dim + work.p.eps);
#pragma unroll
    for (int i = 0; i < 8 && norm.data; ++i) {  // rounded, as the norm by itself would be
      x[i] = widen(narrow<T>(x[i] * factor * load(norm, rotation.at + i)));
      partner[i] = widen(narrow<T>(partner[i] * factor * load(norm, rotation.partner(i))));
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = x[i] * rotation.cos[i] + partner[i] * rotation.sin[i];
  raw.pack(x);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) turn_kv_kernel(const Work work) {
  let_next_start();
  wait_for_last();
  const WriteKvParams& p = work.p;
  const int64_t token = blockIdx.x;
  const int lane = threadIdx.x % work.width, groups = THREADS / work.width;
  const bool active = lane * 8 < p.dim;
  const Rotation rotation(p, token, active ? lane * 8 : 0);
  const int slot = p.k ? p.slots[token] : -1, stride = groups * static_cast<int>(gridDim.y);
  T* const heads = static_cast<T*>(p.qkv) + token * (p.heads + 2 * p.kv_heads) * p.dim;
  for (int base = blockIdx.y * groups; base < work.count; base += AT_ONCE * stride) {
    Raw<T> own[AT_ONCE], partners[AT_ONCE];
    const int first = base + static_cast<int>(threadIdx.x) / work.width;
    const auto head_at = [&](int k) {  // beyond the last, that one: read, but not written
      return min(first + k * stride, work.count - 1);
    };
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      const T* head = heads + head_at(k) * p.dim;
      own[k].read(head + rotation.at);
      if (p.pairs) rotation.read_partners(head, partners[k]);
    }
    __syncwarp();  // all lanes of a head have read it
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      const int head = head_at(k), key = head - p.heads;
      const bool query = key < 0, value = key >= p.kv_heads;
      Raw<T> raw = own[k];
      turn(work, rotation, active, query ? p.q_norm : p.k_norm, partners[k], raw);
      if (first + k * stride >= work.count || !active) continue;
      if (query || !p.k) {
        if (rotation.at < 2 * p.pairs || p.q_norm.data || p.k_norm.data) {
          raw.write(heads + head * p.dim + rotation.at);
        }
      } else if (slot >= 0) {
        if (value) raw = own[k];
        const int kv = value ? key - p.kv_heads : key;
        T* const cache = static_cast<T*>(value ? p.v : p.k);
        raw.write(cache + (static_cast<int64_t>(slot) * p.kv_heads + kv) * p.dim + rotation.at);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS) store_kv_kernel(const WriteKvParams p) {
  let_next_start();
  wait_for_last();
  // A token's words: of its keys, and behind them as many of its values.
  const unsigned half = static_cast<unsigned>(p.kv_heads) * p.dim / 8, words = 2 * half;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * COPIED, begin = first / words;
  const unsigned skipped = first % words + threadIdx.x;
  Raw<T> raw[AT_ONCE];
  int slots[AT_ONCE];
#pragma unroll
  for (int k = 0; k < AT_ONCE; ++k) {
    const unsigned at = skipped + k * THREADS;
    const int64_t token = begin + at / words;
    slots[k] = -1;
    if (token >= p.tokens) continue;
    slots[k] = p.slots[token];
    const T* own = static_cast<const T*>(p.qkv) + token * (p.heads + 2 * p.kv_heads) * p.dim;
    raw[k].read(own + p.heads * p.dim + at % words * 8);
  }
#pragma unroll
  for (int k = 0; k < AT_ONCE; ++k) {
    if (slots[k] < 0) continue;
    const unsigned word = (skipped + k * THREADS) % words;
    T* const cache = static_cast<T*>(word < half ? p.k : p.v);
    raw[k].write(cache + (static_cast<int64_t>(slots[k]) * half + word % half) * 8);
  }
}

template <typename T>
void launch_write(const Work& work, const Device& gpu, cudaStream_t stream) {
  const WriteKvParams& p = work.p;
  if (!p.pairs && !p.q_norm.data && !p.k_norm.data) {
    const int64_t words = p.tokens * p.kv_heads * p.dim / 4;
    const dim3 grid(static_cast<unsigned>((words + COPIED - 1) / COPIED));
    launch(&store_kv_kernel<T>, p, grid, THREADS, 0, early(gpu), stream);
    return;
  }
  const int groups = THREADS / work.width;
  // Few tokens' heads are shared by several blocks.
  const int64_t parts = std::clamp<int64_t>(4 * gpu.processors / p.tokens, 1,
                                            (work.count + groups - 1) / groups);
  const dim3 grid(static_cast<unsigned>(p.tokens), static_cast<unsigned>(parts));
  launch(&turn_kv_kernel<T>, work, grid, THREADS, 0, early(gpu), stream);
}

}  // namespace

void write_kv(const WriteKvParams& p, const Device& gpu, cudaStream_t stream) {
  const bool turned = p.pairs || p.q_norm.data || p.k_norm.data;
  if (!turned && !p.k) return;
  Work work{p, p.heads + p.kv_heads * (p.k ? 2 : 1), 1};
  while (work.width * 8 < p.dim) work.width *= 2;
  switch (p.type) {
    case Type::float16: return launch_write<__half>(work, gpu, stream);
    case Type::bfloat16: return launch_write<__nv_bfloat16>(work, gpu, stream);
    default: return launch_write<float>(work, gpu, stream);
  }
}

}  // namespace lmi
