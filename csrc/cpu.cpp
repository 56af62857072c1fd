// The library growkern_cpu on libtorch's stable ABI: what all its ops share. Each family registers its own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "isa.h"
#include "parallel.h"

namespace growkern {

void parallel(int64_t n, const std::function<void(int64_t)>& body) {
  const auto threads = std::min<int64_t>(n, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  // Whichever thread is free takes the next: other processes may hold one of them up.
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < n; i = next++) body(i);
  });
}

namespace {

bool use_instruction_set(std::string name) { return choose_isa(name.c_str()); }

}  // namespace
}  // namespace growkern

STABLE_TORCH_LIBRARY(growkern_cpu, m) {
  m.def("use_instruction_set(str name) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(growkern_cpu, CompositeExplicitAutograd, m) {
  m.impl("use_instruction_set", TORCH_BOX(&growkern::use_instruction_set));
}
