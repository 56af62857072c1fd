// The micro-kernel and the packing, for one instruction set: each of portable.cpp, avx2.cpp and avx512.cpp
// includes this after it has set the compiler's target. Nothing here has external linkage, so that no code of a
// newer instruction set is ever called from an older one.

namespace growkern {
namespace {

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
};

// MR channels of a by NR vectors of b, all sums in registers.
template <class T, int Bytes, int MR, int NR>
inline __attribute__((always_inline)) void tile(const Walk& walk, const T* a, const T* const* b, T* const* acc,
                                                int64_t row) {
  using Vector = typename VectorOf<T, Bytes>::type;
  Vector sum[MR][NR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NR; ++j) sum[i][j] = Vector{};
  for (int64_t outer = 0; outer < walk.count[0]; ++outer) {
    for (int64_t middle = 0; middle < walk.count[1]; ++middle) {
      const T* left = a + outer * walk.a[0] + middle * walk.a[1];
      const int64_t start = outer * walk.b[0] + middle * walk.b[1];
      const T* right[NR];
#pragma GCC unroll 16
      for (int j = 0; j < NR; ++j) right[j] = b[j] + start;
      for (int64_t inner = 0; inner < walk.count[2]; ++inner) {
        Vector values[NR];
#pragma GCC unroll 16
        for (int j = 0; j < NR; ++j) {
          values[j] = *reinterpret_cast<const Vector*>(right[j]);
          right[j] += walk.b[2];
        }
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const T scale = left[i];
#pragma GCC unroll 16
          for (int j = 0; j < NR; ++j) sum[i][j] += scale * values[j];
        }
        left += walk.a[2];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NR; ++j) *reinterpret_cast<Vector*>(acc[j] + i * row) += sum[i][j];
}

template <class T, int Bytes, int MR, int NR>
void tiles(const Walk& walk, const T* a, int64_t rows, const T* const* b, T* const* acc, int64_t row) {
  int64_t i = 0;
  for (; i + MR <= rows; i += MR) {
    T* part[NR];
    for (int j = 0; j < NR; ++j) part[j] = acc[j] + i * row;
    tile<T, Bytes, MR, NR>(walk, a + i, b, part, row);
  }
  // A narrower tile for the rest; its rows beyond the last channel are padding.
  constexpr int Half = MR > 4 ? MR / 2 : MR;
  for (; i < rows; i += Half) {
    T* part[NR];
    for (int j = 0; j < NR; ++j) part[j] = acc[j] + i * row;
    tile<T, Bytes, Half, NR>(walk, a + i, b, part, row);
  }
}

template <class T, int Bytes, int MR>
void multiply(const Walk& walk, const T* a, int64_t rows, const T* const* b, int64_t shift, int64_t vectors,
              const Sums<T>& acc) {
  constexpr int64_t lanes = Bytes / sizeof(T), parts = kLanes<T> / lanes;
  for (int64_t first = 0, count; first < vectors * parts; first += count) {
    const int64_t rest = vectors * parts - first;
    count = rest == 4 ? 2 : rest < 3 ? rest : 3;  // a single vector takes nearly as long as two
    const T* right[3];
    T* sums[3];
    for (int64_t j = 0; j < count; ++j) {
      const int64_t vector = (first + j) / parts, lane = (first + j) % parts * lanes;
      right[j] = b[vector] + shift + lane;
      sums[j] = acc.first + vector * acc.vector + lane;
    }
    if (count == 3) tiles<T, Bytes, MR, 3>(walk, a, rows, right, sums, acc.row);
    if (count == 2) tiles<T, Bytes, MR, 2>(walk, a, rows, right, sums, acc.row);
    if (count == 1) tiles<T, Bytes, MR, 1>(walk, a, rows, right, sums, acc.row);
  }
}

inline float widen(uint16_t bits, bool brain) {
  if (brain) return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  // The exponent moves from bias 15 to 127 by a product, which also renormalises subnormal numbers.
  if (magnitude < 0x7c00) {
    const float value = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, value) | sign);
  }
  return __builtin_bit_cast(float, sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
}

template <class T>
void pack_half(const Row& row, T* out, int64_t stride, bool brain) {
  const uint16_t* data = static_cast<const uint16_t*>(row.data);
  for (int64_t x = 0; x < row.length; ++x)
    for (int64_t c = 0; c < row.channels; ++c)
      out[x * stride + c] = widen(data[c * row.channel_stride + x * row.step], brain);
}

// 16-byte vectors are transposed in registers where positions are adjacent.
template <class T>
int64_t transpose(const Row& row, const T* data, T* out, int64_t stride) {
  typedef T Vector __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
  constexpr int64_t n = 16 / sizeof(T);
  int64_t x = 0;
  for (; x + n <= row.length; x += n) {
    int64_t c = 0;
    for (; c + n <= row.channels; c += n) {
      Vector in[n];
      for (int64_t i = 0; i < n; ++i)
        in[i] = *reinterpret_cast<const Vector*>(data + (c + i) * row.channel_stride + x);
      Vector* to[n];
      for (int64_t i = 0; i < n; ++i) to[i] = reinterpret_cast<Vector*>(out + (x + i) * stride + c);
      if constexpr (n == 4) {
        const Vector low0 = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5);
        const Vector low1 = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
        const Vector high0 = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
        const Vector high1 = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
        *to[0] = __builtin_shufflevector(low0, low1, 0, 1, 4, 5);
        *to[1] = __builtin_shufflevector(low0, low1, 2, 3, 6, 7);
        *to[2] = __builtin_shufflevector(high0, high1, 0, 1, 4, 5);
        *to[3] = __builtin_shufflevector(high0, high1, 2, 3, 6, 7);
      } else {
        *to[0] = __builtin_shufflevector(in[0], in[1], 0, 2);
        *to[1] = __builtin_shufflevector(in[0], in[1], 1, 3);
      }
    }
    for (; c < row.channels; ++c)
      for (int64_t i = 0; i < n; ++i) out[(x + i) * stride + c] = data[c * row.channel_stride + x + i];
  }
  return x;
}

template <class T>
void pack(const Row& row, T* out, int64_t stride) {
  if (row.dtype == Dtype::bfloat16) return pack_half(row, out, stride, true);
  if (row.dtype == Dtype::float16) return pack_half(row, out, stride, false);
  const T* data = static_cast<const T*>(row.data);
  if (row.channel_stride == 1) {
    typedef T Panel __attribute__((vector_size(kPanelBytes), aligned(sizeof(T)), may_alias));
    if (row.channels == kLanes<T>) {
      for (int64_t x = 0; x < row.length; ++x)
        *reinterpret_cast<Panel*>(out + x * stride) = *reinterpret_cast<const Panel*>(data + x * row.step);
      return;
    }
    for (int64_t x = 0; x < row.length; ++x)
      for (int64_t c = 0; c < row.channels; ++c) out[x * stride + c] = data[x * row.step + c];
    return;
  }
  const int64_t done = row.step == 1 ? transpose(row, data, out, stride) : 0;
  for (int64_t x = done; x < row.length; ++x)
    for (int64_t c = 0; c < row.channels; ++c) out[x * stride + c] = data[c * row.channel_stride + x * row.step];
}

template <class T, int Bytes>
void emit(const T* const* from, const double* weights, int64_t count, int64_t rows, int64_t columns, T* out,
          int64_t row, int64_t column) {
  using Wide = typename VectorOf<double, Bytes>::type;
  using Narrow = typename VectorOf<T, Bytes * sizeof(T) / sizeof(double)>::type;
  constexpr int64_t lanes = Bytes / sizeof(double), parts = kLanes<T> / lanes;
  for (int64_t i = 0; i < rows; ++i) {
    Wide sums[parts] = {};
    for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 8
      for (int64_t part = 0; part < parts; ++part) {
        const T* in = from[k] + i * kLanes<T> + part * lanes;
        sums[part] += weights[k] * __builtin_convertvector(*reinterpret_cast<const Narrow*>(in), Wide);
      }
    }
    T values[kLanes<T>];
#pragma GCC unroll 8
    for (int64_t part = 0; part < parts; ++part)
      *reinterpret_cast<Narrow*>(values + part * lanes) = __builtin_convertvector(sums[part], Narrow);
    for (int64_t j = 0; j < columns; ++j) out[i * row + j * column] = values[j];
  }
}

template <class T>
void join(const T* parts, int64_t imaginary, int64_t count, T* out, int64_t plane) {
  typedef T Panel __attribute__((vector_size(kPanelBytes), aligned(sizeof(T)), may_alias));
  const auto write = [&](const Panel& re, const Panel& im) {
    *reinterpret_cast<Panel*>(out) = re;
    *reinterpret_cast<Panel*>(out + plane) = im;
    *reinterpret_cast<Panel*>(out + 2 * plane) = re + im;
    *reinterpret_cast<Panel*>(out + 3 * plane) = im - re;
    out += 4 * plane;
  };
  for (int64_t k = 0; k < count; ++k, parts += 2 * kLanes<T>) {
    const Panel* re = reinterpret_cast<const Panel*>(parts);
    const Panel* im = reinterpret_cast<const Panel*>(parts + imaginary);
    write(re[0] - im[1], re[1] + im[0]);
    write(re[0] + im[1], im[0] - re[1]);
  }
}

// Shifts ±first … ±(first + Count − 1).
template <class T, int Bytes, int Count>
void mix_some_rows(const T* products, int64_t count, const double* factors, int64_t first, int64_t reach, double* out) {
  using Wide = typename VectorOf<double, Bytes>::type;
  using Narrow = typename VectorOf<T, Bytes * sizeof(T) / sizeof(double)>::type;
  constexpr int64_t square = kLanes<T> * kLanes<T>;
  for (int64_t e = 0; e < square; e += Bytes / sizeof(double)) {
    Wide even_re[Count] = {}, even_im[Count] = {}, odd_re[Count] = {}, odd_im[Count] = {};
    for (int64_t k = 0; k < count; ++k) {
      Wide p[6];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i)
        p[i] = __builtin_convertvector(*reinterpret_cast<const Narrow*>(products + (6 * k + i) * square + e), Wide);
      const Wide re = p[0] + p[1], im = p[2] + p[0] - p[1], other_re = p[3] + p[4], other_im = p[5] + p[3] - p[4];
#pragma GCC unroll 3
      for (int j = 0; j < Count; ++j) {
        const double* wave = factors + 2 * (k * (reach + 1) + first + j);
        even_re[j] += wave[0] * (re + other_re);
        even_im[j] += wave[0] * (im + other_im);
        odd_re[j] += wave[1] * (im - other_im);
        odd_im[j] += wave[1] * (re - other_re);
      }
    }
#pragma GCC unroll 3
    for (int j = 0; j < Count; ++j) {
      double* ahead = out + (reach + first + j) * 2 * square + e;
      double* back = out + (reach - first - j) * 2 * square + e;
      *reinterpret_cast<Wide*>(ahead) += even_re[j] - odd_re[j];
      *reinterpret_cast<Wide*>(ahead + square) += even_im[j] + odd_im[j];
      if (first + j == 0) continue;
      *reinterpret_cast<Wide*>(back) += even_re[j] + odd_re[j];
      *reinterpret_cast<Wide*>(back + square) += even_im[j] - odd_im[j];
    }
  }
}

template <class T, int Bytes>
void mix_rows(const T* products, int64_t count, const double* factors, int64_t reach, double* out) {
  int64_t first = 0;
  for (; first + 3 <= reach + 1; first += 3) mix_some_rows<T, Bytes, 3>(products, count, factors, first, reach, out);
  if (reach + 1 - first == 2) mix_some_rows<T, Bytes, 2>(products, count, factors, first, reach, out);
  if (reach + 1 - first == 1) mix_some_rows<T, Bytes, 1>(products, count, factors, first, reach, out);
}

template <class T, int Bytes>
void mix_columns(const double* rows, int64_t count, const double* factors, const Pair& reach, T* out) {
  using Wide = typename VectorOf<double, Bytes>::type;
  using Narrow = typename VectorOf<T, Bytes * sizeof(T) / sizeof(double)>::type;
  constexpr int64_t square = kLanes<T> * kLanes<T>;
  const int64_t down = 2 * reach[0] + 1, along = 2 * reach[1] + 1;
  for (int64_t y = 0; y < down; ++y) {
    for (int64_t x = 0; x < along; ++x) {
      for (int64_t e = 0; e < square; e += Bytes / sizeof(double)) {
        Wide sum = {};
        for (int64_t k = 0; k < count; ++k) {
          const double* in = rows + (k * down + y) * 2 * square + e;
          const double* wave = factors + 2 * (k * along + x);
          sum += wave[0] * *reinterpret_cast<const Wide*>(in) - wave[1] * *reinterpret_cast<const Wide*>(in + square);
        }
        *reinterpret_cast<Narrow*>(out + (y * along + x) * square + e) = __builtin_convertvector(sum, Narrow);
      }
    }
  }
}

template <class T, int Bytes, int MR>
constexpr Kernels<T> table() {
  return {multiply<T, Bytes, MR>, pack<T>, emit<T, Bytes>, join<T>, mix_rows<T, Bytes>, mix_columns<T, Bytes>};
}

}  // namespace
}  // namespace growkern
