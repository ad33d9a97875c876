package transit

import (
	"crypto/sha256"
	"sync"
	"time"
)

// refusedFor is how long the ids of an AppRole that a server refused are not sent again. Servers lock a role, for everyone who uses it, after a few
// failed logins (five by default), and forget these when none came for a while (15 minutes by default).
const refusedFor = 20 * time.Minute

// Refusals remembers which login a server refused, so that it is not tried over and over: a role would be locked, as a token by wrong PINs. It is
// made again when the ids in the files change, after refusedFor, or after Forget. The zero value is ready. All methods may be called from several
// goroutines at once.
type Refusals struct {
	mu  sync.Mutex // guards the rest
	ids [sha256.Size]byte
	at  time.Time // zero: nothing was refused
	err error
}

// Forget has the next login tried whatever was refused: an operator says that it may work now.
func (r *Refusals) Forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.at, r.err = time.Time{}, nil
}

// any reports whether a login is refused and remembered.
func (r *Refusals) any() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.at.IsZero() && time.Since(r.at) < refusedFor
}

// heldError is the refusal of a login that was not tried again.
type heldError struct{ err error }

func (e *heldError) Error() string { return e.err.Error() }
func (e *heldError) Unwrap() error { return e.err }

// of returns why a login with the ids is not to be tried, or nil.
func (r *Refusals) of(ids [sha256.Size]byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.at.IsZero() || ids != r.ids || time.Since(r.at) >= refusedFor {
		return nil
	}
	return &heldError{r.err}
}

// keep remembers the refusal of a login with the ids.
func (r *Refusals) keep(ids [sha256.Size]byte, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ids, r.at, r.err = ids, time.Now(), err
}
