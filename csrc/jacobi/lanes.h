// Many small symmetric matrices at once, one in each lane of a vector.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace growkern {

constexpr int64_t kLargestInLanes = 128;  // rows and columns

// Decomposes matrices a[i·n² …] for i < count, of which the lower triangle counts, as q diag(w) qᵀ with ascending
// w. `work` holds bytes(n). A matrix that is not finite or does not converge comes back NaN.
template <class T>
struct Method {
  int64_t matrices;  // that take no longer than one of them
  void (*eigh)(const T* a, int64_t count, int64_t n, T* w, T* q, void* work);
  int64_t (*bytes)(int64_t n);
};

// Jacobi's method, and the QL method for tridiagonal matrices.
template <class T>
struct Lanes {
  Method<T> jacobi, tridiagonal;
};

extern const Lanes<float> portable_float_lanes, avx2_float_lanes, avx512_float_lanes;
extern const Lanes<double> portable_double_lanes, avx2_double_lanes, avx512_double_lanes;

// Those of the instruction set in use.
template <class T>
const Lanes<T>& lanes() {
  if constexpr (sizeof(T) == 8) return GROWKERN_BY_ISA(double_lanes);
  else return GROWKERN_BY_ISA(float_lanes);
}

}  // namespace growkern
