// The decompositions of growkern_cpu, on libtorch's stable ABI. `a` is contiguous, (matrices, m, n).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "../parallel.h"
#include "../stable.h"
#include "lanes.h"

namespace growkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

template <class T>
void eigh_by_lanes(const Tensor& a, const Method<T>& method, Tensor& w, Tensor& q) {
  const int64_t count = a.sizes()[0], n = a.sizes()[2], bytes = method.bytes(n);
  // As few parts as there are threads: lanes run empty at the end of each.
  const int64_t parts = method.matrices * torch::stable::get_num_threads();
  const int64_t at_once = std::max<int64_t>(1, (count + parts - 1) / parts) * method.matrices;
  const int64_t tasks = (count + at_once - 1) / at_once;
  const T* in = static_cast<const T*>(a.const_data_ptr());
  T *values = static_cast<T*>(w.mutable_data_ptr()), *vectors = static_cast<T*>(q.mutable_data_ptr());
  parallel(tasks, [&](int64_t task) {
    const int64_t first = task * at_once;
    const std::unique_ptr<void, void (*)(void*)> work(std::aligned_alloc(64, (bytes + 64) / 64 * 64), std::free);
    method.eigh(in + first * n * n, std::min(at_once, count - first), n, values + first * n, vectors + first * n * n,
                work.get());
  });
}

std::tuple<Tensor, Tensor> eigh_lanes(const Tensor& a, bool tridiagonal) {
  STD_TORCH_CHECK(a.sizes()[2] <= kLargestInLanes, "a: expected at most ", kLargestInLanes, " rows and columns");
  Tensor w = torch::stable::new_empty(a, {a.sizes()[0], a.sizes()[2]}), q = torch::stable::new_empty(a, a.sizes());
  const auto run = [&](const auto& table) {
    eigh_by_lanes(a, tridiagonal ? table.tridiagonal : table.jacobi, w, q);
  };
  if (a.scalar_type() == ScalarType::Double) run(lanes<double>());
  else run(lanes<float>());
  return {w, q};
}

// LAPACK on slices of the batch, one thread each: small matrices do not gain from threads inside.
template <size_t Outputs, class Call>
void by_slices(const Tensor& a, std::array<Tensor, Outputs> out, const Call& call) {
  const int64_t count = a.sizes()[0], slices = std::min<int64_t>(count, 4 * torch::stable::get_num_threads());
  parallel(slices, [&](int64_t task) {
    const int64_t first = count * task / slices, length = count * (task + 1) / slices - first;
    Tensor whole = a;
    const std::array<StableIValue, 3> parts = call(torch::stable::narrow(whole, 0, first, length));
    for (size_t i = 0; i < Outputs; ++i) {
      Tensor slice = torch::stable::narrow(out[i], 0, first, length);
      torch::stable::copy_(slice, to<Tensor>(parts[i]));
    }
  });
}

std::tuple<Tensor, Tensor> eigh_lapack(const Tensor& a) {
  Tensor w = torch::stable::new_empty(a, {a.sizes()[0], a.sizes()[2]}), q = torch::stable::new_empty(a, a.sizes());
  by_slices<2>(a, {w, q}, [](const Tensor& part) {
    std::array<StableIValue, 3> stack{from(part), from(std::string("L")), 0};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_eigh", "", stack.data(), TORCH_ABI_VERSION));
    return stack;
  });
  return {w, q};
}

std::tuple<Tensor, Tensor, Tensor> svd_lapack(const Tensor& a) {
  const int64_t count = a.sizes()[0], m = a.sizes()[1], n = a.sizes()[2], k = std::min(m, n);
  Tensor u = torch::stable::new_empty(a, {count, m, k}), s = torch::stable::new_empty(a, {count, k});
  Tensor vh = torch::stable::new_empty(a, {count, k, n});
  by_slices<3>(a, {u, s, vh}, [](const Tensor& part) {
    std::array<StableIValue, 3> stack{from(part), from(false), from(std::optional<std::string>())};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_svd", "", stack.data(), TORCH_ABI_VERSION));
    return stack;
  });
  return {u, s, vh};
}

}  // namespace
}  // namespace growkern

STABLE_TORCH_LIBRARY_FRAGMENT(growkern_cpu, m) {
  m.def("eigh_lanes(Tensor a, bool tridiagonal) -> (Tensor, Tensor)");
  m.def("eigh_lapack(Tensor a) -> (Tensor, Tensor)");
  m.def("svd_lapack(Tensor a) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(growkern_cpu, CPU, m) {
  m.impl("eigh_lanes", TORCH_BOX(&growkern::eigh_lanes));
  m.impl("eigh_lapack", TORCH_BOX(&growkern::eigh_lapack));
  m.impl("svd_lapack", TORCH_BOX(&growkern::svd_lapack));
}
