// A device that calls itself CUDA, and computes on the CPU in memory that both can read. See __init__.py.
//
// An operator on its tensors runs the CPU's kernel on aliases of them; what comes out that is new becomes its tensor. It
// reports what a GPU would make the host wait for, and refuses operands on different devices, as a GPU does.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

using namespace c10;

namespace {

const Device GPU(DeviceType::CUDA, 0);
const Stream STREAM(Stream::DEFAULT, GPU);

struct Guard : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return STREAM; }
  Stream getNewStream(Device, int) const override { return STREAM; }
  Stream getDefaultStream(Device) const override { return STREAM; }
  Stream exchangeStream(Stream) const noexcept override { return STREAM; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream&, const DeviceIndex, const EventFlag) const override { *event = this_event(); }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}

  static void* this_event() {
    static int event;
    return &event;
  }
};

impl::DeviceGuardImplRegistrar guard(DeviceType::CUDA, new Guard());

// What shares a storage's memory under the name of another device, and keeps it alive.
DataPtr shared(const Storage& owner, Device device) {
  return DataPtr(owner.mutable_data(), new Storage(owner), [](void* held) { delete static_cast<Storage*>(held); }, device);
}

at::Tensor with_storage(const at::Tensor& like, Storage storage, DispatchKey key) {
  auto tensor = at::detail::make_tensor<TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

at::Tensor moved(const at::Tensor& tensor, Device device, DispatchKey key) {
  const auto& storage = tensor.storage();
  Storage other(Storage::use_byte_size_t(), storage.nbytes(), shared(storage, device), GetCPUAllocator(), true);
  return with_storage(tensor, std::move(other), key);
}

// ---- what a host would wait for ----

void (*listener)(const char*) = nullptr;
bool refused = false;

void waits_for(const std::string& what) {
  if (listener) listener(what.c_str());
  TORCH_CHECK(!refused, "called a synchronizing CUDA operation: ", what);
}

const std::set<std::string> WAITS{
    "aten::_local_scalar_dense", "aten::bincount",       "aten::equal",           "aten::masked_select",
    "aten::nonzero",             "aten::nonzero.out",    "aten::unique_dim",      "aten::_unique2",
    "aten::unique_consecutive",  "aten::isin.Tensor_Tensor", "aten::isin.Tensor_Tensor_out",
};

// ---- operators ----

// A call's tensors on the device, each with its alias on the CPU.
struct Call {
  std::vector<std::pair<at::Tensor, at::Tensor>> aliases;
  bool on_gpu = false, on_cpu = false;

  at::Tensor alias(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.device().is_cuda()) {
      on_cpu |= tensor.device().is_cpu() && tensor.dim() > 0;
      return tensor;
    }
    on_gpu = true;
    for (auto& [original, other] : aliases)
      if (original.is_same(tensor)) return other;
    for (auto& [original, other] : aliases)
      if (original.storage().is_alias_of(tensor.storage()))
        return keep(tensor, with_storage(tensor, other.storage(), DispatchKey::CPU));
    return keep(tensor, moved(tensor, kCPU, DispatchKey::CPU));
  }

  at::Tensor keep(const at::Tensor& original, at::Tensor other) {
    aliases.emplace_back(original, other);
    return other;
  }

  at::Tensor result(const at::Tensor& tensor, bool is_ours) {
    if (!tensor.defined()) return tensor;
    for (auto& [original, other] : aliases)
      if (other.is_same(tensor)) return original;
    for (auto& [original, other] : aliases)
      if (tensor.has_storage() && other.storage().is_alias_of(tensor.storage()))
        return with_storage(tensor, original.storage(), DispatchKey::CUDA);
    return is_ours && tensor.device().is_cpu() ? moved(tensor, GPU, DispatchKey::CUDA) : tensor;
  }

  // What the CPU's kernel has done to an alias' sizes or memory, as to an `out` that did not fit.
  void take_over() {
    for (auto& [original, other] : aliases) {
      auto* storage = original.storage().unsafeGetStorageImpl();
      if (storage->data() != other.storage().data()) {
        storage->set_nbytes(other.storage().nbytes());
        storage->set_data_ptr_noswap(shared(other.storage(), GPU));
      }
      original.unsafeGetTensorImpl()->set_sizes_and_strides(other.sizes(), other.strides(), other.storage_offset());
    }
  }
};

void run_on_cpu(const OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string name = toString(op.operator_name());
  const auto count = op.schema().arguments().size(), returns = op.schema().returns().size();
  Call call;
  bool asked_for = false;  // by an argument
  std::vector<IValue> arguments(stack->end() - count, stack->end());
  torch::jit::drop(stack, count);
  for (auto& value : arguments) {
    if (value.isTensor()) {
      value = call.alias(value.toTensor());
    } else if (value.isTensorList()) {
      List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(call.alias(tensor));
      value = list;
    } else if (value.isOptionalTensorList()) {  // indices
      List<std::optional<at::Tensor>> list;
      for (std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
        if (tensor && tensor->defined() && (tensor->scalar_type() == kBool || tensor->scalar_type() == kByte))
          waits_for(name + " with a mask");
        list.push_back(tensor ? std::optional<at::Tensor>(call.alias(*tensor)) : std::nullopt);
      }
      value = list;
    } else if (value.isDevice()) {
      asked_for |= value.toDevice().is_cuda();
      value = Device(kCPU);
    }
  }
  const bool sizes_are_data = name == "aten::repeat_interleave.Tensor" && arguments[1].isNone();
  if (WAITS.count(name) || sizes_are_data) waits_for(name);
  TORCH_CHECK(!(call.on_cpu && call.on_gpu), name, ": expected all tensors on the same device, got cuda:0 and cpu");
  for (auto& value : arguments) stack->push_back(value);
  op.callBoxed(stack);
  call.take_over();
  std::vector<IValue> results(stack->end() - returns, stack->end());
  torch::jit::drop(stack, returns);
  for (auto& value : results) {
    if (value.isTensor()) {
      value = call.result(value.toTensor(), call.on_gpu || asked_for);
    } else if (value.isTensorList()) {
      List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(call.result(tensor, true));
      value = list;
    }
    stack->push_back(value);
  }
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.device() != source.device() && !non_blocking) waits_for("a copy between devices");
  Call call;
  call.alias(self).copy_(call.alias(source));
  return self;
}

at::Tensor& set_strided(at::Tensor& self, Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  tensor->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_whole(at::Tensor& self, Storage storage) {
  const auto elements = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_strided(self, std::move(storage), 0, {elements}, {1});
}

// The attention that is made of other operators.
int64_t choose_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;
}

at::Tensor on_cpu(const at::Tensor& tensor) {
  return tensor.device().is_cuda() ? moved(tensor, kCPU, DispatchKey::CPU) : tensor;
}

}  // namespace

namespace at {

struct CUDAHooks : CUDAHooksInterface {  // torch looks it up by this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", copy_);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Storage_storage_offset", set_strided);
  m.impl("_fused_sdp_choice", choose_attention);
}

TORCH_LIBRARY(pretend_gpu, m) {
  m.def("on_cpu(Tensor tensor) -> Tensor", torch::dispatch(DispatchKey::CompositeExplicitAutograd, on_cpu));
}

extern "C" void pretend_gpu_report_waits(void (*function)(const char*), bool refuse) {
  listener = function;
  refused = refuse;
}
