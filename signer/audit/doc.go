// Package audit keeps a log of every private-key operation that nobody can change unnoticed: lines chained by SHA-256, with signed
// checkpoints, in files that are only ever appended to. FORMAT.md beside this file says what stands in them, and what an attacker can do.
//
// [Log] writes, as the [signer.Auditor] of a key server. [Verify], [Show] and [Export] read; they need no server and no write access.
package audit
