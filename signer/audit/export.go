package audit

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

// exportHeader is the first line of an export.
type exportHeader struct {
	Version uint64
	Log     ID
	Server  string
	First   uint64 // seq of the first line
	Prev    Hash   // chain before it; zero before the first line of a log
	Whole   bool   // lines follow one another
}

const exportStart = `{"export":`

// isExport reports whether a line could be the first one of an export.
func isExport(line []byte) bool { return bytes.HasPrefix(line, []byte(exportStart)) }

func (h *exportHeader) encode() []byte {
	b := fmt.Appendf(nil, `%s%d,"log":"%s"`, exportStart, h.Version, h.Log)
	b = appendString(b, "server", h.Server)
	b = appendUint(b, "first", h.First)
	if h.Whole {
		b = append(appendName(b, "prev"), '"')
		b = append(hex.AppendEncode(b, h.Prev[:]), '"')
		b = append(b, `,"whole":true`...)
	}
	return append(b, "}\n"...)
}

func parseExportHeader(line []byte) (*exportHeader, error) {
	body, ok := bytes.CutSuffix(line, []byte("}\n"))
	if !ok {
		return nil, errSyntax
	}
	h := new(exportHeader)
	s := scanner{rest: body}
	for s.next() {
		var err error
		switch v := &s.value; s.name {
		case "export":
			err = v.uint(&h.Version)
		case "log":
			err = v.hex(h.Log[:])
		case "server":
			err = v.string(&h.Server)
		case "first":
			err = v.uint(&h.First)
		case "prev":
			err = v.hex(h.Prev[:])
		case "whole":
			h.Whole = v.kind == 't'
		default:
			err = errMember
		}
		if err != nil {
			return nil, fmt.Errorf("member %q: %w", s.name, err)
		}
	}
	if s.err != nil {
		return nil, s.err
	}
	if !bytes.Equal(h.encode(), line) {
		return nil, errors.New("the export's first line is not in canonical form")
	}
	return h, nil
}

// beginExport prepares for the lines of an export.
func (v *verifier) beginExport(raw []byte) error {
	h, err := parseExportHeader(raw)
	switch {
	case err != nil:
		return err
	case len(v.paths) > 1:
		return errors.New("an export is verified by itself, not among other files")
	case h.Version != Version:
		return fmt.Errorf("export of version %d; this program knows %d", h.Version, Version)
	case !h.Whole:
		return errors.New("the export was filtered, so that its lines do not follow one another: it cannot be verified by itself; export a range, or verify the log")
	case h.First == 0:
		return errors.New("the export says that it begins with seq 0")
	}
	v.export, v.id, v.server, v.rep.Export = h, h.Log, h.Server, true
	v.seq, v.head = h.First-1, h.Prev
	return nil
}

// Export writes what the filter chooses as one file. With format "jsonl" and a filter that is a range it is what [Verify] can check: all lines from the first to the
// last one chosen, and on to the first checkpoint that covers them, if there is one. With any other filter it is only the chosen lines. With format "csv" it is
// the chosen operations, with a head line; a cell that a spreadsheet could take for a formula begins with an apostrophe. An error may be a *[Problem] of the log.
func Export(ctx context.Context, s Source, f Filter, format string, w io.Writer) error {
	if err := f.Check(); err != nil {
		return err
	}
	switch format {
	case "csv":
		return exportCSV(ctx, s, f, w)
	case "jsonl":
	default:
		return fmt.Errorf("audit: format %q; use jsonl or csv", format)
	}
	h, last, err := plan(ctx, s, f)
	if err != nil {
		return err
	}
	if _, err := w.Write(h.encode()); err != nil {
		return err
	}
	v, err := s.walk(ctx, func(l *Line, raw []byte) error {
		if h.Whole && (l.Seq < h.First || l.Seq > last) || !h.Whole && !f.chooses(l) {
			return nil
		}
		_, err := w.Write(raw)
		return err
	})
	if err != nil {
		return err
	}
	if v.rep.Problem != nil {
		return v.rep.Problem
	}
	return nil
}

// plan returns an export's first line, and the seq of the last one: that of the checkpoint which covers the last line chosen, if there is one.
func plan(ctx context.Context, s Source, f Filter) (*exportHeader, uint64, error) {
	h := &exportHeader{Version: Version, Whole: f.ranged()}
	var prev Hash
	var server string // which changes if a repair lets another one go on
	var last, end uint64
	v, err := s.walk(ctx, func(l *Line, _ []byte) error {
		if l.Kind == KindOpen {
			prev, server = l.Open.PrevHead, l.Open.Server
		}
		if f.chooses(l) {
			if h.First == 0 {
				h.First, h.Prev, h.Server = l.Seq, prev, server
			}
			last, end = l.Seq, l.Seq
		}
		if end == last && l.Kind == KindCheckpoint && l.Checkpoint.Covers >= last {
			end = l.Seq
		}
		prev = l.Chain
		return nil
	})
	switch {
	case err != nil:
		return nil, 0, err
	case v.rep.Problem != nil:
		return nil, 0, v.rep.Problem
	case h.First == 0:
		return nil, 0, errors.New("audit: no line fits")
	}
	if h.Log = v.id; h.Server == "" { // of an export without an open line
		h.Server = v.server
	}
	if !h.Whole {
		h.First, h.Prev = 0, Hash{}
	}
	return h, end, nil
}

func exportCSV(ctx context.Context, s Source, f Filter, w io.Writer) error {
	out := csv.NewWriter(w)
	if err := out.Write(csvHead); err != nil {
		return err
	}
	v, err := s.walk(ctx, func(l *Line, _ []byte) error {
		if l.Kind != KindOp || !f.chooses(l) {
			return nil
		}
		return writeCSV(out, l)
	})
	out.Flush()
	if err = errors.Join(err, out.Error()); err != nil {
		return err
	}
	if v.rep.Problem != nil {
		return v.rep.Problem
	}
	return nil
}
