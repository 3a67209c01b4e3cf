// Wrappers of instructions of compute capability 9.0: mbarriers, tensor copies, st.async, wgmma, dependent launches.
// Kernels that use wgmma or setmaxnreg have a body for sm_90a alone (PRUNEOPS_SM90A) and are chosen by the host.
//
// Without nvcc tests/cuda_emulation/hopper.h defines the same functions.

#pragma once

#include <cstdint>

#include "cuda/primitives.cuh"

#ifdef __CUDACC__

#include <cuda.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PRUNEOPS_SM90A 1
#endif

namespace pruneops {

// Of a tensor in global memory, made on the host; passed by value as a __grid_constant__ parameter.
using TensorMap = CUtensorMap;

// ---- mbarrier: `count` arrivals and all expected bytes complete a phase; phases alternate between parity 0 and 1.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#endif
}
// Makes initialised barriers visible to copies and to the cluster; then a block or cluster barrier.
__device__ __forceinline__ void mbarrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
// Arrives at the barrier at this place in the block of rank `block` in the cluster. No release beyond this block (that
// would wait for all memory operations of the thread): for the end of reads, not to publish data.
__device__ __forceinline__ void mbarrier_arrive_peer(uint64_t* barrier, unsigned block) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 peer;\nmapa.shared::cluster.u32 peer, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [peer];\n}" ::"r"(shared_address(barrier)), "r"(block)
      : "memory");
#endif
}
// Arrives, and expects `bytes` more of this phase's copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
// The same at the barrier at this place in a block of the cluster.
__device__ __forceinline__ void mbarrier_arrive_expect_peer(uint64_t* barrier, unsigned bytes, unsigned block) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 peer;\nmapa.shared::cluster.u32 peer, %0, %2;\n"
      "mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [peer], %1;\n}" ::"r"(shared_address(barrier)),
      "r"(bytes), "r"(block)
      : "memory");
#endif
}
// Waits for the phase of this parity to complete; a barrier begins in phase 0.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nwaiting:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra complete;\nbra waiting;\ncomplete:\n}" ::"r"(shared_address(barrier)), "r"(parity)
      : "memory");
#endif
}
// The same, and acquires what other blocks of the cluster stored with store_async.
__device__ __forceinline__ void mbarrier_wait_cluster(uint64_t* barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nwaiting:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra complete;\nbra waiting;\ncomplete:\n}" ::"r"(shared_address(barrier)), "r"(parity)
      : "memory");
#endif
}

// Stores to this place in a block of the cluster; counts its bytes at the barrier at this place there. Unlike a plain
// store and a cluster barrier it needs no fence, which takes about 1 us.
__device__ __forceinline__ void store_async(unsigned* to, unsigned value, uint64_t* barrier, unsigned block) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 place, peer;\nmapa.shared::cluster.u32 place, %0, %3;\nmapa.shared::cluster.u32 peer, %1, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [place], %2, [peer];\n}" ::"r"(shared_address(to)),
      "r"(shared_address(barrier)), "r"(value), "r"(block)
      : "memory");
#endif
}
__device__ __forceinline__ void store_async(uint4* to, uint4 value, uint64_t* barrier, unsigned block) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 place, peer;\nmapa.shared::cluster.u32 place, %0, %6;\nmapa.shared::cluster.u32 peer, %1, %6;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [place], {%2, %3, %4, %5}, [peer];\n}" ::"r"(
          shared_address(to)), "r"(shared_address(barrier)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w),
      "r"(block)
      : "memory");
#endif
}

// ---- copies from global to shared memory by the copy engine; they complete on an mbarrier

// The box of the map at (feature, row, batch). Elements outside the tensor are zero; all bytes of the box count.
__device__ __forceinline__ void tensor_copy(void* to, const TensorMap& map, int feature, int row, int batch,
                                            uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(shared_address(to)), "l"(&map), "r"(feature), "r"(row), "r"(batch), "r"(shared_address(barrier))
      : "memory");
#endif
}
// The same to this place in all blocks of the cluster in `blocks` (a bit each), completing on the barrier of each.
__device__ __forceinline__ void tensor_multicast(void* to, const TensorMap& map, int feature, int row, int batch,
                                                 uint64_t* barrier, unsigned blocks) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)), "l"(&map), "r"(feature), "r"(row), "r"(batch),
      "r"(shared_address(barrier)), "h"(static_cast<unsigned short>(blocks))
      : "memory");
#endif
}
// Orders this thread's ordinary accesses of shared memory (and completed cp.async) before wgmma and copies that follow.
__device__ __forceinline__ void fence_proxy_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- programmatic dependent launch

// Waits until the kernels that this launch depends on have ended and their writes are visible.
__device__ __forceinline__ void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets dependent launches start once all blocks have called this or ended.
__device__ __forceinline__ void dependents_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- wgmma: a warpgroup, four warps of which the first is divisible by four

// Operand of wgmma: rows of 128 bytes (64 features of 2 bytes), the 16-byte vector v of row r at v ^ r % 8 (128-byte
// swizzle); row 0 at a multiple of 1024 bytes. The 16 features from feature f on: `tile` + 2 f bytes.
__device__ __forceinline__ uint64_t wgmma_operand(const void* tile) {
  constexpr uint64_t kSwizzle = uint64_t(1) << 62, kRowGroup = uint64_t(1024 / 16) << 32, kUnused = uint64_t(1) << 16;
  return kSwizzle | kRowGroup | kUnused | (shared_address(tile) & 0x3ffff) >> 4;
}
// The operand of the next 16 k features, within the row of 128 bytes.
__device__ __forceinline__ uint64_t wgmma_next(uint64_t operand, int k) { return operand + 2 * k; }

__device__ __forceinline__ void wgmma_fence() {
#ifdef PRUNEOPS_SM90A
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#ifdef PRUNEOPS_SM90A
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits until at most the last PENDING committed groups run.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
#ifdef PRUNEOPS_SM90A
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}

// Keeps uses of accumulators behind the wait for their products.
template <int COUNT>
__device__ __forceinline__ void settle(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d [64, 2 REGISTERS] = (accumulate ? d : 0) + a [64, 16] b [2 REGISTERS, 16]^T, asynchronous. d[4 j + e] of lane l of
// warp w of the warpgroup is row 16 w + l / 4 + e / 2 * 8 and column 8 j + l % 4 * 2 + e % 2.
template <class T, int REGISTERS>
__device__ __forceinline__ void wgmma(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool accumulate);

#ifdef PRUNEOPS_SM90A
#define PRUNEOPS_WGMMA_64(T, TYPE)                                                                                    \
  template <>                                                                                                         \
  __device__ __forceinline__ void wgmma<T, 32>(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                         \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                                     \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                  \
                 "%32, %33, p, 1, 1, 0, 0;\n}"                                                                        \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),                            \
                   "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),                          \
                   "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),                      \
                   "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),                      \
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),                      \
                   "+f"(d[30]), "+f"(d[31])                                                                           \
                 : "l"(a), "l"(b), "r"(int(accumulate)));                                                             \
  }
PRUNEOPS_WGMMA_64(__half, "f16")
PRUNEOPS_WGMMA_64(__nv_bfloat16, "bf16")
#undef PRUNEOPS_WGMMA_64

#define PRUNEOPS_WGMMA_128(T, TYPE)                                                                                   \
  template <>                                                                                                         \
  __device__ __forceinline__ void wgmma<T, 64>(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                         \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                                    \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                   \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                   \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                  \
                 "%64, %65, p, 1, 1, 0, 0;\n}"                                                                        \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),                            \
                   "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),                          \
                   "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),                      \
                   "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),                      \
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),                      \
                   "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),                      \
                   "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),                      \
                   "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),                      \
                   "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]),                      \
                   "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),                      \
                   "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])                                                 \
                 : "l"(a), "l"(b), "r"(int(accumulate)));                                                             \
  }
PRUNEOPS_WGMMA_128(__half, "f16")
PRUNEOPS_WGMMA_128(__nv_bfloat16, "bf16")
#undef PRUNEOPS_WGMMA_128

#define PRUNEOPS_WGMMA_192(T, TYPE)                                                                                   \
  template <>                                                                                                         \
  __device__ __forceinline__ void wgmma<T, 96>(float (&d)[96], uint64_t a, uint64_t b, bool accumulate) {             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"                                                         \
                 "wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE " {"                                    \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                   \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                   \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                   \
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                   \
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "                  \
                 "%96, %97, p, 1, 1, 0, 0;\n}"                                                                        \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),                            \
                   "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),                          \
                   "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),                      \
                   "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),                      \
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),                      \
                   "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),                      \
                   "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),                      \
                   "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),                      \
                   "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]),                      \
                   "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),                      \
                   "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]),                      \
                   "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),                      \
                   "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]),                      \
                   "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),                      \
                   "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]),                      \
                   "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])                       \
                 : "l"(a), "l"(b), "r"(int(accumulate)));                                                             \
  }
PRUNEOPS_WGMMA_192(__half, "f16")
PRUNEOPS_WGMMA_192(__nv_bfloat16, "bf16")
#undef PRUNEOPS_WGMMA_192

#else
template <class T, int REGISTERS>
__device__ __forceinline__ void wgmma(float (&)[REGISTERS], uint64_t, uint64_t, bool) {}
#endif

// Gives registers of this warpgroup back, or takes more: REGISTERS per thread from now on, a multiple of 8.
template <int REGISTERS>
__device__ __forceinline__ void release_registers() {
#ifdef PRUNEOPS_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
template <int REGISTERS>
__device__ __forceinline__ void acquire_registers() {
#ifdef PRUNEOPS_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

}  // namespace pruneops

#endif
