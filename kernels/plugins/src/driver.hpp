// The CUDA driver, loaded when the first kernel runs, so that plugins can be listed on a machine without one.
#pragma once

#include "entry.hpp"

#include <cstddef>

namespace vp {

// Compute capability of the current device, 90 for 9.0. Throws Refused without a driver or device.
int currentCapability();

// Loads a kernel into the current device, once; later launches only take a shared lock.
void load(Entry const& entry);

// Enqueues a launch on a stream. `arguments` point to the values of the kernel's parameters, hidden ones included.
void launch(Entry const& entry, unsigned const (&grid)[3], void* stream, void** arguments);

}  // namespace vp
