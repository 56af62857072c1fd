// Names of libtorch's stable ABI that changed between the versions of torch that are built against.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has it without the prefix
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
