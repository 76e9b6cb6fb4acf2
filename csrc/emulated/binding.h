#pragma once

#include <pybind11/pybind11.h>

void bind_emulated(pybind11::module_& core);
