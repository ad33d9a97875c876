package faultmodule

import (
	"fmt"
	"time"
)

// An Action is what a rule does to a call.
type Action int

const (
	Return Action = iota + 1 // fail with Rule.Code; the real module is not asked
	Crash                    // write to address 0
	Hang                     // do not come back until the faults change
)

// A Rule is a fault of one function. Calls are counted over all processes.
type Rule struct {
	Function string // as "C_Sign", one of those that the module replaces; "" is each of them
	Do       Action
	Code     uint // CKR_… for Return
	After    int  // calls that pass before the first one that fails
	Count    int  // calls that fail; 0: all
	Leave    bool // a C_Sign or C_Decrypt that fails leaves its operation active, against the standard
	PID      int  // this process alone; 0: all
}

// The forms of ECDSA signatures.
const (
	ECDSAPlain = iota // as the real module gives them
	ECDSAShort        // with a zero byte at the start of r or s
	ECDSADER          // in DER, as some modules do against the standard
)

// Faults are all faults of a moment. The zero value is none.
type Faults struct {
	Rules []Rule // at most 8
	// Delay is how long the token takes for an operation; Serve how many it works on at once, over all processes, the others
	// waiting in the order of their arrival; 0: any number. The token's own time runs within Delay.
	Delay time.Duration
	Serve int // at most 256
	// Throttle fails operations with CKR_FUNCTION_FAILED while more than so many run, over all processes; 0: never.
	Throttle    int
	MaxSessions int           // open sessions over all processes; 0: any number
	LoginIdle   time.Duration // a process that calls nothing for so long loses its login; 0: never
	TokenFlags  uint          // CKF_… that C_GetTokenInfo adds
	Hidden      bool          // no slot, and CKR_DEVICE_REMOVED on open sessions
	Down        bool          // CKR_DEVICE_ERROR on everything; processes that saw it never recover, see Break
	PINTries    int           // wrong PINs after which the token is locked for good, with the flags that tell of it; 0: any number
	ECDSA       int           // form of ECDSA signatures
	Refuse      []uint        // mechanisms that the token does not know, at most 8
	Count       bool          // count calls though nothing is wrong
}

// functionNumbers are the functions that the module replaces, by their place in CK_FUNCTION_LIST.
var functionNumbers = map[string]uint64{
	"": 255, "C_Initialize": 0, "C_Finalize": 1, "C_GetSlotList": 4, "C_GetSlotInfo": 5, "C_GetTokenInfo": 6,
	"C_GetMechanismList": 7, "C_GetMechanismInfo": 8, "C_OpenSession": 12, "C_CloseSession": 13, "C_CloseAllSessions": 14,
	"C_GetSessionInfo": 15, "C_Login": 18, "C_Logout": 19, "C_GetAttributeValue": 24, "C_FindObjectsInit": 26,
	"C_FindObjects": 27, "C_FindObjectsFinal": 28, "C_DecryptInit": 33, "C_Decrypt": 34, "C_SignInit": 42, "C_Sign": 43,
}

func (f *Faults) check() error {
	switch {
	case len(f.Rules) > maxRules:
		return fmt.Errorf("faultmodule: %d rules, at most %d", len(f.Rules), maxRules)
	case len(f.Refuse) > maxRefused:
		return fmt.Errorf("faultmodule: %d refused mechanisms, at most %d", len(f.Refuse), maxRefused)
	case f.Serve < 0 || f.Serve > maxServe || f.Delay < 0 || f.Throttle < 0 || f.MaxSessions < 0 || f.LoginIdle < 0 || f.PINTries < 0:
		return fmt.Errorf("faultmodule: a number is out of range: %+v", *f)
	case f.Serve > 0 && f.Delay == 0:
		return fmt.Errorf("faultmodule: Serve needs a Delay")
	}
	for _, r := range f.Rules {
		if _, ok := functionNumbers[r.Function]; !ok {
			return fmt.Errorf("faultmodule: %q is not a function that the module replaces", r.Function)
		}
		if r.Do < Return || r.Do > Hang || r.After < 0 || r.Count < 0 || (r.Do == Return) != (r.Code != 0) {
			return fmt.Errorf("faultmodule: rule %+v has no action, a code without Return, or a number below 0", r)
		}
	}
	return nil
}

// state returns the words of the faults that are neither rules nor delays.
func (f *Faults) state() map[int]uint64 {
	words := map[int]uint64{
		wThrottle: uint64(f.Throttle), wMaxSessions: uint64(f.MaxSessions), wLoginIdle: uint64(f.LoginIdle), wTokenFlags: uint64(f.TokenFlags),
		wHidden: flag(f.Hidden), wDown: flag(f.Down), wPINTries: uint64(f.PINTries), wECDSA: uint64(f.ECDSA), wRefused: uint64(len(f.Refuse)),
	}
	for i, m := range f.Refuse {
		words[wMechanisms+i] = uint64(m)
	}
	return words
}

func flag(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}
