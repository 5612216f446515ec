// A device guard for "cuda" that does nothing: with it, a torch built for the CPU alone holds tensors that say they are there.
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>); }
