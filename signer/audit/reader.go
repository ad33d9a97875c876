package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
)

// lineReader reads a file line by line.
type lineReader struct {
	f      *os.File
	r      *bufio.Reader
	number int   // of the last line, from 1
	offset int64 // of the first byte behind it
}

// openLines opens a file. One that somebody named may be a pipe, one that was found in a directory must be a regular file.
func openLines(path string, named bool) (*lineReader, error) {
	open := openRead
	if named {
		open = os.Open
	}
	f, err := open(path)
	if err != nil {
		return nil, err
	}
	r := buffers.Get().(*bufio.Reader)
	r.Reset(f)
	return &lineReader{f: f, r: r}, nil
}

// buffers holds readers that can hold a line.
var buffers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, maxLine) }}

// close ends the reading. The last line must not be used any more.
func (r *lineReader) close() {
	_ = r.f.Close() // it was only read
	r.r.Reset(nil)
	buffers.Put(r.r)
}

var errTorn = errors.New("line has no end")

// next returns the next line with its newline, valid until the next call. At the end of the file it returns io.EOF, and for a line that the file's
// end or maxLine cuts off errTorn with what there is.
func (r *lineReader) next() ([]byte, error) {
	line, err := r.r.ReadSlice('\n')
	switch {
	case err == nil:
		r.offset += int64(len(line))
		r.number++
		return line, nil
	case errors.Is(err, io.EOF) && len(line) == 0:
		return nil, io.EOF
	case errors.Is(err, io.EOF), errors.Is(err, bufio.ErrBufferFull):
		r.number++
		return line, errTorn
	}
	return nil, err
}

// readAnchor reads the checkpoint line in a file.
func readAnchor(path string) (*Line, error) {
	f, err := openRead(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseAnchor(f)
}

// parseAnchor reads a checkpoint line.
func parseAnchor(r io.Reader) (*Line, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxLine+1))
	if err != nil {
		return nil, err
	}
	if !bytes.HasSuffix(text, []byte{'\n'}) {
		text = append(text, '\n')
	}
	l, err := ParseLine(text)
	switch {
	case err != nil:
		return nil, err
	case l.Kind != KindCheckpoint:
		return nil, errors.New("line is no checkpoint")
	case l.Checkpoint.Covers >= l.Seq:
		return nil, fmt.Errorf("checkpoint of seq %d says that it covers seq %d, which comes later", l.Seq, l.Checkpoint.Covers)
	}
	return l, nil
}

// paths returns the files of a source in order.
func (s *Source) paths() ([]string, error) {
	if len(s.Files) > 0 {
		return s.Files, nil
	}
	if s.Dir == "" {
		return nil, errors.New("audit: no directory and no file is given")
	}
	names, err := listFiles(s.Dir)
	for i, n := range names {
		names[i] = filepath.Join(s.Dir, n)
	}
	return names, err
}

// LoadAnchor reads the last checkpoint line in a file: a copy of the head file, or what a log host kept, with whatever stands before and between.
func LoadAnchor(path string) (*Line, error) {
	r, err := openLines(path, true)
	if err != nil {
		return nil, fmt.Errorf("audit: anchor: %w", err)
	}
	defer r.close()
	var found *Line
	why := errors.New("holds no checkpoint line")
	for {
		raw, err := r.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && !errors.Is(err, errTorn) {
			return nil, fmt.Errorf("audit: anchor %s: %w", path, err)
		}
		at := bytes.Index(raw, []byte(`{"seq":`))
		if at < 0 || kindOf(raw[at:]) != KindCheckpoint {
			continue
		}
		l, err := parseAnchor(bytes.NewReader(bytes.TrimSpace(raw[at:])))
		if err != nil {
			why = fmt.Errorf("line %d: %w", r.number, err)
			continue
		}
		found = l
	}
	if found == nil {
		return nil, fmt.Errorf("audit: anchor %s: %w", path, why)
	}
	return found, nil
}
