// Running a plan: every value in its parameter's place, then launches in order.
#pragma once

#include "operator.hpp"

namespace vp {

// Loads the kernels of a plan, so that running it allocates nothing on the device.
void prepare(Plan const& plan);

// Puts the plan's launches on a stream. Pointers are device memory: `workspace` of plan.workspace bytes.
// Throws Refused for a pointer or a size that breaks a promise of the compiled code, before the first launch of it.
void run(Plan const& plan, void const* const* inputs, void* const* outputs, void* workspace, void* stream);

}  // namespace vp
