// What the hardware does, one wrapper each; kernels use nothing else that is written in PTX.
//
// Outside nvcc the including file supplies the same functions (tests/cuda_emulation does, to run
// the kernels on a CPU).

#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace pruneops {

// The block's shared memory, all of it, as one structure.
template <class S>
__device__ __forceinline__ S& shared() {
  extern __shared__ __align__(128) unsigned char pruneops_shared_memory[];
  return *reinterpret_cast<S*>(pruneops_shared_memory);
}

// Reads what will not be asked for again: the first to leave the caches.
template <class V>
__device__ __forceinline__ V load_once(const V* p) {
  return __ldcs(p);
}

// The feature of type T in the low bits.
template <class T>
__device__ __forceinline__ float value_of(unsigned bits);
template <>
__device__ __forceinline__ float value_of<float>(unsigned bits) {
  return __uint_as_float(bits);
}
template <>
__device__ __forceinline__ float value_of<__half>(unsigned bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
template <>
__device__ __forceinline__ float value_of<__nv_bfloat16>(unsigned bits) {
  return __uint_as_float(bits << 16);
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Copies `bytes` (0 to 16) from 16-byte aligned global memory and fills the rest of 16 with zeros.
__device__ __forceinline__ void copy16_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies, except the last `PENDING` committed groups.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8, 16 bytes.
// Register i of lane l then holds elements 2 (l % 4) and the next of row l / 4 of matrix i.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8] in float32.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

#define PRUNEOPS_MULTIPLY_ADD(T, NAME)                                                                   \
  template <>                                                                                            \
  __device__ __forceinline__ void multiply_add<T>(float (&d)[4], const unsigned (&a)[4], unsigned b0,    \
                                                  unsigned b1) {                                         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                  \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                  \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                        \
  }
PRUNEOPS_MULTIPLY_ADD(__half, "f16")
PRUNEOPS_MULTIPLY_ADD(__nv_bfloat16, "bf16")
#undef PRUNEOPS_MULTIPLY_ADD

__device__ __forceinline__ unsigned warp_min(unsigned v) { return __reduce_min_sync(~0u, v); }
__device__ __forceinline__ unsigned warp_sum(unsigned v) { return __reduce_add_sync(~0u, v); }

// A meeting of the blocks of a cluster: what all wrote before they arrived is seen by those who wait. Before compute
// capability 9.0 a cluster is one block.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
// The same for those who have written nothing yet.
__device__ __forceinline__ void cluster_arrive_first() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same place in the shared memory of a block of the cluster, by its number there. That block must have begun, and
// must not end before it has met those who use the place.
template <class V>
__device__ __forceinline__ V* cluster_peer(V* place, unsigned block) {
#if __CUDA_ARCH__ >= 900
  V* peer;
  asm("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(place), "r"(block));
  return peer;
#else
  return place;
#endif
}

// Publishes what this thread (and, past a block barrier, its block) has written to the whole device.
__device__ __forceinline__ void arrive_release(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// Waits until a counter that only grows (modulo 2^32) has reached `target`, then sees what was published.
__device__ __forceinline__ void wait_acquire(const unsigned* counter, unsigned target) {
  unsigned value;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  } while (static_cast<int>(value - target) < 0);
}

}  // namespace pruneops

#endif
