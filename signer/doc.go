// Package signer decides who may use which private key, and has it used.
//
// A [Registry] knows every key by its subject key identifier, by the legacy digest and by its label. A [Policy] says which
// client may ask which key for what. A [Service] joins the two: it is a [keyless.Handler] that checks a request against the
// policy, checks that its shape is right for the key, hashes what must be hashed, has a [Key] sign and writes a [Record].
//
// A rule can be bound to hours ([Window]), to a [Rate] and to a budget for each day; [Quotas] holds the counters. An operation
// is counted last, when nothing else stands against it and the [Auditor] is ready, and what it was counted against is not
// given back. Its answer leaves when the Auditor has kept the record. [Policy.Explain] tells people what the rules say.
//
// Where the keys live is the business of a [Backend]: a PKCS#11 token, or files (see [LoadFileKeys]) for trying out.
//
// # Several homes for one key
//
// The same key in several places is one [Entry] with several homes. [Entry.Sign] spreads operations over those that are healthy, goes
// on to the next one when a home is away, and asks a second one when the first takes longer than usual. Each place has a [Lane], which
// lets in as many operations as the place does at once, has the others wait in fair turns, refuses early what would miss its deadline,
// sends less to a place that throttles, and leaves one alone that fails until a trial goes well.
//
// Shares are of the place's time and not of operations, since an RSA signature takes ten times as long as one on P-256. An operation that is
// in the place is not interrupted: one that comes waits for the first place to become free, and only then does its turn count.
//
// # What a refused client learns
//
// A client learns of a key only if a rule of the policy names that key and the operation for that client. In every other
// case the answer is [keyless.CodeKeyNotFound], the same for a key that does not exist, a key of someone else, an operation
// or a scheme that is not allowed, a server name outside the rule, a window that is closed, a limit that is used up, and a permission that ended while the key worked. Client, key, operation
// and server name are judged before the key's type is looked at, so that a refused client learns nothing of it either. Faults that show without a key, such as
// a digest of the wrong length, are the same for every key. Only a client that passed the policy gets a
// [keyless.CodeCrypto] about an opcode that does not fit the key. The local record holds the true reason.
//
// Sealing, renewal and unknown functions need no key; where they are off, or not allowed, the answer is
// [keyless.CodeBadOpcode], as for a server that does not know them.
package signer
