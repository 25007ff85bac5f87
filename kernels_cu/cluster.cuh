// Clusters: a few blocks that run at the same time and reach into each other's shared memory (PTX ISA, sm_90 and later).
#pragma once
#include "mma.cuh"

__device__ __forceinline__ int rank_in_cluster() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));  // the same whenever it is read
    return rank;
}

__device__ __forceinline__ int blocks_of_cluster() {
    int blocks;
    asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));  // read again where it is named again, not kept
    return blocks;
}

// All threads of all blocks.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same where others need to see nothing but what barriers_initialised() shows them: without a fence of the whole GPU.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where what lies here lies in another block.
__device__ __forceinline__ unsigned address_in(int rank, const void* here) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(here)), "r"(rank));
    return there;
}

// Store 16 bytes to another block's shared memory, where a barrier counts them; both addresses are from address_in. That block
// must not end before.
__device__ __forceinline__ void store_to(unsigned address, const float4& value, unsigned barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
                 "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
                 : "memory");
}

// A float of another block's shared memory, as load_from.
__device__ __forceinline__ float load_float_from(unsigned address) {
    float value;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

// 16 bytes of another block's shared memory, at an address from address_in. A cluster_sync() comes between whoever stored
// them and this, and another before that block may end.
__device__ __forceinline__ float4 load_from(unsigned address) {
    float4 value;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "r"(address) : "memory");
    return value;
}
