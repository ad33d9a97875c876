package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/hashicorp/vault/builtin/logical/transit"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// engine is one mounted Transit engine.
type engine struct {
	backend logical.Backend
	storage logical.Storage
}

func newEngine(ctx context.Context) (*engine, error) {
	storage := new(logical.InmemStorage)
	conf := &logical.BackendConfig{StorageView: storage, System: logical.TestSystemView()}
	b, err := transit.Backend(ctx, conf)
	if err != nil {
		return nil, fmt.Errorf("transit engine: %w", err)
	}
	// The engine and the framework are of different releases; the framework wants a check that the engine does not bring along.
	for _, p := range b.Paths {
		if p.ExistenceCheck == nil {
			p.ExistenceCheck = func(context.Context, *logical.Request, *framework.FieldData) (bool, error) { return true, nil }
		}
	}
	if err := b.Setup(ctx, conf); err != nil {
		return nil, fmt.Errorf("transit engine: %w", err)
	}
	return &engine{b, storage}, nil
}

// do performs one request and returns status and body, as a Vault server would.
func (e *engine) do(ctx context.Context, op logical.Operation, path string, data map[string]any) (int, []byte, error) {
	req := &logical.Request{Operation: op, Path: path, Data: data, Storage: e.storage}
	resp, err := e.backend.HandleRequest(ctx, req)
	if status, err := logical.RespondErrorCommon(req, resp, err); status != 0 {
		messages := []string{}
		if err != nil {
			messages = append(messages, err.Error())
		}
		body, err := json.Marshal(map[string]any{"errors": messages})
		return status, body, err
	}
	if resp == nil {
		return http.StatusNoContent, nil, nil
	}
	if status, ok := resp.Data[logical.HTTPStatusCode].(int); ok {
		body, _ := resp.Data[logical.HTTPRawBody].(string)
		return status, []byte(body), nil
	}
	body, err := json.Marshal(logical.LogicalResponseToHTTPResponse(resp))
	return http.StatusOK, body, err
}
