package pkcs11

/*
#cgo linux LDFLAGS: -ldl

#include <dlfcn.h>
#include <stddef.h>

// The parts of PKCS #11 v2.40 that one signature needs. CK_ULONG is unsigned long; structures have the platform's own
// alignment on every Unix.
typedef unsigned long kh_ulong;

typedef struct {
	kh_ulong mechanism;
	void *parameter;
	kh_ulong parameter_len;
} kh_mechanism;

typedef struct {
	kh_ulong hash, mgf, salt;
} kh_pss;

// kh_functions is CK_FUNCTION_LIST: a version, then the functions in the order of the standard's header.
typedef struct {
	unsigned char major, minor;
	void (*f[68])(void);
} kh_functions;

enum {
	kh_login = 18,
	kh_decrypt_init = 33,
	kh_decrypt = 34,
	kh_sign_init = 42,
	kh_sign = 43,
};

typedef struct {
	kh_ulong rv, len;
} kh_result;

typedef kh_ulong (*kh_init_fn)(kh_ulong, kh_mechanism *, kh_ulong);
typedef kh_ulong (*kh_data_fn)(kh_ulong, unsigned char *, kh_ulong, unsigned char *, kh_ulong *);
typedef kh_ulong (*kh_login_fn)(kh_ulong, kh_ulong, unsigned char *, kh_ulong);

// kh_load opens a module. It returns NULL, or what went wrong. The handle is never closed: modules leave threads and exit
// handlers behind.
static const char *kh_load(const char *path) {
	void *h = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (h == NULL)
		return dlerror();
	if (dlsym(h, "C_GetFunctionList") == NULL)
		return "it has no C_GetFunctionList";
	return NULL;
}

// kh_operate runs C_SignInit and C_Sign, or C_DecryptInit and C_Decrypt, with the context-specific login between them if pin is
// not NULL.
static kh_result kh_operate(kh_functions *fl, int init, kh_ulong session, kh_ulong key, kh_ulong mechanism,
		kh_ulong hash, kh_ulong mgf, kh_ulong salt, unsigned char *pin, kh_ulong pin_len,
		unsigned char *in, kh_ulong in_len, unsigned char *out, kh_ulong out_len) {
	kh_result r = {0x54, 0}; // CKR_FUNCTION_NOT_SUPPORTED
	kh_pss pss = {hash, mgf, salt};
	kh_mechanism m = {mechanism, NULL, 0};
	if (hash != 0) {
		m.parameter = &pss;
		m.parameter_len = sizeof pss;
	}
	kh_init_fn start = (kh_init_fn)fl->f[init];
	kh_data_fn finish = (kh_data_fn)fl->f[init + 1];
	kh_login_fn login = (kh_login_fn)fl->f[kh_login];
	if (start == NULL || finish == NULL || login == NULL)
		return r;
	r.rv = start(session, &m, key);
	if (r.rv == 0 && pin != NULL)
		r.rv = login(session, 2, pin, pin_len); // CKU_CONTEXT_SPECIFIC
	if (r.rv == 0) {
		r.len = out_len;
		r.rv = finish(session, in, in_len, out, &r.len);
	}
	return r;
}

#cgo noescape kh_operate
#cgo nocallback kh_operate
*/
import "C"

import (
	"errors"
	"unsafe"

	ck "github.com/miekg/pkcs11"
)

// functions is a module's function list. It stays valid until the process ends.
type functions struct{ list *C.kh_functions }

// loadFunctions opens the module at path, for miekg's package and for us.
func loadFunctions(path string) (*ck.Ctx, functions, error) {
	p := append([]byte(path), 0)
	if msg := C.kh_load((*C.char)(unsafe.Pointer(&p[0]))); msg != nil {
		return nil, functions{}, errors.New(C.GoString(msg))
	}
	ctx := ck.New(path)
	if ctx == nil {
		return nil, functions{}, errors.New("it has no C_GetFunctionList")
	}
	// C_GetFunctionList must not be called twice: some modules, as p11-kit's proxy, yield an instance of its own each time. The list is in
	// miekg's context, a pointer to a C structure of the loader's handle and the list; a test holds that this stays so.
	inside := *(**struct{ handle, list unsafe.Pointer })(unsafe.Pointer(ctx))
	if inside.list == nil {
		return nil, functions{}, errors.New("C_GetFunctionList failed")
	}
	return ctx, functions{(*C.kh_functions)(inside.list)}, nil
}

// missing names a function that is needed and not there, or returns "".
func (f functions) missing() string {
	for i, name := range needed {
		if f.list.f[i] == nil {
			return name
		}
	}
	return ""
}

// mechanism is a mechanism with its parameters; hash, mgf and salt are 0 except for RSA-PSS.
type mechanism struct{ id, hash, mgf, salt uint }

// maxOutput is the size of the buffer that results go to, in bytes: room for RSA keys of 8192 bits.
const maxOutput = 1024

// operation is one signature or raw decryption.
type operation struct {
	decrypt bool
	mechanism
	in  []byte
	pin []byte // for CKA_ALWAYS_AUTHENTICATE, else nil
	out [maxOutput]byte
	n   int // length of the result in out
}

// operate runs op in one crossing into C. miekg's Sign would ask the module for the length first, which for some modules is a
// second trip to the device.
func (f functions) operate(s ck.SessionHandle, key ck.ObjectHandle, op *operation) error {
	init := C.int(C.kh_sign_init)
	if op.decrypt {
		init = C.kh_decrypt_init
	}
	r := C.kh_operate(f.list, init, C.kh_ulong(s), C.kh_ulong(key), C.kh_ulong(op.id),
		C.kh_ulong(op.hash), C.kh_ulong(op.mgf), C.kh_ulong(op.salt),
		(*C.uchar)(unsafe.SliceData(op.pin)), C.kh_ulong(len(op.pin)),
		(*C.uchar)(unsafe.SliceData(op.in)), C.kh_ulong(len(op.in)), (*C.uchar)(&op.out[0]), maxOutput)
	if r.rv != 0 {
		return ck.Error(r.rv)
	}
	if r.len > maxOutput {
		return errors.New("the module reported more output than it was given room for")
	}
	op.n = int(r.len)
	return nil
}
