package signer

import "fmt"

// A Cause is why an operation was refused or failed, as one of a fixed list, for counting. A record's Reason says more.
type Cause string

// The causes. The first ones are a policy's.
const (
	CauseClient    Cause = "client"    // no rule names the client
	CauseOperation Cause = "operation" // no rule of the client has the operation
	CauseKey       Cause = "key"       // no rule of the client has the key
	CauseSNI       Cause = "sni"       // no rule of the client has the server name
	CauseWindow    Cause = "window"    // the time windows are closed
	CauseScheme    Cause = "scheme"    // no rule of the client has the signature scheme
	CauseLegacy    Cause = "legacy"    // the server's switch is off
	CauseRate      Cause = "rate"      // the rate is used up
	CauseDaily     Cause = "daily"     // the day's budget is used up

	CauseNotFound Cause = "not_found" // no such key
	CauseOpcode   Cause = "opcode"    // nothing that is served
	CauseFormat   Cause = "format"    // not well-formed, or of a kind that does not fit the key
	CauseOff      Cause = "off"       // not configured here, or not for this key
	CauseAudit    Cause = "audit"     // no record could be kept, or none was

	CauseOverloaded  Cause = "overloaded"  // the queue before the key's home is full
	CauseDeadline    Cause = "deadline"    // would have been answered too late
	CauseThrottled   Cause = "throttled"   // the key's home asks to be left alone
	CauseUnavailable Cause = "unavailable" // no home of the key answers
	CauseTimeout     Cause = "timeout"     // the time was over before the home answered
	CauseCanceled    Cause = "canceled"    // the client was gone before the home answered
	CauseBackend     Cause = "backend"     // any other failure of the home, or of the authority that renews
	CausePanic       Cause = "panic"       // a fault of the program
)

// panicked is the panic of a [Key], on its way to the goroutine that answers.
type panicked struct {
	value any
	stack []byte
}

// Error says what a log of the panic would.
func (p *panicked) Error() string {
	return fmt.Sprintf("signer: key panicked: %v\n%s", p.value, p.stack)
}

// causes maps a policy's reasons.
var causes = map[Reason]Cause{
	RefusedClient: CauseClient, RefusedOp: CauseOperation, RefusedKey: CauseKey, RefusedSNI: CauseSNI, RefusedWindow: CauseWindow,
	RefusedScheme: CauseScheme, RefusedLegacy: CauseLegacy, RefusedType: CauseFormat, RefusedDecrypt: CauseOff, RefusedRate: CauseRate, RefusedDaily: CauseDaily,
}
