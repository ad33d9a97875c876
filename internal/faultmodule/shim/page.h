// The page that a controlling process and every process with the module in it share: words of 64 bits, at these offsets.
// control.go has the same numbers.
#include <stdint.h>

#define MAGIC 0x6b68666175740001ull
#define PAGE_BYTES 16384

enum {
	P_MAGIC = 0,
	P_ARMED, // 0: every call goes straight through
	P_GENERATION, // rises with each change of what follows
	P_DELAY, // nanoseconds
	P_SERVE,
	P_THROTTLE,
	P_MAX_SESSIONS,
	P_LOGIN_IDLE, // nanoseconds
	P_TOKEN_FLAGS,
	P_HIDDEN,
	P_DOWN,
	P_PIN_TRIES,
	P_ECDSA,
	P_REFUSED, // how many words of P_MECHANISMS are in use
	P_MECHANISMS = 14,

	P_CALLS = 24, // counters
	P_FAULTS,
	P_LOGINS,
	P_LOGINS_FAILED,
	P_OPERATIONS,
	P_OVERLAPS,
	P_FINALIZED_BUSY,
	P_FORKED,
	P_MAX_IN_FLIGHT,
	P_CRASHES,
	P_SESSIONS_PEAK,
	P_LOGINS_PEAK,
	P_PIN_FAILURES,
	P_SHORT,
	P_ENLISTED,

	P_RULES = 64, // RULES times RULE_WORDS
	P_SERVED = 128, // MAX_SERVE words: when each place of the token is free again
	P_PROCESSES = 384, // PROCESSES times PROCESS_WORDS
	P_MODULE = 1408, // paths and environment, as C strings of TEXT_BYTES
	P_ENVIRONMENT = 1664,

	RULES = 8,
	RULE_WORDS = 8,
	MAX_SERVE = 256,
	PROCESSES = 64,
	PROCESS_WORDS = 16,
	TEXT_BYTES = 2048,
};

// The bits of P_ARMED.
enum { ON_RULES = 1, ON_SERVE = 2, ON_COUNT = 4, ON_EVENTS = 8, ON_STATE = 16 };

// The words of a rule.
enum { R_ACTION, R_FUNCTION, R_AFTER, R_COUNT, R_CODE, R_LEAVE, R_PID, R_SEEN };
enum { ACT_CODE = 1, ACT_CRASH, ACT_HANG };
#define ANY_FUNCTION 255

// The words of a process.
enum { Q_PID, Q_SESSIONS, Q_IN_FLIGHT, Q_DROPPED, Q_FORGOTTEN, Q_STALE, Q_INSIDE, Q_LOGINS, Q_HANGING };
enum { STALE_INIT = 1, STALE_PROCESS = 2 };

enum { ECDSA_SHORT = 1, ECDSA_DER = 2 };
