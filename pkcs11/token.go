package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

// Token is an open token, a [signer.Backend]. All methods may be called from several goroutines at once.
type Token struct {
	cfg  Config
	name string
	log  *slog.Logger
	m    *module
	pool *pool
	slot uint

	pin    PIN
	login  gate  // one login at a time; guards failed
	failed error // the token's refusal of the PIN; no login is tried afterwards

	// fresh is held around operations of keys that want the PIN each time, so that a wrong one is tried once, not once
	// for each session. It is entered before login.
	fresh gate

	scans gate // one discovery at a time; guards keys
	keys  map[keyless.SKI]*key

	closing sync.Once
	closed  error // what Close returns
}

// gate is a mutex whose holder may be waited for with a context.
type gate chan struct{}

func (g gate) enter(ctx context.Context) error {
	select {
	case g <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (g gate) leave() { <-g }

// Open loads the module, finds the token and logs in, once. A wrong PIN costs one try: ErrPINIncorrect. A token
// that is not there is ErrTokenNotFound, a name that fits several is ErrAmbiguous and lists them. The caller must call Close.
func Open(ctx context.Context, cfg Config) (*Token, error) {
	t, err := openConfig(ctx, cfg)
	return t, named(err)
}

func openConfig(ctx context.Context, cfg Config) (*Token, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Sessions == 0 {
		cfg.Sessions = DefaultSessions
	}
	cfg.PIN = cfg.pinSource()
	cfg.URI.pinValue = PIN{}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	path, err := cfg.resolveModule()
	if err != nil {
		return nil, err
	}
	pin, err := cfg.PIN()
	if err != nil {
		return nil, err
	}
	m, err := openModule(path)
	if err != nil {
		return nil, err
	}
	t, err := open(ctx, cfg, m, pin)
	if err != nil {
		return nil, errors.Join(err, m.release())
	}
	return t, nil
}

// Bounds of the attempts to open a token. Modules that keep tokens in files, as SoftHSM does, show half a token, or none,
// while another process starts on the same files.
const (
	openTries    = 5
	minOpenPause = 20 * time.Millisecond // doubles with each attempt
)

// open makes the token on a module that is ready.
func open(ctx context.Context, cfg Config, m *module, pin PIN) (*Token, error) {
	for try := 1; ; try++ {
		t, err := openOnce(ctx, cfg, m, pin)
		if err == nil || try == openTries || !unsettled(err) {
			return t, err
		}
		pause := minOpenPause << (try - 1)
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
			return nil, err
		}
		// What a module did not see when it was initialised, it may never see.
		if err := m.reinitialise(); err != nil {
			return nil, err
		}
	}
}

// unsettled reports whether another process that starts may be the cause of err. The token has not judged a PIN then.
func unsettled(err error) bool {
	return errors.Is(err, ErrTokenNotFound) || errors.Is(err, errNoUserPIN) || errors.Is(err, errUnreadable) ||
		errors.Is(err, ck.Error(ck.CKR_USER_PIN_NOT_INITIALIZED)) || faultOf(err) == faultSession
}

func openOnce(ctx context.Context, cfg Config, m *module, pin PIN) (*Token, error) {
	f, err := m.findToken(&cfg.URI)
	if err != nil {
		return nil, err
	}
	switch flags := f.info.Flags; {
	case flags&ck.CKF_USER_PIN_LOCKED != 0:
		return nil, fmt.Errorf("%w: %v: have the security officer reset it", ErrPINLocked, f)
	case flags&ck.CKF_USER_PIN_INITIALIZED == 0:
		return nil, fmt.Errorf("%w: %v: initialise it", errNoUserPIN, f)
	}
	size := cfg.Sessions
	// 0 means no limit, all bits set means unknown. PKCS #11 v2.40 section 3.2, CK_TOKEN_INFO.
	if limit := f.info.MaxSessionCount; limit != 0 && limit != ^uint(0) && int(limit) < size {
		size = int(limit)
		cfg.Logger.Warn("token has fewer sessions than configured", "token", f.info.Label, "sessions", size, "configured", cfg.Sessions)
	}
	t := &Token{
		cfg: cfg, m: m, slot: f.slot, pin: pin, log: cfg.Logger.With("token", f.name()), name: f.name(),
		login: make(gate, 1), fresh: make(gate, 1), scans: make(gate, 1),
		keys: map[keyless.SKI]*key{},
	}
	t.pool = newPool(m, f.slot, size)
	if err := t.do(ctx, t.ensureLogin); err != nil {
		t.pool.close()
		return nil, fmt.Errorf("log in to %s: %w", t.name, err)
	}
	return t, nil
}

// name is what operators call a token.
func (f found) name() string {
	if f.info.Label != "" {
		return f.info.Label
	}
	return "serial " + f.info.SerialNumber
}

// Name returns the token's label, or its serial if it has none.
func (t *Token) Name() string { return t.name }

// Sessions returns how many operations the token does at one time.
func (t *Token) Sessions() int { return cap(t.pool.permits) }

// Check reports whether the token answers and is logged in, and logs in if it is not.
func (t *Token) Check(ctx context.Context) error { return named(t.check(ctx)) }

func (t *Token) check(ctx context.Context) error {
	if err := t.do(ctx, t.ensureLogin); err != nil {
		return fmt.Errorf("check token %s: %w", t.name, err)
	}
	return nil
}

// Close waits for operations in progress, closes the token's sessions and, after the last token of a module, finalises the
// module. Operations that come later, and those that wait for a session, return ErrClosed.
func (t *Token) Close() error {
	t.closing.Do(func() {
		t.pool.close()
		t.closed = named(t.m.release())
	})
	return t.closed
}

// ensureLogin logs in unless the login stands. However many callers find it gone, one tries.
func (t *Token) ensureLogin(ctx context.Context, s *session) error {
	if err := t.login.enter(ctx); err != nil {
		return err
	}
	defer t.login.leave()
	if t.failed != nil {
		return t.failed
	}
	info, err := t.m.sessionInfo(s)
	if err != nil {
		return err
	}
	if loggedIn(info) {
		return nil
	}
	leave, err := t.leave(ctx)
	if err != nil {
		return err
	}
	err = t.logInLocked(s, leave)
	leave.Done(err)
	return err
}

// logInLocked asks the token. The caller holds the login gate.
func (t *Token) logInLocked(s *session, leave Leave) error {
	if err := t.checkTries(leave); err != nil {
		return err
	}
	err := t.m.with(s, func(c *ck.Ctx, h ck.SessionHandle) error { return c.Login(h, ck.CKU_USER, t.pin.value()) })
	switch {
	case err == nil:
		t.log.Info("logged in to token")
	case errors.Is(err, ck.Error(ck.CKR_USER_ALREADY_LOGGED_IN)):
		// Somebody else in this process did; nothing is known about our PIN.
		return nil
	case faultOf(err) == faultPIN:
		return t.refuseLocked(err)
	}
	return err
}

// loggedIn reports whether the session is one of a user who is logged in.
func loggedIn(info ck.SessionInfo) bool {
	return info.State == ck.CKS_RO_USER_FUNCTIONS || info.State == ck.CKS_RW_USER_FUNCTIONS
}

// checkTries keeps a PIN that may be wrong from locking the token. The caller holds the login gate.
func (t *Token) checkTries(leave Leave) error {
	var info ck.TokenInfo
	err := t.m.call(func(c *ck.Ctx) (err error) {
		info, err = c.GetTokenInfo(t.slot)
		return err
	})
	if err != nil {
		return fmt.Errorf("%w: %w", errUnreadable, err)
	}
	if leave.Unproven && info.Flags&ck.CKF_USER_PIN_COUNT_LOW != 0 {
		return t.refuseLocked(errUnproven)
	}
	if info.Flags&ck.CKF_USER_PIN_FINAL_TRY == 0 {
		return nil
	}
	if t.cfg.AllowFinalTry {
		t.log.Warn("token has one PIN try left, which is made because the configuration allows it")
		return nil
	}
	t.failed = fmt.Errorf("token %s: %w: another wrong PIN would lock it: log in to it by other means with the right PIN, "+
		"which gives it all its tries back, or set allow_final_try", t.name, ErrPINFinalTry)
	t.log.Error("token has one PIN try left; it is not used", "err", t.failed)
	return t.failed
}

// refuseLocked remembers that the token refused the PIN. The caller holds the login gate.
func (t *Token) refuseLocked(err error) error {
	t.failed = fmt.Errorf("token %s: %w", t.name, pinError(err))
	t.log.Error("token refused the PIN; it is not tried again", "err", t.failed)
	return t.failed
}

// leave asks for permission to log in.
func (t *Token) leave(ctx context.Context) (Leave, error) {
	if t.cfg.Leave == nil {
		return Leave{Done: func(error) {}}, nil
	}
	return t.cfg.Leave(ctx)
}

func (t *Token) progress(ctx context.Context) {
	if t.cfg.Progress != nil {
		t.cfg.Progress(ctx)
	}
}

// do runs f on a session, with the remedies of the ladder.
func (t *Token) do(ctx context.Context, f func(context.Context, *session) error) error {
	var l ladder
	for {
		err := t.once(ctx, &l, f)
		if err == nil {
			return nil
		}
		if err := t.climb(ctx, &l, err); err != nil {
			return err
		}
	}
}

func (t *Token) once(ctx context.Context, l *ladder, f func(context.Context, *session) error) error {
	s, err := t.pool.take(ctx, l.session)
	if err != nil {
		return err
	}
	if l.login {
		err = t.ensureLogin(ctx, s)
	}
	if err == nil {
		err = f(ctx, s)
	}
	t.pool.give(s, err)
	return err
}

// ladder records which remedies one operation has had: each once.
type ladder struct {
	session, login, object bool
}

// climb applies the remedy that err asks for. It returns nil if the operation should be tried again, and otherwise
// the error to return.
func (t *Token) climb(ctx context.Context, l *ladder, err error) error {
	take := func(rung *bool) error {
		if *rung {
			return err
		}
		*rung = true
		return nil
	}
	switch faultOf(err) {
	case faultSession:
		if l.session && errors.Is(err, ck.Error(ck.CKR_OPERATION_ACTIVE)) {
			// On a new session: that is how some network HSMs throttle.
			return fmt.Errorf("%w: %w", ErrBusy, err)
		}
		return take(&l.session)
	case faultLogin:
		return take(&l.login)
	case faultObject:
		t.pool.doubt()
		return take(&l.object)
	case faultBusy:
		return fmt.Errorf("%w: %w", ErrBusy, err)
	case faultDevice:
		return fmt.Errorf("%w: %w", ErrDevice, err)
	case faultPIN:
		return t.refuse(ctx, err)
	}
	return err
}

// refuse remembers a PIN refused in a context-specific login.
func (t *Token) refuse(ctx context.Context, err error) error {
	if errors.Is(err, ErrPINIncorrect) || errors.Is(err, ErrPINLocked) {
		return err
	}
	if gateErr := t.login.enter(context.WithoutCancel(ctx)); gateErr != nil {
		return gateErr
	}
	defer t.login.leave()
	return t.refuseLocked(err)
}

var _ signer.Backend = (*Token)(nil)
