#include "plan.h"

#include <algorithm>
#include <numeric>

namespace growkern {
namespace {

// What gathering patches costs beside multiplying them, about.
constexpr double kGather = 1.3;

bool all_ones(const Weights& weights) {
  return std::all_of(weights.begin(), weights.end(), [](const std::vector<double>& axis) {
    return std::all_of(axis.begin(), axis.end(), [](double weight) { return weight == 1; });
  });
}

// Makes a window dense along one axis: where samples are two positions apart for it or the other one, the samples
// between them are counted too, and then, or where it reads every half position, positions of the map are put apart.
int64_t spread(Window& window, int axis, bool samples_apart) {
  int64_t apart = window.divisor[axis];
  if (samples_apart && window.stride[axis] == 1) {
    apart *= 2;
    window.offset[axis] *= 2;
    window.step[axis] *= 2;
  }
  window.stride[axis] = window.divisor[axis] = 1;
  return apart;
}

}  // namespace

Weights constant(const Pair& size, double value) {
  return {std::vector<double>(size[0], value), std::vector<double>(size[1], value)};
}

template <class T>
Source<T>* Planner<T>::whole(int map, const Pair& apart) {
  for (auto& known : batch_.sources)
    if (!known->patches && known->map == maps_[map] && known->apart == apart) return known.get();
  Source<T> source;
  source.map = maps_[map];
  source.apart = apart;
  for (int axis : {0, 1}) source.size[axis] = std::max<int64_t>(0, (maps_[map].size[axis] - 1) * apart[axis] + 1);
  source.channels = maps_[map].channels;
  batch_.sources.push_back(std::make_unique<Source<T>>(std::move(source)));
  return batch_.sources.back().get();
}

template <class T>
Source<T>* Planner<T>::patches(int map, const Window& window, const Weights& weights, const Pair& size) {
  const bool weighted = !all_ones(weights);
  for (auto& known : batch_.sources)
    if (known->patches && known->map == maps_[map] && known->window == window && known->size == size &&
        known->weights == (weighted ? weights : Weights{}))
      return known.get();
  Source<T> source;
  source.map = maps_[map];
  source.patches = true;
  source.window = window;
  if (weighted) source.weights = weights;
  source.size = source.pitch = size;
  source.channels = maps_[map].channels * window.count();
  batch_.sources.push_back(std::make_unique<Source<T>>(std::move(source)));
  return batch_.sources.back().get();
}

template <class T>
Moment<T>& Planner<T>::add(int u, const Window& u_window, bool u_bias, int v, const Window& v_window, bool v_bias,
                           const Weights& weights, T* out) {
  Moment<T> moment;
  moment.weights = weights;
  moment.symmetric = u == v && u_window == v_window;
  moment.u_bias = u_bias;
  moment.v_bias = v_bias;
  moment.out = out;
  const Pair size{static_cast<int64_t>(weights[0].size()), static_cast<int64_t>(weights[1].size())};
  const double gathered = (moment.symmetric ? 0.5 : 1) * kGather * static_cast<double>(size[0] * size[1]) *
                          static_cast<double>(u_window.count() * v_window.count());
  moment.u_window = u_window;
  moment.v_window = v_window;
  Pair u_apart, v_apart;
  bool near = true;
  for (int axis : {0, 1}) {
    const bool samples_apart = u_window.stride[axis] == 2 || v_window.stride[axis] == 2;
    near &= std::max(u_window.stride[axis], v_window.stride[axis]) <= 2;
    u_apart[axis] = spread(moment.u_window, axis, samples_apart);
    v_apart[axis] = spread(moment.v_window, axis, samples_apart);
    near &= u_apart[axis] <= 2 && v_apart[axis] <= 2;
    if (!samples_apart) continue;
    auto& along = moment.weights[axis];
    along.assign(2 * size[axis], 0);
    for (int64_t sample = 0; sample < size[axis]; ++sample) along[2 * sample] = weights[axis][sample];
  }
  if (near) {
    moment.u = whole(u, u_apart);
    moment.v = whole(v, v_apart);
  }
  if (near && correlation_cost(moment) <= gathered) {
    for (int axis : {0, 1}) {
      // Zeros enough that no shift reaches from one row or image into the next.
      const Pair shifts = shift_range(moment.u_window, moment.v_window, axis);
      const int64_t u_size = moment.u->size[axis], v_size = moment.v->size[axis];
      pitch_[axis] = std::max({pitch_[axis], u_size, v_size, v_size - shifts[0], u_size + shifts[1]});
    }
  } else {
    moment.u = patches(u, u_window, weights, size);
    moment.v = patches(v, v_window, constant(size, 1), size);
    moment.u_window = moment.v_window = Window{};
    moment.weights = weights;
  }
  batch_.moments.push_back(std::move(moment));
  return batch_.moments.back();
}

template <class T>
void Planner<T>::set_signs(const T* signs, int64_t draws) {
  signs_ = signs;
  draws_ = draws;
}

template <class T>
void Planner<T>::run() {
  const auto is_sign = [](T value) { return value == 1 || value == -1; };
  if (draws_ == 1 && std::all_of(signs_, signs_ + batch_.images, is_sign)) {
    const auto positive = [this](int64_t image) { return signs_[image] > 0; };
    batch_.order.resize(batch_.images);
    std::iota(batch_.order.begin(), batch_.order.end(), int64_t{0});
    const auto others = std::stable_partition(batch_.order.begin(), batch_.order.end(), positive);
    batch_.positive = others - batch_.order.begin();
    for (auto& source : batch_.sources) source->order = batch_.order.data();
  }
  for (Moment<T>& moment : batch_.moments) {
    if (!(moment.v->map == maps_[2])) continue;
    moment.v->signs = signs_;
    moment.v->draws = draws_;
    // The row of a matrix is not worth its own sums.
    moment.v->copied = draws_ > 0 && batch_.order.empty() && maps_[0].size == Pair{1, 1} && pitch_ == Pair{1, 1} && !moment.v->patches;
  }
  // Of the sources those that were only considered are not packed.
  std::erase_if(batch_.sources, [&](const auto& source) {
    return std::none_of(batch_.moments.begin(), batch_.moments.end(),
                        [&](const Moment<T>& moment) { return moment.u == source.get() || moment.v == source.get(); });
  });
  for (auto& source : batch_.sources)
    if (!source->patches) source->pitch = pitch_;
  batch_.run();
}

template class Planner<float>;
template class Planner<double>;

ConvWindows::ConvWindows(const Geometry& producer, const Geometry& consumer, bool full, const Pair& hidden,
                         const Pair& outputs)
    : ones(constant(outputs, 1)) {
  x.taps = producer.kernel;
  x.step = producer.dilation;
  h.taps = consumer.kernel;
  h.step = consumer.dilation;
  h.stride = consumer.stride;
  for (int axis : {0, 1}) {
    h.offset[axis] = -consumer.padding[axis];
    if (full) {
      x.stride[axis] = producer.stride[axis];
      x.offset[axis] = -producer.padding[axis];
      // Tap t at output o reads hidden position i: o = (i + padding − dilation·t) / stride.
      target.taps[axis] = consumer.kernel[axis];
      target.offset[axis] = consumer.padding[axis];
      target.step[axis] = -consumer.dilation[axis];
      target.divisor[axis] = consumer.stride[axis];
      xv[axis].assign(hidden[axis], 1);
      xx[axis].assign(hidden[axis], 0);
      for (int64_t output = 0; output < outputs[axis]; ++output) {
        for (int64_t tap = 0; tap < consumer.kernel[axis]; ++tap) {
          const int64_t position = h.position(axis, output, tap);
          if (position >= 0 && position < hidden[axis]) ++xx[axis][position];
        }
      }
    } else {
      const int64_t centre = consumer.dilation[axis] * (consumer.kernel[axis] / 2) - consumer.padding[axis];
      x.stride[axis] = producer.stride[axis] * consumer.stride[axis];
      x.offset[axis] = producer.stride[axis] * centre - producer.padding[axis];
      xx[axis].assign(outputs[axis], 0);
      for (int64_t output = 0; output < outputs[axis]; ++output) {
        const int64_t position = consumer.stride[axis] * output + centre;
        if (position >= 0 && position < hidden[axis]) xx[axis][output] = 1;
      }
      xv[axis] = xx[axis];
    }
  }
}

}  // namespace growkern
