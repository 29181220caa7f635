/* A libcuda for tests: one GPU whose memory is the host's, and the checkpoint calls. A process's state is a file named
 * by its id in the directory $FAKE_CUDA. Structures whose unused bytes are not zero are refused. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, ILLEGAL_STATE = 401, NOT_SUPPORTED = 801 };
enum { RUNNING, LOCKED, CHECKPOINTED };
struct uuid { unsigned char bytes[16]; };
static int initialised;

static void path(char *out, int pid) { sprintf(out, "%s/%d", getenv("FAKE_CUDA"), pid); }

static int get(int pid) {
    char name[4096], text[16] = {0};
    path(name, pid);
    int file = open(name, O_RDONLY), state = RUNNING;
    if (file >= 0) {
        if (read(file, text, 15) > 0) state = atoi(text);
        close(file);
    }
    return state;
}

static int step(int pid, int before, int after, const void *args, size_t used) {
    char name[4096], text[16];
    for (size_t i = used; i < 64; i++)
        if (((const unsigned char *)args)[i]) return INVALID_VALUE;
    if (!initialised) return NOT_INITIALIZED;
    if (get(pid) != before) return ILLEGAL_STATE;
    path(name, pid);
    int file = open(name, O_CREAT | O_WRONLY | O_TRUNC, 0600);
    if (write(file, text, sprintf(text, "%d", after)) < 0) return INVALID_VALUE;
    close(file);
    return OK;
}

int cuInit(unsigned flags) { initialised = !flags; return flags ? INVALID_VALUE : OK; }
int cuDriverGetVersion(int *version) { *version = 13000; return OK; }
int cuDeviceGetCount(int *count) { *count = 1; return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? INVALID_VALUE : OK; }
int cuDeviceGetUuid(struct uuid *uuid, int device) { memset(uuid, 0xaa, 16); return device ? INVALID_VALUE : OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)0x700000000001; return device ? INVALID_VALUE : OK; }
int cuCtxSetCurrent(void *context) { return context == (void *)0x700000000001 ? OK : INVALID_VALUE; }
int cuCtxSynchronize(void) { return OK; }
int cuMemAlloc_v2(unsigned long long *address, size_t nbytes) { *address = (unsigned long long)malloc(nbytes); return OK; }
int cuMemcpyHtoD_v2(unsigned long long to, const void *from, size_t nbytes) { memcpy((void *)to, from, nbytes); return OK; }
int cuMemcpyDtoH_v2(void *to, unsigned long long from, size_t nbytes) {
    while (get(getpid()) != RUNNING) usleep(1000); /* the driver blocks the calls of a process that is not */
    memcpy(to, (void *)from, nbytes);
    return OK;
}
int cuGetErrorName(int code, const char **text) {
    *text = code == NOT_SUPPORTED ? "CUDA_ERROR_NOT_SUPPORTED" : 0;
    return *text ? OK : INVALID_VALUE;
}
int cuGetErrorString(int code, const char **text) { *text = "operation not supported"; return code == NOT_SUPPORTED ? OK : INVALID_VALUE; }

int cuCheckpointProcessGetState(int pid, int *state) { *state = get(pid); return initialised ? OK : NOT_INITIALIZED; }
int cuCheckpointProcessGetRestoreThreadId(int pid, int *tid) { *tid = pid; return OK; }
int cuCheckpointProcessLock(int pid, void *args) {
    return *(unsigned *)args ? step(pid, RUNNING, LOCKED, args, 4) : INVALID_VALUE;
}
int cuCheckpointProcessCheckpoint(int pid, void *args) {
    return getenv("FAKE_CUDA_GB10") ? NOT_SUPPORTED : step(pid, LOCKED, CHECKPOINTED, args, 0);
}
int cuCheckpointProcessRestore(int pid, void *args) { return step(pid, CHECKPOINTED, LOCKED, args, 0); }
int cuCheckpointProcessUnlock(int pid, void *args) { return step(pid, LOCKED, RUNNING, args, 0); }
