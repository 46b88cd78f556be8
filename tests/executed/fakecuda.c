/* A libcuda.so.1 for a machine without a card: enough for Triton's own driver and launchers.
 *
 * It describes one Hopper card, refuses what a card would refuse of a launch or of a tensor map, and
 * hands every launch to a callback, which executes it. Memory is the process's own.
 */
#include <stdint.h>
#include <string.h>

#include "cuda.h"

enum { REFUSED = CUDA_ERROR_INVALID_VALUE, MAX_SHARED_BYTES = 232448 };

typedef void (*launch_callback)(uint64_t function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                unsigned threads, unsigned shared_bytes, void **params);
static launch_callback callback;

void executed_set_callback(launch_callback given) { callback = given; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = MAX_SHARED_BYTES; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1000; /* clock rates and the bus, which nothing here reads */
  }
  return CUDA_SUCCESS;
}

/* A module and its function are one number, which the callback knows a kernel by. */
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  static uintptr_t number;
  return *module = (CUmodule)++number, CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  return *function = (CUfunction)module, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  return *text = "refused by tests/executed/fakecuda.c", CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  if (!callback || !config->gridDimX || !config->gridDimY || !config->gridDimZ || config->gridDimY > 65535 ||
      config->gridDimZ > 65535 || config->blockDimX > 1024 || config->sharedMemBytes > MAX_SHARED_BYTES)
    return REFUSED;
  callback((uintptr_t)function, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
           config->sharedMemBytes, params);
  return CUDA_SUCCESS;
}

/* The 128 opaque bytes of a tensor map, as asynchronous.py reads them. */
typedef struct {
  uint64_t magic, address, sizes[2], row_bytes;
  uint32_t box[2], swizzle, element_bytes;
} tensor_map;
_Static_assert(sizeof(tensor_map) <= sizeof(CUtensorMap), "a tensor map has 128 bytes");

/* Only what the kernels ask for: two dimensions. The rules are those of the CUDA driver API's manual. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  static const unsigned widest_box[] = {1u << 30, 32, 64, 128}; /* bytes of a row, by swizzle */
  unsigned bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  int known = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ||
              type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_UINT16;
  if (!known || rank != 2 || interleave || fill || swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return REFUSED;
  if (((uintptr_t)map & 63) || ((uintptr_t)address & 15) || (strides[0] & 15) || strides[0] >= (1ull << 40))
    return REFUSED;
  for (int i = 0; i < 2; i++)
    if (!sizes[i] || sizes[i] > (1ull << 32) || !box[i] || box[i] > 256 || element_strides[i] != 1) return REFUSED;
  if ((box[0] * bytes & 15) || box[0] * bytes > widest_box[swizzle]) return REFUSED;
  tensor_map made = {0x7e4507, (uintptr_t)address, {sizes[0], sizes[1]}, strides[0], {box[0], box[1]}, swizzle, bytes};
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}
