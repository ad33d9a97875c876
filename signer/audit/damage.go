package audit

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// usable sees to it that there is a file to write to. Damage stops the writer until somebody consents to going on, or what was moved away is back.
func (w *writer) usable(now time.Time) error {
	if w.f != nil {
		w.damaged = w.intact()
	}
	if w.damaged != nil {
		reason, ok := w.consent()
		if !ok {
			return w.damaged
		}
		w.damage = w.damaged.Error() + reason
		w.damaged = nil
		w.leave()
	}
	if w.f == nil {
		return w.create(now)
	}
	return nil
}

// damageError is damage that needs an operator's consent.
type damageError struct{ file, what string }

func (e *damageError) Error() string {
	return fmt.Sprintf("audit: %s %s", e.file, e.what)
}

const repairAdvice = "; look into it, and then let the server go on with keyhaven-keyserver audit repair"

// advised adds to damage what an operator can do.
func advised(err error) error {
	var d *damageError
	if errors.As(err, &d) {
		return fmt.Errorf("%w%s", err, repairAdvice)
	}
	return err
}

// intact reports whether the file is still the one that was written.
func (w *writer) intact() error {
	have, err := w.f.Stat()
	if err != nil {
		return &damageError{w.path(), "cannot be looked at any more: " + err.Error()}
	}
	there, err := os.Lstat(w.path())
	switch {
	case err != nil:
		return &damageError{w.path(), "was removed or moved away while it was written"}
	case !os.SameFile(have, there):
		return &damageError{w.path(), "was replaced by another file while it was written"}
	case have.Size() != w.size:
		return &damageError{w.path(), fmt.Sprintf("has %d bytes, but %d were written: somebody else changed it", have.Size(), w.size)}
	}
	return nil
}

// consent reports whether the log may go on after damage, and what the operator said.
func (w *writer) consent() (string, bool) {
	reason, err := readRepair(w.c.Dir)
	switch {
	case err == nil:
		w.consented = true
		return " (repair: " + reason + ")", true
	case w.c.Mode == BestEffort:
		return "", true
	}
	return "", false
}

// readRepair returns the reason of a request to repair.
func readRepair(dir string) (string, error) {
	f, err := openRead(filepath.Join(dir, repairFile))
	if err != nil {
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxString))
	if err != nil {
		return "", err
	}
	reason := strings.TrimSpace(string(text))
	if reason == "" {
		reason = "no reason given"
	}
	return reason, nil
}
