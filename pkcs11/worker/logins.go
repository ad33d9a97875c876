package worker

import (
	"fmt"
	"sync"

	"github.com/keyhaven/keyhaven/pkcs11"
)

// logins lets one worker log in at a time, and none after the token has refused the PIN.
type logins struct {
	mu       sync.Mutex // guards what follows
	waiting  []login
	current  login
	refused  error
	reading  int  // of the PIN that may be used
	proven   bool // the token has accepted it
	unproven bool // a login with it had no answer
}

// login is a worker's wish to log in.
type login struct {
	w  *proc
	id uint32
}

// maxWishes bounds the wishes of one worker: one for each of its sessions and one for the token.
const maxWishes = 1024

// errOldPIN keeps a worker with an older PIN from trying it. It is replaced soon.
var errOldPIN = fmt.Errorf("%w: the worker has a PIN that was read before", pkcs11.ErrDevice)

// ask queues a wish.
func (l *logins) ask(w *proc, id uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	mine := 0
	for _, o := range l.waiting {
		if o.w == w {
			mine++
		}
	}
	if mine < maxWishes {
		l.waiting = append(l.waiting, login{w, id})
	}
	l.nextLocked()
}

// nextLocked answers the wishes that can be answered now.
func (l *logins) nextLocked() {
	for l.current.w == nil && len(l.waiting) > 0 {
		next := l.waiting[0]
		l.waiting = l.waiting[1:]
		switch {
		case l.refused != nil:
			next.w.out.send(frameLeave, next.id, []byte{leaveDenied}, encodeError(l.refused))
		case next.w.pin != l.reading:
			next.w.out.send(frameLeave, next.id, []byte{leaveDenied}, encodeError(errOldPIN))
		default:
			how := leaveGiven
			if l.unproven && !l.proven {
				how = leaveUnproven
			}
			l.current = next
			next.w.out.send(frameLeave, next.id, []byte{how})
		}
	}
}

// done records what became of a login.
func (l *logins) done(w *proc, id uint32, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.current != (login{w, id}) {
		return
	}
	l.current = login{}
	switch {
	case w.pin != l.reading:
	case err == nil:
		l.proven, l.unproven = true, false
	case refusesPIN(err):
		l.refused, l.proven = err, false
	default:
		l.unproven = true
	}
	l.nextLocked()
}

// leave forgets a worker that is gone. If it was about to log in, the token may have counted a try.
func (l *logins) leave(w *proc) {
	l.mu.Lock()
	defer l.mu.Unlock()
	kept := l.waiting[:0]
	for _, o := range l.waiting {
		if o.w != w {
			kept = append(kept, o)
		}
	}
	l.waiting = kept
	if l.current.w == w {
		l.current = login{}
		l.unproven = l.unproven || w.pin == l.reading
	}
	l.nextLocked()
}

// renew allows logins with a PIN that has been read anew.
func (l *logins) renew(reading int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reading, l.refused, l.proven, l.unproven = reading, nil, false, false
	l.nextLocked()
}

// denial returns why no worker may log in, or nil.
func (l *logins) denial() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.refused
}
