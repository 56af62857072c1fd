#include "kernels.h"

#include "micro_kernel.h"

namespace growkern {

// 16-byte vectors are in the baseline of x86-64 (SSE2) and of AArch64 (NEON).
const Kernels<float> portable_float = table<float, 16, 4>();
const Kernels<double> portable_double = table<double, 16, 4>();

}  // namespace growkern
