// The binding of device.h: every call gives the interpreter's lock away.
#include "device_module.h"

#include <pybind11/stl.h>

#include "device.h"
#include "dlpack.h"

namespace py = pybind11;
namespace device = mpilsgd::device;
using device::Event;

#ifdef MPILSGD_EMULATED
constexpr std::int32_t kDeviceType = mpilsgd::kDLCPU;  // for torch it is the host's
#else
constexpr std::int32_t kDeviceType = mpilsgd::kDLCUDA;
#endif

void bind_device(py::module_& core) {
  py::module_ m = core.def_submodule("device", "Memory, streams and events of CUDA devices.");
  using Free = py::call_guard<py::gil_scoped_release>;

  // What returns bytes makes them when it has the lock again.
  const auto unlocked = [](auto call) {
    std::string found;
    {
      py::gil_scoped_release release;
      found = call();
    }
    return py::bytes(found);
  };

  m.def("count", &device::count, Free());
  m.def(
      "identity", [=](int index) { return unlocked([&] { return device::identity(index); }); },
      py::arg("device"), "The GPU's uuid, the same in every process.");
  m.def("can_access", &device::can_access, py::arg("device"), py::arg("other"), Free());
  m.def("enable_access", &device::enable_access, py::arg("device"), py::arg("other"), Free());
  m.def("versions", &device::versions, Free(), "Of the driver and of the runtime.");

  m.def("allocate", &device::allocate, py::arg("device"), py::arg("nbytes"), Free());
  m.def("release", &device::release, py::arg("device"), py::arg("address"), Free());
  m.def("memory", &device::memory, py::arg("device"), Free(), "Free and total bytes.");
  m.def(
      "memory_handle",
      [=](int index, device::Address address) {
        return unlocked([&] { return device::memory_handle(index, address); });
      },
      py::arg("device"), py::arg("address"), "For another process; of what allocate() gave.");
  m.def(
      "vector",
      [](int index, device::Address address, std::int64_t nbytes) {
        return mpilsgd::bytes_at(address, nbytes, kDeviceType, kDeviceType == mpilsgd::kDLCPU ? 0 : index);
      },
      py::arg("device"), py::arg("address"), py::arg("nbytes"),
      "Bytes in device memory for torch.from_dlpack; they must outlive the tensor.");
  m.def("open_memory", &device::open_memory, py::arg("device"), py::arg("handle"), Free());
  m.def("close_memory", &device::close_memory, py::arg("device"), py::arg("address"), Free());
  m.def("pin", &device::pin, py::arg("address"), py::arg("nbytes"), py::arg("device") = -1, Free());
  m.def("unpin", &device::unpin, py::arg("address"), Free());

  // "from" is Python's own word.
  m.def("copy", &device::copy, py::arg("device"), py::arg("to"), py::arg("source"), py::arg("nbytes"),
        py::arg("stream"), Free());
  m.def("fill", &device::fill, py::arg("device"), py::arg("address"), py::arg("byte"), py::arg("nbytes"),
        py::arg("stream"), Free());
  m.def("new_stream", &device::new_stream, py::arg("device"), Free());
  m.def("drop_stream", &device::drop_stream, py::arg("device"), py::arg("stream"), Free());
  m.def("synchronize", &device::synchronize, py::arg("device"), py::arg("stream"), Free());

  py::class_<Event>(m, "Event")
      .def(py::init<int, bool>(), py::arg("device"), py::arg("shared"), Free())
      .def_static("opened", &Event::opened, py::arg("device"), py::arg("handle"), Free())
      .def("record", &Event::record, py::arg("stream"), Free())
      .def("wait", &Event::wait, py::arg("stream"), Free(), "The stream waits; the host does not.")
      .def("passed", &Event::passed, Free())
      .def("handle", [=](Event& event) { return unlocked([&] { return event.handle(); }); });
}
