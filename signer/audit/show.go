package audit

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

// Filter chooses lines. Zero members choose all; the others must all fit. Every member but First and Last chooses among operations only.
type Filter struct {
	Since, Until time.Time // when the operation was taken up; Since is within, Until is not
	First, Last  uint64    // seq; both within
	Client       string    // the client's identity; "*" stands for any text
	Key          string    // SKI in hex, or label
	Op           string
	Result       string
	SNI          string // "*" stands for any text
}

// Check returns what is wrong with the filter; nil if nothing is.
func (f *Filter) Check() error {
	switch {
	case f.Last != 0 && f.First > f.Last:
		return fmt.Errorf("audit: seq %d to %d is no range", f.First, f.Last)
	case !f.Since.IsZero() && !f.Until.IsZero() && !f.Since.Before(f.Until):
		return fmt.Errorf("audit: %s to %s is no range", f.Since.Format(time.RFC3339), f.Until.Format(time.RFC3339))
	}
	switch signer.Result(f.Result) {
	case "", signer.ResultOK, signer.ResultRefused, signer.ResultFailed:
		return nil
	}
	return fmt.Errorf("audit: result %q; use %s, %s or %s", f.Result, signer.ResultOK, signer.ResultRefused, signer.ResultFailed)
}

// chooses reports whether the line is wanted.
func (f *Filter) chooses(l *Line) bool {
	if l.Seq < f.First || f.Last != 0 && l.Seq > f.Last {
		return false
	}
	r := &l.Op
	if l.Kind != KindOp {
		return *f == Filter{First: f.First, Last: f.Last}
	}
	return (f.Since.IsZero() || !l.Time.Before(f.Since)) && (f.Until.IsZero() || l.Time.Before(f.Until)) &&
		(f.Client == "" || glob(f.Client, r.Peer)) && (f.SNI == "" || glob(f.SNI, r.SNI)) &&
		(f.Key == "" || f.Key == r.Label || strings.EqualFold(f.Key, r.SKI.String())) &&
		(f.Op == "" || f.Op == r.Op) && (f.Result == "" || f.Result == string(r.Result))
}

// ranged reports whether the filter chooses by nothing but time and seq.
func (f *Filter) ranged() bool {
	return f.Client == "" && f.Key == "" && f.Op == "" && f.Result == "" && f.SNI == ""
}

// glob reports whether text fits a pattern in which "*" stands for any text.
func glob(pattern, text string) bool {
	parts := strings.Split(pattern, "*")
	first, last := parts[0], parts[len(parts)-1]
	if len(parts) == 1 {
		return text == pattern
	}
	if !strings.HasPrefix(text, first) || len(text) < len(first)+len(last) || !strings.HasSuffix(text, last) {
		return false
	}
	text = text[len(first) : len(text)-len(last)]
	for _, p := range parts[1 : len(parts)-1] {
		_, after, ok := strings.Cut(text, p)
		if !ok {
			return false
		}
		text = after
	}
	return true
}

// Source is where [Show] and [Export] read: the directory of a log, or its files in order, or an export.
type Source struct {
	Dir   string
	Files []string
}

// walk calls visit for each line whose chain is right, up to the first that is wrong. Damage that a repair has noted is passed over.
func (s Source) walk(ctx context.Context, visit func(l *Line, raw []byte) error) (*verifier, error) {
	v, err := newVerifier(VerifyConfig{Dir: s.Dir, Files: s.Files, Partial: true, Repaired: true})
	if err != nil {
		return nil, err
	}
	v.visit = visit
	if err := v.run(ctx); err != nil {
		return nil, err
	}
	return v, nil
}

// Show writes the lines that the filter chooses: as a table for people if format is "table", as they stand in the log if it is "json". Each line's chain is
// checked on the way. When something is wrong the lines before it are shown, and the error is a *[Problem].
func Show(ctx context.Context, s Source, f Filter, format string, w io.Writer) error {
	if err := f.Check(); err != nil {
		return err
	}
	var show func(l *Line, raw []byte) error
	end := func() error { return nil }
	switch format {
	case "json":
		show = func(_ *Line, raw []byte) error {
			_, err := w.Write(raw)
			return err
		}
	case "table":
		t := table{w: tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)}
		t.head()
		show, end = t.line, t.w.Flush
	default:
		return fmt.Errorf("audit: format %q; use table or json", format)
	}
	v, err := s.walk(ctx, func(l *Line, raw []byte) error {
		if !f.chooses(l) {
			return nil
		}
		return show(l, raw)
	})
	if err = errors.Join(err, end()); err != nil {
		return err
	}
	if v.rep.Problem != nil {
		return v.rep.Problem
	}
	return nil
}

// table writes lines for people.
type table struct {
	w *tabwriter.Writer
	n int
}

func (t *table) head() {
	fmt.Fprintln(t.w, "SEQ\tTIME\tCLIENT\tOP\tSCHEME\tKEY\tSNI*\tVISITOR*\tRESULT\tDURATION\tREASON")
}

// tableBlock is after how many lines the widths of the columns are settled, so that a long log needs no memory.
const tableBlock = 500

func (t *table) line(l *Line, _ []byte) error {
	if t.n++; t.n%tableBlock == 0 {
		if err := t.w.Flush(); err != nil {
			return err
		}
	}
	when := l.Time.Format("2006-01-02T15:04:05.000Z07:00")
	if l.Kind != KindOp {
		_, err := fmt.Fprintf(t.w, "%d\t%s\t-\t%s\t-\t-\t-\t-\t-\t-\t%s\n", l.Seq, when, l.Kind, plain(l.about()))
		return err
	}
	r := &l.Op
	key := r.Label
	if key == "" && !r.SKI.IsZero() {
		key = r.SKI.String()
	}
	visitor := ""
	if r.ClientIP.IsValid() {
		visitor = r.ClientIP.String()
	}
	_, err := fmt.Fprintf(t.w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.Seq, when, plain(r.Peer), plain(r.Op), plain(r.Scheme),
		plain(key), plain(r.SNI), plain(visitor), plain(string(r.Result)), r.Duration.Round(time.Microsecond), plain(r.Reason))
	return err
}

// plain returns v without anything that a terminal could act on, "-" if it is empty.
func plain(v string) string {
	if v == "" {
		return "-"
	}
	return string(appendEscaped(nil, v))
}

// about says in words what a line other than an operation tells.
func (l *Line) about() string {
	switch l.Kind {
	case KindOpen:
		if l.Open.Damage != "" {
			return "after damage: " + l.Open.Damage
		}
		return "server " + l.Open.Server
	case KindCheckpoint:
		return fmt.Sprintf("covers seq %d, key %s", l.Checkpoint.Covers, l.Checkpoint.Key)
	case KindLost:
		return fmt.Sprintf("%d records lost: %s", l.Note.Count, l.Note.Text)
	case KindRecovered:
		return fmt.Sprintf("%d bytes of %s given up: %s", l.Note.Bytes, l.Note.File, l.Note.Text)
	}
	return l.Note.Text
}

// csvHead names the columns of a CSV export. What the client says of its visitor is marked as in the log.
var csvHead = []string{"seq", "time", "dur_ns", "client", "addr", "op", "scheme", "key", "label", "home", "sha256", "result", "cause", "reason",
	"waited_ns", "took_ns", "tries", "hedged", "asserted_sni", "asserted_visitor", "asserted_server", "trace", "request", "chain"}

// writeCSV writes an operation as a row.
func writeCSV(w *csv.Writer, l *Line) error {
	r := &l.Op
	ns := func(d time.Duration) string { return strconv.FormatInt(int64(d), 10) }
	row := []string{strconv.FormatUint(l.Seq, 10), l.Time.Format(timeLayout), ns(r.Duration), r.Peer, "", r.Op, r.Scheme, hexOrNone(r), r.Label, r.Home,
		Hash(r.Hash).String(), string(r.Result), string(r.Cause), r.Reason, ns(r.Waited), ns(r.Took), strconv.Itoa(r.Tries), strconv.FormatBool(r.Hedged),
		r.SNI, "", "", r.TraceID, r.RequestID, l.Chain.String()}
	if r.Addr.IsValid() {
		row[4] = r.Addr.String()
	}
	if r.ClientIP.IsValid() {
		row[19] = r.ClientIP.String()
	}
	if r.ServerIP.IsValid() {
		row[20] = r.ServerIP.String()
	}
	for i, cell := range row {
		cell = printable(cell) // a person may read it
		row[i] = cell
		// A spreadsheet takes such a cell for a formula, and clients choose some of them.
		if cell != "" && strings.ContainsRune("=+-@\t\r", rune(cell[0])) {
			row[i] = "'" + cell
		}
	}
	return w.Write(row)
}

func hexOrNone(r *signer.Record) string {
	if r.SKI.IsZero() {
		return ""
	}
	return r.SKI.String()
}
