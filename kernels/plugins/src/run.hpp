// Runs a plan: fills in kernel arguments and launches in order.
#pragma once

#include "operator.hpp"

namespace vp {

// Loads the kernels of a plan, so that running it allocates no device memory.
void prepare(Plan const& plan);

// Enqueues the plan's launches on a stream. Pointers are device memory; `workspace` has plan.workspace bytes.
// Throws Refused, before that launch, if a pointer or size breaks a guarantee of the compiled code.
void run(Plan const& plan, void const* const* inputs, void* const* outputs, void* workspace, void* stream);

}  // namespace vp
