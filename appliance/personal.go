package appliance

import (
	"bytes"
	"errors"
	"fmt"

	"go.yaml.in/yaml/v3"
)

// Personal is what differs between devices that share a keyhaven.yaml.
type Personal struct {
	Token    Secret // empty: what the file says
	Hostname string // empty: what the file says
}

// Personalised returns a keyhaven.yaml with p's values in it, and what it says then. Comments stay. A file with mistakes gives
// the errors of [Parse], which also looks at the result.
func Personalised(name string, file []byte, p Personal) ([]byte, *Config, error) {
	c, err := Parse(name, file)
	if err != nil {
		return nil, nil, err
	}
	if p == (Personal{}) {
		return file, c, nil
	}
	text, err := plainText(name, file)
	if err != nil {
		return nil, nil, err
	}
	for _, f := range []struct{ key, value string }{{"hostname", p.Hostname}, {"token", p.Token.Reveal()}} {
		if f.value == "" {
			continue
		}
		if text, err = setKey(text, f.key, f.value); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	c, err = Parse(name, text)
	return text, c, err
}

// setKey gives a key of the first level a value, in place of the one that it has.
func setKey(text []byte, key, value string) ([]byte, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return nil, errors.New("not valid YAML") // it was, a moment ago
	}
	if len(doc.Content) == 0 || doc.Content[0].Kind != yaml.MappingNode { // nothing but comments
		return append(append(bytes.TrimRight(text, "\n"), '\n'), key+": "+value+"\n"...), nil
	}
	root := doc.Content[0]
	if old := at(root, key); old != nil {
		old.SetString(value)
	} else {
		name, v := &yaml.Node{}, &yaml.Node{}
		name.SetString(key)
		v.SetString(value)
		root.Content = append([]*yaml.Node{name, v}, root.Content...)
	}
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(&doc); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
