// The kernels of csrc/jacobi, run by the emulation.
#include "cuda_emulation.h"

#include "../../csrc/jacobi/eigh.cuh"
#include "../../csrc/jacobi/svd.cuh"

namespace {

template <class T, bool kVectorsInShared>
void eigh(const T* a, T* w, T* q, T* outside, int count, int n, int seed) {
  const size_t bytes = growkern::EighLayout<T>(n).elements(kVectorsInShared) * sizeof(T);
  emulation::launch({unsigned(count)}, {unsigned(growkern::eigh_threads(n))}, bytes, seed, [&](char* shared) {
    growkern::eigh_block<T, kVectorsInShared>(a, w, q, outside, n, reinterpret_cast<T*>(shared));
  });
}

template <class T>
void eigh(const T* a, T* w, T* q, T* outside, int count, int n, int seed) {
  if (outside) eigh<T, false>(a, w, q, outside, count, n, seed);
  else eigh<T, true>(a, w, q, outside, count, n, seed);
}

template <class T>
void svd(const T* a, T* u, T* s, T* vh, int count, int m, int n, int seed) {
  const growkern::SvdLayout layout(m, n);
  emulation::launch({unsigned(count)}, {unsigned(growkern::svd_threads(layout.k))}, layout.elements() * sizeof(T), seed,
                    [&](char* shared) { growkern::svd_block<T>(a, u, s, vh, m, n, reinterpret_cast<T*>(shared)); });
}

}  // namespace

extern "C" {
void eigh_float32(const float* a, float* w, float* q, float* outside, int count, int n, int seed) {
  eigh(a, w, q, outside, count, n, seed);
}
void eigh_float64(const double* a, double* w, double* q, double* outside, int count, int n, int seed) {
  eigh(a, w, q, outside, count, n, seed);
}
void svd_float32(const float* a, float* u, float* s, float* vh, int count, int m, int n, int seed) {
  svd(a, u, s, vh, count, m, n, seed);
}
void svd_float64(const double* a, double* u, double* s, double* vh, int count, int m, int n, int seed) {
  svd(a, u, s, vh, count, m, n, seed);
}
}
