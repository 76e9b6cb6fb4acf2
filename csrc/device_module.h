// The submodule _core.device.
#pragma once

#include <pybind11/pybind11.h>

void bind_device(pybind11::module_& core);
