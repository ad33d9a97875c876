// Package httprelay is what the edge's proxy and the connector's ingress have in common in passing on requests and
// responses.
package httprelay

import (
	"errors"
	"net/http"
	"strings"
)

// UpgradeOf returns the protocol that a message asks to switch to, or switches to, in lower case; "" if none. See RFC 9110,
// section 7.8.
func UpgradeOf(h http.Header) string {
	for _, v := range h["Connection"] {
		for token := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(token), "upgrade") {
				return strings.ToLower(strings.TrimSpace(h.Get("Upgrade")))
			}
		}
	}
	return ""
}

// ErrSwitch says that an origin switched protocols in another way than it was asked to.
var ErrSwitch = errors.New("the origin switched to a protocol that was not asked for")

// CheckSwitch returns ErrSwitch if the response to a request with these headers switches protocols and must not. It is for
// httputil's ModifyResponse, whose errors close the origin's connection; httputil's own refusal would leave it open.
func CheckSwitch(asked http.Header, res *http.Response) error {
	if res.StatusCode != http.StatusSwitchingProtocols {
		return nil
	}
	if p := UpgradeOf(asked); p == "" || p != UpgradeOf(res.Header) {
		return ErrSwitch
	}
	return nil
}
