package audit

import (
	"context"
	"errors"
	"io"
	"time"
)

// Filter chooses lines. Zero members choose all; the others must all fit.
type Filter struct {
	Since, Until   time.Time // of the operation; Since is within, Until is not
	First, Last    uint64    // seq; both within
	Client         string    // a pattern: "*" stands for any text
	Key            string    // SKI in hex or label
	Op             string
	Result         string
	SNI            string // a pattern
	OnlyOperations bool
}

// Source is where [Show] and [Export] read.
type Source struct {
	Dir   string
	Files []string // instead of Dir, in order
}

// Show writes the lines that the filter chooses: as a table for people, or as they stand in the log if format is "json". It does not verify.
func Show(ctx context.Context, s Source, f Filter, format string, w io.Writer) error {
	return errors.ErrUnsupported
}

// Export writes a range as one file: format "jsonl" (which [Verify] can check, if the filter has no other members than a range) or "csv".
func Export(ctx context.Context, s Source, f Filter, format string, w io.Writer) error {
	return errors.ErrUnsupported
}

// LoadAnchor reads a checkpoint line from a file, such as a copy of the head file or what a log host kept.
func LoadAnchor(path string) (*Line, error) { return nil, errors.ErrUnsupported }

// Repair consents to going on after damage; reason goes into the log. A server that runs is given until ctx ends to take it; otherwise the next start takes it.
func Repair(ctx context.Context, dir, reason string) (taken bool, err error) {
	return false, errors.ErrUnsupported
}
