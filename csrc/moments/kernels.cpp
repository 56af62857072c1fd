#include "kernels.h"

#include <atomic>
#include <cstring>

namespace growkern {
namespace {

struct Choice {
  const Kernels<float>* single;
  const Kernels<double>* double_;
  bool runs_here;
};

// The fastest first.
const Choice* choices(int* count) {
#ifdef __x86_64__
  __builtin_cpu_init();
  static const Choice all[] = {
      {&avx512_float, &avx512_double, __builtin_cpu_supports("avx512f") != 0},
      {&avx2_float, &avx2_double, __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0},
      {&portable_float, &portable_double, true},
  };
#else
  static const Choice all[] = {{&portable_float, &portable_double, true}};
#endif
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

const Choice* find(const char* name) {
  int count = 0;
  const Choice* all = choices(&count);
  for (int i = 0; i < count; ++i)
    if (all[i].runs_here && (name == nullptr || std::strcmp(all[i].single->name, name) == 0)) return &all[i];
  return nullptr;
}

std::atomic<const Choice*>& chosen() {
  static std::atomic<const Choice*> choice{find(nullptr)};
  return choice;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *chosen().load(std::memory_order_relaxed)->single;
}

template <>
const Kernels<double>& kernels<double>() {
  return *chosen().load(std::memory_order_relaxed)->double_;
}

bool choose(const char* name) {
  const Choice* choice = find(name);
  if (choice != nullptr) chosen() = choice;
  return choice != nullptr;
}

}  // namespace growkern
