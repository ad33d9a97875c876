package doctest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
)

const module = "github.com/keyhaven/keyhaven/"

// A source reads the project's packages without compiling them, since those of programs cannot be imported.
type source struct {
	root string
	pkgs map[string]*sourcePackage // by directory below root
}

type sourcePackage struct {
	dir     string
	structs map[string]*ast.StructType
	funcs   map[string]*ast.FuncDecl
	consts  map[string]ast.Expr
	imports map[string]string // name in the package to directory of ours
}

func (s *source) load(dir string) (*sourcePackage, error) {
	if p, ok := s.pkgs[dir]; ok {
		return p, nil
	}
	files, err := filepath.Glob(filepath.Join(s.root, dir, "*.go"))
	if err != nil {
		return nil, err
	}
	p := &sourcePackage{dir, map[string]*ast.StructType{}, map[string]*ast.FuncDecl{}, map[string]ast.Expr{}, map[string]string{}}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			return nil, err
		}
		p.add(f)
	}
	if len(p.structs) == 0 {
		return nil, fmt.Errorf("no types in %s", dir)
	}
	s.pkgs[dir] = p
	return p, nil
}

func (p *sourcePackage) add(f *ast.File) {
	for _, i := range f.Imports {
		path, _ := strconv.Unquote(i.Path.Value)
		if dir, ok := strings.CutPrefix(path, module); ok {
			p.imports[filepath.Base(dir)] = dir
		}
	}
	for _, d := range f.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if d.Recv == nil {
				p.funcs[d.Name.Name] = d
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				switch spec := spec.(type) {
				case *ast.TypeSpec:
					if t, ok := spec.Type.(*ast.StructType); ok {
						p.structs[spec.Name.Name] = t
					}
				case *ast.ValueSpec:
					for i, n := range spec.Names {
						if d.Tok == token.CONST && i < len(spec.Values) {
							p.consts[n.Name] = spec.Values[i]
						}
					}
				}
			}
		}
	}
}

// keys lists the configuration keys of a struct with their types as the documentation calls them.
func (s *source) keys(dir, name string) (map[string]string, error) {
	out := map[string]string{}
	p, err := s.load(dir)
	if err != nil {
		return nil, err
	}
	return out, s.walk(p, name, "", out)
}

func (s *source) walk(p *sourcePackage, name, prefix string, out map[string]string) error {
	t, ok := p.structs[name]
	if !ok {
		return fmt.Errorf("%s has no struct %s", p.dir, name)
	}
	for _, f := range t.Fields.List {
		tag := tagOf(f)
		if tag == "-" {
			continue // no key
		}
		if tag == "" {
			return fmt.Errorf("%s.%s: field %v has no mapstructure tag", p.dir, name, f.Names)
		}
		if err := s.field(p, f.Type, prefix+tag, out); err != nil {
			return err
		}
	}
	return nil
}

func (s *source) field(p *sourcePackage, t ast.Expr, key string, out map[string]string) error {
	switch t := t.(type) {
	case *ast.ArrayType:
		if id, ok := t.Elt.(*ast.Ident); ok && plain[id.Name] != "" {
			out[key] = strings.TrimSuffix("list of "+plain[id.Name]+"s", " of s")
			if id.Name == "any" {
				out[key] = "list"
			}
			return nil
		}
		return s.field(p, t.Elt, key+"[]", out)
	case *ast.Ident:
		if t.Name == "Duration" {
			out[key] = "duration"
			return nil
		}
		if word := plain[t.Name]; word != "" {
			out[key] = word
			return nil
		}
		return s.walk(p, t.Name, key+".", out)
	case *ast.StarExpr:
		return s.field(p, t.X, key, out)
	case *ast.MapType:
		out[key] = "map"
		return nil
	case *ast.SelectorExpr:
		in := t.X.(*ast.Ident).Name
		if in == "time" && t.Sel.Name == "Duration" {
			out[key] = "duration"
			return nil
		}
		dir, ok := p.imports[in]
		if !ok {
			return fmt.Errorf("%s: %s is of the foreign package %s", p.dir, key, in)
		}
		other, err := s.load(dir)
		if err != nil {
			return err
		}
		return s.walk(other, t.Sel.Name, key+".", out)
	}
	return fmt.Errorf("%s: %s has a type that this test does not know", p.dir, key)
}

var plain = map[string]string{"string": "string", "bool": "bool", "int": "integer", "int64": "integer", "uint16": "integer", "uint64": "integer", "float64": "number", "any": "any"}

func tagOf(f *ast.Field) string {
	if f.Tag == nil {
		return ""
	}
	text, _ := strconv.Unquote(f.Tag.Value)
	return reflect.StructTag(text).Get("mapstructure")
}
