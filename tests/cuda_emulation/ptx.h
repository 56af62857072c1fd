// csrc/moments/ptx.cuh for the emulation: the same functions, with fragments laid out as PTX defines them.
#pragma once

#include "cuda_emulation.h"

namespace growkern {

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 0    ? ldexpf(fraction, -24)
                     : exponent == 31 ? (fraction ? NAN : INFINITY)
                                      : ldexpf(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

inline uint32_t to_tf32(float value) { return (__float_as_uint(value) + 0x1000) & 0xffffe000; }

struct Fragments {
  uint32_t a[4], b[2];
};

inline const Fragments& of_lane(const char (&all)[32][32], int lane) {
  return *reinterpret_cast<const Fragments*>(all[lane]);
}

// c(row, column) += Σ_k a(row, k) b(k, column), the lane and register of each given by k.
template <class Multiply>
void mma(float (&c)[4], const uint32_t* a, const uint32_t* b, const Multiply& multiply) {
  const auto& all = emulation::machine.gather(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int lane = emulation::machine.running->lane;
  for (int i = 0; i < 4; ++i) c[i] += multiply(all, lane / 4, i / 2, lane % 4 * 2 + i % 2);
}

inline void mma_tf32(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  mma(c, a, b, [](const auto& all, int row, int lower, int column) {
    float sum = 0;
    for (int k = 0; k < 8; ++k)
      sum += __uint_as_float(of_lane(all, row * 4 + k % 4).a[lower + k / 4 * 2] & 0xffffe000) *
             __uint_as_float(of_lane(all, column * 4 + k % 4).b[k / 4] & 0xffffe000);
    return sum;
  });
}

template <bool kBfloat>
void mma_half(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  const auto number = [](uint32_t word, int i) {
    const uint32_t bits = word >> 16 * i & 0xffff;
    return kBfloat ? __uint_as_float(bits << 16) : half_to_float(bits);
  };
  mma(c, a, b, [&](const auto& all, int row, int lower, int column) {
    float sum = 0;
    for (int k = 0; k < 16; ++k)
      sum += number(of_lane(all, row * 4 + k % 8 / 2).a[lower + k / 8 * 2], k % 2) *
             number(of_lane(all, column * 4 + k % 8 / 2).b[k / 8], k % 2);
    return sum;
  });
}

inline void load_transposed(uint32_t (&words)[4], const uint16_t* row) {
  const auto& rows = emulation::machine.gather(row);
  const int lane = emulation::machine.running->lane;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint16_t* pair[2];
    for (int i = 0; i < 2; ++i) memcpy(&pair[i], rows[matrix * 8 + lane % 4 * 2 + i], sizeof pair[i]);
    words[matrix] = pair[0][lane / 4] | uint32_t(pair[1][lane / 4]) << 16;
  }
}

}  // namespace growkern
