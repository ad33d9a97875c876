package doctest

import (
	"fmt"
	"go/ast"
	"go/constant"
	"go/token"
	"strconv"
	"time"
)

// defaults lists the values that a function which returns a composite literal gives to configuration keys.
func (s *source) defaults(dir, function string) (map[string]string, error) {
	out := map[string]string{}
	p, err := s.load(dir)
	if err != nil {
		return nil, err
	}
	return out, s.defaultsOf(p, function, "", out)
}

func (s *source) defaultsOf(p *sourcePackage, function, prefix string, out map[string]string) error {
	f, ok := p.funcs[function]
	if !ok {
		return fmt.Errorf("%s has no function %s", p.dir, function)
	}
	ret, ok := f.Body.List[len(f.Body.List)-1].(*ast.ReturnStmt)
	if !ok || len(ret.Results) != 1 {
		return fmt.Errorf("%s.%s does not end in the return of one value", p.dir, function)
	}
	e := ret.Results[0]
	if u, ok := e.(*ast.UnaryExpr); ok {
		e = u.X
	}
	lit, ok := e.(*ast.CompositeLit)
	if !ok {
		return fmt.Errorf("%s.%s does not return a literal", p.dir, function)
	}
	return s.literal(p, lit, prefix, out)
}

func (s *source) literal(p *sourcePackage, lit *ast.CompositeLit, prefix string, out map[string]string) error {
	name, ok := lit.Type.(*ast.Ident)
	if !ok || p.structs[name.Name] == nil {
		return fmt.Errorf("%s: the default at %q is not a struct of the package", p.dir, prefix)
	}
	tags := map[string]string{}
	for _, f := range p.structs[name.Name].Fields.List {
		for _, n := range f.Names {
			tags[n.Name] = tagOf(f)
		}
	}
	for _, e := range lit.Elts {
		kv := e.(*ast.KeyValueExpr)
		key := prefix + tags[kv.Key.(*ast.Ident).Name]
		switch v := kv.Value.(type) {
		case *ast.CompositeLit:
			if err := s.literal(p, v, key+".", out); err != nil {
				return err
			}
		case *ast.CallExpr:
			sel, ok := v.Fun.(*ast.SelectorExpr)
			if !ok {
				return fmt.Errorf("%s: the default of %s is a call that this test does not know", p.dir, key)
			}
			other, err := s.load(p.imports[sel.X.(*ast.Ident).Name])
			if err != nil {
				return err
			}
			if err := s.defaultsOf(other, sel.Sel.Name, key+".", out); err != nil {
				return err
			}
		default:
			c, isTime, err := p.eval(v)
			if err != nil {
				return fmt.Errorf("%s: default of %s: %w", p.dir, key, err)
			}
			out[key] = show(c, isTime)
		}
	}
	return nil
}

var units = map[string]time.Duration{"Millisecond": time.Millisecond, "Second": time.Second, "Minute": time.Minute, "Hour": time.Hour}

// eval evaluates a constant expression and reports whether it is a duration.
func (p *sourcePackage) eval(e ast.Expr) (c constant.Value, isTime bool, err error) {
	switch e := e.(type) {
	case *ast.BasicLit:
		return constant.MakeFromLiteral(e.Value, e.Kind, 0), false, nil
	case *ast.Ident:
		if e.Name == "true" || e.Name == "false" {
			return constant.MakeBool(e.Name == "true"), false, nil
		}
		if v, ok := p.consts[e.Name]; ok {
			return p.eval(v)
		}
	case *ast.SelectorExpr:
		if u, ok := units[e.Sel.Name]; ok {
			return constant.MakeInt64(int64(u)), true, nil
		}
	case *ast.BinaryExpr:
		x, xTime, err := p.eval(e.X)
		if err != nil {
			return nil, false, err
		}
		y, yTime, err := p.eval(e.Y)
		if err != nil {
			return nil, false, err
		}
		if e.Op == token.SHL {
			n, _ := constant.Uint64Val(y)
			return constant.Shift(x, e.Op, uint(n)), xTime, nil
		}
		return constant.BinaryOp(x, e.Op, y), xTime || yTime, nil
	}
	return nil, false, fmt.Errorf("%T is not a constant that this test can evaluate", e)
}

func show(c constant.Value, isTime bool) string {
	if isTime {
		n, _ := constant.Int64Val(c)
		return time.Duration(n).String()
	}
	switch c.Kind() {
	case constant.String:
		return constant.StringVal(c)
	case constant.Float:
		x, _ := constant.Float64Val(c)
		return strconv.FormatFloat(x, 'g', -1, 64)
	}
	return c.ExactString()
}
