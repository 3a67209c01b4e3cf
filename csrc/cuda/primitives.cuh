// Wrappers of hardware instructions: cp.async, ldmatrix, mma, cluster barriers, acquire and release. All inline PTX is
// here and in hopper.cuh.
//
// Without nvcc the including file defines the same functions; tests/cuda_emulation does so to run kernels on a CPU.

#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace pruneops {

// The dynamic shared memory of the block as one structure.
template <class S>
__device__ __forceinline__ S& shared() {
  extern __shared__ __align__(1024) unsigned char pruneops_shared_memory[];
  return *reinterpret_cast<S*>(pruneops_shared_memory);
}

// Load with the evict-first policy (ld.global.cs), for data that is read once.
template <class V>
__device__ __forceinline__ V load_streaming(const V* p) {
  return __ldcs(p);
}

// The element of type T in the low bits, as float.
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

// Asynchronous copy of `bytes` (0 to 16) from global to shared memory, both 16-byte aligned; the rest of 16 is zeroed.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last PENDING committed groups of this thread are in flight.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8, 16 bytes.
// Register i of lane l receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8] with float32 sums.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

#define PRUNEOPS_MMA(T, NAME)                                                                            \
  template <>                                                                                            \
  __device__ __forceinline__ void mma_m16n8k16<T>(float (&d)[4], const unsigned (&a)[4], unsigned b0,    \
                                                  unsigned b1) {                                         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                  \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                  \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                        \
  }
PRUNEOPS_MMA(__half, "f16")
PRUNEOPS_MMA(__nv_bfloat16, "bf16")
#undef PRUNEOPS_MMA

// 2^x with a relative error of 2^-22; 0 where it is subnormal.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ unsigned warp_min(unsigned v) { return __reduce_min_sync(~0u, v); }
__device__ __forceinline__ unsigned warp_sum(unsigned v) { return __reduce_add_sync(~0u, v); }

// Cluster barrier with release and acquire: writes before arrive are visible after wait in all blocks of the cluster.
// No-ops before compute capability 9.0, where a cluster is one block.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
// Without release, for blocks that have nothing to publish.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Distributed shared memory: the address of `place` in the block of rank `block` in the cluster. That block must have
// started, and must not exit before a cluster barrier with the blocks that use the address.
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

// Increments a counter with release semantics at device scope: earlier writes of this thread, and after a block barrier
// those of its block, become visible to threads that acquire the counter.
__device__ __forceinline__ void arrive_release(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// Spins with acquire semantics until a counter that only grows (modulo 2^32) reaches `target`.
__device__ __forceinline__ void wait_acquire(const unsigned* counter, unsigned target) {
  unsigned value;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  } while (static_cast<int>(value - target) < 0);
}

}  // namespace pruneops

#endif
