// A stub libcuda.so.1: loads any kernel, runs none, counts launches and keeps the configuration of the last one.
// tests/compile_only_driver.py builds it, to run Triton's driver and launchers without a GPU.

#include <stddef.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3], shared_bytes;
} LaunchConfig;  // as CUlaunchConfig begins

long stub_launches = 0;
LaunchConfig stub_last;

int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
  ++stub_launches;
  memcpy(&stub_last, config, sizeof stub_last);
  return 0;
}

// Enum values of cuda.h. Device: 97 maximum shared memory per block (opt-in), 16 multiprocessors, 10 warp size.
// Function: 0 maximum threads per block, 4 registers.
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 97 ? 232448 : attribute == 16 ? 132 : attribute == 10 ? 32 : 1024;
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0;
  return 0;
}
int cuGetErrorString(int code, const char** message) {
  *message = "stub";
  return 0;
}
static int handle(void** out) {
  *out = (void*)0x10;
  return 0;
}
int cuCtxGetCurrent(void** context) { return handle(context); }
int cuDevicePrimaryCtxRetain(void** context, int device) { return handle(context); }
int cuModuleLoadData(void** module, const void* image) { return handle(module); }
int cuModuleGetFunction(void** function, void* module, const char* name) { return handle(function); }
int cuPointerGetAttribute(void** data, int attribute, unsigned long long pointer) {
  *data = (void*)pointer;
  return 0;
}
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cuCtxGetLimit(size_t* value, int limit) {
  *value = 0;
  return 0;
}
int cuStreamIsCapturing(void* stream, int* status) {
  *status = 0;
  return 0;
}
int cuCtxSetCurrent(void* context) { return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuModuleUnload(void* module) { return 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) {
  *clusters = 1;
  return 0;
}
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
