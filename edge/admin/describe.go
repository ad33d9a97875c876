package admin

import (
	_ "embed"
	"net/http"
)

// descriptionPath is where the API's description is served.
const descriptionPath = "/v1/openapi.yaml"

//go:embed openapi.yaml
var description []byte

func serveDescription(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/yaml") // RFC 9512
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Write(description) //nolint:errcheck // a caller that has left
}
