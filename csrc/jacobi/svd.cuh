// Singular values of a matrix by one block: one-sided Jacobi, which finds small ones to relative accuracy. Free of
// torch.
#pragma once

#include "rotation.cuh"

namespace growkern {

constexpr int kLargestSvd = 64;    // of the smaller side
constexpr int kSvdThreads = 512;  // at most

constexpr int svd_threads(int smaller) { return smaller <= 8 ? 128 : smaller <= 32 ? 256 : kSvdThreads; }

// Where things lie in shared memory, in elements: k rows of the matrix, k rows of the rotations' product.
struct SvdLayout {
  int k, length, ld, ld_product;

  __host__ __device__ SvdLayout(int m, int n)
      : k(m < n ? m : n), length(m < n ? n : m), ld(length | 1), ld_product(k | 1) {}
  __host__ __device__ int values() const { return 32; }
  __host__ __device__ int order() const { return values() + k; }
  __host__ __device__ int rows() const { return order() + k; }
  __host__ __device__ int product() const { return rows() + k * ld; }
  __host__ __device__ int elements() const { return product() + k * ld_product; }
};

template <class T>
struct Svd {
  const SvdLayout at;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  T *const partial, *const values, *const rows, *const product;
  int* const order;

  __device__ Svd(int m, int n, T* shared)
      : at(m, n), partial(shared), values(shared + at.values()), rows(shared + at.rows()),
        product(shared + at.product()), order(reinterpret_cast<int*>(shared + at.order())) {}

  __device__ T dot(const T* x, const T* y) const {
    T sum = 0;
    for (int j = lane; j < at.length; j += 32) sum += x[j] * y[j];
    return warp_sum(sum);
  }

  // Rows that are orthogonal to rounding, with the product of the rotations: rows = product · a.
  __device__ bool orthogonalise() {
    // Below `nothing` (rows are scaled to entries near one) the square of a norm is not held well enough.
    const T nothing = sizeof(T) == 8 ? T(1e-280) : T(1e-32);
    const T unit = sizeof(T) == 8 ? T(2.220446049250313e-16) : T(1.1920929e-7);
    const T tolerance = unit * fmax(T(4), sqrt(T(at.length)));
    const int even = at.k + at.k % 2;
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      bool done = true;
      for (int round = 0; round < even - 1; ++round) {
        for (int pair = warp; pair < even / 2; pair += warps) {
          const int p = seat(pair, round, even), q = seat(even - 1 - pair, round, even);
          if (p >= at.k || q >= at.k) continue;
          T *const x = rows + p * at.ld, *const y = rows + q * at.ld;
          const T xx = dot(x, x), yy = dot(y, y), xy = dot(x, y);
          if (xx <= nothing || yy <= nothing || xy == 0) continue;
          done &= fabs(xy) <= tolerance * (sqrt(xx) * sqrt(yy));
          const Rotation<T> by = rotation(tangent(xx, yy, xy));
          for (int j = lane; j < at.length; j += 32) rotate(x[j], y[j], by);
          T *const left = product + p * at.ld_product, *const right = product + q * at.ld_product;
          for (int j = lane; j < at.k; j += 32) rotate(left[j], right[j], by);
        }
        __syncthreads();
      }
      if (!__syncthreads_or(!done)) return true;
    }
    return false;
  }

  // Divides rows by their norms, which are the singular values; a row that is nothing becomes zero.
  __device__ void normalise() {
    const T nothing = sizeof(T) == 8 ? T(1e-280) : T(1e-32);
    for (int i = warp; i < at.k; i += warps) {
      T* const row = rows + i * at.ld;
      const T square = dot(row, row), norm = square <= nothing ? T(0) : sqrt(square);
      for (int j = lane; j < at.length; j += 32) row[j] = norm == 0 ? T(0) : row[j] / norm;
      if (lane == 0) values[i] = norm;
    }
  }

  // Rows of zeros become unit vectors that are orthogonal to all others: coordinate vectors, projected twice.
  __device__ void complete() {
    for (int i = 0; i < at.k; ++i) {
      if (values[i] != 0) continue;
      T* const row = rows + i * at.ld;
      // At least one of `length` coordinate vectors keeps 1/length of its square beside length − 1 rows.
      int start = 0;
      while (start < at.length - 1 && left_of(start) < T(0.5) / T(at.length)) ++start;
      __syncthreads();
      for (int j = threadIdx.x; j < at.length; j += blockDim.x) row[j] = T(j == start);
      for (int pass = 0; pass < 2; ++pass) {
        __syncthreads();
        for (int other = warp; other < at.k; other += warps) {
          const T share = other == i ? T(0) : dot(rows + other * at.ld, row);
          if (lane == 0) partial_products()[other] = share;
        }
        __syncthreads();
        T square = 0;
        for (int j = threadIdx.x; j < at.length; j += blockDim.x) {
          T value = row[j];
          for (int other = 0; other < at.k; ++other) value -= partial_products()[other] * rows[other * at.ld + j];
          row[j] = value;
          square += value * value;
        }
        const T norm = sqrt(block_sum(square, partial));
        for (int j = threadIdx.x; j < at.length; j += blockDim.x) row[j] /= norm;
      }
      __syncthreads();
    }
  }

  // Of coordinate vector j, the square of what lies outside the rows so far; rows still zero take nothing.
  __device__ T left_of(int j) const {
    T left = 1;
    for (int i = 0; i < at.k; ++i) left -= rows[i * at.ld + j] * rows[i * at.ld + j];
    return left;
  }

  // Used before there is an order.
  __device__ T* partial_products() const { return reinterpret_cast<T*>(order); }

  // The source of each rank, largest first; equal ones keep their order.
  __device__ void sort(T scale, T* s) {
    for (int i = threadIdx.x; i < at.k; i += blockDim.x) {
      const T value = values[i];
      int rank = 0;
      for (int j = 0; j < at.k; ++j) rank += values[j] > value || (values[j] == value && j < i);
      order[rank] = i;
      s[rank] = value * scale;
    }
  }

  __device__ void store_columns(const T* from, int ld, int length, T* out) const {
    for (int j = warp; j < length; j += warps)
      for (int rank = lane; rank < at.k; rank += 32) out[j * at.k + rank] = from[order[rank] * ld + j];
  }

  __device__ void store_rows(const T* from, int ld, int length, T* out) const {
    for (int rank = warp; rank < at.k; rank += warps)
      for (int j = lane; j < length; j += 32) out[rank * length + j] = from[order[rank] * ld + j];
  }
};

// Matrix `blockIdx.x` of a batch. a: m × n each; u: m × k; s: k; vh: k × n, with k = min(m, n).
template <class T>
__device__ void svd_block(const T* a, T* u, T* s, T* vh, int m, int n, T* shared) {
  Svd<T> block(m, n, shared);
  const SvdLayout& at = block.at;
  const int64_t index = blockIdx.x;
  a += index * m * n, u += index * m * at.k, s += index * at.k, vh += index * at.k * n;
  const bool tall = m >= n;
  const T largest = block_largest(a, m * n, block.partial), scale = scale_of(largest);
  bool good = largest == largest;
  if (good) {
    for (int i = block.warp; i < m; i += block.warps)
      for (int j = block.lane; j < n; j += 32)
        block.rows[tall ? j * at.ld + i : i * at.ld + j] = a[i * n + j] / scale;
    for (int i = block.warp; i < at.k; i += block.warps)
      for (int j = block.lane; j < at.k; j += 32) block.product[i * at.ld_product + j] = T(i == j);
    __syncthreads();
    good = block.orthogonalise();
  }
  if (!good) {
    fill(u, m * at.k, T(nan("")));
    fill(s, at.k, T(nan("")));
    fill(vh, at.k * n, T(nan("")));
    return;
  }
  block.normalise();
  __syncthreads();
  block.complete();
  block.sort(scale, s);
  __syncthreads();
  if (tall) {
    block.store_columns(block.rows, at.ld, m, u);
    block.store_rows(block.product, at.ld_product, n, vh);
  } else {
    block.store_columns(block.product, at.ld_product, m, u);
    block.store_rows(block.rows, at.ld, n, vh);
  }
}

}  // namespace growkern
