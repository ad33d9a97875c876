package server

import (
	"context"

	"github.com/hashicorp/vault/builtin/logical/transit"
	"github.com/hashicorp/vault/sdk/logical"
)

func engine(ctx context.Context) (logical.Backend, logical.Storage, error) {
	storage := new(logical.InmemStorage)
	conf := &logical.BackendConfig{StorageView: storage, System: logical.TestSystemView()}
	b, err := transit.Backend(ctx, conf)
	if err != nil {
		return nil, nil, err
	}
	return b, storage, nil
}
