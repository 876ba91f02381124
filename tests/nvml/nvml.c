/* A stand-in for NVIDIA's libnvidia-ml.so.1: it answers what the JSON file named by NVML_FIXTURE
 * says, or NOT_SUPPORTED where that is silent, as a real driver does. Calls and structures are
 * those of nvml.h which nvidia-ml-py uses; handles are indexes, plus one. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, NOT_LOADED = 9, TIMEOUT = 10 };
typedef struct { uint64_t total, free, used; } Memory;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char busId[32]; } Pci;
typedef struct { unsigned pid; uint64_t memory; unsigned gpuInstance, computeInstance; } Process;

static char *text;

static const char *space(const char *p) { return p + strspn(p, " \t\r\n,:"); }

/* The end of the value that begins at p. */
static const char *skip(const char *p) {
    int depth = 0;
    p = space(p);
    do {
        if (*p == '"') { for (p++; *p != '"'; p++) if (*p == '\\') p++; p++; }
        else if (*p == '{' || *p == '[') { depth++; p++; }
        else if (*p == '}' || *p == ']') { depth--; p++; }
        else p += strcspn(p, ",]} \t\r\n");
        if (depth) p = space(p);
    } while (depth > 0);
    return p;
}

/* A member of an object, or an element of an array; NULL when there is none, or it is null. */
static const char *member(const char *p, const char *key) {
    if (!p || *(p = space(p)) != '{') return NULL;
    for (p = space(p + 1); *p && *p != '}'; p = space(skip(p))) {
        int found = !strncmp(p + 1, key, strlen(key)) && p[1 + strlen(key)] == '"';
        p = space(skip(p));
        if (found) return *p == 'n' ? NULL : p;
    }
    return NULL;
}

static const char *element(const char *p, unsigned index) {
    if (!p || *(p = space(p)) != '[') return NULL;
    for (p = space(p + 1); *p && *p != ']'; p = space(skip(p)))
        if (!index--) return p;
    return NULL;
}

static unsigned length(const char *p) {
    unsigned n = 0;
    while (element(p, n)) n++;
    return n;
}

static int number(const char *p, uint64_t *out) {
    if (!p) return NOT_SUPPORTED;
    *out = strtoull(space(p), NULL, 10);
    return SUCCESS;
}

static int string(const char *p, char *out, unsigned size) {
    if (!p) return NOT_SUPPORTED;
    p = space(p) + 1;
    snprintf(out, size, "%.*s", (int)strcspn(p, "\""), p);
    return SUCCESS;
}

static int small(const char *p, unsigned *out) {
    uint64_t found = 0;
    int code = number(p, &found);
    if (code == SUCCESS) *out = (unsigned)found;
    return code;
}

/* Handles: 1 + GPU, and for a MIG slice 1000 * (1 + slice) more. */
static const char *device(uintptr_t handle) {
    const char *gpu = element(member(text, "gpus"), (unsigned)((handle - 1) % 1000));
    if (handle <= 1000) return gpu;
    return element(member(gpu, "mig_instances"), (unsigned)((handle - 1) / 1000 - 1));
}

int nvmlInitWithFlags(unsigned flags) {
    const char *path = getenv("NVML_FIXTURE");
    FILE *file = fopen(path ? path : "/etc/nvml.json", "rb");
    uint64_t code = 0;
    (void)flags;
    if (!file) return NOT_LOADED;
    text = calloc(1, 1 << 20);
    if (!fread(text, 1, (1 << 20) - 1, file)) text[0] = 0;
    fclose(file);
    number(member(text, "init"), &code);
    return (int)code;
}

int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == NOT_LOADED ? "Driver Not Loaded" : "Error"; }
int nvmlSystemGetDriverVersion(char *out, unsigned n) { return string(member(text, "driver"), out, n); }
int nvmlSystemGetCudaDriverVersion_v2(unsigned *out) { return small(member(text, "cuda"), out); }
int nvmlDeviceGetCount_v2(unsigned *out) { *out = length(member(text, "gpus")); return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, uintptr_t *out) {
    *out = index + 1;
    if (!device(*out)) return INVALID;
    return member(device(*out), "lost") ? 15 : SUCCESS;
}

int nvmlDeviceGetName(uintptr_t h, char *out, unsigned n) { return string(member(device(h), "name"), out, n); }
int nvmlDeviceGetUUID(uintptr_t h, char *out, unsigned n) { return string(member(device(h), "uuid"), out, n); }
int nvmlDeviceGetPersistenceMode(uintptr_t h, unsigned *out) { return small(member(device(h), "persistence"), out); }
int nvmlDeviceGetMaxMigDeviceCount(uintptr_t h, unsigned *out) { return small(member(device(h), "mig_max"), out); }

int nvmlDeviceGetPciInfo_v3(uintptr_t h, Pci *out) {
    memset(out, 0, sizeof *out);
    return string(member(device(h), "pci"), out->busId, sizeof out->busId);
}

int nvmlDeviceGetMemoryInfo(uintptr_t h, Memory *out) {
    const char *found = member(device(h), "memory");
    if (number(element(found, 0), &out->total)) return NOT_SUPPORTED;
    number(element(found, 1), &out->free);
    number(element(found, 2), &out->used);
    return SUCCESS;
}

static int pair(uintptr_t h, const char *key, unsigned *first, unsigned *second) {
    const char *found = member(device(h), key);
    int code = small(element(found, 0), first);
    return code ? code : small(element(found, 1), second);
}

int nvmlDeviceGetCudaComputeCapability(uintptr_t h, unsigned *a, unsigned *b) { return pair(h, "capability", a, b); }
int nvmlDeviceGetMigMode(uintptr_t h, unsigned *a, unsigned *b) { return pair(h, "mig", a, b); }
int nvmlDeviceGetEccMode(uintptr_t h, unsigned *a, unsigned *b) { return pair(h, "ecc", a, b); }

int nvmlDeviceGetTotalEccErrors(uintptr_t h, int kind, int counter, uint64_t *out) {
    (void)counter;
    return kind == 1 ? number(member(device(h), "ecc_errors"), out) : NOT_SUPPORTED;
}

int nvmlDeviceGetMigDeviceHandleByIndex(uintptr_t h, unsigned index, uintptr_t *out) {
    *out = h + 1000 * (1 + (uintptr_t)index);
    return device(*out) ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetNvLinkState(uintptr_t h, unsigned link, unsigned *out) {
    unsigned links = 0;
    if (small(member(device(h), "nvlinks"), &links)) return NOT_SUPPORTED;
    if (link >= 18) return INVALID;
    *out = link < links;
    return SUCCESS;
}

static int processes(const char *list, unsigned *count, Process *out) {
    unsigned there = length(list), room = *count;
    *count = there;
    if (!there) return SUCCESS;
    if (!out || room < there) return TOO_SMALL;
    for (unsigned n = 0; n < there; n++) {
        small(element(element(list, n), 0), &out[n].pid);
        if (number(element(element(list, n), 1), &out[n].memory) || !out[n].memory) out[n].memory = UINT64_MAX;
    }
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(uintptr_t h, unsigned *n, Process *out) {
    return processes(member(device(h), "processes"), n, out);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(uintptr_t h, unsigned *n, Process *out) {
    return processes(member(device(h), "graphics"), n, out);
}

/* Of events, Xids alone: each GPU that has a member "xid" reports it, once. */

typedef struct { uintptr_t device; uint64_t type, data; unsigned gpuInstance, computeInstance; } Event;
static uintptr_t watched[64];
static unsigned watching, reported;

int nvmlEventSetCreate(uintptr_t *out) { *out = 1; return SUCCESS; }

int nvmlDeviceRegisterEvents(uintptr_t h, uint64_t types, uintptr_t set) {
    (void)types, (void)set;
    if (watching < 64) watched[watching++] = h;
    return SUCCESS;
}

int nvmlEventSetWait_v2(uintptr_t set, Event *out, unsigned milliseconds) {
    (void)set;
    memset(out, 0, sizeof *out);
    for (; reported < watching; reported++)
        if (number(member(device(watched[reported]), "xid"), &out->data) == SUCCESS) {
            out->device = watched[reported++];
            return SUCCESS;
        }
    usleep(milliseconds * 1000);
    return TIMEOUT;
}

int nvmlDeviceGetTemperature(uintptr_t h, int sensor, unsigned *out) {
    (void)sensor;
    return small(member(device(h), "temperature"), out);
}
