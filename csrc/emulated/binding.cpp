// The stand-in's controls as the submodule _core.emulated, which is there in this build alone.
#include "binding.h"

#include <pybind11/stl.h>

#include <stdexcept>

#include "control.h"
#include "cuda_runtime.h"
#include "sample_kernels.h"

namespace py = pybind11;
namespace emulated = mpilsgd::emulated;

void bind_emulated(py::module_& core) {
  py::module_ m = core.def_submodule("emulated", "A stand-in for the CUDA runtime, for tests.");
  m.def("owner", &emulated::owner, py::arg("address"), "The device whose memory this is, or -1.");
  m.def(
      "drain",
      [](std::uintptr_t stream) {
        int error;
        {
          py::gil_scoped_release release;
          error = emulated::drain(stream);
        }
        if (error == cudaSuccess) return;
        throw std::runtime_error(std::string("mpilsgd: CUDA: drain: ") +
                                 cudaGetErrorString(cudaError_t(error)));
      },
      py::arg("stream") = 0,
      "Waits for a stream, or for the default streams of all devices; is not counted.");
  m.def("capture", &emulated::capture, py::arg("stream"), py::arg("on"),
        "A stream is capturing a graph from now on, or no longer.");
  m.def("capturing", &emulated::capturing, py::arg("stream"));
  m.def("copy_later", &emulated::copy_later, py::arg("to"), py::arg("source"), py::arg("nbytes"),
        py::arg("stream"),
        "A copy between vectors of the device by a stream, as torch makes it; is not counted.");
  m.def("seed", &emulated::seed, py::arg("number"), "Of delays and of the order of blocks and threads.");
  m.def("delay", &emulated::set_delay, py::arg("seconds"),
        "Work starts so much later at most, unless somebody waits for it.");
  m.def("fail", &emulated::fail, py::arg("name"), py::arg("nth"), py::arg("error"),
        "The nth next call of this name does nothing and returns this error.");
  m.def("log", &emulated::counts, "How often each call was made.");
  m.def(
      "launches",
      [] {
        py::list all;
        for (const auto& one : emulated::launches())
          all.append(py::make_tuple(one.kernel, one.grid, one.block));
        return all;
      },
      "Of each kernel the types of its arguments, the blocks and their threads.");
  m.def("clear", &emulated::clear, py::call_guard<py::gil_scoped_release>(),
        "Forgets calls, failures to come and errors; delay and seed are as at the start.");
  m.def("last_error", [] { return int(cudaGetLastError()); }, "And forgets it, as CUDA does.");
  m.def(
      "uneven_barrier",
      [] {
        py::gil_scoped_release release;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(1);
        config.blockDim = dim3(64);
        cudaLaunchKernelEx(&config, emulated::uneven_barrier, 3);
      },
      "Launches a kernel that is wrong: some threads leave before a barrier.");
  m.def(
      "order",
      [](std::uintptr_t into, unsigned blocks) {
        py::gil_scoped_release release;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(blocks);
        config.blockDim = dim3(32);
        cudaLaunchKernelEx(&config, emulated::order, reinterpret_cast<unsigned*>(into));
      },
      py::arg("into"), py::arg("blocks"),
      "Launches a kernel: into[0] counts its threads, 32 a block; behind it stands the turn of each.");
}
