package balance

import (
	"container/list"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"hash/fnv"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/internal/household"
)

const (
	keySize = 32

	defaultCookieTTL = 23 * time.Hour
	defaultHeaderTTL = 30 * time.Minute
	// maxValues is how many values of a header one pool remembers. Beyond it the one that was idle longest is forgotten.
	maxValues = 1 << 16
	// maxCookies is how many cookies of one name are looked at. A visitor may send any number.
	maxCookies = 8
)

// An id names an endpoint to the outside. It says nothing about the endpoint to those without the key.
type id [8]byte

func (i id) number() uint64 { return binary.BigEndian.Uint64(i[:]) }

// mac returns the code of parts, which are set apart from one another, for one purpose.
func (b *Balancer) mac(purpose string, parts ...[]byte) []byte {
	m := hmac.New(sha256.New, b.cfg.Key)
	for _, p := range append([][]byte{[]byte(purpose)}, parts...) {
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(p))) //nolint:gosec // G115: names and addresses
		m.Write(n[:])
		m.Write(p)
	}
	return m.Sum(nil)
}

func (b *Balancer) idOf(pool string, e *spec.Endpoint) (i id) {
	var port [2]byte
	binary.BigEndian.PutUint16(port[:], e.Port)
	copy(i[:], b.mac("endpoint", []byte(pool), []byte(e.VNet), []byte(e.Host), port[:], []byte(e.Connector)))
	return i
}

// mix spreads the bits of x (the finaliser of SplitMix64).
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}

// pointOf is where a visitor's address lies among the endpoints.
func pointOf(a netip.Addr) uint64 {
	bytes := household.Of(a).As16()
	return mix(binary.BigEndian.Uint64(bytes[:8])) ^ binary.BigEndian.Uint64(bytes[8:])*0x9e3779b97f4a7c15
}

func pointOfText(s string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(s)) // never fails
	return mix(h.Sum64())
}

// A cookie's value is, in base64url without padding,
//
//	0..7    endpoint id
//	8..11   end of its validity (u32, Unix time in minutes)
//	12..27  HMAC-SHA-256 of the pool that the visitor asked for and the bytes before, cut
//
// so that it reveals no address, and that of one pool is worth nothing in another.
const (
	cookieBody  = 12
	cookieSize  = 28
	cookieChars = 38
)

func (b *Balancer) sealCookie(pool string, e id, until time.Time) string {
	var raw [cookieSize]byte
	copy(raw[:8], e[:])
	binary.BigEndian.PutUint32(raw[8:12], uint32(until.Unix()/60)) //nolint:gosec // G115: until the year 10136
	copy(raw[cookieBody:], b.mac("cookie", []byte(pool), raw[:cookieBody]))
	return base64.RawURLEncoding.EncodeToString(raw[:])
}

// openCookie returns the endpoint of a cookie's value, and false for one that is not ours, or no longer good.
func (b *Balancer) openCookie(pool, value string, now time.Time) (e id, ok bool) {
	var raw [cookieSize]byte
	if len(value) != cookieChars {
		return e, false
	}
	if n, err := base64.RawURLEncoding.Strict().Decode(raw[:], []byte(value)); err != nil || n != cookieSize {
		return e, false
	}
	if !hmac.Equal(raw[cookieBody:], b.mac("cookie", []byte(pool), raw[:cookieBody])[:cookieSize-cookieBody]) {
		return e, false
	}
	if now.Unix()/60 >= int64(binary.BigEndian.Uint32(raw[8:12])) {
		return e, false
	}
	copy(e[:], raw[:8])
	return e, true
}

// CookieName returns the name of a pool's cookie, which differs from pool to pool unless it is configured.
func CookieName(pool string, a *spec.Affinity) string {
	if a.Name != "" {
		return a.Name
	}
	sum := sha256.Sum256([]byte(pool))
	return "keyhaven_" + hex.EncodeToString(sum[:4])
}

// byCookie picks the endpoint of the visitor's cookie while that may be used, else one for which a cookie is made.
func (b *Balancer) byCookie(p *pool, a *spec.Affinity, v *Visit) *Lease {
	name, now := CookieName(p.cfg.Name, a), time.Now()
	if v.Request != nil {
		cookies := v.Request.CookiesNamed(name)
		for _, c := range cookies[:min(len(cookies), maxCookies)] {
			known, ok := b.openCookie(p.cfg.Name, c.Value, now)
			if e := p.byID[known]; ok && e != nil && e.keeps() && !v.tried(e) {
				return leaseOf(e)
			}
		}
	}
	l := leaseOf(p.choose(v, pointOf(v.IP), a.Type == spec.AffinityIPCookie))
	if l == nil {
		return nil
	}
	ttl := a.TTL.D(defaultCookieTTL)
	l.Cookie = &http.Cookie{
		Name: name, Value: b.sealCookie(p.cfg.Name, l.e.id, now.Add(ttl)), Path: "/", MaxAge: int(ttl / time.Second),
		Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode,
	}
	return l
}

// byHeader picks the endpoint that the header's value has, else one that follows from the value, so that edges that do not
// know it yet choose alike.
func (b *Balancer) byHeader(p *pool, a *spec.Affinity, v *Visit) *Lease {
	value := ""
	if v.Request != nil {
		value = v.Request.Header.Get(a.Name)
	}
	if value == "" {
		return leaseOf(p.choose(v, pointOf(v.IP), false))
	}
	sum, now := sha256.Sum256([]byte(value)), time.Now()
	if known, ok := p.state.values.get(sum, now, a.TTL.D(defaultHeaderTTL)); ok {
		if e := p.byID[known]; e != nil && e.keeps() && !v.tried(e) {
			return leaseOf(e)
		}
	}
	l := leaseOf(p.choose(v, pointOfText(value), true))
	if l != nil {
		p.state.values.put(sum, l.e.id, now)
	}
	return l
}

// affinities remembers values, by their hashes. The zero value is ready.
type affinities struct {
	mu    sync.Mutex
	byKey map[[sha256.Size]byte]*list.Element
	order list.List // of *affinity, the one used last in front
}

type affinity struct {
	key  [sha256.Size]byte
	id   id
	used time.Time
}

// get returns what a value has, unless it was idle for longer than ttl, and marks it as used.
func (a *affinities) get(key [sha256.Size]byte, now time.Time, ttl time.Duration) (id, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for el := a.order.Back(); el != nil && now.Sub(el.Value.(*affinity).used) > ttl; el = a.order.Back() {
		a.dropLocked(el)
	}
	el := a.byKey[key]
	if el == nil {
		return id{}, false
	}
	f := el.Value.(*affinity)
	f.used = now
	a.order.MoveToFront(el)
	return f.id, true
}

func (a *affinities) put(key [sha256.Size]byte, i id, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if el := a.byKey[key]; el != nil {
		f := el.Value.(*affinity)
		f.id, f.used = i, now
		a.order.MoveToFront(el)
		return
	}
	if a.byKey == nil {
		a.byKey = make(map[[sha256.Size]byte]*list.Element)
	}
	if a.order.Len() >= maxValues {
		a.dropLocked(a.order.Back())
	}
	a.byKey[key] = a.order.PushFront(&affinity{key, i, now})
}

func (a *affinities) dropLocked(el *list.Element) {
	delete(a.byKey, el.Value.(*affinity).key)
	a.order.Remove(el)
}
