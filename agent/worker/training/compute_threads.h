// Threads of LibTorch and its BLAS.
#pragma once

namespace itwin::worker {

// For the whole process; called once, before any tensor work.
void SetComputeThreads(int threads);

// Tensor work that the calling thread starts stays on it.
void UseOneComputeThreadHere();

}  // namespace itwin::worker
