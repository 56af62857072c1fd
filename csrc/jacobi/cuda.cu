// The decompositions of growkern_cuda, on libtorch's stable ABI. `a` is contiguous, (matrices, m, n), and not empty.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../launch.h"
#include "eigh.cuh"
#include "svd.cuh"

namespace growkern {

// Two blocks of the largest float32 matrices share a multiprocessor; float64 needs the registers.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;

template <class T, bool kVectorsInShared>
__global__ void __launch_bounds__(kEighThreads, kBlocks<T>) eigh_kernel(const T* a, T* w, T* q, T* outside, int n) {
  extern __shared__ __align__(16) unsigned char shared[];
  eigh_block<T, kVectorsInShared>(a, w, q, outside, n, reinterpret_cast<T*>(shared));
}

template <class T>
__global__ void __launch_bounds__(kSvdThreads, kBlocks<T>) svd_kernel(const T* a, T* u, T* s, T* vh, int m, int n) {
  extern __shared__ __align__(16) unsigned char shared[];
  svd_block<T>(a, u, s, vh, m, n, reinterpret_cast<T*>(shared));
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
void run_eigh(const Tensor& a, Tensor& w, Tensor& q) {
  const Launcher launch(a);
  const auto count = static_cast<unsigned>(a.sizes()[0]);
  const int n = static_cast<int>(a.sizes()[2]), threads = eigh_threads(n);
  const EighLayout<T> layout(n);
  const int64_t all = layout.elements(true) * sizeof(T), some = layout.elements(false) * sizeof(T);
  if (all <= launch.shared_bytes()) {
    launch(eigh_kernel<T, true>, count, threads, all, const_data<T>(a), data<T>(w), data<T>(q),
           static_cast<T*>(nullptr), n);
  } else {
    const Tensor outside = torch::stable::new_empty(a, {a.sizes()[0], n, layout.ld});
    launch(eigh_kernel<T, false>, count, threads, some, const_data<T>(a), data<T>(w), data<T>(q), data<T>(outside), n);
  }
}

std::tuple<Tensor, Tensor> eigh(const Tensor& a) {
  STD_TORCH_CHECK(a.sizes()[2] <= kLargestEigh, "a: expected at most ", kLargestEigh, " rows and columns");
  Tensor w = torch::stable::new_empty(a, {a.sizes()[0], a.sizes()[2]}), q = torch::stable::new_empty(a, a.sizes());
  (a.scalar_type() == ScalarType::Double ? run_eigh<double> : run_eigh<float>)(a, w, q);
  return {w, q};
}

// Whether a block can hold one matrix.
bool svd_fits(const Tensor& a) {
  const int64_t m = a.sizes()[a.dim() - 2], n = a.sizes()[a.dim() - 1];
  if (std::min(m, n) > kLargestSvd || std::max(m, n) > (1 << 20)) return false;
  const int64_t elements = SvdLayout(static_cast<int>(m), static_cast<int>(n)).elements();
  return elements * static_cast<int64_t>(a.element_size()) <= Launcher(a).shared_bytes();
}

template <class T>
void run_svd(const Tensor& a, Tensor& u, Tensor& s, Tensor& vh) {
  const Launcher launch(a);
  const int m = static_cast<int>(a.sizes()[1]), n = static_cast<int>(a.sizes()[2]);
  const SvdLayout layout(m, n);
  launch(svd_kernel<T>, static_cast<unsigned>(a.sizes()[0]), svd_threads(layout.k),
         static_cast<int64_t>(layout.elements() * sizeof(T)), const_data<T>(a), data<T>(u), data<T>(s), data<T>(vh), m,
         n);
}

std::tuple<Tensor, Tensor, Tensor> svd(const Tensor& a) {
  const int64_t count = a.sizes()[0], m = a.sizes()[1], n = a.sizes()[2], k = std::min(m, n);
  STD_TORCH_CHECK(svd_fits(a), "a: expected a matrix that svd_fits, got (", m, ", ", n, ")");
  Tensor u = torch::stable::new_empty(a, {count, m, k}), s = torch::stable::new_empty(a, {count, k});
  Tensor vh = torch::stable::new_empty(a, {count, k, n});
  (a.scalar_type() == ScalarType::Double ? run_svd<double> : run_svd<float>)(a, u, s, vh);
  return {u, s, vh};
}

}  // namespace
}  // namespace growkern

STABLE_TORCH_LIBRARY_FRAGMENT(growkern_cuda, m) {
  m.def("eigh(Tensor a) -> (Tensor, Tensor)");
  m.def("svd(Tensor a) -> (Tensor, Tensor, Tensor)");
  m.def("svd_fits(Tensor a) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(growkern_cuda, CUDA, m) {
  m.impl("eigh", TORCH_BOX(&growkern::eigh));
  m.impl("svd", TORCH_BOX(&growkern::svd));
  m.impl("svd_fits", TORCH_BOX(&growkern::svd_fits));
}
