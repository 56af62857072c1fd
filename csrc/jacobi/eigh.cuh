// Eigendecomposition of a symmetric matrix by one block: two-sided cyclic Jacobi in round robin. Free of torch.
#pragma once

#include "rotation.cuh"

namespace growkern {

constexpr int kLargestEigh = 128;
constexpr int kEighThreads = 512;  // at most

constexpr int eigh_threads(int n) { return n <= 16 ? 32 : n <= 32 ? 64 : n <= 48 ? 128 : n <= 80 ? 256 : kEighThreads; }

// The two indices that meet, and where their rows start in the packed triangle.
struct alignas(16) Meeting {
  int p, q, p_row, q_row;
};

// Where things lie in shared memory, in elements: rotations, meetings, sums of warps, the matrix as a packed triangle,
// vectors. Along rows and along columns of the triangle threads meet in a bank at most twice.
template <class T>
struct EighLayout {
  static constexpr int per_meeting = sizeof(Meeting) / sizeof(T);
  int n, even, triangle, ld;

  __host__ __device__ explicit EighLayout(int size)
      : n(size), even(size + size % 2), triangle(even * (even + 1) / 2), ld(size | 1) {}
  __host__ __device__ int rotations() const { return even / 2 * per_meeting; }
  __host__ __device__ int partial() const { return rotations() + even; }
  __host__ __device__ int matrix() const { return partial() + 32; }
  __host__ __device__ int vectors() const { return matrix() + triangle; }
  __host__ __device__ int elements(bool vectors_inside) const { return vectors() + (vectors_inside ? n * ld : 0); }

  // Row i of the upper triangle starts so that column j ≥ i lies at row(i) + j.
  __device__ int row(int i) const { return i * even - i * (i + 1) / 2; }
  __device__ int symmetric(int i, int j) const { return i < j ? row(i) + j : row(j) + i; }
};

// Unordered pairs (i, j) of `count`, threads side by side at neighbouring i: j = i + distance, around the end.
struct Pairs {
  int count, distance, i, left, step_distance, step_i;

  __device__ Pairs(int count_, int nearest) : count(count_) {
    const int all = count * (count - 1) / 2 + (nearest == 0 ? count : 0);
    distance = nearest + int(threadIdx.x) / count;
    i = int(threadIdx.x) % count;
    step_distance = int(blockDim.x) / count;
    step_i = int(blockDim.x) % count;
    left = all - int(threadIdx.x);
  }
  __device__ bool valid() const { return left > 0; }
  __device__ int j() const { return i + distance < count ? i + distance : i + distance - count; }
  __device__ void next() {
    left -= int(blockDim.x);
    distance += step_distance;
    i += step_i;
    if (i >= count) i -= count, ++distance;
  }
};

template <class T, bool kVectorsInShared>
struct Eigh {
  const EighLayout<T> at;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  Meeting* const meetings;
  Rotation<T>* const rotations;
  T *const partial, *const matrix, *const vectors;  // the rows of `vectors` are eigenvectors

  __device__ Eigh(int n, T* shared, T* outside)
      : at(n), meetings(reinterpret_cast<Meeting*>(shared)),
        rotations(reinterpret_cast<Rotation<T>*>(shared + at.rotations())), partial(shared + at.partial()),
        matrix(shared + at.matrix()), vectors(kVectorsInShared ? shared + at.vectors() : outside) {}

  // The lower triangle of `a` counts; an odd matrix has a row and column of zeros more.
  __device__ void load(const T* a, T scale) {
    for (int i = warp; i < at.even; i += warps)
      for (int j = lane; j <= i; j += 32) matrix[at.row(j) + i] = i < at.n ? a[i * at.n + j] / scale : T(0);
  }

  __device__ T energy(int nearest) const {
    T sum = 0;
    for (int i = warp; i < at.n; i += warps)
      for (int j = i + nearest + lane; j < at.n; j += 32) {
        const T value = matrix[at.row(i) + j];
        sum += i == j ? value * value : T(2) * value * value;
      }
    return block_sum(sum, partial);
  }

  // The rotations of a round touch disjoint rows, so that all angles are known before the first is applied.
  __device__ void angles(int round) {
    for (int pair = threadIdx.x; pair < at.even / 2; pair += blockDim.x) {
      const int p = seat(pair, round, at.even), q = seat(at.even - 1 - pair, round, at.even);
      const Meeting meeting{p, q, at.row(p), at.row(q)};
      T &app = matrix[meeting.p_row + p], &aqq = matrix[meeting.q_row + q], &apq = matrix[at.symmetric(p, q)];
      const T off = apq, t = off == 0 ? T(0) : tangent(app, aqq, off);
      meetings[pair] = meeting;
      rotations[pair] = rotation(t);
      app -= t * off;
      aqq += t * off;
      apq = 0;
    }
  }

  __device__ void apply(Pairs pairs) {
    // A block of two by two is read once, and turned from both sides.
    for (; pairs.valid(); pairs.next()) {
      const Meeting a = meetings[pairs.i], b = meetings[pairs.j()];
      const Rotation<T> left = rotations[pairs.i], right = rotations[pairs.j()];
      T& pp = matrix[a.p < b.p ? a.p_row + b.p : b.p_row + a.p];
      T& pq = matrix[a.p < b.q ? a.p_row + b.q : b.q_row + a.p];
      T& qp = matrix[a.q < b.p ? a.q_row + b.p : b.p_row + a.q];
      T& qq = matrix[a.q < b.q ? a.q_row + b.q : b.q_row + a.q];
      T x00 = pp, x01 = pq, x10 = qp, x11 = qq;
      rotate(x00, x10, left);
      rotate(x01, x11, left);
      rotate(x00, x01, right);
      rotate(x10, x11, right);
      pp = x00, pq = x01, qp = x10, qq = x11;
    }
    for (int pair = warp; pair < at.even / 2; pair += warps) {
      const Rotation<T> by = rotations[pair];
      if (by.s == 0) continue;
      T *const p = vectors + meetings[pair].p * at.ld, *const q = vectors + meetings[pair].q * at.ld;
      for (int k = lane; k < at.n; k += 32) rotate(p[k], q[k], by);
    }
  }

  __device__ bool diagonalise() {
    const T tolerance = sizeof(T) == 8 ? T(1e-15) : T(3e-7), limit = tolerance * tolerance * energy(0);
    const Pairs blocks(at.even / 2, 1);
    for (int sweep = 0; energy(1) > limit; ++sweep) {
      if (sweep == kSweeps) return false;
      for (int round = 0; round < at.even - 1; ++round) {
        angles(round);
        __syncthreads();
        apply(blocks);
        __syncthreads();
      }
    }
    return true;
  }

  // One step of Newton and Schulz, v ← 1.5 v − 0.5 v vᵀ v, undoes the rounding of hundreds of rotations. Each thread
  // holds 4×4 numbers whose rows and columns are n/4 apart. `scratch` has room for n² numbers outside.
  __device__ void polish(T* scratch) {
    const int quarter = (at.n + 3) / 4;
    for (Pairs pairs(quarter, 0); pairs.valid(); pairs.next()) {
      T sums[4][4] = {};
#pragma unroll 1  // 16 sums leave no registers for more
      for (int k = 0; k < at.n; ++k) {
        T right[4];
        for (int b = 0; b < 4; ++b) right[b] = vectors[row(pairs.j(), b, quarter) * at.ld + k];
        for (int a = 0; a < 4; ++a) {
          const T left = vectors[row(pairs.i, a, quarter) * at.ld + k];
          for (int b = 0; b < 4; ++b) sums[a][b] += left * right[b];
        }
      }
      for (int a = 0; a < 4; ++a)
        for (int b = 0; b < 4; ++b) {
          const int i = pairs.i + a * quarter, j = pairs.j() + b * quarter;
          if (i < at.n && j < at.n && (pairs.distance > 0 || a <= b)) matrix[at.symmetric(i, j)] = sums[a][b];
        }
    }
    __syncthreads();
    for (int item = threadIdx.x; item < quarter * quarter; item += blockDim.x) {
      const int i = item / quarter, k = item % quarter;
      T sums[4][4] = {};
#pragma unroll 1
      for (int j = 0; j < at.n; ++j) {
        T right[4];
        for (int b = 0; b < 4; ++b) right[b] = vectors[j * at.ld + row(k, b, quarter)];
        for (int a = 0; a < 4; ++a) {
          const T left = matrix[at.symmetric(row(i, a, quarter), j)];
          for (int b = 0; b < 4; ++b) sums[a][b] += left * right[b];
        }
      }
      for (int a = 0; a < 4; ++a)
        for (int b = 0; b < 4; ++b) {
          const int y = i + a * quarter, x = k + b * quarter;
          if (y < at.n && x < at.n) scratch[y * at.n + x] = T(1.5) * vectors[y * at.ld + x] - T(0.5) * sums[a][b];
        }
    }
    __syncthreads();
    for (int i = warp; i < at.n; i += warps)
      for (int k = lane; k < at.n; k += 32) vectors[i * at.ld + k] = scratch[i * at.n + k];
  }

  __device__ int row(int i, int quarters, int quarter) const { return min(i + quarters * quarter, at.n - 1); }

  // values[i] = v_i · matrix · v_i / v_i · v_i; a warp takes four i at a time.
  __device__ void quadratic_forms(T* values) const {
    for (int first = warp; first < at.n; first += 4 * warps) {
      T sums[4] = {}, squares[4] = {};
      for (int k = lane; k < at.n; k += 32) {
        T products[4] = {};
        for (int j = 0; j < at.n; ++j) {
          const T entry = matrix[at.symmetric(k, j)];
          for (int a = 0; a < 4; ++a) products[a] += entry * vectors[row(first, a, warps) * at.ld + j];
        }
        for (int a = 0; a < 4; ++a) {
          const T value = vectors[row(first, a, warps) * at.ld + k];
          sums[a] += products[a] * value;
          squares[a] += value * value;
        }
      }
      for (int a = 0; a < 4; ++a) {
        const T quotient = warp_sum(sums[a]) / warp_sum(squares[a]);
        if (lane == 0 && first + a * warps < at.n) values[first + a * warps] = quotient;
      }
    }
  }

  // Eigenvalues in ascending order, and vectors as columns in the same order; equal ones keep their order.
  __device__ void store(const T* values, T scale, T* w, T* q) {
    int* const source = reinterpret_cast<int*>(matrix);
    for (int i = threadIdx.x; i < at.n; i += blockDim.x) {
      const T value = values[i];
      int column = 0;
      for (int j = 0; j < at.n; ++j) column += values[j] < value || (values[j] == value && j < i);
      source[column] = i;
      w[column] = value * scale;
    }
    __syncthreads();
    for (int k = warp; k < at.n; k += warps)
      for (int column = lane; column < at.n; column += 32)
        q[k * at.n + column] = vectors[source[column] * at.ld + k];
  }
};

// Matrix `blockIdx.x` of a batch. a, q: n × n each; w: n; outside: n × (n | 1) for the vectors, used where shared
// memory does not hold them.
template <class T, bool kVectorsInShared>
__device__ void eigh_block(const T* a, T* w, T* q, T* outside, int n, T* shared) {
  const int64_t index = blockIdx.x;
  a += index * n * n, q += index * n * n, w += index * n;
  Eigh<T, kVectorsInShared> block(n, shared, kVectorsInShared ? nullptr : outside + index * n * (n | 1));
  const T largest = block_largest(a, n * n, block.partial), scale = scale_of(largest);
  bool good = largest == largest;
  if (good) {
    block.load(a, scale);
    for (int i = block.warp; i < n; i += block.warps)
      for (int k = block.lane; k < n; k += 32) block.vectors[i * block.at.ld + k] = T(i == k);
    __syncthreads();
    good = block.diagonalise();
  }
  if (!good) {
    fill(w, n, T(nan("")));
    fill(q, n * n, T(nan("")));
    return;
  }
  block.polish(q);
  __syncthreads();
  block.load(a, scale);
  __syncthreads();
  T* const values = shared;  // meetings and rotations are done with
  block.quadratic_forms(values);
  __syncthreads();
  block.store(values, scale, w, q);
}

}  // namespace growkern
