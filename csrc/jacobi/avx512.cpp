#include "lanes.h"

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx2,fma")
#endif

#include "lanes_kernel.h"
#include "tridiagonal_kernel.h"

namespace growkern {

const Lanes<float> avx512_float_lanes = lanes_table<float, 64>();
const Lanes<double> avx512_double_lanes = lanes_table<double, 64>();

}  // namespace growkern

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
