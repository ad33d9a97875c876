// The functions of the module that differ from the real ones. Each reads P_ARMED once and, if it is 0, does nothing else.

#define ARMED() get(P_ARMED)
#define LIKELY(x) __builtin_expect(!!(x), 1)
#define REAL(ID, PARAMS) ((ulong_t(*) PARAMS)real->f[ID])

// FORWARD defines a function that has no faults of its own. SESSION is its session handle, or 0.
#define FORWARD(ID, NAME, SESSION, PARAMS, ARGS) \
	static ulong_t NAME PARAMS { \
		uint64_t on = ARMED(); \
		if (LIKELY(on == 0)) \
			return REAL(ID, PARAMS) ARGS; \
		call_t c; \
		ulong_t rv = enter(&c, on, ID, SESSION); \
		if (rv == 0) \
			rv = REAL(ID, PARAMS) ARGS; \
		leave(&c); \
		return rv; \
	}

FORWARD(SLOT_INFO, slot_info, 0, (ulong_t slot, void *info), (slot, info))
FORWARD(FIND_INIT, find_init, s, (ulong_t s, void *template, ulong_t n), (s, template, n))
FORWARD(FIND_FINAL, find_final, s, (ulong_t s), (s))
FORWARD(LOGOUT, logout, s, (ulong_t s), (s))

static ulong_t initialize(void *args) {
	enlist();
	// A module that was finalised and is initialised again has no sessions.
	__atomic_store_n(&page[mine + Q_SESSIONS], 0, __ATOMIC_RELEASE);
	if (get(mine + Q_STALE) == STALE_INIT)
		__atomic_store_n(&page[mine + Q_STALE], 0, __ATOMIC_RELEASE);
	call_t c;
	ulong_t rv = enter(&c, ARMED(), INITIALIZE, 0);
	if (rv == 0)
		rv = REAL(INITIALIZE, (void *))(args);
	leave(&c);
	return rv;
}

static ulong_t finalize(void *reserved) {
	call_t c;
	ulong_t rv = enter(&c, ARMED(), FINALIZE, 0);
	if (c.inside && get(mine + Q_INSIDE) > 1)
		add(P_FINALIZED_BUSY, 1);
	if (rv == 0) {
		for (size_t i = 0; i < sizeof sessions / sizeof *sessions; i++)
			__atomic_store_n(&sessions[i].handle, 0, __ATOMIC_RELEASE);
		if (mine != 0)
			__atomic_store_n(&page[mine + Q_SESSIONS], 0, __ATOMIC_RELEASE);
		rv = REAL(FINALIZE, (void *))(reserved);
	}
	leave(&c);
	return rv;
}

static ulong_t slots(byte_t present, ulong_t *list, ulong_t *count) {
	uint64_t on = ARMED();
	if (LIKELY(on == 0))
		return REAL(SLOTS, (byte_t, ulong_t *, ulong_t *))(present, list, count);
	call_t c;
	ulong_t rv = enter(&c, on, SLOTS, 0);
	if (rv == 0 && get(P_HIDDEN))
		*count = fault(0);
	else if (rv == 0)
		rv = REAL(SLOTS, (byte_t, ulong_t *, ulong_t *))(present, list, count);
	leave(&c);
	return rv;
}

// The flags of CK_TOKEN_INFO stand behind label, manufacturer, model and serial.
static ulong_t token_info(ulong_t slot, byte_t *info) {
	uint64_t on = ARMED();
	if (LIKELY(on == 0))
		return REAL(TOKEN_INFO, (ulong_t, byte_t *))(slot, info);
	call_t c;
	ulong_t rv = enter(&c, on, TOKEN_INFO, 0);
	if (rv == 0)
		rv = REAL(TOKEN_INFO, (ulong_t, byte_t *))(slot, info);
	uint64_t flags = get(P_TOKEN_FLAGS), tries = get(P_PIN_TRIES), failed = get(P_PIN_FAILURES);
	if (tries != 0 && failed > 0)
		flags |= 0x10000; // CKF_USER_PIN_COUNT_LOW
	if (tries != 0 && failed + 1 == tries)
		flags |= 0x20000; // CKF_USER_PIN_FINAL_TRY
	if (tries != 0 && failed >= tries)
		flags |= 0x40000; // CKF_USER_PIN_LOCKED
	if (rv == 0 && flags != 0) {
		*(ulong_t *)(info + 32 + 32 + 16 + 16) |= flags;
		add(P_FAULTS, 1);
	}
	leave(&c);
	return rv;
}

static int refused(ulong_t mechanism) {
	for (uint64_t i = 0, n = get(P_REFUSED); i < n; i++)
		if (get(P_MECHANISMS + i) == mechanism)
			return 1;
	return 0;
}

static ulong_t mechanisms(ulong_t slot, ulong_t *list, ulong_t *count) {
	uint64_t on = ARMED();
	if (LIKELY(on == 0))
		return REAL(MECHANISMS, (ulong_t, ulong_t *, ulong_t *))(slot, list, count);
	call_t c;
	ulong_t rv = enter(&c, on, MECHANISMS, 0);
	if (rv == 0)
		rv = REAL(MECHANISMS, (ulong_t, ulong_t *, ulong_t *))(slot, list, count);
	if (rv == 0 && list != NULL) {
		ulong_t kept = 0;
		for (ulong_t i = 0; i < *count; i++)
			if (!refused(list[i]))
				list[kept++] = list[i];
		*count = kept;
	}
	leave(&c);
	return rv;
}

static ulong_t mechanism_info(ulong_t slot, ulong_t mechanism, void *info) {
	uint64_t on = ARMED();
	if (LIKELY(on == 0))
		return REAL(MECHANISM_INFO, (ulong_t, ulong_t, void *))(slot, mechanism, info);
	call_t c;
	ulong_t rv = enter(&c, on, MECHANISM_INFO, 0);
	if (rv == 0)
		rv = refused(mechanism) ? fault(MECHANISM_INVALID) : REAL(MECHANISM_INFO, (ulong_t, ulong_t, void *))(slot, mechanism, info);
	leave(&c);
	return rv;
}

static ulong_t open_session(ulong_t slot, ulong_t flags, void *app, void *notify, ulong_t *out) {
	call_t c;
	ulong_t rv = enter(&c, ARMED(), OPEN, 0);
	if (rv == 0 && mine != 0) {
		add(mine + Q_SESSIONS, 1);
		uint64_t all = over_processes(Q_SESSIONS), most = get(P_MAX_SESSIONS);
		rv = most != 0 && all > most ? fault(SESSION_COUNT) : REAL(OPEN, (ulong_t, ulong_t, void *, void *, ulong_t *))(slot, flags, app, notify, out);
		if (rv != 0)
			add(mine + Q_SESSIONS, -1);
		else
			raise_to(P_SESSIONS_PEAK, all);
	} else if (rv == 0)
		rv = REAL(OPEN, (ulong_t, ulong_t, void *, void *, ulong_t *))(slot, flags, app, notify, out);
	if (rv == 0) {
		session_t *s = &sessions[*out % 16384];
		s->dropped = mine != 0 ? get(mine + Q_DROPPED) : 0;
		s->busy = 0;
		__atomic_store_n(&s->handle, *out, __ATOMIC_RELEASE);
	}
	leave(&c);
	return rv;
}

static ulong_t close_session(ulong_t s) {
	call_t c;
	ulong_t rv = enter(&c, ARMED(), CLOSE, s);
	// The real module frees what the faulty one says it has lost already.
	ulong_t closed = REAL(CLOSE, (ulong_t))(s);
	if (closed == 0 && mine != 0) {
		session_t *known = find(s);
		if (known != NULL)
			__atomic_store_n(&known->handle, 0, __ATOMIC_RELEASE);
		add(mine + Q_SESSIONS, -1);
	}
	leave(&c);
	return rv != 0 ? rv : closed;
}

static ulong_t close_all(ulong_t slot) {
	call_t c;
	ulong_t rv = enter(&c, ARMED(), CLOSE_ALL, 0);
	if (rv == 0)
		rv = REAL(CLOSE_ALL, (ulong_t))(slot);
	if (rv == 0 && mine != 0)
		__atomic_store_n(&page[mine + Q_SESSIONS], 0, __ATOMIC_RELEASE);
	leave(&c);
	return rv;
}

static ulong_t session_info(ulong_t s, session_info_t *info) {
	uint64_t on = ARMED();
	if (LIKELY(on == 0))
		return REAL(SESSION_INFO, (ulong_t, session_info_t *))(s, info);
	call_t c;
	ulong_t rv = enter(&c, on, SESSION_INFO, s);
	if (rv == 0)
		rv = REAL(SESSION_INFO, (ulong_t, session_info_t *))(s, info);
	// User functions become public ones.
	if (rv == 0 && !has_login() && (info->state == 1 || info->state == 3))
		info->state--;
	leave(&c);
	return rv;
}

static ulong_t login(ulong_t s, ulong_t user, byte_t *pin, ulong_t len) {
	add(P_LOGINS, 1);
	if (mine != 0) {
		add(mine + Q_LOGINS, 1);
		raise_to(P_LOGINS_PEAK, over_processes(Q_LOGINS));
	}
	uint64_t before = era(), tries = get(P_PIN_TRIES);
	call_t c;
	ulong_t rv = enter(&c, ARMED(), LOGIN, s);
	if (rv == 0 && tries != 0 && get(P_PIN_FAILURES) >= tries)
		rv = fault(PIN_LOCKED);
	if (rv == 0) {
		rv = REAL(LOGIN, (ulong_t, ulong_t, byte_t *, ulong_t))(s, user, pin, len);
		if (rv == ALREADY_LOGGED_IN && !has_login())
			rv = 0;
		if (user == 1 && (rv == 0 || rv == ALREADY_LOGGED_IN))
			__atomic_store_n(&logged_in, before + 1, __ATOMIC_RELEASE);
		if (rv == 0)
			__atomic_store_n(&page[P_PIN_FAILURES], 0, __ATOMIC_RELEASE);
	}
	if (rv == PIN_INCORRECT)
		add(P_PIN_FAILURES, 1);
	if (rv != 0 && rv != ALREADY_LOGGED_IN)
		add(P_LOGINS_FAILED, 1);
	leave(&c);
	if (mine != 0)
		add(mine + Q_LOGINS, -1);
	return rv;
}

static int is_private(ulong_t s, ulong_t object) {
	byte_t value = 0;
	attribute_t a = {2, &value, 1}; // CKA_PRIVATE
	return REAL(ATTRIBUTES, (ulong_t, ulong_t, attribute_t *, ulong_t))(s, object, &a, 1) == 0 && value;
}

static ulong_t find_objects(ulong_t s, ulong_t *list, ulong_t most, ulong_t *count) {
	uint64_t on = ARMED();
	if (LIKELY(on == 0))
		return REAL(FIND, (ulong_t, ulong_t *, ulong_t, ulong_t *))(s, list, most, count);
	call_t c;
	ulong_t rv = enter(&c, on, FIND, s);
	if (rv == 0)
		rv = REAL(FIND, (ulong_t, ulong_t *, ulong_t, ulong_t *))(s, list, most, count);
	if (rv == 0 && (on & ON_EVENTS)) {
		int seen = has_login();
		ulong_t kept = 0;
		for (ulong_t i = 0; i < *count; i++)
			if (seen || !is_private(s, list[i]))
				list[kept++] = marked(list[i]);
		*count = kept;
	}
	leave(&c);
	return rv;
}

static ulong_t attributes(ulong_t s, ulong_t object, void *template, ulong_t n) {
	uint64_t on = ARMED();
	if (LIKELY(on == 0))
		return REAL(ATTRIBUTES, (ulong_t, ulong_t, void *, ulong_t))(s, object, template, n);
	call_t c;
	ulong_t rv = enter(&c, on, ATTRIBUTES, s);
	if (rv == 0)
		rv = current(object) ? REAL(ATTRIBUTES, (ulong_t, ulong_t, void *, ulong_t))(s, unmarked(object), template, n) : fault(OBJECT_HANDLE_INVALID);
	leave(&c);
	return rv;
}

static ulong_t begin(int fn, ulong_t s, mechanism_t *m, ulong_t key) {
	uint64_t on = ARMED();
	if (LIKELY(on == 0))
		return REAL(fn, (ulong_t, mechanism_t *, ulong_t))(s, m, key);
	call_t c;
	ulong_t rv = enter(&c, on, fn, s);
	if (rv == 0 && refused(m->mechanism))
		rv = fault(MECHANISM_INVALID);
	if (rv == 0 && !current(key))
		rv = fault(KEY_HANDLE_INVALID);
	if (rv == 0) {
		rv = REAL(fn, (ulong_t, mechanism_t *, ulong_t))(s, m, unmarked(key));
		session_t *known = find(s);
		if (known != NULL) {
			known->mechanism = (mechanism_t){m->mechanism, NULL, 0};
			known->key = unmarked(key);
		}
	}
	leave(&c);
	return rv;
}

static ulong_t sign_init(ulong_t s, mechanism_t *m, ulong_t key) { return begin(SIGN_INIT, s, m, key); }
static ulong_t decrypt_init(ulong_t s, mechanism_t *m, ulong_t key) { return begin(DECRYPT_INIT, s, m, key); }

typedef ulong_t (*data_fn)(ulong_t, byte_t *, ulong_t, byte_t *, ulong_t *);

// integer writes an unsigned number as DER does and returns where it ends.
static byte_t *integer(byte_t *to, const byte_t *n, ulong_t len) {
	while (len > 1 && *n == 0)
		n++, len--;
	int sign = *n >= 0x80;
	*to++ = 2;
	*to++ = len + sign;
	if (sign)
		*to++ = 0;
	memcpy(to, n, len);
	return to + len;
}

// odd_ecdsa gives a signature whose r or s begins with a zero byte, or one in DER, as some modules do.
static ulong_t odd_ecdsa(ulong_t s, byte_t *in, ulong_t in_len, byte_t *out, ulong_t *out_len, ulong_t room) {
	session_t *known = find(s);
	if (known == NULL || known->mechanism.mechanism != 0x1041) // CKM_ECDSA
		return 0;
	if (get(P_ECDSA) == ECDSA_DER) {
		byte_t der[160], *end = integer(integer(der + 2, out, *out_len / 2), out + *out_len / 2, *out_len / 2);
		if (*out_len > 64 || room < (ulong_t)(end - der))
			return fault(GENERAL_ERROR);
		der[0] = 0x30;
		der[1] = end - der - 2;
		memcpy(out, der, end - der);
		*out_len = end - der;
		return fault(0);
	}
	while (out[0] != 0 && out[*out_len / 2] != 0) {
		*out_len = room;
		ulong_t rv = REAL(SIGN_INIT, (ulong_t, mechanism_t *, ulong_t))(s, &known->mechanism, known->key);
		if (rv == 0)
			rv = ((data_fn)real->f[SIGN])(s, in, in_len, out, out_len);
		if (rv != 0)
			return rv;
	}
	add(P_SHORT, 1);
	return fault(0);
}

static ulong_t operate(int fn, ulong_t s, byte_t *in, ulong_t in_len, byte_t *out, ulong_t *out_len) {
	uint64_t on = ARMED();
	if (LIKELY(on == 0) || out == NULL)
		return ((data_fn)real->f[fn])(s, in, in_len, out, out_len);
	uint64_t done = on & ON_SERVE ? reserve() : 0;
	call_t c;
	ulong_t rv = enter(&c, on, fn, s), room = *out_len;
	if (rv == 0) {
		rv = ((data_fn)real->f[fn])(s, in, in_len, out, out_len);
		if (rv == 0 && fn == SIGN && get(P_ECDSA))
			rv = odd_ecdsa(s, in, in_len, out, out_len, room);
		if (done != 0)
			wait_until(done);
	} else if (c.end)
		// The operation is over, as it is when the real function fails.
		((data_fn)real->f[fn])(s, in, in_len, out, out_len);
	leave(&c);
	return rv;
}

static ulong_t sign(ulong_t s, byte_t *in, ulong_t in_len, byte_t *out, ulong_t *out_len) { return operate(SIGN, s, in, in_len, out, out_len); }
static ulong_t decrypt(ulong_t s, byte_t *in, ulong_t in_len, byte_t *out, ulong_t *out_len) { return operate(DECRYPT, s, in, in_len, out, out_len); }

ulong_t C_GetFunctionList(list_t **out);

static void replace(void) {
	shim = *real;
	shim.f[INITIALIZE] = initialize;
	shim.f[FINALIZE] = finalize;
	shim.f[GET_LIST] = C_GetFunctionList;
	shim.f[SLOTS] = slots;
	shim.f[SLOT_INFO] = slot_info;
	shim.f[TOKEN_INFO] = token_info;
	shim.f[MECHANISMS] = mechanisms;
	shim.f[MECHANISM_INFO] = mechanism_info;
	shim.f[OPEN] = open_session;
	shim.f[CLOSE] = close_session;
	shim.f[CLOSE_ALL] = close_all;
	shim.f[SESSION_INFO] = session_info;
	shim.f[LOGIN] = login;
	shim.f[LOGOUT] = logout;
	shim.f[ATTRIBUTES] = attributes;
	shim.f[FIND_INIT] = find_init;
	shim.f[FIND] = find_objects;
	shim.f[FIND_FINAL] = find_final;
	shim.f[DECRYPT_INIT] = decrypt_init;
	shim.f[DECRYPT] = decrypt;
	shim.f[SIGN_INIT] = sign_init;
	shim.f[SIGN] = sign;
}
