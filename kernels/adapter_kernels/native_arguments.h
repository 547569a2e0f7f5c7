// What native.cpp takes: memory on the CPU in float32 that nothing watches. See there.

#pragma once

#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/extension.h>

#include <optional>
#include <utility>

namespace adapter_kernels {

using at::Tensor;
using Optional = std::optional<Tensor>;

// Whether nothing watches or changes calls of torch, which these functions are not.
inline bool unwatched() {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
      !at::impl::torch_function_mode_enabled() && !at::autocast::is_autocast_enabled(at::kCPU) &&
      !c10::impl::tls_local_dispatch_key_set().included_.has_any(c10::DispatchKeySet(
          {c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::Functionalize,
           c10::DispatchKey::Tracer, c10::DispatchKey::PythonDispatcher}));
}

// The bytes from the first to the last number of x.
inline std::pair<const char*, const char*> extent(const Tensor& x) {
  int64_t last = x.numel() > 0 ? 1 : 0;
  for (int64_t i = 0; i < x.dim() && last > 0; ++i) last += (x.size(i) - 1) * x.stride(i);
  const char* start = static_cast<const char*>(x.const_data_ptr());
  return {start, start + last * x.element_size()};
}

inline bool apart(const Tensor& x, const Tensor& y) {
  const auto a = extent(x), b = extent(y);
  return a.second <= b.first || b.second <= a.first;
}

// Whether x is memory on the CPU, no gradient goes through it and no class of its own watches it.
inline bool plain(const Tensor& x) {
  static const c10::DispatchKeySet refused(
      {c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
       c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize,
       c10::DispatchKey::Batched, c10::DispatchKey::Negative, c10::DispatchKey::Conjugate,
       c10::DispatchKey::ZeroTensor, c10::DispatchKey::NestedTensor});
  if (!x.device().is_cpu() || x.layout() != at::kStrided || x.key_set().has_any(refused) ||
      (x.requires_grad() && at::GradMode::is_enabled()) || x._fw_grad(0).defined())
    return false;
  const char* memory = static_cast<const char*>(x.storage().data());
  const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(x));
  return extent(x).second <= memory + x.storage().nbytes() &&
      THPVariable_CheckTypeExact(Py_TYPE(object.ptr()));
}

inline bool takes(const Tensor& x, at::ScalarType dtype = at::kFloat) {
  return x.scalar_type() == dtype && plain(x);
}

// Rows of float32 that can be read one number after another.
inline bool takes_rows(const Tensor& x) {
  return takes(x) && x.dim() > 0 && x.numel() > 0 && x.stride(-1) == 1;
}

// A cache that can be written to: memory of its own for every slot.
inline bool takes_cache(const Tensor& x) {
  if (x.dim() != 4 || !takes_rows(x)) return false;
  for (int64_t i = 0; i < 4; ++i)
    if (x.size(i) > 1 && x.stride(i) == 0) return false;
  return !x.is_inference() || at::InferenceMode::is_enabled();
}

inline void written(const Tensor& x) {
  if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

}  // namespace adapter_kernels
