// What the ops of growkern_cuda share; each family registers its own, on libtorch's stable ABI.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "launch.h"
#include "stable.h"

namespace growkern {

using torch::stable::Tensor;

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "growkern_cuda: ", cudaGetErrorString(error));
}

Launcher::Launcher(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

int64_t Launcher::shared_bytes() const {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_));
  return bytes;
}

}  // namespace growkern
