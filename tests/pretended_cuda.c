// A libcuda for tests without a GPU: memory is the host's, a kernel takes the time that PRETENDED_TIMES says, and a
// virtual clock runs. What is allocated and made is counted, so that tests see what is not given back.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char name[200]; double us; } Kernel;
typedef struct { int count; double us; } Graph;
static double now_us, captured_us;
static int capturing, live;

static double time_of(const char* name) {  // lines "substring us"; the first that is in the name
    const char* path = getenv("PRETENDED_TIMES");
    FILE* file = path ? fopen(path, "r") : NULL;
    char word[256]; double us = 50.0, found;
    while (file && fscanf(file, "%255s %lf", word, &found) == 2)
        if (strstr(name, word)) { us = found; break; }
    if (file) fclose(file);
    return us;
}
static double noise(void) { return 1.0 + 0.01 * ((double)rand() / RAND_MAX - 0.5); }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* v) { *v = 13000; return 0; }
int cuDeviceGetCount(int* n) { const char* count = getenv("PRETENDED_GPUS"); *n = count ? atoi(count) : 1; return 0; }
int cuDeviceGetName(char* name, int n, int d) { strncpy(name, "NVIDIA H200", n); return 0; }
int cuDeviceGetUuid_v2(unsigned char* u, int d) { memset(u, 7, 16); return 0; }
int cuDeviceTotalMem_v2(size_t* n, int d) { *n = (size_t)1 << 37; return 0; }
int cuDeviceGetAttribute(int* v, int a, int d) {
    switch (a) {
        case 75: *v = 9; break;
        case 76: *v = 0; break;
        case 16: *v = 132; break;
        case 38: *v = 1 << 20; break;
        case 36: *v = 3201000; break;
        case 97: *v = 232448; break;
        default: *v = 0;
    }
    return 0;
}
int cuGetErrorName(int e, const char** s) { *s = "CUDA_ERROR_PRETENDED"; return 0; }
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)16; return 0; }
int cuCtxGetCurrent(void** c) { *c = (void*)16; return 0; }
int cuCtxPushCurrent_v2(void* c) { return 0; }
int cuCtxPopCurrent_v2(void** c) { return 0; }
int cuStreamCreate(void** s, unsigned f) { *s = malloc(1); live++; return 0; }
int cuStreamDestroy_v2(void* s) { free(s); live--; return 0; }
int cuStreamIsCapturing(void* s, int* c) { *c = capturing; return 0; }
int cuStreamSynchronize(void* s) { return 0; }
int cuMemAlloc_v2(uint64_t* p, size_t n) {
    void* m = NULL;
    if (posix_memalign(&m, 256, n)) return 2;
    *p = (uint64_t)m; live++; return 0;
}
int cuMemFree_v2(uint64_t p) { free((void*)p); live--; return 0; }
int cuMemcpyHtoD_v2(uint64_t d, const void* s, size_t n) { memcpy((void*)d, s, n); return 0; }
int cuMemcpyDtoH_v2(void* d, uint64_t s, size_t n) { memcpy(d, (void*)s, n); return 0; }
int cuMemcpyDtoDAsync_v2(uint64_t d, uint64_t s, size_t n, void* st) { memcpy((void*)d, (void*)s, n); return 0; }
int cuMemsetD32Async(uint64_t p, unsigned v, size_t n, void* s) { if (!capturing) memset((void*)p, 0, 4 * n); return 0; }
int cuModuleLoadData(void** m, const void* image) { *m = (void*)32; return 0; }
int cuModuleGetFunction(Kernel** f, void* m, const char* name) {
    *f = malloc(sizeof(Kernel));
    snprintf((*f)->name, 200, "%s", name);
    (*f)->us = time_of(name);
    return 0;
}
int cuFuncSetAttribute(void* f, int a, int v) { return 0; }
int cuTensorMapEncodeTiled(void* map, int t, int r, void* p, const void* a, const void* b, const void* c, const void* d,
                           int e, int f, int g, int h) { memset(map, 1, 128); return 0; }
static void run(double us) { if (capturing) captured_us += us; else now_us += us * noise(); }
int cuLaunchKernelEx(void* config, Kernel* f, void** p, void** e) {
    if (f->us < 0) return 701;  // out of resources
    run(f->us);
    return 0;
}
int cuStreamBeginCapture_v2(void* s, int mode) { capturing = 1; captured_us = 0; return 0; }
int cuStreamEndCapture(void* s, Graph** g) {
    *g = malloc(sizeof(Graph)); (*g)->us = captured_us; capturing = 0; live++; return 0;
}
int cuGraphInstantiateWithFlags(Graph** e, Graph* g, unsigned long long f) {
    *e = malloc(sizeof(Graph)); **e = *g; live++; return 0;
}
int cuGraphUpload(Graph* g, void* s) { return 0; }
int cuGraphDestroy(Graph* g) { free(g); live--; return 0; }
int cuGraphExecDestroy(Graph* g) { free(g); live--; return 0; }
int cuGraphLaunch(Graph* g, void* s) { run(g->us); return 0; }
int cuEventCreate(double** e, unsigned f) { *e = malloc(8); live++; return 0; }
int cuEventDestroy_v2(double* e) { free(e); live--; return 0; }
int cuEventRecord(double* e, void* s) { *e = now_us; return 0; }
int cuEventSynchronize(double* e) { return 0; }
int cuEventElapsedTime(float* ms, double* a, double* b) { *ms = (*b - *a) / 1e3; return 0; }
int pretended_live(void) { return live; }
