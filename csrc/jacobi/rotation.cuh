// What both of Jacobi's methods share on a GPU: rotations, the round robin, and sums over a block. Free of torch.
#pragma once

#include <cstdint>

namespace growkern {

constexpr int kSweeps = 30;

// A rotation by its sine and τ = s/(1 + c).
template <class T>
struct alignas(2 * sizeof(T)) Rotation {
  T s, tau;
};

// (x, y) ← (x − s(y + τx), y + s(x − τy)): Rutishauser's form keeps the product of all rotations orthogonal.
template <class T>
__device__ __forceinline__ void rotate(T& x, T& y, Rotation<T> by) {
  const T x0 = x, y0 = y;
  x = x0 - by.s * (y0 + by.tau * x0);
  y = y0 + by.s * (x0 - by.tau * y0);
}

// The tangent t of the smaller angle that diagonalises [[app, apq], [apq, aqq]], for apq ≠ 0.
template <class T>
__device__ __forceinline__ T tangent(T app, T aqq, T apq) {
  const T theta = (aqq - app) / (apq + apq);
  return copysign(T(1), theta) / (fabs(theta) + sqrt(T(1) + theta * theta));
}

template <class T>
__device__ __forceinline__ Rotation<T> rotation(T t) {
  const T c = T(1) / sqrt(T(1) + t * t), s = t * c;
  return {s, s / (T(1) + c)};
}

// Who sits at a place in a round: the first index stays, the others move on by one place. `even` indices meet in
// even − 1 rounds, place i against place even − 1 − i.
__device__ __forceinline__ int seat(int place, int round, int even) {
  if (place == 0) return 0;
  const int moved = place - 1 + round;
  return 1 + (moved < even - 1 ? moved : moved - (even - 1));
}

// A power of two near `largest`, so that squares of the scaled entries neither overflow nor vanish.
template <class T>
__device__ __forceinline__ T scale_of(T largest) {
  int exponent;
  frexp(largest, &exponent);
  return largest > 0 ? ldexp(T(1), exponent - 1) : T(1);
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Sum over the block, in a fixed order, to every thread; `partial` holds one number for each warp.
template <class T>
__device__ T block_sum(T value, T* partial) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) total += partial[warp];
  __syncthreads();
  return total;
}

// The largest size of `count` numbers, to every thread; NaN where one of them is not finite.
template <class T>
__device__ T block_largest(const T* numbers, int count, T* partial) {
  T largest = 0;
  bool bad = false;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const T size = fabs(numbers[i]);
    bad |= size - size != 0;
    largest = fmax(largest, size);
  }
  for (int step = 16; step > 0; step /= 2) largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = largest;
  bad = __syncthreads_or(bad);
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) largest = fmax(largest, partial[warp]);
  __syncthreads();
  return bad ? T(nan("")) : largest;
}

template <class T>
__device__ void fill(T* out, int count, T value) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = value;
}

}  // namespace growkern
