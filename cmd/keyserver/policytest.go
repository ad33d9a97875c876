package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

// A policyQuery asks whether something would be allowed.
type policyQuery struct {
	Client string    `json:"client"`
	Key    string    `json:"key"` // SKI or label
	Op     string    `json:"op"`
	Scheme string    `json:"scheme"`
	SNI    string    `json:"sni"`
	At     time.Time `json:"at,omitzero"`
}

// A policyAnswer is the answer to a policyQuery.
type policyAnswer struct {
	Allowed bool          `json:"allowed"`
	Reason  string        `json:"reason,omitempty"`
	Where   string        `json:"where,omitempty"` // file, line and key of what says so
	Key     string        `json:"key,omitempty"`
	Known   bool          `json:"known"` // the key is there; else its name was taken as it is written
	Rules   []ruleVerdict `json:"rules,omitempty"`
}

// A ruleVerdict is what one rule of the client says.
type ruleVerdict struct {
	Where   string `json:"where"`
	Allowed bool   `json:"allowed"`
	Reason  string `json:"reason,omitempty"`
}

// query turns a question into one of the policy. Without a registry, or if it has no such key, a key's name is taken as it is written.
func (q policyQuery) query(keys *signer.Registry) (out signer.Query, known bool, err error) {
	out = signer.Query{Client: q.Client, SNI: q.SNI, At: q.At}
	if q.Client == "" {
		return out, false, errors.New("name the client, by the URI of its certificate")
	}
	var ok bool
	if out.Op, ok = signer.ParseOp(q.Op); !ok {
		return out, false, fmt.Errorf("operation %q is unknown; write ping, tls-sign, sign, decrypt, seal or renew", q.Op)
	}
	if signs := out.Op == signer.OpTLSSign || out.Op == signer.OpSign; signs && q.Scheme == "" {
		return out, false, fmt.Errorf("name the signature scheme for %s, such as ecdsa_secp256r1_sha256", q.Op)
	} else if !signs && out.Op != signer.OpDecrypt {
		return out, false, nil
	} else if out.Scheme, ok = signer.ParseAlgorithm(q.Scheme); signs && !ok {
		return out, false, fmt.Errorf("signature scheme %q is unknown", q.Scheme)
	}
	if q.Key == "" {
		return out, false, fmt.Errorf("name the key for %s, by SKI or label", q.Op)
	}
	if keys != nil {
		switch found := keys.ByName(q.Key); {
		case len(found) == 1:
			out.Key = found[0]
			return out, true, nil
		case len(found) > 1:
			return out, false, fmt.Errorf("%d keys have the label %q; name one by its SKI", len(found), q.Key)
		}
	}
	out.Key = &signer.Entry{Labels: []string{q.Key}}
	if ski, err := keyless.ParseSKI(q.Key); err == nil {
		out.Key = &signer.Entry{SKI: ski}
	}
	return out, false, nil
}

// test answers a question by the plan's rules.
func (p *plan) test(q policyQuery, keys *signer.Registry) (policyAnswer, error) {
	in, known, err := q.query(keys)
	if err != nil {
		return policyAnswer{}, err
	}
	// The rules as they are written, so that they count as the file does: revoked clients' rules are left out of the policy in use.
	policy, err := p.policyOf(p.cfg.Clients)
	if err != nil {
		return policyAnswer{}, err
	}
	d := policy.Explain(in)
	if in.Op == signer.OpPing && len(d.Rules) > 0 { // which takes no more than a rule, whatever it says
		first := signer.RuleVerdict{Rule: d.Rules[0].Rule, Reason: signer.Allowed}
		d = signer.Decision{Allowed: true, Reason: signer.Allowed, Rule: first.Rule, Rules: []signer.RuleVerdict{first}}
	}
	a := policyAnswer{Allowed: d.Allowed, Reason: string(d.Reason), Known: known, Where: p.where("clients")}
	if in.Key != nil {
		a.Key = q.Key
		if known {
			a.Key = in.Key.String()
		}
	}
	for _, v := range d.Rules {
		where := p.ruleField(v)
		if v.Rule == d.Rule {
			a.Where = where
		}
		a.Rules = append(a.Rules, ruleVerdict{where, v.Reason == signer.Allowed, string(v.Reason)})
	}
	if p.revoked.revokedID(q.Client) && d.Rule >= 0 {
		a.Allowed, a.Reason, a.Where = false, "client revoked", p.revoked.path
	}
	return a, nil
}

// ruleField says where the configuration has the rule, or the field of it that stands against the operation. Switches of the server are
// no rule's.
func (p *plan) ruleField(v signer.RuleVerdict) string {
	switch {
	case v.Reason == signer.RefusedLegacy:
		return p.where(v.Field)
	case v.Field == "":
		return p.where(fmt.Sprintf("clients[%d]", v.Rule))
	}
	return p.where(fmt.Sprintf("clients[%d].%s", v.Rule, v.Field))
}

func newPolicy() *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "Ask what the rules allow"}
	cmd.AddCommand(newPolicyTest())
	return cmd
}

func newPolicyTest() *cobra.Command {
	var q policyQuery
	var at string
	var online bool
	cmd := &cobra.Command{
		Use:   "test --client ID --op OPERATION",
		Short: "Say whether a client would be allowed something, and which line says so",
		Long: `Test answers by the rules of the configuration file: allowed (exit code 0) or refused (1), and the line that decides.
A key is named by SKI or label as the rules name it. With --online the running server answers, by the configuration and the
keys that it has at present: it knows which labels a key has besides, and what is used up of rates and budgets.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if at != "" {
				var err error
				if q.At, err = time.Parse(time.RFC3339, at); err != nil {
					return cli.UsageError("--at %q: write a time such as 2026-01-31T06:00:00Z", at)
				}
			}
			if _, _, err := q.query(nil); err != nil {
				return cli.UsageError("%w", err)
			}
			a, err := q.ask(cmd, online)
			if err != nil {
				return err
			}
			if err := cli.Show(cmd, a, a.table); err != nil || a.Allowed {
				return err
			}
			return cli.Quiet(errors.New("refused")) // which the output has said
		},
	}
	configFlags(cmd)
	controlFlag(cmd)
	cmd.Flags().StringVar(&q.Client, "client", "", "identity of the client, such as spiffe://keys.example/edge/one")
	cmd.Flags().StringVar(&q.Key, "key", "", "SKI or label of the key, for tls-sign, sign and decrypt")
	cmd.Flags().StringVar(&q.Op, "op", "", "operation: ping, tls-sign, sign, decrypt, seal or renew")
	cmd.Flags().StringVar(&q.Scheme, "scheme", "", "signature scheme, for tls-sign and sign, such as ecdsa_secp256r1_sha256")
	cmd.Flags().StringVar(&q.SNI, "sni", "", "server name that the visitor asks for")
	cmd.Flags().StringVar(&at, "at", "", "time (RFC 3339), in place of now")
	cmd.Flags().BoolVar(&online, "online", false, "have the running server answer, over its control socket")
	required(cmd, "client", "op")
	return cli.WithOutput(cmd)
}

// ask has the configuration file or the running server answer.
func (q policyQuery) ask(cmd *cobra.Command, online bool) (a policyAnswer, err error) {
	if online {
		err = call(cmd, http.MethodPost, "/v1/policy/test", q, &a)
		return a, err
	}
	p, err := loadRules(optionsOf(cmd))
	if err != nil {
		return a, cli.ConfigError(err)
	}
	a, err = p.test(q, nil)
	if err != nil {
		return a, cli.UsageError("%w", err)
	}
	return a, nil
}

// loadRules loads what of the configuration decides about requests. Nothing else of it needs to be right, or readable for the caller.
func loadRules(o loadOptions) (*plan, error) {
	cfg, file, err := read(o)
	if file == nil {
		return nil, err
	}
	p := &plan{cfg: cfg, file: file, quotas: new(signer.Quotas)}
	errs := p.loadPolicy()
	if cfg.CADir != "" {
		if p.revoked, err = openRevocations(cfg.CADir); err != nil {
			errs = append(errs, file.Errorf("ca_dir", "%v", err))
		}
	}
	if path := cfg.beside(quotaFile); path != "" {
		if err := p.quotas.Load(path); err != nil {
			errs = append(errs, file.Errorf("state_dir", "%v", err))
		}
	}
	return p, errs.Err()
}

func (a policyAnswer) table(w io.Writer) {
	word := "refused"
	if a.Allowed {
		word = "allowed"
	}
	fmt.Fprintf(w, "%s\t%s\t%s\n", word, a.Where, a.Reason)
	if a.Key != "" && !a.Known {
		fmt.Fprintf(w, "\tthe key's name is taken as it is written; --online asks the running server for its labels\n")
	}
	others := slices.DeleteFunc(slices.Clone(a.Rules), func(r ruleVerdict) bool { return r.Where == a.Where })
	for _, r := range others {
		word := "no"
		if r.Allowed {
			word = "yes"
		}
		fmt.Fprintf(w, "  %s\t%s\t%s\n", word, r.Where, r.Reason)
	}
}
