package proxy

import (
	"net/http"
	"net/netip"
	"strings"
)

// identityHeaders are those by which proxies, load balancers and their applications name a visitor, an original host or
// an original path. Every spelling counts: upper and lower case, and any other byte in place of a hyphen, because many
// application servers read "X_Real_IP" and "X-Real-IP" from one variable.
var identityHeaders = map[string]bool{
	"forwarded": true, "forwarded-for": true, "x-forwarded": true, "x-original-forwarded-for": true,
	"x-real-ip": true, "x-client-ip": true, "x-cluster-client-ip": true, "client-ip": true, "true-client-ip": true,
	"x-remote-ip": true, "x-remote-addr": true, "remote-addr": true, "x-originating-ip": true, "x-proxyuser-ip": true,
	"cf-connecting-ip": true, "cf-connecting-ipv6": true, "cf-pseudo-ipv4": true, "fastly-client-ip": true, "fly-client-ip": true,
	"do-connecting-ip": true, "oxygen-connecting-ip": true, "akamai-client-ip": true, "incap-client-ip": true,
	"x-envoy-external-address": true, "x-azure-clientip": true, "x-azure-socketip": true, "x-appengine-user-ip": true,
	"x-nf-client-connection-ip": true, "x-vercel-forwarded-for": true, "proxy-client-ip": true, "wl-proxy-client-ip": true,
	"x-original-host": true, "x-host": true, "x-original-url": true, "x-original-uri": true, "x-envoy-original-path": true, "x-rewrite-url": true,
	"front-end-https": true, "x-url-scheme": true, "x-scheme": true, "proxy": true,
	"x-true-client-ip": true, "x-real-port": true, "x-client-port": true, "x-remote-host": true, "x-remote-port": true, "x-http-host-override": true,
	"x-client-cert": true, "x-arr-clientcert": true, "x-ssl-client-cert": true, "ssl-client-cert": true, "client-cert": true, "client-cert-chain": true,
}

// identityPrefixes are families of such headers.
var identityPrefixes = []string{"x-forwarded-", "x-ssl-client-", "ssl-client-", "x-client-cert-", "x-tls-client-", "x-amzn-mtls-"}

// stripIdentity removes every header that could tell an origin something about the visitor that only the edge may say.
func stripIdentity(h http.Header) {
	for name := range h {
		if namesIdentity(name) {
			delete(h, name)
		}
	}
}

func namesIdentity(name string) bool {
	plain := plainName(name)
	if identityHeaders[plain] {
		return true
	}
	for _, p := range identityPrefixes {
		if strings.HasPrefix(plain, p) {
			return true
		}
	}
	return false
}

// plainName is name in lower case with every byte but letters and digits as a hyphen.
func plainName(name string) string {
	b := []byte(name)
	for i, c := range b {
		switch {
		case 'A' <= c && c <= 'Z':
			b[i] = c + 'a' - 'A'
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9':
		default:
			b[i] = '-'
		}
	}
	return string(b)
}

// setForwarded says to the origin who asks, for which host, and that TLS was used.
func setForwarded(h http.Header, visitor netip.Addr, host string) {
	ip := visitor.String()
	h.Set("X-Forwarded-For", ip)
	h.Set("X-Forwarded-Host", host)
	h.Set("X-Forwarded-Proto", "https")
	h.Set("Forwarded", forwarded(visitor, host))
}

// forwarded returns one element of RFC 7239, section 4. IPv6 addresses stand in brackets and quotes (section 6), and a
// host with a port in quotes, because a colon is no token.
func forwarded(visitor netip.Addr, host string) string {
	node := visitor.String()
	if visitor.Is6() {
		node = `"[` + node + `]"`
	}
	if strings.ContainsRune(host, ':') {
		host = `"` + host + `"`
	}
	return "for=" + node + ";host=" + host + ";proto=https"
}
