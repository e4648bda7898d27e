// Copies of input files on the node's own disk, made once per node.
#pragma once

#include <filesystem>

namespace itwin::worker {

// The copy of `source` below `directory`: made now, by whichever process of the node comes first; the
// others wait for it. A copy is known by path, size and time of the source, and compared with it by
// SHA-256 when it is made. Throws ResourceError when the disk is full.
std::filesystem::path CopyToNode(const std::filesystem::path& source,
                                 const std::filesystem::path& directory);

// Where such copies go: $SLURM_TMPDIR, else $TMPDIR, with a folder of ours; empty when neither is set.
std::filesystem::path NodeCacheDirectory();

}  // namespace itwin::worker
