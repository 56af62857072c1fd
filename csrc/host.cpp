// The host module: what the compiled libraries were built with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = GROWKERN_COMPILER;
  info["flags"] = GROWKERN_FLAGS;
#ifdef __x86_64__
  info["instruction_sets"] = std::vector<std::string>{"avx512", "avx2", "portable"};
#else
  info["instruction_sets"] = std::vector<std::string>{"portable"};
#endif
  info["cuda_architectures"] = GROWKERN_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What growkern's compiled libraries were built with.";
  m.def("build_info", &build_info, "Compiler, flags, instruction sets and CUDA architectures.");
}
