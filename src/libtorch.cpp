// Functions of libtorch that tch does not bind. Each returns null, or libtorch's error message.

#include <ATen/DeviceAccelerator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstring>

namespace {
template <typename Act>
char *told(Act act) {
  try {
    act();
    return nullptr;
  } catch (const std::exception &error) {
    return strdup(error.what());
  }
}
} // namespace

extern "C" {

// Writes the gradients of x and, if trained, of weight and bias.
char *incubate_layer_norm_backward(at::Tensor **out, const at::Tensor *gradient, const at::Tensor *x,
                                   const at::Tensor *mean, const at::Tensor *scale, const at::Tensor *weight,
                                   const at::Tensor *bias, bool trained) {
  return told([&] {
    auto [dx, dweight, dbias] = at::native_layer_norm_backward(*gradient, *x, weight->sizes(), *mean, *scale, *weight,
                                                               *bias, {true, trained, trained});
    out[0] = new at::Tensor(dx);
    if (trained) {
      out[1] = new at::Tensor(dweight);
      out[2] = new at::Tensor(dbias);
    }
  });
}

// Updates all numbers in place. The gradients are divided by `divisor` first. Nothing is updated if `skip` is 1.
char *incubate_fused_adamw(const at::Tensor *weights, const at::Tensor *gradients, const at::Tensor *exp_avg,
                           const at::Tensor *exp_avg_sq, const at::Tensor *step, const at::Tensor *divisor,
                           const at::Tensor *skip, double lr, double beta1, double beta2, double weight_decay,
                           double eps) {
  return told([&] {
    at::_fused_adamw_({*weights}, {*gradients}, {*exp_avg}, {*exp_avg_sq}, {}, {*step}, lr, beta1, beta2, weight_decay,
                      eps, /*amsgrad=*/false, /*maximize=*/false, *divisor, *skip);
  });
}

// Writes the gradients of three inputs, from the gradient of the output.
char *incubate_gradients(at::Tensor **out, const at::Tensor *output, at::Tensor *const *inputs,
                         const at::Tensor *gradient) {
  return told([&] {
    auto all = torch::autograd::grad({*output}, {*inputs[0], *inputs[1], *inputs[2]}, {*gradient});
    for (size_t i = 0; i < all.size(); ++i)
      out[i] = new at::Tensor(all[i]);
  });
}

// Writes an uninitialised fp32 tensor in pinned host memory.
char *incubate_empty_pinned(at::Tensor **out, const int64_t *sizes, size_t dimensions) {
  return told([&] {
    auto options = at::TensorOptions(at::kFloat).pinned_memory(true);
    *out = new at::Tensor(at::empty(at::IntArrayRef(sizes, dimensions), options));
  });
}

// Returns the GPU memory that libtorch caches to the driver.
char *incubate_empty_cache() {
  return told([] { at::accelerator::emptyCache(); });
}
}
