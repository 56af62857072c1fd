// What the instruction sets have in common: sums of outer products over a walk, and the packing before them.
#pragma once

#include <array>
#include <cstdint>

#include "../isa.h"

namespace growkern {

// A panel holds rows of 64 bytes: that many channels of one position.
constexpr int64_t kPanelBytes = 64;
template <class T>
constexpr int64_t kLanes = kPanelBytes / static_cast<int64_t>(sizeof(T));

using Pair = std::array<int64_t, 2>;  // rows, columns

enum class Dtype { float16, bfloat16, float32, float64 };

// Positions visited in three nested loops, outermost first; strides in elements.
struct Walk {
  int64_t count[3];
  int64_t a[3];
  int64_t b[3];
};

// Channels of one row of positions of a map, wherever they lie.
struct Row {
  const void* data;
  Dtype dtype;
  int64_t channel_stride, step;  // in elements
  int64_t channels, length;
};

// Sums of outer products: row i of vector k at first + k·vector + i·row, kLanes of them. Rows are written in fours.
template <class T>
struct Sums {
  T* first;
  int64_t vector = kLanes<T> * kLanes<T>, row = kLanes<T>;
};

template <class T>
struct Kernels {
  // For each of `vectors` panel rows b[k] + shift: acc[k][i][:] += Σ over the walk of a[i]·b[k][:], for i < rows.
  // Every call starts its own sums and adds them to acc, so that no chain of roundings is longer than the walk.
  void (*multiply)(const Walk&, const T* a, int64_t rows, const T* const* b, int64_t shift, int64_t vectors,
                   const Sums<T>& acc);
  // out[x·stride + c] = row[c, x]
  void (*pack)(const Row&, T* out, int64_t stride);
  // out[i·row + j·column] = Σ over k < count of weights[k]·from[k][i·kLanes + j], in double precision, for i < rows and
  // j < columns.
  void (*emit)(const T* const* from, const double* weights, int64_t count, int64_t rows, int64_t columns, T* out,
               int64_t row, int64_t column);
  // What spectrum.h asks for. From the real transforms of the real and, `imaginary` elements further, of the imaginary
  // parts of columns: four planes, `plane` elements apart, of each of `count` frequencies and of its opposite.
  void (*join)(const T* parts, int64_t imaginary, int64_t count, T* out, int64_t plane);
  // Adds products of such pairs of frequencies to sums at shifts −reach … reach of rows, real and imaginary parts;
  // factors: cosine and sine for each frequency and each shift from 0 on.
  void (*mix_rows)(const T* products, int64_t count, const double* factors, int64_t reach, double* out);
  // From there, for all columns of frequencies together, to sums at shifts (row, column); factors: cosine and sine for
  // each column of frequencies and each shift of columns.
  void (*mix_columns)(const double* rows, int64_t count, const double* factors, const Pair& reach, T* out);
};

extern const Kernels<float> portable_float, avx2_float, avx512_float;
extern const Kernels<double> portable_double, avx2_double, avx512_double;

// Those of the instruction set in use.
template <class T>
const Kernels<T>& kernels() {
  if constexpr (sizeof(T) == 8) return GROWKERN_BY_ISA(double);
  else return GROWKERN_BY_ISA(float);
}

}  // namespace growkern
