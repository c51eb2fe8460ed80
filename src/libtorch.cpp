// Wraps functions of libtorch that tch does not bind. Each `incubate_` function that returns a `char *` returns null, or libtorch's
// error message, which the caller must free.

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_efficient_attention_backward.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/stack.h>
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <cstring>

namespace {
// Calls act. Returns null, or the message of the exception that it throws.
template <typename Act>
char *error_of(Act act) {
  try {
    act();
    return nullptr;
  } catch (const std::exception &error) {
    return strdup(error.what());
  }
}

// The functions that incubate_set_allocator was given.
void *(*take)(size_t);
bool (*free_taken)(void *);

// Allocates the memory of CPU tensors with `take`, or with libtorch's own allocator if `take` returns null.
struct Allocator final : at::Allocator {
  static void release(void *memory) {
    if (!free_taken(memory))
      c10::GetDefaultCPUAllocator()->raw_deallocate(memory);
  }
  at::DataPtr allocate(size_t bytes) override {
    if (void *memory = take(bytes))
      return {memory, memory, &release, at::Device(at::kCPU)};
    return c10::GetDefaultCPUAllocator()->allocate(bytes);
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void *to, const void *from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

// The kernels of fused attention, numbered as in libtorch.rs.
enum Kernel { NONE, FLASH, EFFICIENT, CUDNN, FLASH_FOR_CPU };

// The kernel that libtorch prefers among the allowed kernels that can compute with these tensors; NONE if there is no such kernel.
Kernel preferred(const at::Tensor &q, const at::Tensor &k, const at::Tensor &v) {
  switch (at::SDPBackend(at::_fused_sdp_choice(q, k, v))) {
  case at::SDPBackend::flash_attention:
    if (q.is_cpu())
      return FLASH_FOR_CPU;
    // FlashAttention takes only head sizes that are multiples of 8. libtorch's own attention pads other sizes, but this file does
    // not.
    return q.size(-1) % 8 == 0 ? FLASH : NONE;
  case at::SDPBackend::efficient_attention:
    return EFFICIENT;
  case at::SDPBackend::cudnn_attention:
    return CUDNN;
  default:
    return NONE;
  }
}

// Joins three tensors (b, h, n, e) into one tensor (b, n, 3, h, e): batch, heads, tokens, head size. Makes no copy if the three
// tensors are already the parts of such a tensor.
at::Tensor packed(at::Tensor dq, at::Tensor dk, at::Tensor dv) {
  dq = dq.transpose(1, 2), dk = dk.transpose(1, 2), dv = dv.transpose(1, 2);
  auto b = dq.size(0), n = dq.size(1), h = dq.size(2), e = dq.size(3), start = dq.storage_offset();
  auto strides = {3 * n * h * e, 3 * h * e, e, int64_t(1)};
  bool are_parts = dq.storage().is_alias_of(dk.storage()) && dq.storage().is_alias_of(dv.storage()) &&
                   dk.storage_offset() == start + h * e && dv.storage_offset() == start + 2 * h * e;
  for (auto &part : {dq, dk, dv})
    are_parts = are_parts && part.strides().equals(strides);
  if (are_parts)
    return dq.as_strided({b, n, 3, h, e}, {3 * n * h * e, 3 * h * e, h * e, e, 1}, start);
  return at::stack({dq, dk, dv}, 2);
}
} // namespace

extern "C" {

// Writes the gradient of x and, if `trained` is true, the gradients of weight and bias.
char *incubate_layer_norm_backward(at::Tensor **out, const at::Tensor *gradient, const at::Tensor *x,
                                   const at::Tensor *mean, const at::Tensor *scale, const at::Tensor *weight,
                                   const at::Tensor *bias, bool trained) {
  return error_of([&] {
    auto [dx, dweight, dbias] = at::native_layer_norm_backward(*gradient, *x, weight->sizes(), *mean, *scale, *weight,
                                                               *bias, {true, trained, trained});
    out[0] = new at::Tensor(dx);
    if (trained) {
      out[1] = new at::Tensor(dweight);
      out[2] = new at::Tensor(dbias);
    }
  });
}

// Differentiates through the graph of a tensor, given the tensor's own gradient, and adds to the gradients of the graph's leaves.
// The graph stays, because other tensors may share a part of it.
char *incubate_backward(const at::Tensor *tensor, const at::Tensor *gradient) {
  return error_of([&] { tensor->backward(*gradient, /*retain_graph=*/true); });
}

// Adds the product of two bf16 matrices to an fp32 matrix without rounding the product to bf16. Only GPUs have this operator.
char *incubate_add_product(at::Tensor *sum, const at::Tensor *a, const at::Tensor *b) {
  return error_of([&] { at::addmm_outf(*sum, *a, *b, at::kFloat, /*beta=*/1, /*alpha=*/1, *sum); });
}

// Updates weights and moments in place. The gradients are divided by `divisor` first. Nothing is updated if `skip` is 1.
char *incubate_fused_adamw(const at::Tensor *weights, const at::Tensor *gradients, const at::Tensor *exp_avg,
                           const at::Tensor *exp_avg_sq, const at::Tensor *step, const at::Tensor *divisor,
                           const at::Tensor *skip, double lr, double beta1, double beta2, double weight_decay,
                           double eps) {
  return error_of([&] {
    at::_fused_adamw_({*weights}, {*gradients}, {*exp_avg}, {*exp_avg_sq}, {}, {*step}, lr, beta1, beta2, weight_decay,
                      eps, /*amsgrad=*/false, /*maximize=*/false, *divisor, *skip);
  });
}

// Does the same as incubate_fused_adamw, for SGD with momentum.
char *incubate_fused_sgd(const at::Tensor *weights, const at::Tensor *gradients, const at::Tensor *moment,
                         const at::Tensor *divisor, const at::Tensor *skip, double lr, double momentum, bool nesterov,
                         double weight_decay) {
  return error_of([&] {
    at::_fused_sgd_({*weights}, {*gradients}, {*moment}, weight_decay, momentum, lr, /*dampening=*/0.0, nesterov,
                    /*maximize=*/false, /*is_first_step=*/false, *divisor, *skip);
  });
}

// Sets which kernels of fused attention libtorch may use from now on.
char *incubate_allow_attention(bool flash, bool efficient, bool cudnn) {
  return error_of([&] {
    at::globalContext().setSDPUseFlash(flash);
    at::globalContext().setSDPUseMemEfficient(efficient);
    at::globalContext().setSDPUseCuDNN(cudnn);
  });
}

// Computes attention of q, k and v, each (b, h, n, e), with a fused kernel. Writes the number of the kernel, which is 0 if no
// kernel takes the tensors. Otherwise also writes the output, logsumexp, seed and offset of the generator, and the cumulative
// lengths of q and k. The backward pass takes these six tensors, of which some kernels leave some undefined.
char *incubate_attention(int *kernel, at::Tensor **out, at::Tensor *const *qkv) {
  return error_of([&] {
    auto &q = *qkv[0], &k = *qkv[1], &v = *qkv[2];
    auto write = [&](std::initializer_list<at::Tensor> tensors) {
      for (auto &tensor : tensors)
        *out++ = new at::Tensor(tensor);
    };
    *kernel = preferred(q, k, v);
    if (*kernel == FLASH) {
      auto [y, logsumexp, cum_q, cum_k, max_q, max_k, seed, offset, mask] =
          at::_scaled_dot_product_flash_attention(q, k, v);
      write({y, logsumexp, seed, offset, cum_q, cum_k});
    } else if (*kernel == EFFICIENT) {
      auto [y, logsumexp, seed, offset] = at::_scaled_dot_product_efficient_attention(q, k, v, {}, true);
      write({y, logsumexp, seed, offset, {}, {}});
    } else if (*kernel == CUDNN) {
      auto [y, logsumexp, cum_q, cum_k, max_q, max_k, seed, offset, mask] =
          at::_scaled_dot_product_cudnn_attention(q, k, v, {}, true);
      write({y, logsumexp, seed, offset, cum_q, cum_k});
    } else if (*kernel == FLASH_FOR_CPU) {
      auto [y, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v);
      write({y, logsumexp, {}, {}, {}, {}});
    }
  });
}

// Writes the gradients of q, k and v as one tensor (b, n, 3, h, e), given the gradient of the output. `kept` are the six tensors
// that incubate_attention wrote.
char *incubate_attention_backward(at::Tensor **out, int kernel, const at::Tensor *gradient, at::Tensor *const *qkv,
                                  at::Tensor *const *kept) {
  return error_of([&] {
    auto &q = *qkv[0], &k = *qkv[1], &v = *qkv[2];
    auto &y = *kept[0], &logsumexp = *kept[1], &seed = *kept[2], &offset = *kept[3], &cum_q = *kept[4], &cum_k = *kept[5];
    auto n = q.size(2);
    at::Tensor dq, dk, dv, dmask;
    if (kernel == FLASH) {
      std::tie(dq, dk, dv) = at::_scaled_dot_product_flash_attention_backward(
          *gradient, q, k, v, y, logsumexp, cum_q, cum_k, n, n, 0.0, false, seed, offset);
    } else if (kernel == EFFICIENT) {
      // This is the call inside _scaled_dot_product_efficient_attention_backward, except that the three gradients share one
      // storage.
      auto bnhe = [](const at::Tensor &bhne) { return bhne.transpose(1, 2); };
      std::tie(dq, dk, dv, dmask) = at::_efficient_attention_backward(
          bnhe(*gradient), bnhe(q), bnhe(k), bnhe(v), {}, bnhe(y), {}, {}, n, n, logsumexp, 0.0, seed, offset,
          /*custom_mask_type=*/0, /*bias_requires_grad=*/false, {}, {}, {}, /*shared_storage_dqdkdv=*/true);
      dq = bnhe(dq), dk = bnhe(dk), dv = bnhe(dv);
    } else if (kernel == CUDNN) {
      std::tie(dq, dk, dv) = at::_scaled_dot_product_cudnn_attention_backward(
          *gradient, q, k, v, y, logsumexp, seed, offset, {}, cum_q, cum_k, n, n, 0.0, false);
    } else {
      std::tie(dq, dk, dv) = at::_scaled_dot_product_flash_attention_for_cpu_backward(*gradient, q, k, v, y,
                                                                                     logsumexp, 0.0, false);
    }
    *out = new at::Tensor(packed(dq, dk, dv));
  });
}

// Writes an uninitialised tensor in pinned host memory, with the data type of `alike`.
char *incubate_empty_pinned(at::Tensor **out, const int64_t *sizes, size_t dimensions, const at::Tensor *alike) {
  return error_of([&] {
    auto options = at::TensorOptions(alike->scalar_type()).pinned_memory(true);
    *out = new at::Tensor(at::empty(at::IntArrayRef(sizes, dimensions), options));
  });
}

// Begins to record the calls of libtorch's functions on the calling thread and, if `gpus` is true, the kernels of all GPUs.
char *incubate_trace_start(bool gpus) {
  return error_of([&] {
    using namespace torch::autograd::profiler;
    std::set<ActivityType> activities{ActivityType::CPU};
    if (gpus)
      activities.insert(ActivityType::CUDA);
    ProfilerConfig config(ProfilerState::KINETO);
    prepareProfiler(config, activities);
    enableProfiler(config, activities);
  });
}

// Ends the recording and writes it to a file in Chrome's trace format.
char *incubate_trace_write(const char *path) {
  return error_of([&] { torch::autograd::profiler::disableProfiler()->save(path); });
}

// Makes libtorch take and free the memory of CPU tensors by these functions. If `take_memory` returns null, libtorch's own
// allocator serves the tensor.
void incubate_set_allocator(void *(*take_memory)(size_t), bool (*free_memory)(void *)) {
  take = take_memory, free_taken = free_memory;
  // The allocator must outlive all tensors, so it is never deleted.
  static Allocator *allocator = new Allocator;
  c10::SetCPUAllocator(allocator);
}

// Gives the GPU memory in libtorch's cache back to the driver.
char *incubate_empty_cache() {
  return error_of([] { at::accelerator::emptyCache(); });
}
}
