#include "kernels.h"

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "micro_kernel.h"

namespace growkern {

const Kernels<float> avx2_float = table<float, 32, 4>();
const Kernels<double> avx2_double = table<double, 32, 4>();

}  // namespace growkern

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
