#include "kernels.h"

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx2,fma")
#endif

#include "micro_kernel.h"

namespace growkern {

const Kernels<float> avx512_float = table<float, 64, 8>();
const Kernels<double> avx512_double = table<double, 64, 8>();

}  // namespace growkern

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
