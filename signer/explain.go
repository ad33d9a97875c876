package signer

import "time"

// A Query is a question to a policy: may this be done?
type Query struct {
	Client string    // the client's identity
	Op     Op        // what it wants to do
	Key    *Entry    // with which key, if the operation has one
	Scheme Algorithm // how, if the operation signs
	SNI    string    // for which server name, if the operation has one
	At     time.Time // when; zero is now
}

// A Decision is a policy's answer to a [Query].
type Decision struct {
	Allowed bool
	Reason  Reason        // why not
	Rule    int           // index of the rule that allows it, or that came nearest; -1 if no rule names the client
	Rules   []RuleVerdict // what each of the client's rules says, in their order
}

// A RuleVerdict is what one rule says to a [Query].
type RuleVerdict struct {
	Rule   int    // index of the rule
	Reason Reason // why the rule does not allow it; Allowed if it does
	Field  string // the value that stands against it: "keys", "windows", "legacy.decrypt"; "" if none
}
