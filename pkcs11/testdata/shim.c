// A PKCS#11 module that hands everything to another and misbehaves on request. The environment of the process, read at each
// call, says how:
//
//	KH_SHIM_MODULE    path of the real module
//	KH_SHIM_REFUSE    mechanisms, as "0xd,0x3,", that C_SignInit and C_DecryptInit do not know
//	KH_SHIM_SIGN      "code:count": so many calls of C_Sign fail with this code
//	KH_SHIM_SESSIONS  the greatest number of sessions
//	KH_SHIM_LOG       file that grows by one byte with each fault
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long ulong_t;
typedef struct {
	unsigned char major, minor;
	void *f[68];
} list_t;
typedef struct {
	ulong_t mechanism;
	void *parameter;
	ulong_t len;
} mechanism_t;

enum { FINALIZE = 1, GET_LIST = 3, OPEN = 12, CLOSE = 13, DECRYPT_INIT = 33, SIGN_INIT = 42, SIGN = 43 };

static list_t *real, shim;
static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static long sessions, failed;
static char last[64];

// fault records a fault and returns its code.
static ulong_t fault(ulong_t code) {
	FILE *log = fopen(getenv("KH_SHIM_LOG"), "a");
	if (log != NULL) {
		fputc('!', log);
		fclose(log);
	}
	return code;
}

static int refused(mechanism_t *m) {
	char name[32];
	const char *all = getenv("KH_SHIM_REFUSE");
	snprintf(name, sizeof name, "0x%lx,", m->mechanism);
	return all != NULL && strstr(all, name) != NULL;
}

static ulong_t start(int which, ulong_t s, mechanism_t *m, ulong_t key) {
	pthread_mutex_lock(&mu);
	ulong_t rv = refused(m) ? fault(0x70) : 0; // CKR_MECHANISM_INVALID
	pthread_mutex_unlock(&mu);
	return rv ? rv : ((ulong_t(*)(ulong_t, mechanism_t *, ulong_t))real->f[which])(s, m, key);
}

static ulong_t sign_init(ulong_t s, mechanism_t *m, ulong_t key) { return start(SIGN_INIT, s, m, key); }
static ulong_t decrypt_init(ulong_t s, mechanism_t *m, ulong_t key) { return start(DECRYPT_INIT, s, m, key); }

static ulong_t sign(ulong_t s, unsigned char *in, ulong_t in_len, unsigned char *out, ulong_t *out_len) {
	ulong_t rv = 0;
	pthread_mutex_lock(&mu);
	const char *plan = getenv("KH_SHIM_SIGN");
	if (plan == NULL)
		plan = "";
	if (strcmp(plan, last) != 0) {
		snprintf(last, sizeof last, "%s", plan);
		failed = 0;
	}
	char *colon = strchr(plan, ':');
	if (colon != NULL && failed < atol(colon + 1)) {
		failed++;
		rv = fault(strtoul(plan, NULL, 16));
	}
	pthread_mutex_unlock(&mu);
	if (rv != 0) {
		// The operation ends, as it does when C_Sign fails.
		((ulong_t(*)(ulong_t, unsigned char *, ulong_t, unsigned char *, ulong_t *))real->f[SIGN])(s, in, in_len, out, out_len);
		return rv;
	}
	return ((ulong_t(*)(ulong_t, unsigned char *, ulong_t, unsigned char *, ulong_t *))real->f[SIGN])(s, in, in_len, out, out_len);
}

static ulong_t open_session(ulong_t slot, ulong_t flags, void *app, void *notify, ulong_t *out) {
	pthread_mutex_lock(&mu);
	const char *max = getenv("KH_SHIM_SESSIONS");
	ulong_t rv;
	if (max != NULL && *max != 0 && sessions >= atol(max))
		rv = fault(0xb1); // CKR_SESSION_COUNT
	else if ((rv = ((ulong_t(*)(ulong_t, ulong_t, void *, void *, ulong_t *))real->f[OPEN])(slot, flags, app, notify, out)) == 0)
		sessions++;
	pthread_mutex_unlock(&mu);
	return rv;
}

static ulong_t close_session(ulong_t s) {
	pthread_mutex_lock(&mu);
	ulong_t rv = ((ulong_t(*)(ulong_t))real->f[CLOSE])(s);
	if (rv == 0)
		sessions--;
	pthread_mutex_unlock(&mu);
	return rv;
}

static ulong_t finalize(void *reserved) {
	pthread_mutex_lock(&mu);
	sessions = 0;
	pthread_mutex_unlock(&mu);
	return ((ulong_t(*)(void *))real->f[FINALIZE])(reserved);
}

ulong_t C_GetFunctionList(list_t **out) {
	pthread_mutex_lock(&mu);
	if (real == NULL) {
		void *h = dlopen(getenv("KH_SHIM_MODULE"), RTLD_NOW);
		ulong_t (*get)(list_t **) = h ? (ulong_t(*)(list_t **))dlsym(h, "C_GetFunctionList") : NULL;
		if (get == NULL || get(&real) != 0) {
			pthread_mutex_unlock(&mu);
			return 5; // CKR_GENERAL_ERROR
		}
		shim = *real;
		shim.f[FINALIZE] = finalize;
		shim.f[GET_LIST] = C_GetFunctionList;
		shim.f[OPEN] = open_session;
		shim.f[CLOSE] = close_session;
		shim.f[DECRYPT_INIT] = decrypt_init;
		shim.f[SIGN_INIT] = sign_init;
		shim.f[SIGN] = sign;
	}
	pthread_mutex_unlock(&mu);
	*out = &shim;
	return 0;
}
