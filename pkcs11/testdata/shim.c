// A PKCS#11 module that hands everything to another and misbehaves on request. The environment of the process, read at each
// call, says how:
//
//	KH_SHIM_MODULE    path of the real module
//	KH_SHIM_REFUSE    mechanisms, as "0xd,0x3,", that C_SignInit and C_DecryptInit do not know
//	KH_SHIM_SIGN      "code:count": so many calls of C_Sign fail with this code
//	KH_SHIM_LOGIN     the same for C_Login, which does not reach the real module then
//	KH_SHIM_INFO      the same for C_GetTokenInfo
//	KH_SHIM_FLAGS     flags that C_GetTokenInfo adds, in hexadecimal
//	KH_SHIM_HIDE      1: there is no slot, until C_Finalize
//	KH_SHIM_HANG      a file: while it is there, C_Sign does not come back
//	KH_SHIM_BREAK     a file: while it is there, C_Sign fails with CKR_DEVICE_ERROR
//	KH_SHIM_SESSIONS  the greatest number of sessions
//	KH_SHIM_LOG       file that grows by one byte with each fault
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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

enum { FINALIZE = 1, GET_LIST = 3, SLOTS = 4, INFO = 6, OPEN = 12, CLOSE = 13, LOGIN = 18, DECRYPT_INIT = 33, SIGN_INIT = 42, SIGN = 43 };

static list_t *real, shim;
static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static long sessions;
static int finalized;

typedef struct {
	long failed;
	char last[64];
} plan_t;

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

// planned follows a "code:count" and returns the code while there are calls left that are to fail.
static ulong_t planned(const char *name, plan_t *p) {
	ulong_t rv = 0;
	pthread_mutex_lock(&mu);
	const char *plan = getenv(name);
	if (plan == NULL)
		plan = "";
	if (strcmp(plan, p->last) != 0) {
		snprintf(p->last, sizeof p->last, "%s", plan);
		p->failed = 0;
	}
	char *colon = strchr(plan, ':');
	if (colon != NULL && p->failed < atol(colon + 1)) {
		p->failed++;
		rv = fault(strtoul(plan, NULL, 16));
	}
	pthread_mutex_unlock(&mu);
	return rv;
}

static ulong_t login(ulong_t s, ulong_t user, unsigned char *pin, ulong_t len) {
	static plan_t p;
	ulong_t rv = planned("KH_SHIM_LOGIN", &p);
	return rv ? rv : ((ulong_t(*)(ulong_t, ulong_t, unsigned char *, ulong_t))real->f[LOGIN])(s, user, pin, len);
}

// The flags of CK_TOKEN_INFO stand behind label, manufacturer, model and serial.
static ulong_t token_info(ulong_t slot, unsigned char *info) {
	static plan_t p;
	ulong_t rv = planned("KH_SHIM_INFO", &p);
	if (rv == 0)
		rv = ((ulong_t(*)(ulong_t, unsigned char *))real->f[INFO])(slot, info);
	const char *flags = getenv("KH_SHIM_FLAGS");
	if (rv == 0 && flags != NULL && *flags != 0) {
		*(ulong_t *)(info + 32 + 32 + 16 + 16) |= strtoul(flags, NULL, 16);
		fault(0);
	}
	return rv;
}

static ulong_t slots(unsigned char present, ulong_t *list, ulong_t *count) {
	const char *hide = getenv("KH_SHIM_HIDE");
	if (hide != NULL && *hide != 0 && !finalized) {
		*count = 0;
		return fault(0);
	}
	return ((ulong_t(*)(unsigned char, ulong_t *, ulong_t *))real->f[SLOTS])(present, list, count);
}

static ulong_t sign(ulong_t s, unsigned char *in, ulong_t in_len, unsigned char *out, ulong_t *out_len) {
	static plan_t p;
	ulong_t rv = planned("KH_SHIM_SIGN", &p);
	const char *hang = getenv("KH_SHIM_HANG");
	const char *broken = getenv("KH_SHIM_BREAK");
	if (broken != NULL && access(broken, F_OK) == 0)
		rv = 0x30;
	if (hang != NULL && access(hang, F_OK) == 0)
		fault(0);
	while (hang != NULL && access(hang, F_OK) == 0)
		usleep(10000);
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
	finalized = getenv("KH_SHIM_HIDE") != NULL && *getenv("KH_SHIM_HIDE") != 0;
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
		shim.f[SLOTS] = slots;
		shim.f[INFO] = token_info;
		shim.f[LOGIN] = login;
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
