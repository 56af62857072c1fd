// A block's tile of Σ_k u(k) v(k)ᵀ: how threads share it, and the ways to multiply. Free of torch. What only a GPU has
// (`mma_tf32`, `mma_half`, `load_transposed`, `to_tf32`, `half_to_float`) is defined before this is included.
#pragma once

#include <cstdint>

namespace growkern {

// BLOCK × BLOCK sums of a block of threads: warps side by side, each with MT × NT tiles of the tensor cores, 16 × 8.
template <int BLOCK>
struct Grid {
  static constexpr int warps_m = BLOCK == 16 ? 1 : 2, warps_n = 2, threads = 32 * warps_m * warps_n;
  static constexpr int mt = BLOCK / warps_m / 16, nt = BLOCK / warps_n / 8;
  static constexpr int ld = BLOCK + 8;  // of a row in shared memory: no bank is met twice along rows or columns

  __device__ static int row(int m, int i) {
    const int warp = threadIdx.x / 32 / warps_n, lane = threadIdx.x % 32;
    return (warp * mt + m) * 16 + lane / 4 + i / 2 * 8;
  }
  __device__ static int column(int n, int i) {
    const int warp = threadIdx.x / 32 % warps_n, lane = threadIdx.x % 32;
    return (warp * nt + n) * 8 + lane % 4 * 2 + i % 2;
  }
};

// The sums of one thread: numbers 0 and 1 lie side by side, 2 and 3 eight rows below them.
template <int BLOCK>
struct Sums {
  float at[Grid<BLOCK>::mt][Grid<BLOCK>::nt][4] = {};

  __device__ void operator+=(const Sums& other) {
#pragma unroll
    for (int m = 0; m < Grid<BLOCK>::mt; ++m)
#pragma unroll
      for (int n = 0; n < Grid<BLOCK>::nt; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) at[m][n][i] += other.at[m][n][i];
  }

  template <class Visit>
  __device__ void each(const Visit& visit) const {
#pragma unroll
    for (int m = 0; m < Grid<BLOCK>::mt; ++m)
#pragma unroll
      for (int n = 0; n < Grid<BLOCK>::nt; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) visit(Grid<BLOCK>::row(m, i), Grid<BLOCK>::column(n, i), at[m][n][i]);
  }
};

// Each way adds `depth` rows of u and v, which are (depth, ld) in shared memory. Callers start from zero for every
// tile: tensor cores drop low bits as they add up.

struct Fma {
  using Operand = float;
  static constexpr int depth = 32;

  template <int BLOCK>
  __device__ static void multiply(const float* u, const float* v, Sums<BLOCK>& sums) {
    using Grid = Grid<BLOCK>;
    for (int k = 0; k < depth; ++k) {
      float left[Grid::mt][2], right[Grid::nt][2];
      for (int m = 0; m < Grid::mt; ++m)
        for (int i = 0; i < 2; ++i) left[m][i] = u[k * Grid::ld + Grid::row(m, 2 * i)];
      for (int n = 0; n < Grid::nt; ++n)
        for (int i = 0; i < 2; ++i) right[n][i] = v[k * Grid::ld + Grid::column(n, i)];
      for (int m = 0; m < Grid::mt; ++m)
        for (int n = 0; n < Grid::nt; ++n)
          for (int i = 0; i < 4; ++i) sums.at[m][n][i] += left[m][i / 2] * right[n][i % 2];
    }
  }
};

// tf32 products; with kSplit three of them, of each number's first eleven bits and of the rest, which is as good as
// float32.
template <bool kSplit>
struct Tf32 {
  using Operand = float;
  static constexpr int depth = 32;

  template <int Count>
  struct Parts {
    uint32_t high[Count], low[Count];

    __device__ void set(int i, float value) {
      high[i] = to_tf32(value);
      if (kSplit) low[i] = to_tf32(value - __uint_as_float(high[i]));
    }
  };

  template <int BLOCK, class Left, class Right, class Mma>
  __device__ static void multiply_all(const Left& left, const Right& right, Sums<BLOCK>& sums, const Mma& mma) {
#pragma unroll
    for (int m = 0; m < Grid<BLOCK>::mt; ++m)
#pragma unroll
      for (int n = 0; n < Grid<BLOCK>::nt; ++n) mma(sums.at[m][n], left[m], right[n]);
  }

  template <int BLOCK>
  __device__ static void multiply(const float* u, const float* v, Sums<BLOCK>& sums) {
    using Grid = Grid<BLOCK>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Row of k, and first channel of the warp with the lane's place in it.
    u += lane % 4 * Grid::ld + warp / Grid::warps_n * Grid::mt * 16 + lane / 4;
    v += lane % 4 * Grid::ld + warp % Grid::warps_n * Grid::nt * 8 + lane / 4;
#pragma unroll
    for (int k = 0; k < depth; k += 8) {
      Parts<4> left[Grid::mt];
      Parts<2> right[Grid::nt];
#pragma unroll
      for (int m = 0; m < Grid::mt; ++m)
        for (int i = 0; i < 4; ++i) left[m].set(i, u[(k + i / 2 * 4) * Grid::ld + m * 16 + i % 2 * 8]);
#pragma unroll
      for (int n = 0; n < Grid::nt; ++n)
        for (int i = 0; i < 2; ++i) right[n].set(i, v[(k + i * 4) * Grid::ld + n * 8]);
      // Neighbouring instructions add to different sums, so that none waits for the one before it.
      if (kSplit) {
        multiply_all(left, right, sums, [](auto& c, const auto& a, const auto& b) { mma_tf32(c, a.low, b.high); });
        multiply_all(left, right, sums, [](auto& c, const auto& a, const auto& b) { mma_tf32(c, a.high, b.low); });
      }
      multiply_all(left, right, sums, [](auto& c, const auto& a, const auto& b) { mma_tf32(c, a.high, b.high); });
    }
  }
};

// Products of bfloat16 or float16 numbers, which are exact.
template <bool kBfloat>
struct Half {
  using Operand = uint16_t;
  static constexpr int depth = 64;

  template <int BLOCK>
  __device__ static void multiply(const uint16_t* u, const uint16_t* v, Sums<BLOCK>& sums) {
    using Grid = Grid<BLOCK>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Each lane names a row of eight numbers: of u by k, then channel, in the order of a fragment; of v the other way.
    u += (lane / 16 * 8 + lane % 8) * Grid::ld + warp / Grid::warps_n * Grid::mt * 16 + lane / 8 % 2 * 8;
    v += (lane / 8 % 2 * 8 + lane % 8) * Grid::ld + warp % Grid::warps_n * Grid::nt * 8 + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
      uint32_t left[Grid::mt][4], right[Grid::nt / 2][4];
#pragma unroll
      for (int m = 0; m < Grid::mt; ++m) load_transposed(left[m], u + k * Grid::ld + m * 16);
#pragma unroll
      for (int n = 0; n < Grid::nt / 2; ++n) load_transposed(right[n], v + k * Grid::ld + n * 16);
#pragma unroll
      for (int m = 0; m < Grid::mt; ++m)
#pragma unroll
        for (int n = 0; n < Grid::nt; ++n)
          mma_half<kBfloat>(sums.at[m][n], left[m], right[n / 2] + n % 2 * 2);
    }
  }
};

// What an element of an input is.
enum class Dtype : int { float32, bfloat16, float16 };

__device__ __forceinline__ float from_bits(uint32_t bits, Dtype dtype) {
  if (dtype == Dtype::float32) return __uint_as_float(bits);
  if (dtype == Dtype::bfloat16) return __uint_as_float(bits << 16);
  return half_to_float(static_cast<uint16_t>(bits));
}

__device__ __forceinline__ uint32_t bits_at(const void* data, int64_t element, Dtype dtype) {
  return dtype == Dtype::float32 ? static_cast<const uint32_t*>(data)[element]
                                 : static_cast<const uint16_t*>(data)[element];
}

// Activations as rows of channels, one for every pixel.
struct Side {
  const void* data;
  int64_t pitch;
  int channels;
};

// Rows of signs of one site in memory, and how many there are in each.
struct Signs {
  int64_t address, pitch, count;
};

// `Count` channels that follow each other, as they lie in memory until they are unpacked.
template <int Count>
struct Chunk {
  uint32_t words[4] = {};

  // Channels from `channel` on of the row that starts at `element`; zeros beyond the last.
  __device__ void read(const Side& side, int64_t element, int channel, Dtype dtype, bool aligned) {
    if (!aligned) {
      for (int i = 0; i < Count; ++i) {
        const uint32_t bits = channel + i < side.channels ? bits_at(side.data, element + channel + i, dtype) : 0;
        if (Count == 4) words[i] = bits;
        else words[i / 2] |= bits << 16 * (i % 2);
      }
    } else if (channel < side.channels) {
      if (Count == 4 && dtype != Dtype::float32) {
        const auto* row = static_cast<const uint16_t*>(side.data) + element + channel;
        const uint2 found = *reinterpret_cast<const uint2*>(row);
        words[0] = found.x, words[1] = found.y;
      } else {
        const char* row = static_cast<const char*>(side.data) + (element + channel) * (Count == 4 ? 4 : 2);
        const uint4 found = *reinterpret_cast<const uint4*>(row);
        words[0] = found.x, words[1] = found.y, words[2] = found.z, words[3] = found.w;
      }
    }
  }

  __device__ float value(int i, Dtype dtype, bool aligned) const {
    const bool packed = aligned && dtype != Dtype::float32;
    return from_bits(packed ? (words[i / 2] >> 16 * (i % 2)) & 0xffff : words[i], dtype);
  }

  // To 16-byte aligned shared memory; float operands are multiplied by `factor`.
  __device__ void write(float* shared, Dtype dtype, bool aligned, float factor) const {
    uint32_t bits[4];
    for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(value(i, dtype, aligned) * factor);
    *reinterpret_cast<uint4*>(shared) = {bits[0], bits[1], bits[2], bits[3]};
  }
  __device__ void write(uint16_t* shared, Dtype, bool, float) const {
    *reinterpret_cast<uint4*>(shared) = {words[0], words[1], words[2], words[3]};
  }
};

}  // namespace growkern
