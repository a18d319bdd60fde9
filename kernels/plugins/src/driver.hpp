// The CUDA driver, found when the first kernel runs: a machine without one can load the library and list its plugins.
#pragma once

#include "entry.hpp"

#include <cstddef>

namespace vp {

// Compute capability of the current device, 90 for 9.0; throws Refused where there is no driver or no device.
int currentCapability();

// Loads a kernel into the current device, once; later launches of it take no lock but a shared one.
void load(Entry const& entry);

// Puts one launch on a stream. `arguments` are pointers to the values of the kernel's parameters, hidden ones included.
void launch(Entry const& entry, unsigned const (&grid)[3], void* stream, void** arguments);

}  // namespace vp
