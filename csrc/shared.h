// What the module has for processes that share memory.
#pragma once

#include <pybind11/pybind11.h>

void bind_shared(pybind11::module_& m);
