// Kernels that are right or wrong in one way each, to show what the emulation finds.
#include "cuda_emulation.h"

namespace {

// Reverses numbers through shared memory, with or without the barrier that this takes.
void reverse(const float* in, float* out, bool barrier, float* shared) {
  const unsigned i = threadIdx.x, n = blockDim.x;
  shared[i] = in[i];
  if (barrier) __syncthreads();
  out[i] = shared[n - 1 - i];
}

// Sums over each warp; adds to what shared memory held before, or to zero.
void sum(const float* in, float* out, bool cleared, float* shared) {
  float value = in[threadIdx.x];
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  if (threadIdx.x % 32 == 0) {
    if (cleared) shared[threadIdx.x / 32] = 0;
    shared[threadIdx.x / 32] += value;
    out[threadIdx.x / 32] = shared[threadIdx.x / 32];
  }
}

}  // namespace

extern "C" {
void toy_reverse(const float* in, float* out, int threads, int barrier, int seed) {
  emulation::launch({1}, {unsigned(threads)}, threads * sizeof(float), seed,
                    [=](char* shared) { reverse(in, out, barrier, reinterpret_cast<float*>(shared)); });
}
void toy_sum(const float* in, float* out, int threads, int cleared, int seed) {
  emulation::launch({1}, {unsigned(threads)}, threads * sizeof(float), seed,
                    [=](char* shared) { sum(in, out, cleared, reinterpret_cast<float*>(shared)); });
}
// Half of the threads leave before a barrier that the others wait at.
void toy_leave(int threads) {
  emulation::launch({1}, {unsigned(threads)}, 8, 0, [=](char*) {
    if (threadIdx.x % 2) __syncthreads();
  });
}
}
