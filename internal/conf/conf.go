// Package conf reads a program's configuration: a YAML file, then the environment, then flags, decoded strictly.
// What is wrong is reported with file, line and key, all of it at once, so that an operator mends a file in one go.
package conf

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"github.com/spf13/pflag"
	"github.com/spf13/viper"
	"go.yaml.in/yaml/v3"
)

// maxSize bounds a configuration file, in bytes.
const maxSize = 4 << 20

// Options say where values come from. Later sources win: file, environment, flags.
type Options struct {
	// Path of the YAML file. If empty, there is no file.
	Path string
	// EnvPrefix, such as "KEYHAVEN_EDGE", makes the key tls.min_version also KEYHAVEN_EDGE_TLS_MIN_VERSION. Only
	// single values and lists of strings (comma-separated) can come from the environment. If empty, none do.
	EnvPrefix string
	// EnvOthers are names with the prefix that are no keys, such as those that the program reads elsewhere. If it is not
	// nil, any other name with the prefix that is no key is an error; if it is nil, such names pass.
	EnvOthers []string
	// Flags that were set on the command line overlay the keys that FlagKeys maps their names to.
	Flags    *pflag.FlagSet
	FlagKeys map[string]string
}

// An Error is one fault of a configuration.
type Error struct {
	File string // empty for a fault of the environment, or of a document that is no file
	Line int    // 1 is the first; 0 if it is not known
	Key  string // such as zones[1].origin; empty for the whole file
	Msg  string // what is wrong and what to do
}

func (e *Error) Error() string {
	var b strings.Builder
	if e.File != "" {
		b.WriteString(e.File)
		if e.Line > 0 {
			b.WriteByte(':')
			b.WriteString(strconv.Itoa(e.Line))
		}
		b.WriteString(": ")
	} else if e.Line > 0 {
		fmt.Fprintf(&b, "line %d: ", e.Line)
	}
	if e.Key != "" {
		b.WriteString(e.Key)
		b.WriteString(": ")
	}
	b.WriteString(e.Msg)
	return b.String()
}

// Errors are all faults of one configuration, a line each.
type Errors []error

func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, err := range e {
		lines[i] = err.Error()
	}
	return strings.Join(lines, "\n")
}

func (e Errors) Unwrap() []error { return e }

// Err returns nil if there is no fault.
func (e Errors) Err() error {
	if len(e) == 0 {
		return nil
	}
	return e
}

// A File remembers where each key of a configuration stands, for errors about its meaning.
type File struct {
	path  string
	lines map[string]int
}

// Errorf makes an [Error] about key. The line is that of the key or, if the file does not have it, of the nearest
// key around it.
func (f *File) Errorf(key, format string, args ...any) error {
	e := &Error{File: f.path, Key: key, Msg: fmt.Sprintf(format, args...)}
	for k := key; ; k = parent(k) {
		if line, ok := f.lines[k]; ok {
			e.Line = line
			return e
		}
		if k == "" {
			return e
		}
	}
}

func parent(key string) string {
	if i := strings.LastIndexAny(key, ".["); i >= 0 {
		return key[:i]
	}
	return ""
}

// Load decodes the configuration into dst, a pointer to a struct with mapstructure tags whose fields hold the
// defaults. Unknown keys, keys given twice, values of the wrong type and keys without a value are errors; then dst is
// not to be used. The errors of one call are an [Errors].
func Load(dst any, o Options) (*File, error) {
	t := reflect.TypeOf(dst)
	if t == nil || t.Kind() != reflect.Pointer || t.Elem().Kind() != reflect.Struct {
		return nil, fmt.Errorf("conf: dst is a %T, not a pointer to a struct", dst)
	}
	f := &File{path: o.Path, lines: map[string]int{}}
	v := viper.New()
	if o.Path != "" {
		m, err := f.read(t.Elem())
		if err != nil {
			return f, err
		}
		if err := v.MergeConfigMap(m); err != nil {
			return f, Errors{f.Errorf("", "%v", err)}
		}
	}
	if err := overlay(v, t.Elem(), o); err != nil {
		return f, err
	}
	if err := v.UnmarshalExact(dst, strict); err != nil {
		return f, Errors{f.Errorf("", "%v", err)}
	}
	return f, nil
}

// strict makes the decoder guess nothing.
func strict(c *mapstructure.DecoderConfig) {
	c.WeaklyTypedInput = false
	c.ZeroFields = true // a list in the file replaces a default list, it does not merge with it
	c.DecodeHook = mapstructure.ComposeDecodeHookFunc(
		mapstructure.StringToTimeDurationHookFunc(),
		mapstructure.TextUnmarshallerHookFunc())
}

// Decode is [Load] for a document that did not come from a file, such as one that another program sent: YAML, or JSON,
// which YAML contains. Its errors, and those of the File, have line and key, and no file name. The caller bounds the
// document's size.
func Decode(dst any, document []byte) (*File, error) {
	t := reflect.TypeOf(dst)
	if t == nil || t.Kind() != reflect.Pointer || t.Elem().Kind() != reflect.Struct {
		return nil, fmt.Errorf("conf: dst is a %T, not a pointer to a struct", dst)
	}
	f := &File{lines: map[string]int{}}
	m, err := f.parse(document, t.Elem())
	if err != nil {
		return f, err
	}
	c := &mapstructure.DecoderConfig{Result: dst, ErrorUnused: true}
	strict(c)
	d, err := mapstructure.NewDecoder(c)
	if err != nil {
		return f, fmt.Errorf("conf: %w", err)
	}
	if err := d.Decode(m); err != nil {
		return f, Errors{f.Errorf("", "%v", err)}
	}
	return f, nil
}

// overlay adds the environment and the flags to v.
func overlay(v *viper.Viper, t reflect.Type, o Options) error {
	var errs Errors
	if o.EnvPrefix != "" {
		for _, l := range leaves(t, "") {
			name := envName(o.EnvPrefix, l.key)
			s, ok := os.LookupEnv(name)
			if !ok {
				continue
			}
			val, err := fromString(l.typ, s)
			if err != nil {
				errs = append(errs, &Error{Key: l.key, Msg: fmt.Sprintf("environment variable %s: %v", name, err)})
				continue
			}
			v.Set(l.key, val)
		}
		if o.EnvOthers != nil {
			errs = append(errs, unknownEnv(t, o)...)
		}
	}
	for flag, key := range o.FlagKeys {
		fl := o.Flags.Lookup(flag)
		if fl == nil {
			return fmt.Errorf("conf: no flag --%s", flag)
		}
		if !fl.Changed {
			continue
		}
		if s, ok := fl.Value.(pflag.SliceValue); ok {
			v.Set(key, s.GetSlice())
			continue
		}
		l := leafAt(t, key)
		if l == nil {
			return fmt.Errorf("conf: flag --%s sets %s, which the configuration does not have", flag, key)
		}
		val, err := fromString(l, fl.Value.String())
		if err != nil {
			errs = append(errs, &Error{Key: key, Msg: fmt.Sprintf("flag --%s: %v", flag, err)})
			continue
		}
		v.Set(key, val)
	}
	return errs.Err()
}

func envName(prefix, key string) string {
	return prefix + "_" + strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
}

// unknownEnv finds variables with the prefix that stand for nothing. Their values are not shown: they may be secrets in
// the wrong place.
func unknownEnv(t reflect.Type, o Options) (errs Errors) {
	known := map[string]reflect.Type{}
	for _, l := range leaves(t, "") {
		known[envName(o.EnvPrefix, l.key)] = l.typ
	}
	for _, name := range o.EnvOthers {
		known[name] = nil
	}
	names := os.Environ()
	slices.Sort(names)
	for _, name := range names {
		name, _, _ = strings.Cut(name, "=")
		rest, ours := strings.CutPrefix(name, o.EnvPrefix+"_")
		if _, ok := known[name]; !ok && ours && !fromKubernetes(rest) {
			errs = append(errs, &Error{Msg: fmt.Sprintf("environment variable %s: stands for no key; correct or unset it%s", name, suggestEnv(name, known))})
		}
	}
	return errs
}

// fromKubernetes reports whether a variable is one of those that Kubernetes gives to containers for a Service which has the
// program's name, such as KEYHAVEN_EDGE_SERVICE_HOST and KEYHAVEN_EDGE_PORT_443_TCP.
func fromKubernetes(rest string) bool {
	return rest == "PORT" || strings.HasPrefix(rest, "PORT_") || rest == "SERVICE_HOST" || strings.HasPrefix(rest, "SERVICE_PORT")
}

var (
	yamlLine = regexp.MustCompile(`line (\d+): (.*)`)
	// fromZero matches what the parser says with lines that it counts from 0; its scanner counts from 1.
	fromZero = regexp.MustCompile(`^did not find expected (<document start>|node content|key|'-' indicator|',' or '[]}]')`)
)

// read reads the file and checks it against t.
func (f *File) read(t reflect.Type) (map[string]any, error) {
	in, err := os.Open(f.path)
	if err != nil {
		return nil, Errors{fmt.Errorf("configuration file: %w: %s", err, openRemedy(err))}
	}
	defer in.Close()
	b, err := io.ReadAll(io.LimitReader(in, maxSize+1))
	if err != nil {
		return nil, Errors{fmt.Errorf("configuration file: %w", err)}
	}
	if len(b) > maxSize {
		return nil, Errors{&Error{File: f.path, Msg: fmt.Sprintf("larger than %d bytes; is this the right file?", maxSize)}}
	}
	return f.parse(b, t)
}

// parse reads a document and checks it against t.
func (f *File) parse(b []byte, t reflect.Type) (map[string]any, error) {
	doc, err := f.document(b)
	if err != nil {
		return nil, err
	}
	if len(doc.Content) == 0 {
		return map[string]any{}, nil // an empty file
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return map[string]any{}, nil
	}
	c := checker{file: f}
	c.value(root, t, "")
	if err := c.errs.Err(); err != nil {
		return nil, err
	}
	m := map[string]any{}
	if err := root.Decode(&m); err != nil {
		return nil, Errors{f.Errorf("", "%v", err)}
	}
	return m, nil
}

// document reads the one document of a file. YAML lets others follow, which would count for nothing: they are an error, as is
// text after a first line that is indented, which YAML takes for the beginning of the next document.
func (f *File) document(b []byte) (first yaml.Node, err error) {
	d := yaml.NewDecoder(bytes.NewReader(b))
	for n := 0; ; n++ {
		var doc yaml.Node
		switch err := d.Decode(&doc); {
		case errors.Is(err, io.EOF):
			return first, nil
		case err != nil:
			return first, Errors{f.syntax(err)}
		case n == 0:
			first = doc
		case doc.Content[0].Tag != "!!null":
			return first, Errors{&Error{File: f.path, Line: doc.Content[0].Line, Msg: "a second document begins here, and only one is read; remove the line --- or ... before it"}}
		}
	}
}

// syntax is what the parser of YAML did not understand.
func (f *File) syntax(err error) *Error {
	e := &Error{File: f.path}
	reason := strings.TrimPrefix(err.Error(), "yaml: ")
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		e.Line, _ = strconv.Atoi(m[1])
		reason = m[2]
	}
	if fromZero.MatchString(reason) {
		e.Line++
	}
	if strings.Contains(reason, "expected <document start>") {
		reason = "this line belongs to nothing before it; keys of one group start in the same column"
	}
	e.Msg = "not valid YAML: " + reason
	return e
}

// openRemedy says what to do about a file that does not open.
func openRemedy(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "create it, or name another with --config"
	case errors.Is(err, fs.ErrPermission):
		return fmt.Sprintf("the user with id %d may not read it; run as the program's own user, or let this one read the file and enter its directories", os.Geteuid())
	}
	return "correct the path, or name another with --config"
}

// fromString parses a value that came as text.
func fromString(t reflect.Type, s string) (any, error) {
	switch {
	case t == durationType:
		if _, err := time.ParseDuration(s); err != nil {
			return nil, fmt.Errorf("%q is not a duration; write a number with a unit, such as 5s or 1h30m", s)
		}
		return s, nil
	case isText(t):
		return s, nil
	}
	switch t.Kind() {
	case reflect.String:
		return s, nil
	case reflect.Bool:
		b, err := strconv.ParseBool(s)
		if err != nil {
			return nil, fmt.Errorf("%q is not true or false", s)
		}
		return b, nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%q is not a whole number", s)
		}
		if err := inRange(t, n); err != nil {
			return nil, err
		}
		return n, nil
	case reflect.Float64:
		n, err := strconv.ParseFloat(s, 64)
		if err != nil {
			return nil, fmt.Errorf("%q is not a number", s)
		}
		return n, nil
	case reflect.Slice:
		if t.Elem().Kind() == reflect.String {
			if s == "" {
				return []string{}, nil
			}
			parts := strings.Split(s, ",")
			for i := range parts {
				parts[i] = strings.TrimSpace(parts[i])
			}
			return parts, nil
		}
	}
	return nil, errors.New("this key can only be set in the file")
}
