// A PKCS#11 module that hands everything to another and misbehaves on command. The command comes through a page of memory
// (page.h) that the processes of a test share: the file "control" beside this module, or the one that KH_FAULT_CONTROL names.
//
// Functions that are not listed at the end go straight to the real module.
#define _GNU_SOURCE
#include "page.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long ulong_t;
typedef unsigned char byte_t;
typedef struct {
	byte_t major, minor;
	void *f[68];
} list_t;
typedef struct {
	ulong_t mechanism;
	void *parameter;
	ulong_t len;
} mechanism_t;
typedef struct {
	ulong_t type;
	void *value;
	ulong_t len;
} attribute_t;
typedef struct {
	ulong_t slot, state, flags, error;
} session_info_t;

enum {
	INITIALIZE, FINALIZE, GET_INFO, GET_LIST, SLOTS, SLOT_INFO, TOKEN_INFO, MECHANISMS, MECHANISM_INFO,
	OPEN = 12, CLOSE, CLOSE_ALL, SESSION_INFO, LOGIN = 18, LOGOUT, ATTRIBUTES = 24, FIND_INIT = 26, FIND, FIND_FINAL,
	DECRYPT_INIT = 33, DECRYPT, SIGN_INIT = 42, SIGN,
};

enum {
	GENERAL_ERROR = 0x5, FUNCTION_FAILED = 0x6, DEVICE_ERROR = 0x30, DEVICE_REMOVED = 0x32, KEY_HANDLE_INVALID = 0x60,
	MECHANISM_INVALID = 0x70, OBJECT_HANDLE_INVALID = 0x82, PIN_INCORRECT = 0xa0, PIN_LOCKED = 0xa4, SESSION_COUNT = 0xb1,
	SESSION_HANDLE_INVALID = 0xb3, TOKEN_NOT_PRESENT = 0xe0, ALREADY_LOGGED_IN = 0x100, NOT_LOGGED_IN = 0x101,
};

static list_t *real, shim;
static volatile uint64_t *page;
static pid_t loaded_by;

static uint64_t get(int w) { return __atomic_load_n(&page[w], __ATOMIC_ACQUIRE); }
static uint64_t add(int w, int64_t n) { return __atomic_add_fetch(&page[w], n, __ATOMIC_ACQ_REL); }
static void raise_to(int w, uint64_t n) {
	uint64_t old = get(w);
	while (n > old && !__atomic_compare_exchange_n(&page[w], &old, n, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
		;
}
static ulong_t fault(ulong_t code) {
	add(P_FAULTS, 1);
	return code;
}
static uint64_t now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

// --- this process

static int mine; // offset of this process's words, 0 before C_Initialize
static uint64_t logged_in; // era() + 1 at the latest login; 0: none
static uint64_t used; // when the latest call was, for the login that ends when idle

// A session is remembered from C_OpenSession on, in a table that forgets the older of two that meet.
typedef struct {
	ulong_t handle;
	uint64_t dropped; // Q_DROPPED when it was opened
	int busy;
	mechanism_t mechanism;
	ulong_t key;
} session_t;
static session_t sessions[16384];

static session_t *find(ulong_t handle) {
	session_t *s = &sessions[handle % 16384];
	return handle != 0 && __atomic_load_n(&s->handle, __ATOMIC_ACQUIRE) == handle ? s : NULL;
}

// era counts what ended the login and the handles of this process. Object handles carry it in their upper half.
static uint64_t era(void) { return mine == 0 ? 0 : get(mine + Q_DROPPED) + get(mine + Q_FORGOTTEN); }
static int has_login(void) { return era() == 0 || __atomic_load_n(&logged_in, __ATOMIC_ACQUIRE) == era() + 1; }
static ulong_t marked(ulong_t object) { return object | (ulong_t)(era() & 0x7fff) << 32; }
static int current(ulong_t object) { return object >> 32 == (era() & 0x7fff); }
static ulong_t unmarked(ulong_t object) { return object & 0xffffffff; }

static uint64_t over_processes(int word) {
	uint64_t sum = 0;
	for (int i = 0; i < PROCESSES; i++) {
		int p = P_PROCESSES + i * PROCESS_WORDS;
		uint64_t pid = get(p + Q_PID);
		if (pid != 0 && (p == mine || kill((pid_t)pid, 0) == 0 || errno == EPERM))
			sum += get(p + word);
	}
	return sum;
}

// enlist takes a place in the page, perhaps one of a process that is gone.
static void enlist(void) {
	uint64_t pid = getpid();
	if (mine != 0 && get(mine + Q_PID) == pid)
		return;
	for (int i = 0; i < PROCESSES; i++) {
		int p = P_PROCESSES + i * PROCESS_WORDS;
		uint64_t old = get(p + Q_PID);
		if (old != 0 && (kill((pid_t)old, 0) == 0 || errno == EPERM))
			continue;
		if (!__atomic_compare_exchange_n(&page[p + Q_PID], &old, pid, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			continue;
		for (int w = Q_PID + 1; w < PROCESS_WORDS; w++)
			__atomic_store_n(&page[p + w], 0, __ATOMIC_RELEASE);
		mine = p;
		add(P_ENLISTED, 1);
		return;
	}
	abort(); // more processes than a test has
}

// --- faults of every function

typedef struct {
	session_t *session; // marked busy by this call
	int counted; // in Q_IN_FLIGHT
	int inside; // in Q_INSIDE
	int end; // a failure that ends the operation
} call_t;

static int needs_login(int fn) { return fn == SIGN_INIT || fn == SIGN || fn == DECRYPT_INIT || fn == DECRYPT; }
static int is_operation(int fn) { return fn == SIGN || fn == DECRYPT; }

// hang stays until the rule is taken back.
static void hang(void) {
	uint64_t generation = get(P_GENERATION);
	if (mine != 0)
		add(mine + Q_HANGING, 1);
	while (get(P_GENERATION) == generation)
		usleep(2000);
	if (mine != 0)
		add(mine + Q_HANGING, -1);
}

static ulong_t by_rule(call_t *c, int fn) {
	for (int i = 0; i < RULES; i++) {
		int r = P_RULES + i * RULE_WORDS;
		uint64_t action = get(r + R_ACTION), count = get(r + R_COUNT), pid = get(r + R_PID);
		if (action == 0 || (get(r + R_FUNCTION) != (uint64_t)fn && get(r + R_FUNCTION) != ANY_FUNCTION) || (pid != 0 && pid != (uint64_t)getpid()))
			continue;
		uint64_t seen = add(r + R_SEEN, 1) - 1;
		if (seen < get(r + R_AFTER) || (count != 0 && seen - get(r + R_AFTER) >= count))
			continue;
		add(P_FAULTS, 1);
		switch (action) {
		case ACT_CRASH:
			add(P_CRASHES, 1);
			*(volatile int *)0 = 1;
			abort();
		case ACT_HANG:
			hang();
			break;
		case ACT_CODE:
			c->end = get(r + R_LEAVE) == 0;
			return get(r + R_CODE);
		}
	}
	return 0;
}

// state fails calls on a token that is gone, or that this process has lost.
static ulong_t state(int fn, int session) {
	if (fn == INITIALIZE || fn == FINALIZE || fn == GET_INFO)
		return 0;
	if (mine != 0 && get(P_DOWN))
		__atomic_store_n(&page[mine + Q_STALE], STALE_PROCESS, __ATOMIC_RELEASE);
	if (mine != 0 && get(mine + Q_STALE))
		return fault(DEVICE_ERROR);
	if (get(P_HIDDEN) && session)
		return fault(DEVICE_REMOVED);
	if (get(P_HIDDEN) && fn != SLOTS)
		return fault(TOKEN_NOT_PRESENT);
	return 0;
}

// idle ends a login that nobody used for so long.
static void idle(void) {
	uint64_t limit = get(P_LOGIN_IDLE), t = now(), last = __atomic_exchange_n(&used, t, __ATOMIC_ACQ_REL);
	if (limit != 0 && last != 0 && t > last + limit && mine != 0) {
		__atomic_or_fetch(&page[P_ARMED], ON_EVENTS, __ATOMIC_ACQ_REL);
		add(mine + Q_FORGOTTEN, 1);
		add(P_FAULTS, 1);
	}
}

static ulong_t enter(call_t *c, uint64_t on, int fn, ulong_t handle) {
	memset(c, 0, sizeof *c);
	if ((on & ~(uint64_t)ON_SERVE) == 0)
		return 0;
	add(P_CALLS, 1);
	if (getpid() != loaded_by)
		add(P_FORKED, 1);
	if (mine != 0) {
		add(mine + Q_INSIDE, 1);
		c->inside = 1;
	}
	session_t *s = find(handle);
	int free = 0;
	if (s != NULL && !__atomic_compare_exchange_n(&s->busy, &free, 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
		add(P_OVERLAPS, 1);
	else
		c->session = s;
	if (is_operation(fn) && mine != 0) {
		add(P_OPERATIONS, 1);
		add(mine + Q_IN_FLIGHT, 1);
		c->counted = 1;
		raise_to(P_MAX_IN_FLIGHT, over_processes(Q_IN_FLIGHT));
	}
	idle();
	ulong_t rv = state(fn, handle != 0);
	if (rv == 0 && s != NULL && s->dropped != get(mine + Q_DROPPED))
		return fault(SESSION_HANDLE_INVALID);
	if (rv == 0 && needs_login(fn) && !has_login())
		return fault(NOT_LOGGED_IN);
	if (rv == 0 && (on & ON_RULES))
		rv = by_rule(c, fn);
	uint64_t most = get(P_THROTTLE);
	if (rv == 0 && c->counted && most != 0 && over_processes(Q_IN_FLIGHT) > most) {
		c->end = 1;
		rv = fault(FUNCTION_FAILED);
	}
	return rv;
}

static void leave(call_t *c) {
	if (c->session != NULL)
		__atomic_store_n(&c->session->busy, 0, __ATOMIC_RELEASE);
	if (c->counted)
		add(mine + Q_IN_FLIGHT, -1);
	if (c->inside)
		add(mine + Q_INSIDE, -1);
}

// reserve takes a place at the token, first come, first served over all processes, and says when the operation is done there.
// A process that dies takes nothing with it.
static uint64_t reserve(void) {
	uint64_t delay = get(P_DELAY), places = get(P_SERVE), t = now();
	if (places == 0)
		return t + delay;
	for (;;) {
		int best = P_SERVED;
		uint64_t first = get(best);
		for (int i = P_SERVED + 1; i < P_SERVED + (int)places; i++)
			if (get(i) < first) {
				first = get(i);
				best = i;
			}
		uint64_t done = (first > t ? first : t) + delay;
		if (__atomic_compare_exchange_n(&page[best], &first, done, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			return done;
	}
}

static void wait_until(uint64_t t) {
	struct timespec at = {t / 1000000000, t % 1000000000};
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == EINTR)
		;
}

#include "functions.h"

// --- loading

static int attach(void) {
	char path[4096];
	const char *named = getenv("KH_FAULT_CONTROL");
	Dl_info self;
	if (named != NULL && *named != 0)
		snprintf(path, sizeof path, "%s", named);
	else if (dladdr((void *)attach, &self) != 0) {
		const char *slash = strrchr(self.dli_fname, '/');
		snprintf(path, sizeof path, "%.*scontrol", slash ? (int)(slash - self.dli_fname + 1) : 0, self.dli_fname);
	} else
		return 0;
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return 0;
	void *p = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (p == MAP_FAILED || *(uint64_t *)p != MAGIC)
		return 0;
	page = p;
	return 1;
}

static int load(void) {
	if (!attach())
		return 0;
	char *variable = (char *)&page[P_ENVIRONMENT], *equals = strchr(variable, '=');
	if (equals != NULL) {
		char name[128];
		snprintf(name, sizeof name, "%.*s", (int)(equals - variable), variable);
		setenv(name, equals + 1, 1);
	}
	void *h = dlopen((char *)&page[P_MODULE], RTLD_NOW | RTLD_LOCAL);
	ulong_t (*list)(list_t **) = h ? (ulong_t(*)(list_t **))dlsym(h, "C_GetFunctionList") : NULL;
	if (list == NULL || list(&real) != 0)
		return 0;
	loaded_by = getpid();
	replace();
	return 1;
}

ulong_t C_GetFunctionList(list_t **out) {
	static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
	pthread_mutex_lock(&mu);
	int ok = real != NULL || load();
	pthread_mutex_unlock(&mu);
	*out = &shim;
	return ok ? 0 : GENERAL_ERROR;
}
