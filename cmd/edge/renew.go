package main

import "context"

// renewOwn keeps the edge's own certificate fresh: the operator's authority is on this host. The certificate for key
// servers is renewed by the visitors' server, through the key servers.
func (p *process) renewOwn(ctx context.Context) error {
	return p.ids.own.KeepRenewed(ctx, func(_ context.Context, csr []byte) ([][]byte, error) {
		return p.ids.authority.IssueCSR(csr, p.ids.own.Identity(), 0)
	})
}
