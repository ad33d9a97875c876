package ingressconf

import (
	"encoding/json"
	"fmt"
)

// Inline puts the contents of the files that a document's ca_pool options name in their place, so that it can go where
// the files are not. read reads a file.
func Inline(doc json.RawMessage, read func(path string) ([]byte, error)) (json.RawMessage, error) {
	var d map[string]any
	if err := json.Unmarshal(doc, &d); err != nil {
		return nil, fmt.Errorf("not a configuration in JSON: %w", err)
	}
	if err := inline(d["ingress_origin"], "ingress_origin", read); err != nil {
		return nil, err
	}
	rules, _ := d["ingress"].([]any)
	for i, r := range rules {
		if rule, ok := r.(map[string]any); ok {
			if err := inline(rule["origin"], fmt.Sprintf("ingress[%d].origin", i), read); err != nil {
				return nil, err
			}
		}
	}
	return json.Marshal(d)
}

func inline(options any, key string, read func(path string) ([]byte, error)) error {
	o, ok := options.(map[string]any)
	if !ok {
		return nil
	}
	name, ok := o["ca_pool"].(string)
	if !ok || name == "" || InlinePEM(name) {
		return nil
	}
	b, err := read(name)
	switch {
	case err != nil:
		return fmt.Errorf("%s.ca_pool: %w", key, err)
	case !InlinePEM(string(b)):
		return fmt.Errorf("%s.ca_pool: %s holds no certificates in PEM", key, name)
	}
	o["ca_pool"] = string(b)
	return nil
}
