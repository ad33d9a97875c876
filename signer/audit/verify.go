package audit

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"
)

// VerifyConfig says what to verify.
type VerifyConfig struct {
	// Dir is the directory of a log. Its head file is looked at too, if there is one.
	Dir string
	// Files are the files to verify instead, in order, or one export.
	Files []string
	// Keys are the public keys that may have signed checkpoints; see [LoadKeys]. Without any, signatures are not checked and nothing counts as covered.
	Keys []crypto.PublicKey
	// Anchor is a checkpoint line that was kept elsewhere; see [LoadAnchor]. Nil is none.
	Anchor *Line
	// Partial allows the log to begin after its first line, because older files were moved away.
	Partial bool
	// Repaired takes damage that a repair has noted for known: it goes to Report.Damage and verification goes on.
	Repaired bool
	// AllSigned demands that signatures cover all operations, as they do once a server has ended well.
	AllSigned bool
}

// ProblemKind is what is wrong with a log.
type ProblemKind string

// What can be wrong.
const (
	Altered    ProblemKind = "altered"
	Removed    ProblemKind = "removed"
	Reordered  ProblemKind = "reordered"
	Duplicated ProblemKind = "duplicated"
	Inserted   ProblemKind = "inserted"
	Truncated  ProblemKind = "truncated"
	Forged     ProblemKind = "forged"   // a checkpoint's signature is wrong, or its key unknown
	Foreign    ProblemKind = "foreign"  // a line or file of another log
	Unsigned   ProblemKind = "unsigned" // keys were given, and no signature covers it
	Damaged    ProblemKind = "damaged"  // the server found damage and went on; see VerifyConfig.Repaired
)

// Problem is the first thing that is wrong.
type Problem struct {
	Kind ProblemKind `json:"kind"`
	File string      `json:"file"`
	Line int         `json:"line"` // counted from 1; 0 if it is about the file
	Seq  uint64      `json:"seq"`  // that should stand there
	Text string      `json:"text"`
}

// Error implements error.
func (p *Problem) Error() string {
	return fmt.Sprintf("audit: %s: line %d (seq %d): %s: %s", p.File, p.Line, p.Seq, p.Kind, p.Text)
}

// Report is what [Verify] found. The numbers are of what was verified before the problem.
type Report struct {
	Log            string    `json:"log"`
	Server         string    `json:"server"`           // with escapes for what is not printable
	Export         bool      `json:"export,omitempty"` // it is an export, which begins where its first line says
	Files          int       `json:"files"`
	First          uint64    `json:"first"`       // seq of the first line
	Last           uint64    `json:"last"`        // seq of the last line
	Head           Hash      `json:"head"`        // its chain
	Records        uint64    `json:"records"`     // operations
	Covered        uint64    `json:"covered"`     // operations that a checked signature covers
	Uncovered      uint64    `json:"uncovered"`   // operations at the end that none covers
	SignedTo       uint64    `json:"signed_to"`   // seq of the last line that a checked signature covers
	Lost           uint64    `json:"lost"`        // records that the server says it could not keep
	Checkpoints    int       `json:"checkpoints"` // whose signature was checked
	KeysGiven      bool      `json:"keys_given"`  // false: signatures were not checked
	Anchored       bool      `json:"anchored"`    // the anchor was found to fit
	LastCheckpoint time.Time `json:"last_checkpoint,omitzero"`
	Damage         []Problem `json:"damage,omitempty"`  // that a repair has noted, with VerifyConfig.Repaired
	Problem        *Problem  `json:"problem,omitempty"` // nil: everything is as it was written
}

// Verify reads a log or an export and looks for the first line that is not as it was written. What is wrong with the log is in Report.Problem;
// an error means that it could not be read. It opens the files for reading only, and may be used while a server writes.
func Verify(ctx context.Context, c VerifyConfig) (Report, error) {
	v, err := newVerifier(c)
	if err != nil {
		return Report{}, err
	}
	if err := v.run(ctx); err != nil {
		return v.rep, err
	}
	return v.rep, nil
}

func newVerifier(c VerifyConfig) (*verifier, error) {
	ring, err := newKeyring(c.Keys)
	if err != nil {
		return nil, err
	}
	v := &verifier{c: c, ring: ring, sealer: newSealer(), rep: Report{KeysGiven: len(ring) > 0}}
	// The head file is read before the files, so that a server that writes meanwhile does not look like a truncated log.
	if len(c.Files) == 0 && c.Dir != "" {
		path := filepath.Join(c.Dir, headFile)
		switch l, err := readAnchor(path); {
		case err == nil:
			v.anchors = append(v.anchors, &anchor{line: l, from: path})
		case !errors.Is(err, fs.ErrNotExist):
			v.rep.Problem = &Problem{Kind: Altered, File: path, Text: err.Error()}
		}
	}
	if c.Anchor != nil {
		if c.Anchor.Kind != KindCheckpoint {
			return nil, errors.New("audit: the anchor is no checkpoint line")
		}
		v.anchors = append(v.anchors, &anchor{line: c.Anchor, from: "the anchor", own: true})
	}
	src := Source{Dir: c.Dir, Files: c.Files}
	if v.paths, err = src.paths(); err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	if len(v.paths) == 0 && len(v.anchors) == 0 {
		return nil, fmt.Errorf("audit: directory %s holds no log", c.Dir)
	}
	return v, nil
}
