package signer

import "sync"

// Quotas counts what rules with a rate or a daily budget have allowed. The zero value is ready; all methods may be called from several goroutines at once.
type Quotas struct {
	mu sync.Mutex
}
