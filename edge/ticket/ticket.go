package ticket

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"

	"github.com/keyhaven/keyhaven/edge/zone"
)

const (
	version   = 1
	idSize    = 16
	nonceSize = 12
	headSize  = 1 + idSize
	maxTicket = 8 << 10 // a session without client certificates is a few hundred bytes
)

// extraPrefix marks our entry among those of other layers in SessionState.Extra.
const extraPrefix = "keyhaven-ticket/1 "

var errNoKey = errors.New("ticket: no key")

// A Binding is what a ticket is good for, beside the canonical host name of the connection.
type Binding struct {
	Zone  string
	Key   [20]byte // SKI of the key that the full handshake was made with
	Epoch uint64
}

// BindingsOf returns the bindings of a zone's tickets, one for each certificate in its order.
func BindingsOf(z *zone.Zone) []Binding {
	all := make([]Binding, len(z.Certificates))
	for i, c := range z.Certificates {
		all[i] = Binding{Zone: z.Name, Key: c.SKI, Epoch: z.KeyEpoch}
	}
	return all
}

// extra returns the entry for SessionState.Extra.
func (b Binding) extra(sni string) ([]byte, error) {
	name, err := zone.Canonical(sni)
	if err != nil {
		return nil, err
	}
	h := make([]byte, 0, 256)
	h = binary.BigEndian.AppendUint32(h, uint32(len(b.Zone)))
	h = append(h, b.Zone...)
	h = append(h, b.Key[:]...)
	h = binary.BigEndian.AppendUint64(h, b.Epoch)
	h = append(h, name...)
	sum := sha256.Sum256(h)
	return append([]byte(extraPrefix), sum[:]...), nil
}

// Bind makes cfg issue and accept tickets of this binding only. It must be called before cfg is used.
func (k *Keys) Bind(cfg *tls.Config, b Binding) {
	cfg.WrapSession = func(cs tls.ConnectionState, ss *tls.SessionState) ([]byte, error) {
		return k.wrap(b, cs.ServerName, ss)
	}
	cfg.UnwrapSession = func(identity []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
		return k.unwrap(b, cs.ServerName, identity), nil
	}
}

// BindOnce makes cfg, which must serve one handshake only, issue tickets of the binding all[own] and accept those of all, the
// bindings of a zone with several keys. A session that is resumed keeps the binding of its full handshake, so that
// it dies with the key that was used then.
func (k *Keys) BindOnce(cfg *tls.Config, all []Binding, own int) {
	resumed := all[own]
	cfg.WrapSession = func(cs tls.ConnectionState, ss *tls.SessionState) ([]byte, error) {
		if cs.DidResume {
			return k.wrap(resumed, cs.ServerName, ss)
		}
		return k.wrap(all[own], cs.ServerName, ss)
	}
	cfg.UnwrapSession = func(identity []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
		for _, b := range all {
			if ss := k.unwrap(b, cs.ServerName, identity); ss != nil {
				resumed = b
				return ss, nil
			}
		}
		return nil, nil
	}
}

func (k *Keys) wrap(b Binding, sni string, ss *tls.SessionState) ([]byte, error) {
	extra, err := b.extra(sni)
	if err != nil {
		return nil, err
	}
	ss.Extra = append(ss.Extra, extra)
	ss.EarlyData = false
	state, err := ss.Bytes()
	if err != nil {
		return nil, err
	}
	key := k.ring.Load().newest()
	if key == nil {
		return nil, errNoKey
	}
	out := make([]byte, headSize+nonceSize, headSize+nonceSize+len(state)+key.aead.Overhead())
	out[0] = version
	copy(out[1:], key.id[:])
	rand.Read(out[headSize:])
	return key.aead.Seal(out, out[headSize:headSize+nonceSize], state, out[:headSize]), nil
}

// unwrap returns nil for everything that is not a ticket of this binding: the handshake then goes on in full.
func (k *Keys) unwrap(b Binding, sni string, identity []byte) *tls.SessionState {
	if len(identity) < headSize+nonceSize || len(identity) > maxTicket || identity[0] != version {
		return nil
	}
	key := k.ring.Load().find([idSize]byte(identity[1:headSize]))
	if key == nil {
		return nil
	}
	state, err := key.aead.Open(nil, identity[headSize:headSize+nonceSize], identity[headSize+nonceSize:], identity[:headSize])
	if err != nil {
		return nil
	}
	ss, err := tls.ParseSessionState(state)
	if err != nil {
		return nil
	}
	want, err := b.extra(sni)
	if err != nil || !bound(ss.Extra, want) {
		return nil
	}
	ss.EarlyData = false
	return ss
}

// bound reports whether want is the one entry of ours.
func bound(extra [][]byte, want []byte) bool {
	n := 0
	ok := false
	for _, e := range extra {
		if bytes.HasPrefix(e, []byte(extraPrefix)) {
			n++
			ok = bytes.Equal(e, want)
		}
	}
	return ok && n == 1
}
