// Threads of LibTorch and its BLAS, and the kernels that the BLAS uses.
#pragma once

#include <string>

namespace itwin::worker {

// For the whole process; called once, before any tensor work.
void SetComputeThreads(int threads);

// OpenBLAS falls back to kernels of 2004 on a processor that is newer than itself (0.3.21 on
// Sapphire Rapids: a fifth of the speed). Where that has happened, and OPENBLAS_CORETYPE does not
// say otherwise, switches to the newest kernels that this processor has instructions for. Call
// before any thread works. Returns "SkylakeX": the kernels in use; "" when the BLAS is not
// OpenBLAS.
std::string ChooseBlasKernels();

// Tensor work that the calling thread starts stays on it.
void UseOneComputeThreadHere();

}  // namespace itwin::worker
