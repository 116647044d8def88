// What all kernels share: element types, eight elements at a time, and launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace lmi {

enum class Type : int { float32, float16, bfloat16, int8, float8 };  // float8: e4m3

// A tensor that is read where its type costs nothing to look up: once a kernel, or once an output.
struct Operand {
  const void* data = nullptr;
  Type type = Type::float32;
};

template <typename T>
struct TwoOf;
template <>
struct TwoOf<__half> {
  using type = __half2;
};
template <>
struct TwoOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float2 widen(__half2 x) { return __half22float2(x); }
__device__ inline float2 widen(__nv_bfloat162 x) {  // in two instructions, not three
  const uint32_t bits = reinterpret_cast<const uint32_t&>(x);
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}

template <typename T>
__device__ inline T narrow(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <typename T>
__device__ inline void load8(const T* from, float (&to)[8]) {
  if constexpr (std::is_same_v<T, float>) {
    const float4 a = reinterpret_cast<const float4*>(from)[0];
    const float4 b = reinterpret_cast<const float4*>(from)[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const auto* pairs = reinterpret_cast<const typename TwoOf<T>::type*>(&raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen(pairs[i]);
      to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
    }
  }
}

template <typename T>
__device__ inline void store8(T* to, const float (&from)[8]) {
  alignas(16) T packed[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) packed[i] = narrow<T>(from[i]);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(packed) / 16); ++i) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(packed)[i];
  }
}

// Eight elements as they lie in memory: reading them does not wait for them, unpacking does.
template <typename T>
struct Raw {
  uint4 bits[sizeof(T) / 2] = {};

  __device__ void read(const T* from) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
      bits[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  }

  __device__ void write(T* to) const {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
      reinterpret_cast<uint4*>(to)[i] = bits[i];
    }
  }

  __device__ void pack(const float (&x)[8]) { store8(reinterpret_cast<T*>(bits), x); }
  __device__ void unpack(float (&x)[8]) const { load8(reinterpret_cast<const T*>(bits), x); }
};

__device__ inline void load8(Operand from, int64_t at, float (&to)[8]) {
  switch (from.type) {
    case Type::float16: return load8(static_cast<const __half*>(from.data) + at, to);
    case Type::bfloat16: return load8(static_cast<const __nv_bfloat16*>(from.data) + at, to);
    default: return load8(static_cast<const float*>(from.data) + at, to);
  }
}

// One element: reading it does not wait for it, widening does.
__device__ inline uint32_t read(Operand from, int64_t at) {
  return from.type == Type::float32 ? static_cast<const uint32_t*>(from.data)[at]
                                    : static_cast<const uint16_t*>(from.data)[at];
}

__device__ inline float widen(uint32_t bits, Type type) {
  switch (type) {
    case Type::float16: return widen(__ushort_as_half(static_cast<uint16_t>(bits)));
    case Type::bfloat16: return __uint_as_float(bits << 16);
    default: return __uint_as_float(bits);
  }
}

__device__ inline float load(Operand from, int64_t at) { return widen(read(from, at), from.type); }

__device__ inline void store(void* to, Type type, int64_t at, float value) {
  switch (type) {
    case Type::float16: static_cast<__half*>(to)[at] = narrow<__half>(value); break;
    case Type::bfloat16: static_cast<__nv_bfloat16*>(to)[at] = narrow<__nv_bfloat16>(value); break;
    default: static_cast<float*>(to)[at] = value;
  }
}

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Programmatic dependent launch: the next kernel may start now; what follows needs the last one's
// results. Until then only what no kernel of the step writes may be read: weights, lengths, block
// tables, and the keys and values of earlier tokens.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_last() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Of a power of two.
__device__ inline int log2_of(int x) { return 31 - __clz(x); }

// Warps of a block that work together: all of them, or some of several teams.
struct Team {
  int barrier;  // 0: the whole block's; else one more than the team's place in the block
  int thread;   // of the team
  int warps;

  static __device__ Team whole_block() {
    return {0, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x) / 32};
  }

  // Of a power of two of warps.
  static __device__ Team of_warps(int warps) {
    const int thread = threadIdx.x, threads = warps * 32;
    if (threads == static_cast<int>(blockDim.x)) return whole_block();
    return {(thread >> log2_of(threads)) + 1, thread & (threads - 1), warps};
  }

  __device__ int place() const { return barrier ? barrier - 1 : 0; }

  __device__ void sync() const {
    if (warps == 1) return __syncwarp();  // there are not as many barriers as such teams
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(warps * 32) : "memory");
  }
};

// True in every thread of the last of `parts` teams that come here for one `counter`, which is
// zero again afterwards. What the others wrote before is then visible.
__device__ inline bool is_last_part(const Team& team, int* counter, int parts) {
  __shared__ bool last_part[17];
  bool& last = last_part[team.barrier];
  team.sync();
  if (team.thread == 0) {
    __threadfence();
    last = atomicAdd(counter, 1) == parts - 1;
    if (last) *counter = 0;
  }
  team.sync();
  __threadfence();
  return last;
}

struct Device {
  int major, processors, shared_per_processor, shared_per_block;
  bool hopper;  // and there is code for just that
};

// What the GPU can do with the code that this library has for it.
Device device(int index);

// Lets launches of a kernel on the current device have this much dynamic shared memory. It is never
// lowered: another thread may be about to launch the kernel with more.
void allow_shared(const void* kernel, int bytes);

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // torch looks at it behind every kernel of its own
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// How a kernel starts: when the last one has ended; or before (see `let_next_start`); or with all
// of its blocks at once, which may then wait for each other.
enum class Start { after_last, with_last, together };

inline cudaLaunchAttribute attribute(Start start) {
  cudaLaunchAttribute found{};
  if (start == Start::with_last) {
    found.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    found.val.programmaticStreamSerializationAllowed = 1;
  } else {
    found.id = cudaLaunchAttributeCooperative;
    found.val.cooperative = 1;
  }
  return found;
}

// Attributes of a launch. `cluster` neighbouring blocks run together, and may use each other's shared
// memory; 0: a kernel that knows of none.
struct Attributes {
  cudaLaunchAttribute list[2]{};
  unsigned count = 0;

  Attributes(Start start, unsigned cluster) {
    if (start != Start::after_last) list[count++] = attribute(start);
    if (!cluster) return;
    list[count].id = cudaLaunchAttributeClusterDimension;
    list[count++].val.clusterDim = {cluster, 1, 1};
  }
};

template <typename Params>
void launch(void (*kernel)(Params), const Params& params, dim3 grid, int threads, int shared,
            Start start, cudaStream_t stream, unsigned cluster = 0) {
  if (shared > 47 * 1024) {  // with what is static, more than what needs no leave
    allow_shared(reinterpret_cast<const void*>(kernel), shared);
  }
  Attributes how(start, cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = how.list;
  config.numAttrs = how.count;
  check(cudaLaunchKernelEx(&config, kernel, params), "launch");
}

// How many clusters of such blocks find room at a time on the current device, or the part of it that
// there is.
template <typename Params>
int most_clusters(void (*kernel)(Params), int threads, int shared, unsigned cluster) {
  allow_shared(reinterpret_cast<const void*>(kernel), shared);
  Attributes how(Start::after_last, cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.attrs = how.list;
  config.numAttrs = how.count;
  int clusters = 0;
  if (!cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) return clusters;
  cudaGetLastError();  // torch looks at it behind every kernel of its own
  return 0;
}

// Where the chip can start a kernel before the last one has ended.
inline Start early(const Device& gpu) {
  return gpu.major >= 9 ? Start::with_last : Start::after_last;
}

}  // namespace lmi
