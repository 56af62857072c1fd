// The moment ops of growkern_cpu, on libtorch's stable ABI. Shapes and dtypes have been checked in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "plan.h"

namespace growkern {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Double: return Dtype::float64;
    default: return Dtype::float32;
  }
}

bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

// A matrix is a map of one position.
Map map_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  if (tensor.dim() == 2)
    return {tensor.const_data_ptr(), dtype_of(tensor), sizes[0], sizes[1], {1, 1}, {strides[0], strides[1], 1, 1}};
  return {tensor.const_data_ptr(), dtype_of(tensor),       sizes[0],
          sizes[1],                {sizes[2], sizes[3]}, {strides[0], strides[1], strides[2], strides[3]}};
}

Tensor result(const Tensor& x, std::vector<int64_t> shape) {
  return torch::stable::new_empty(x, shape, is_double(x) ? ScalarType::Double : ScalarType::Float);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Geometry geometry(const std::vector<int64_t>& packed) {
  return {{packed[0], packed[1]}, {packed[2], packed[3]}, {packed[4], packed[5]}, {packed[6], packed[7]}};
}

template <class T>
void sum_moments(const std::array<Map, 3>& maps, const ConvWindows& windows, const ConvWindows* uniform, bool full,
                 bool x_bias, bool h_bias, const Seven& out) {
  const auto& [xx, xh, xv, hh, hv, vv, alike] = out;
  const Window own;
  Planner<T> planner(maps);
  planner.add(0, windows.x, x_bias, 0, windows.x, x_bias, windows.xx, data<T>(xx));
  if (!full) planner.add(0, windows.x, x_bias, 1, windows.h, h_bias, windows.xx, data<T>(xh));
  planner.add(0, windows.x, x_bias, 2, windows.target, false, windows.xv, data<T>(xv));
  planner.add(1, windows.h, h_bias, 1, windows.h, h_bias, windows.ones, data<T>(hh));
  planner.add(1, windows.h, h_bias, 2, own, false, windows.ones, data<T>(hv));
  planner.add(2, own, false, 2, own, false, windows.ones, data<T>(vv));
  if (uniform != nullptr) planner.add(0, uniform->x, true, 0, uniform->x, true, uniform->xx, data<T>(alike));
  planner.run();
}

Seven moments(const Tensor& x, const Tensor& h, const Tensor& v, const ConvWindows& windows,
              const ConvWindows* uniform, bool full, bool x_bias, bool h_bias) {
  const std::array<Map, 3> maps{map_of(x), map_of(h), map_of(v)};
  const int64_t p = maps[0].channels * windows.x.count() + x_bias, q = maps[1].channels * windows.h.count() + h_bias;
  const int64_t r = maps[2].channels, all = uniform == nullptr ? 0 : maps[0].channels * uniform->x.count() + 1;
  Seven out{result(x, {p, p}), result(x, {p, full ? 0 : q}), result(x, {p, r * windows.target.count()}),
            result(x, {q, q}), result(x, {q, r}),            result(x, {r, r}),
            result(x, {all, all})};
  (is_double(x) ? sum_moments<double> : sum_moments<float>)(maps, windows, uniform, full, x_bias, h_bias, out);
  return out;
}

// The windows of matrices: one position, one tap.
ConvWindows matrix_windows() {
  const Geometry one{{1, 1}, {1, 1}, {0, 0}, {1, 1}};
  return ConvWindows(one, one, false, {1, 1}, {1, 1});
}

Six linear_moments(const Tensor& x, const Tensor& h, const Tensor& v, bool x_bias, bool h_bias) {
  const auto& [xx, xh, xv, hh, hv, vv, _] = moments(x, h, v, matrix_windows(), nullptr, false, x_bias, h_bias);
  return {xx, xh, xv, hh, hv, vv};
}

// With `uniform` also the moment of x and ones over all hidden positions, of which the sums of xx hold most.
Seven conv2d_moments(const Tensor& x, const Tensor& h, const Tensor& v, std::vector<int64_t> producer,
                     std::vector<int64_t> consumer, bool full, bool x_bias, bool h_bias, bool uniform) {
  const Geometry one{{1, 1}, {1, 1}, {0, 0}, {1, 1}};
  const Pair hidden = map_of(h).size;
  const ConvWindows windows(geometry(producer), geometry(consumer), full, hidden, map_of(v).size);
  const ConvWindows once(geometry(producer), one, true, hidden, hidden);
  return moments(x, h, v, windows, uniform ? &once : nullptr, full, x_bias, h_bias);
}

template <class T>
void sum_residual(const std::array<Map, 3>& maps, const ConvWindows& windows, bool full, bool x_bias, bool h_bias,
                  const Tensor& signs, const Three& out) {
  const auto& [xr, xr_null, hr_null] = out;
  Planner<T> planner(maps);
  planner.set_signs(data<T>(signs), signs.sizes()[0]);
  planner.add(0, windows.x, x_bias, 2, windows.target, false, windows.xv, data<T>(xr), data<T>(xr_null));
  if (!full && signs.sizes()[0] > 0)
    planner.add(1, windows.h, h_bias, 2, Window{}, false, windows.ones, nullptr, data<T>(hr_null));
  planner.run();
}

// r is v⊥, and signs are contiguous in the dtype of the results.
Three residual(const Tensor& x, const Tensor& h, const Tensor& r, const Tensor& signs, const ConvWindows& windows,
               bool full, bool x_bias, bool h_bias) {
  const std::array<Map, 3> maps{map_of(x), map_of(h), map_of(r)};
  const int64_t p = maps[0].channels * windows.x.count() + x_bias, q = maps[1].channels * windows.h.count() + h_bias;
  const int64_t targets = maps[2].channels * windows.target.count(), draws = signs.sizes()[0];
  Three out{result(x, {p, targets}), result(x, {draws, p, targets}),
            result(x, {draws, full ? 0 : q, maps[2].channels})};
  (is_double(x) ? sum_residual<double> : sum_residual<float>)(maps, windows, full, x_bias, h_bias, signs, out);
  return out;
}

Three linear_residual(const Tensor& x, const Tensor& h, const Tensor& r, const Tensor& signs, bool x_bias,
                      bool h_bias) {
  return residual(x, h, r, signs, matrix_windows(), false, x_bias, h_bias);
}

Three conv2d_residual(const Tensor& x, const Tensor& h, const Tensor& r, const Tensor& signs,
                      std::vector<int64_t> producer, std::vector<int64_t> consumer, bool full, bool x_bias,
                      bool h_bias) {
  const ConvWindows windows(geometry(producer), geometry(consumer), full, map_of(h).size, map_of(r).size);
  return residual(x, h, r, signs, windows, full, x_bias, h_bias);
}

}  // namespace
}  // namespace growkern

STABLE_TORCH_LIBRARY_FRAGMENT(growkern_cpu, m) {
  m.def("linear_moments(Tensor x, Tensor h, Tensor v, bool x_bias, bool h_bias)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("conv2d_moments(Tensor x, Tensor h, Tensor v, int[] producer, int[] consumer, bool full, bool x_bias,"
        " bool h_bias, bool uniform) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_residual(Tensor x, Tensor h, Tensor r, Tensor signs, bool x_bias, bool h_bias)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("conv2d_residual(Tensor x, Tensor h, Tensor r, Tensor signs, int[] producer, int[] consumer, bool full,"
        " bool x_bias, bool h_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(growkern_cpu, CPU, m) {
  m.impl("linear_moments", TORCH_BOX(&growkern::linear_moments));
  m.impl("conv2d_moments", TORCH_BOX(&growkern::conv2d_moments));
  m.impl("linear_residual", TORCH_BOX(&growkern::linear_residual));
  m.impl("conv2d_residual", TORCH_BOX(&growkern::conv2d_residual));
}
