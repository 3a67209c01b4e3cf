// Access to the launch parameters of tuning.h from benchmarks, through ctypes.

#include "cuda/tuning.h"

#include <cstring>

// Sets a parameter and returns its previous value; a negative value only reads. -1: no such parameter.
extern "C" __attribute__((visibility("default"))) int pruneops_tune(const char* name, int value) {
  for (auto* tuned = pruneops::Tuned::first; tuned; tuned = tuned->next) {
    if (std::strcmp(tuned->name, name)) continue;
    const int previous = tuned->value;
    if (value >= 0) tuned->value = value;
    return previous;
  }
  return -1;
}
