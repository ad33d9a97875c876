package audit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sort"
	"time"
)

// verifier goes through the files of a log once, in order.
type verifier struct {
	c       VerifyConfig
	ring    keyring
	sealer  *sealer
	paths   []string
	anchors []*anchor
	visit   func(l *Line, raw []byte) error // called for each right line; nil is none
	export  *exportHeader                   // of an export; nil in a log
	rep     Report

	begun   bool
	id      ID
	server  string
	seq     uint64 // of the last right line
	head    Hash   // its chain
	base    uint64 // seq of marks[0]
	marks   []mark // the state after each of the last lines
	at      place  // of the last line that was read
	index   int    // of the file that is read
	loose   loose  // what no signature covers
	excused int    // index of the file whose open line's damage was noted already
	behind  place  // where a next line of the file before would stand
	line    Line
}

// mark is the state after a line, for the checkpoints that cover it.
type mark struct {
	chain   Hash
	records uint64
	file    int32 // index of the line's file
	line    int32
}

// loose is the first operation behind the last one that a signature covers; its seq is 0 if there is none.
type loose struct {
	at  place
	seq uint64
}

// anchor is a checkpoint beside the log.
type anchor struct {
	line *Line
	from string
	own  bool // given by the one who verifies
	met  bool
}

// place is where a line stands.
type place struct {
	path string
	line int
}

func (v *verifier) problem(kind ProblemKind, at place, seq uint64, format string, args ...any) *Problem {
	return &Problem{Kind: kind, File: printable(at.path), Line: at.line, Seq: seq, Text: printable(fmt.Sprintf(format, args...))}
}

// run fills in the report.
func (v *verifier) run(ctx context.Context) error {
	if v.rep.Problem != nil {
		return nil
	}
	for i, path := range v.paths {
		v.index = i
		next, err := v.peek(i + 1)
		if err != nil {
			return err
		}
		v.rep.Problem, err = v.file(ctx, i, path, next)
		if p := v.rep.Problem; p != nil && next != nil && next.Open.Damage != "" {
			v.rep.Problem = v.noted(p) // the next file tells of it
			v.excused = i + 1
		}
		v.sum()
		if err != nil || v.rep.Problem != nil {
			return err
		}
		v.rep.Files++
	}
	v.rep.Problem = v.end()
	v.sum()
	return nil
}

func (v *verifier) sum() {
	v.rep.Last, v.rep.Head = v.seq, v.head
	v.rep.Uncovered = v.rep.Records - v.rep.Covered
	if v.begun {
		v.rep.Log, v.rep.Server = v.id.String(), printable(v.server)
	}
}

// peek returns the first line of the file at i, or nil if there is none that could be one.
func (v *verifier) peek(i int) (*Line, error) {
	if i >= len(v.paths) {
		return nil, nil
	}
	r, err := openLines(v.paths[i], len(v.c.Files) > 0)
	if err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	defer r.close()
	raw, err := r.next()
	if err != nil {
		return nil, nil // what it is will be said when its turn comes
	}
	if l, err := ParseLine(raw); err == nil && l.Kind == KindOpen {
		return l, nil
	}
	return nil, nil
}

// file verifies one file. next is the first line of the one after it.
func (v *verifier) file(ctx context.Context, i int, path string, next *Line) (*Problem, error) {
	r, err := openLines(path, len(v.c.Files) > 0)
	if err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	defer r.close()
	newest := i == len(v.paths)-1
	for first := true; ctx.Err() == nil; first = false {
		if next != nil && !first && next.Open.PrevSeq == v.seq && next.Open.PrevHead == v.head {
			return v.leftover(r, path, next)
		}
		raw, err := r.next()
		if errors.Is(err, errTorn) && newest && len(v.c.Files) == 0 {
			raw, err = v.settle(r, raw)
		}
		v.at = place{path, r.number}
		switch {
		case errors.Is(err, io.EOF) && first:
			return v.vain(path, newest), nil
		case errors.Is(err, io.EOF):
			v.behind = place{path, r.number + 1}
			return nil, nil
		case errors.Is(err, errTorn) && len(raw) < maxLine:
			return v.problem(Truncated, v.at, v.seq+1, "the file ends within a line; a crash leaves such a line, and the next start of the server cuts it off"), nil
		case err != nil && !errors.Is(err, errTorn):
			return nil, fmt.Errorf("audit: %s: %w", path, err)
		}
		if v.at.line == 1 && isExport(raw) {
			if len(v.c.Files) == 0 { // its first line says where it begins, so the log's beginning could be missing
				return v.problem(Foreign, v.at, v.seq+1, "an export is no file of a log; verify it by itself, with --file"), nil
			}
			if err := v.beginExport(raw); err != nil {
				return nil, fmt.Errorf("audit: %s: %w", path, err)
			}
			continue
		}
		if err := v.line.parse(raw); err != nil {
			return v.problem(Altered, v.at, v.seq+1, "%v", err), nil
		}
		if p := v.take(r, raw, i, first); p != nil {
			return p, nil
		}
		if v.visit != nil {
			if err := v.visit(&v.line, raw); err != nil {
				return nil, err
			}
		}
	}
	return nil, context.Cause(ctx)
}

// vain is for a file without any line. The server may have just begun the newest one.
func (v *verifier) vain(path string, newest bool) *Problem {
	if newest && v.begun {
		return nil
	}
	return v.problem(Truncated, place{path, 0}, v.seq+1, "the file is empty")
}

// settle reads the last line of a file again that a server may be writing.
func (v *verifier) settle(r *lineReader, raw []byte) ([]byte, error) {
	for range 10 {
		time.Sleep(20 * time.Millisecond)
		if _, err := r.f.Seek(r.offset, io.SeekStart); err != nil {
			return nil, err
		}
		r.r.Reset(r.f)
		r.number--
		again, err := r.next()
		if !errors.Is(err, errTorn) {
			return again, err
		}
		raw = again
	}
	return raw, errTorn
}

// leftover judges what stands in a file behind the last line that the next file counts.
func (v *verifier) leftover(r *lineReader, path string, next *Line) (*Problem, error) {
	counted := r.offset
	raw, err := r.next()
	if errors.Is(err, io.EOF) {
		return nil, nil
	}
	if err != nil && !errors.Is(err, errTorn) {
		return nil, fmt.Errorf("audit: %s: %w", path, err)
	}
	at := place{path, r.number}
	if next.Open.Damage == "" && next.Open.Abandoned > 0 {
		st, err := r.f.Stat()
		if err != nil {
			return nil, fmt.Errorf("audit: %w", err)
		}
		if behind := st.Size() - counted; behind < 0 || uint64(behind) > next.Open.Abandoned {
			return v.problem(Inserted, at, v.seq+1, "%d bytes stand behind seq %d, but the server gave up %d there", behind, v.seq, next.Open.Abandoned), nil
		}
		return nil, nil
	}
	if next.Open.Damage == "" {
		return v.problem(Inserted, at, v.seq+1, "the next file begins behind seq %d, so nothing should stand here", v.seq), nil
	}
	// The server noted this; name it more closely.
	var p *Problem
	if err := v.line.parse(raw); err != nil {
		p = v.problem(Altered, at, v.seq+1, "%v", err)
	} else if p = v.chained(r, raw, at); p == nil {
		p = v.problem(Damaged, at, v.seq+1, "the server found damage: %s", next.Open.Damage)
	}
	return p, nil
}

// noted returns p unless the damage that a repair has noted is taken for known.
func (v *verifier) noted(p *Problem) *Problem {
	if !v.c.Repaired {
		return p
	}
	v.rep.Damage = append(v.rep.Damage, *p)
	return nil
}

// take checks a line, whose decoded form is v.line, against all before it.
func (v *verifier) take(r *lineReader, raw []byte, i int, first bool) *Problem {
	l := &v.line
	switch {
	case first && v.export == nil && l.Kind != KindOpen:
		return v.problem(Removed, v.at, v.seq+1, "the file does not begin with its open line")
	case l.Kind == KindOpen && (first || v.export != nil):
		if p := v.opening(raw, i); p != nil {
			return p
		}
	default:
		if p := v.chained(r, raw, v.at); p != nil {
			return p
		}
	}
	v.advance(l)
	switch l.Kind {
	case KindOp:
	case KindLost:
		v.rep.Lost += l.Note.Count
	case KindCheckpoint:
		if p := v.checkpoint(l); p != nil {
			return p
		}
	}
	return v.meet()
}

// advance goes on to a right line.
func (v *verifier) advance(l *Line) {
	if !v.begun {
		v.begun = true
		v.rep.First = l.Seq
		v.base, v.marks = l.Seq-1, append(v.marks, mark{chain: v.head})
	} else if l.Seq != v.seq+1 {
		v.base, v.marks = l.Seq, v.marks[:0] // a jump, after damage
	}
	v.seq, v.head = l.Seq, l.Chain
	if l.Kind == KindOp {
		v.rep.Records++
		if v.loose.seq == 0 {
			v.loose = loose{v.at, l.Seq}
		}
	}
	v.marks = append(v.marks, mark{l.Chain, v.rep.Records, int32(v.index), int32(v.at.line)})
	if len(v.marks) >= 2*maxLag {
		drop := len(v.marks) - maxLag - 1
		v.marks = append(v.marks[:0], v.marks[drop:]...)
		v.base += uint64(drop)
	}
}

// opening checks the first line of a file against the end of the file before.
func (v *verifier) opening(raw []byte, i int) *Problem {
	l, o := &v.line, &v.line.Open
	if o.Version != Version {
		return v.problem(Foreign, v.at, l.Seq, "format version %d; this program knows %d", o.Version, Version)
	}
	if v.sealer.chain(&o.PrevHead, raw[:len(raw)-lineTail]) != l.Chain {
		return v.problem(Altered, v.at, v.seq+1, "the line's chain does not fit what it says")
	}
	if !v.begun && v.export == nil {
		if !v.c.Partial && (l.Seq != 1 || o.PrevFile != "") {
			return v.problem(Removed, v.at, 1, "the log begins with seq %d: older files are missing; if they were moved away, verify them with it or allow a partial log", l.Seq)
		}
		v.id, v.server, v.seq, v.head = o.Log, o.Server, l.Seq-1, o.PrevHead
		if o.Damage != "" {
			return v.told(i, l.Seq)
		}
		return nil
	}
	if o.Log != v.id || o.Server != v.server && o.Damage == "" {
		return v.problem(Foreign, v.at, v.seq+1, "the file is of log %s of server %q, the one before of log %s of server %q", o.Log, o.Server, v.id, v.server)
	}
	v.server = o.Server
	fits := o.PrevSeq == v.seq && o.PrevHead == v.head
	if o.Damage != "" {
		return v.told(i, v.seq+1)
	}
	if !fits || l.Seq != v.seq+1 {
		return v.misfit(i, o)
	}
	return nil
}

// told is for an open line that tells of damage.
func (v *verifier) told(i int, seq uint64) *Problem {
	if v.excused == i && i > 0 {
		return nil // noted in the file before
	}
	return v.noted(v.problem(Damaged, v.at, seq, "the server found damage and went on: %s", v.line.Open.Damage))
}

// misfit says why a file does not continue the one before.
func (v *verifier) misfit(i int, o *Opening) *Problem {
	switch {
	case o.PrevSeq < v.seq && v.chainAt(v.line.Seq) == v.line.Chain:
		return v.problem(Duplicated, v.at, v.seq+1, "the file repeats one that came before")
	case o.PrevSeq <= v.seq:
		return v.problem(Altered, v.at, v.seq+1, "the file continues another line than the last one of the file before")
	}
	for j := i + 1; j < len(v.paths); j++ {
		if l, err := v.peek(j); err == nil && l != nil && l.Open.PrevSeq == v.seq && l.Open.PrevHead == v.head {
			return v.problem(Reordered, v.at, v.seq+1, "the file that continues seq %d is %s: files were renamed", v.seq, v.paths[j])
		}
	}
	if i > 0 && o.PrevFile != filepath.Base(v.paths[i-1]) {
		return v.problem(Removed, place{filepath.Join(filepath.Dir(v.at.path), o.PrevFile), 0}, v.seq+1,
			"the file is missing: %s continues it, and seq %d to %d are not there", v.at.path, v.seq+1, o.PrevSeq)
	}
	return v.problem(Truncated, v.behind, v.seq+1, "the file ends with seq %d, but the next one continues seq %d", v.seq, o.PrevSeq)
}

// chainAt returns the chain of a line that was read, zero if it is not known any more.
func (v *verifier) chainAt(seq uint64) Hash {
	if seq < v.base || seq-v.base >= uint64(len(v.marks)) {
		return Hash{}
	}
	return v.marks[seq-v.base].chain
}

// chained checks that a line continues the one before, and else finds out what was done.
func (v *verifier) chained(r *lineReader, raw []byte, at place) *Problem {
	l := &v.line
	want := v.seq + 1
	fits := v.sealer.chain(&v.head, raw[:len(raw)-lineTail]) == l.Chain
	if fits && l.Seq == want && l.Kind != KindOpen {
		return nil
	}
	seq, chain := l.Seq, l.Chain
	after, later := lookAhead(r, want)
	switch {
	case fits:
		return v.problem(Altered, at, want, "the chain was made anew, but seq %d of kind %s does not belong here", seq, l.Kind)
	case l.Kind == KindCheckpoint && l.Checkpoint.Log != v.id:
		return v.problem(Foreign, at, want, "the line is from log %s", l.Checkpoint.Log)
	case seq < want && v.chainAt(seq) == chain:
		return v.problem(Duplicated, at, want, "the line repeats seq %d", seq)
	case seq == want && after == want, seq < want && after == want:
		return v.problem(Inserted, at, want, "the line was not there when the next one was written")
	case seq == want, after == want+1:
		return v.problem(Altered, at, want, "the line was changed, or comes from another log: its chain does not fit")
	case later:
		return v.problem(Reordered, at, want, "seq %d stands where seq %d should, which comes later", seq, want)
	case seq < want:
		return v.problem(Inserted, at, want, "seq %d does not belong here", seq)
	}
	return v.problem(Removed, at, want, "seq %d to %d are missing", want, seq-1)
}

// lookAhead returns the seq of the line after the present one, 0 if there is none, and whether seq want comes anywhere later in the file.
func lookAhead(r *lineReader, want uint64) (after uint64, later bool) {
	var l Line
	for i := 0; ; i++ {
		raw, err := r.next()
		if err != nil {
			return after, false
		}
		if l.parse(raw) != nil {
			continue
		}
		if i == 0 {
			after = l.Seq
		}
		if l.Seq == want {
			return after, true
		}
	}
}

// checkpoint checks a checkpoint line, which is right as a line.
func (v *verifier) checkpoint(l *Line) *Problem {
	c := &l.Checkpoint
	switch {
	case c.Log != v.id:
		return v.problem(Foreign, v.at, l.Seq, "the checkpoint is of log %s", c.Log)
	case c.Server != v.server:
		return v.problem(Foreign, v.at, l.Seq, "the checkpoint is of server %q, and this is the log of %q", c.Server, v.server)
	case c.Covers >= l.Seq || l.Seq-c.Covers > maxLag:
		return v.problem(Forged, v.at, l.Seq, "the checkpoint says that it covers seq %d", c.Covers)
	}
	if p := v.signature(l, v.at, l.Seq); p != nil {
		return p
	}
	if c.Covers < v.base {
		return nil // what it covers is not here, or came before damage
	}
	m := v.marks[c.Covers-v.base]
	if m.chain != c.Head {
		return v.problem(Altered, v.at, l.Seq, "lines up to seq %d were changed and chained anew: the checkpoint has another chain for it", c.Covers)
	}
	if c.Covers <= v.rep.SignedTo {
		return nil // an older one, written once more
	}
	v.covered(l, m.records)
	v.loose = loose{}
	i := c.Covers - v.base + 1
	n := sort.Search(len(v.marks[i:]), func(n int) bool { return v.marks[i:][n].records > m.records })
	if i += uint64(n); i < uint64(len(v.marks)) {
		v.loose = loose{place{v.paths[v.marks[i].file], int(v.marks[i].line)}, v.base + i}
	}
	return nil
}

// signature checks a checkpoint's signature if keys were given.
func (v *verifier) signature(l *Line, at place, seq uint64) *Problem {
	if len(v.ring) == 0 {
		return nil
	}
	if err := v.ring.check(l); err != nil {
		return v.problem(Forged, at, seq, "checkpoint up to seq %d: %v", l.Checkpoint.Covers, err)
	}
	v.rep.Checkpoints++
	return nil
}

// covered counts what a right checkpoint covers.
func (v *verifier) covered(l *Line, records uint64) {
	if len(v.ring) == 0 {
		return
	}
	v.rep.Covered = max(v.rep.Covered, records)
	v.rep.SignedTo = max(v.rep.SignedTo, l.Checkpoint.Covers)
	if l.Time.After(v.rep.LastCheckpoint) {
		v.rep.LastCheckpoint = l.Time
	}
}

// meet compares the anchors that cover the last line.
func (v *verifier) meet() *Problem {
	for _, a := range v.anchors {
		c := &a.line.Checkpoint
		if a.line.Seq == v.seq && c.Log == v.id && a.line.Chain != v.head {
			return v.problem(Altered, v.at, v.seq, "%s has another line here", a.from)
		}
		if a.met || c.Covers != v.seq {
			continue
		}
		a.met = true
		if c.Log == v.id && c.Head != v.head {
			return v.problem(Altered, v.at, v.seq, "lines up to here were changed and chained anew: %s has another chain for seq %d", a.from, v.seq)
		}
		if p := v.signature(a.line, place{a.from, 0}, v.seq); p != nil {
			return p
		}
		v.covered(a.line, v.rep.Records)
		v.loose = loose{}
		v.rep.Anchored = v.rep.Anchored || a.own
	}
	return nil
}

// end looks at the anchors that no line met.
func (v *verifier) end() *Problem {
	for _, a := range v.anchors {
		c := &a.line.Checkpoint
		switch {
		case v.begun && c.Log != v.id:
			return v.problem(Foreign, place{a.from, 0}, c.Covers, "%s is of log %s, and this is log %s", a.from, c.Log, v.id)
		case a.line.Seq > v.seq:
			return v.problem(Truncated, v.behind, v.seq+1, "the log ends with seq %d, but %s tells of seq %d: lines at the end were removed", v.seq, a.from, a.line.Seq)
		case a.met:
		case a.own:
			return v.problem(Removed, place{a.from, 0}, c.Covers, "%s covers seq %d, which is not here", a.from, c.Covers)
		}
	}
	return v.unsigned()
}

// unsigned looks whether signatures cover as much as they must.
func (v *verifier) unsigned() *Problem {
	left := v.rep.Records - v.rep.Covered
	switch {
	case len(v.ring) == 0 || left == 0:
		return nil
	case v.rep.Covered == 0:
		return v.problem(Unsigned, v.loose.at, v.loose.seq, "no checkpoint covers any of %d operations, so that anybody could have written them; if the log has only begun, wait for the next checkpoint", left)
	case v.c.AllSigned:
		return v.problem(Unsigned, v.loose.at, v.loose.seq, "no checkpoint covers this operation and what follows, %d in all, so that anybody could have written them", left)
	}
	return nil
}
