package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"net/netip"
	"strconv"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

// Version is the version of the format that this package writes and reads.
const Version = 1

// maxLine bounds a line, its newline included, in bytes.
const maxLine = 128 << 10

// timeLayout is the one form of times.
const timeLayout = "2006-01-02T15:04:05.000000000Z07:00"

// Hash is a SHA-256 value: a chain, or a key's id.
type Hash [sha256.Size]byte

// String returns lower-case hex.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText implements [encoding.TextMarshaler].
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// ID names a log. It is made at random with the log's first file.
type ID [16]byte

// String returns lower-case hex.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// Kind is the kind of a line.
type Kind string

// The kinds of lines.
const (
	KindOpen       Kind = "open"
	KindOp         Kind = "op"
	KindCheckpoint Kind = "checkpoint"
	KindLost       Kind = "lost"
	KindRecovered  Kind = "recovered"
	KindClose      Kind = "close"
)

// Line is one line of the log. Only the member of its kind is set.
type Line struct {
	Seq        uint64
	Kind       Kind
	Time       time.Time
	Op         signer.Record
	Open       Opening
	Checkpoint Checkpoint
	Note       Note // lost, recovered, close
	Chain      Hash
}

// Opening is what the first line of a file says.
type Opening struct {
	Version   uint64
	Log       ID
	Server    string
	Key       Hash   // id of the audit key; zero if it was not known
	PrevFile  string // "" in the first file
	PrevSeq   uint64 // of the last line before that counts
	PrevHead  Hash   // its chain
	Abandoned uint64 // bytes in the file before that do not count
	Damage    string // why the log goes on without all of the file before
}

// Note is what lost, recovered and close lines say.
type Note struct {
	Count  uint64 // records lost
	File   string // where bytes were cut off
	Bytes  uint64 // how many
	SHA256 Hash   // of them
	Text   string
}

// sealer makes chains. It is not safe for concurrent use.
type sealer struct {
	h   hash.Hash
	sum Hash
}

func newSealer() *sealer { return &sealer{h: sha256.New()} }

// chain returns the chain of a line with the given bytes before its chain member.
func (s *sealer) chain(prev *Hash, body []byte) Hash {
	s.h.Reset()
	s.h.Write(prev[:])
	s.h.Write(body)
	s.h.Sum(s.sum[:0])
	return s.sum
}

const chainMember = `,"chain":"`

// lineTail is how many bytes follow a line's body.
const lineTail = len(chainMember) + 2*sha256.Size + len("\"}\n")

// seal completes the line whose body starts at b[start:].
func (s *sealer) seal(b []byte, start int, prev *Hash) ([]byte, Hash) {
	c := s.chain(prev, b[start:])
	b = append(b, chainMember...)
	b = hex.AppendEncode(b, c[:])
	return append(b, "\"}\n"...), c
}

// splitLine takes a line, with its newline, apart into the bytes that the chain covers and the chain.
func splitLine(line []byte) (body []byte, chain Hash, err error) {
	if len(line) > maxLine {
		return nil, chain, fmt.Errorf("line is longer than %d bytes", maxLine)
	}
	at := len(line) - lineTail
	if at < 1 || !bytes.HasPrefix(line[at:], []byte(chainMember)) || !bytes.HasSuffix(line, []byte("\"}\n")) {
		return nil, chain, errors.New("line does not end in a chain")
	}
	digits := line[at+len(chainMember) : len(line)-3]
	if _, err := hex.Decode(chain[:], digits); err != nil || !bytes.Equal(hex.AppendEncode(nil, chain[:]), digits) {
		return nil, chain, errors.New("chain is no lower-case hex")
	}
	return line[:at], chain, nil
}

// appendBody appends the line without its chain.
func (l *Line) appendBody(b []byte) []byte {
	if l.Kind == KindOp {
		l.Op.Time = l.Time
		return appendOp(b, l.Seq, &l.Op)
	}
	b = appendStart(b, l.Seq, l.Kind, l.Time)
	switch l.Kind {
	case KindOpen:
		o := &l.Open
		b = appendUint(b, "version", o.Version)
		b = appendHex(b, "log", o.Log[:])
		b = appendString(b, "server", o.Server)
		b = appendHex(b, "key", o.Key[:])
		b = appendString(b, "prev_file", o.PrevFile)
		b = appendUint(b, "prev_seq", o.PrevSeq)
		b = appendHex(b, "prev_head", o.PrevHead[:])
		b = appendUint(b, "abandoned", o.Abandoned)
		b = appendString(b, "damage", o.Damage)
	case KindCheckpoint:
		c := &l.Checkpoint
		b = appendHex(b, "log", c.Log[:])
		b = appendString(b, "server", c.Server)
		b = appendUint(b, "covers", c.Covers)
		b = appendHex(b, "head", c.Head[:])
		b = appendHex(b, "key", c.Key[:])
		b = appendString(b, "alg", c.Alg)
		if len(c.Sig) > 0 {
			b = append(b, `,"sig":"`...)
			b = base64.StdEncoding.AppendEncode(b, c.Sig)
			b = append(b, '"')
		}
	default:
		n := &l.Note
		b = appendUint(b, "count", n.Count)
		b = appendString(b, "file", n.File)
		b = appendUint(b, "bytes", n.Bytes)
		b = appendHex(b, "sha256", n.SHA256[:])
		b = appendString(b, "text", n.Text)
	}
	return b
}

// appendOp appends an op line without its chain.
func appendOp(b []byte, seq uint64, r *signer.Record) []byte {
	b = appendStart(b, seq, KindOp, r.Time)
	b = appendDuration(b, "dur", r.Duration)
	b = appendString(b, "client", r.Peer)
	if r.Addr.IsValid() && r.Addr.Addr().Zone() == "" {
		b = append(r.Addr.AppendTo(append(appendName(b, "addr"), '"')), '"')
	} else if r.Addr.IsValid() {
		b = appendString(b, "addr", r.Addr.String())
	}
	b = appendString(b, "op", r.Op)
	b = appendString(b, "scheme", r.Scheme)
	b = appendHex(b, "key", r.SKI[:])
	b = appendString(b, "label", r.Label)
	b = appendString(b, "home", r.Home)
	b = appendHex(b, "sha256", r.Hash[:])
	b = appendString(b, "result", string(r.Result))
	b = appendString(b, "cause", string(r.Cause))
	b = appendString(b, "reason", r.Reason)
	b = appendDuration(b, "waited", r.Waited)
	b = appendDuration(b, "took", r.Took)
	b = appendUint(b, "tries", uint64(max(r.Tries, 0)))
	if r.Hedged {
		b = append(b, `,"hedged":true`...)
	}
	b = appendString(b, "asserted_sni", r.SNI)
	b = appendAddr(b, "asserted_visitor", r.ClientIP)
	b = appendAddr(b, "asserted_server", r.ServerIP)
	b = appendString(b, "trace", r.TraceID)
	return appendString(b, "request", r.RequestID)
}

func appendStart(b []byte, seq uint64, kind Kind, t time.Time) []byte {
	b = append(b, `{"seq":`...)
	b = strconv.AppendUint(b, seq, 10)
	b = append(b, `,"kind":"`...)
	b = append(b, kind...)
	b = append(b, `","time":"`...)
	b = t.UTC().AppendFormat(b, timeLayout)
	return append(b, '"')
}

func appendAddr(b []byte, name string, a netip.Addr) []byte {
	switch {
	case !a.IsValid():
		return b
	case a.Zone() == "":
		return append(a.AppendTo(append(appendName(b, name), '"')), '"')
	}
	return appendString(b, name, a.String()) // a zone can hold anything
}

func appendDuration(b []byte, name string, d time.Duration) []byte {
	return appendUint(b, name, uint64(max(d, 0)))
}

// ParseLine decodes one line, with its newline. It takes no other spelling than the canonical one, and does not check the chain.
func ParseLine(line []byte) (*Line, error) {
	l := new(Line)
	if err := l.parse(line); err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	return l, nil
}

func (l *Line) parse(line []byte) error {
	body, chain, err := splitLine(line)
	if err != nil {
		return err
	}
	*l = Line{Chain: chain}
	members := scanner{rest: body}
	for i := 0; members.next(); i++ {
		if err := l.set(i, members.name, &members.value); err != nil {
			return fmt.Errorf("member %q: %w", members.name, err)
		}
	}
	if members.err != nil {
		return members.err
	}
	if !bytes.Equal(l.appendBody(make([]byte, 0, len(body))), body) {
		return errors.New("line is not in canonical form")
	}
	return nil
}

var errMember = errors.New("not known, or not at this place")

// set takes the member at place i over. Order and repetitions show when the line is encoded again.
func (l *Line) set(i int, name string, v *value) error {
	switch {
	case i == 0 && name == "seq":
		return v.uint(&l.Seq)
	case i == 1 && name == "kind":
		l.Kind = Kind(v.text)
		return v.isText()
	case i == 2 && name == "time":
		return v.time(&l.Time)
	case i < 3:
		return errMember
	}
	switch l.Kind {
	case KindOp:
		return l.setOp(name, v)
	case KindOpen:
		return l.Open.set(name, v)
	case KindCheckpoint:
		return l.Checkpoint.set(name, v)
	case KindLost, KindRecovered, KindClose:
		return l.Note.set(name, v)
	}
	return fmt.Errorf("lines of kind %q are not known to this version", l.Kind)
}

func (o *Opening) set(name string, v *value) error {
	switch name {
	case "version":
		return v.uint(&o.Version)
	case "log":
		return v.hex(o.Log[:])
	case "server":
		return v.string(&o.Server)
	case "key":
		return v.hex(o.Key[:])
	case "prev_file":
		return v.string(&o.PrevFile)
	case "prev_seq":
		return v.uint(&o.PrevSeq)
	case "prev_head":
		return v.hex(o.PrevHead[:])
	case "abandoned":
		return v.uint(&o.Abandoned)
	case "damage":
		return v.string(&o.Damage)
	}
	return errMember
}

func (c *Checkpoint) set(name string, v *value) error {
	switch name {
	case "log":
		return v.hex(c.Log[:])
	case "server":
		return v.string(&c.Server)
	case "covers":
		return v.uint(&c.Covers)
	case "head":
		return v.hex(c.Head[:])
	case "key":
		return v.hex(c.Key[:])
	case "alg":
		return v.string(&c.Alg)
	case "sig":
		var err error
		c.Sig, err = base64.StdEncoding.DecodeString(v.text)
		return err
	}
	return errMember
}

func (n *Note) set(name string, v *value) error {
	switch name {
	case "count":
		return v.uint(&n.Count)
	case "file":
		return v.string(&n.File)
	case "bytes":
		return v.uint(&n.Bytes)
	case "sha256":
		return v.hex(n.SHA256[:])
	case "text":
		return v.string(&n.Text)
	}
	return errMember
}

func (l *Line) setOp(name string, v *value) error {
	r := &l.Op
	switch name {
	case "dur":
		return v.duration(&r.Duration)
	case "client":
		return v.string(&r.Peer)
	case "addr":
		return v.addrPort(&r.Addr)
	case "op":
		return v.string(&r.Op)
	case "scheme":
		return v.string(&r.Scheme)
	case "key":
		return v.hex(r.SKI[:])
	case "label":
		return v.string(&r.Label)
	case "home":
		return v.string(&r.Home)
	case "sha256":
		return v.hex(r.Hash[:])
	case "result":
		return v.string((*string)(&r.Result))
	case "cause":
		return v.string((*string)(&r.Cause))
	case "reason":
		return v.string(&r.Reason)
	case "waited":
		return v.duration(&r.Waited)
	case "took":
		return v.duration(&r.Took)
	case "tries":
		var n uint64
		err := v.uint(&n)
		r.Tries = int(n)
		return err
	case "hedged":
		r.Hedged = v.kind == 't'
		return nil
	case "asserted_sni":
		return v.string(&r.SNI)
	case "asserted_visitor":
		return v.addr(&r.ClientIP)
	case "asserted_server":
		return v.addr(&r.ServerIP)
	case "trace":
		return v.string(&r.TraceID)
	case "request":
		return v.string(&r.RequestID)
	}
	return errMember
}
