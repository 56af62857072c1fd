#include "isa.h"

#include <atomic>
#include <cstring>

namespace growkern {
namespace {

constexpr Isa kAll[] = {Isa::avx512, Isa::avx2, Isa::portable};
constexpr const char* kNames[] = {"avx512", "avx2", "portable"};

bool runs(Isa isa) {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (isa == Isa::avx512) return __builtin_cpu_supports("avx512f");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::portable;
}

Isa best() {
  for (Isa isa : kAll)
    if (runs(isa)) return isa;
  return Isa::portable;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> choice{best()};
  return choice;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

bool choose_isa(const char* name) {
  if (*name == '\0') {
    chosen() = best();
    return true;
  }
  for (Isa isa : kAll) {
    if (std::strcmp(name, kNames[static_cast<int>(isa)]) != 0 || !runs(isa)) continue;
    chosen() = isa;
    return true;
  }
  return false;
}

}  // namespace growkern
