// Which instruction set the kernels use.
#pragma once

namespace growkern {

enum class Isa { avx512, avx2, portable };

// The best that this processor runs, unless another was chosen.
Isa isa();

// Chooses by name, or the best for an empty one; false where this processor does not run it.
bool choose_isa(const char* name);

// Of three tables of kernels the one to use. Tables of other processors' instruction sets are not linked in.
#ifdef __x86_64__
#define GROWKERN_BY_ISA(suffix)                                   \
  (::growkern::isa() == ::growkern::Isa::avx512 ? avx512_##suffix \
   : ::growkern::isa() == ::growkern::Isa::avx2 ? avx2_##suffix   \
                                                : portable_##suffix)
#else
#define GROWKERN_BY_ISA(suffix) portable_##suffix
#endif

}  // namespace growkern
