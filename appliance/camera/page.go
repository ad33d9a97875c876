package camera

import _ "embed"

//go:embed page/index.html
var page []byte

// Page is index.html, the page that visitors see: the moving picture, and a way to a single one. It stands in [PageDir] of the
// image. It holds nothing of the configuration.
func Page() []byte { return append([]byte(nil), page...) }
