package reliability

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"time"

	"github.com/keyhaven/keyhaven/internal/faultmodule"
)

type (
	faults = faultmodule.Faults
	rule   = faultmodule.Rule
)

// Rows are all failures, in the order of the table.
func Rows() []Row {
	var rows []Row
	for _, part := range [][]Row{processRows(), deviceRows(), sessionRows(), pinRows(), signatureRows()} {
		rows = append(rows, part...)
	}
	for i := range rows {
		rows[i].Workers = cmp.Or(rows[i].Workers, 2)
	}
	return rows
}

// processRows are modules that crash and hang.
func processRows() []Row {
	crash := func(function string, count int) rule {
		return rule{Function: function, Do: faultmodule.Crash, Count: count}
	}
	hang := rule{Function: "C_Sign", Do: faultmodule.Hang}
	return []Row{
		{Name: "kill", Failure: "a worker is killed with SIGKILL", Homes: 1, Loss: None, Fault: killed()},
		{Name: "kill-only", Failure: "the only worker is killed with SIGKILL", Homes: 1, Workers: 1, Loss: Outage, Fault: killed()},
		{Name: "kill-only-2", Failure: "the same, second home", Homes: 2, Workers: 1, Loss: None, Fault: killed()},
		{Name: "crash", Failure: "the module crashes in C_Sign (SIGSEGV)", Homes: 1, Loss: None, Fault: once(1, crash("C_Sign", 1))},
		{Name: "crash-always", Failure: "every C_Sign crashes for a while", Homes: 1, Loss: Outage, Fault: lasting(faults{Rules: []rule{crash("C_Sign", 0)}})},
		{Name: "crash-always-2", Failure: "the same, second home", Homes: 2, Loss: None, Fault: lasting(faults{Rules: []rule{crash("C_Sign", 0)}})},
		{Name: "crash-start", Failure: "a killed worker's replacements crash in C_Initialize, twice", Homes: 1, Loss: None, Fault: killed(crash("C_Initialize", 2))},
		{Name: "hang", Failure: "one C_Sign hangs", Homes: 1, Loss: None, Fault: once(1, rule{Function: "C_Sign", Do: faultmodule.Hang, Count: 1})},
		{Name: "hang-always", Failure: "every C_Sign hangs for a while", Homes: 1, Loss: Outage, Fault: lasting(faults{Rules: []rule{hang}})},
		{Name: "hang-always-2", Failure: "the same, second home", Homes: 2, Loss: None, Fault: lasting(faults{Rules: []rule{hang}})},
		{Name: "ha-wait-2", Failure: "an HA group does not answer, for longer than clients wait; second home", Homes: 2, Token: "deadline: 60s", Loss: None,
			Fault: lasting(faults{Rules: []rule{hang}})},
		{Name: "slow", Failure: "each operation takes 200 ms, four at a time", Homes: 1, Loss: None, Fault: lasting(faults{Delay: 200 * time.Millisecond, Serve: 4})},
		{Name: "fork", Failure: "workers are started while others have the module loaded", Homes: 1, Workers: 4, Loss: None, Fault: killed()},
	}
}

// deviceRows are tokens that go away and come back.
func deviceRows() []Row {
	return []Row{
		{Name: "restart", Failure: "the HSM or its daemon restarts; all handles are stale", Homes: 1, Loss: Outage, Fault: lasting(faults{Down: true})},
		{Name: "restart-2", Failure: "the same, second home", Homes: 2, Loss: None, Fault: lasting(faults{Down: true})},
		{Name: "device-error", Failure: "CKR_DEVICE_ERROR until the module is loaded by a new process", Homes: 1, Loss: Outage, Fault: event(func(h *Home) { h.Break() })},
		{Name: "device-error-2", Failure: "the same, second home", Homes: 2, Loss: None, Fault: event(func(h *Home) { h.Break() })},
		{Name: "finalize", Failure: "only C_Finalize and C_Initialize bring the module back", Homes: 1, Loss: Outage, Fault: event(func(h *Home) { h.Stale() })},
		{Name: "one-stale", Failure: "the same for one worker of two", Homes: 1, Loss: None, Fault: event(func(h *Home) { h.Stale(h.Counters().PIDs[0]) })},
		{Name: "removed", Failure: "the token is taken out and put back", Homes: 1, Loss: Outage, Fault: lasting(faults{Hidden: true})},
		{Name: "removed-2", Failure: "the same, second home", Homes: 2, Loss: None, Fault: lasting(faults{Hidden: true})},
		{Name: "files-away", Failure: "the token's files are away and come back", Homes: 1, Loss: Outage, Fault: filesAway},
		{Name: "general-error", Failure: "one C_Sign fails with CKR_GENERAL_ERROR", Homes: 1, Loss: InFlight, Also: noRestart,
			Fault: codes("C_Sign", 1, generalError)},
		{Name: "general-error-2", Failure: "the same, second home", Homes: 2, Loss: None, Also: noRestart, Fault: codes("C_Sign", 1, generalError)},
		{Name: "throttled", Failure: "the token throttles: CKR_FUNCTION_FAILED; second home of lower priority", Homes: 2, Token: "deadline: 500ms\npriority: -1", Loss: None,
			Fault: aloneDuring(lasting(faults{Delay: 5 * time.Millisecond, Throttle: 2}))},
		{Name: "throttled-active", Failure: "the same as CKR_OPERATION_ACTIVE", Homes: 2, Token: "deadline: 500ms\npriority: -1", Loss: None,
			Fault: aloneDuring(codes("C_SignInit", 3, operationActive))},
	}
}

// sessionRows are sessions and logins that are lost.
func sessionRows() []Row {
	rows := []Row{
		{Name: "idle", Failure: "the login ends when the token is idle; no keep-alive", Homes: 1, Token: "keep_alive: -1s", Loss: None,
			Before: before(faults{LoginIdle: spell / 2}), Fault: idle},
		{Name: "idle-kept", Failure: "the same, with keep-alive", Homes: 1, Token: "keep_alive: 100ms", Loss: None,
			Before: before(faults{LoginIdle: spell / 2}), Fault: idle, Also: noLogin},
		{Name: "login-lost", Failure: "the token forgets the login", Homes: 1, Loss: None, Fault: event(func(h *Home) { h.ForgetLogin() })},
		{Name: "sessions-lost", Failure: "the token drops all sessions", Homes: 1, Loss: None, Fault: event(func(h *Home) { h.DropSessions() })},
		{Name: "session-codes", Failure: "session handles and the login are refused now and then", Homes: 1, Loss: None,
			Fault: codes("C_SignInit", 2, sessionHandleInvalid, sessionClosed, userNotLoggedIn)},
		{Name: "handle-codes", Failure: "key handles are refused now and then", Homes: 1, Loss: None, Fault: codes("C_SignInit", 2, keyHandleInvalid, objectHandleInvalid)},
		{Name: "left-active", Failure: "a failed C_Sign leaves its operation active", Homes: 1, Loss: None,
			Fault: once(3, rule{Function: "C_Sign", Do: faultmodule.Return, Code: functionFailed, Count: 3, Leave: true})},
		{Name: "start-together", Failure: "four workers start on one token", Homes: 1, Workers: 4, Loss: None, Fault: standing(50), Also: logins(4)},
	}
	for _, n := range []struct{ workers, most int }{{1, 1}, {1, 2}, {2, 2}, {2, 5}} {
		rows = append(rows, Row{
			Name: fmt.Sprintf("sessions-%d-%d", n.workers, n.most), Failure: fmt.Sprintf("the token has %d sessions, for workers: %d", n.most, n.workers),
			Homes: 1, Workers: n.workers, Loss: None, Before: before(faults{MaxSessions: n.most}), Fault: standing(100), Also: atMost(n.most),
		})
	}
	return rows
}

// pinRows are PINs that the token does not take.
func pinRows() []Row {
	return []Row{
		{Name: "wrong-pin-2", Failure: "the PIN is wrong from the start; second home", Homes: 2, Loss: None, Before: noPIN, Fault: rightPIN, Says: `refused the PIN|PIN`},
		{Name: "pin-refused", Failure: "the token refuses the PIN when a worker is replaced", Homes: 1, Loss: None, Fault: refusedLater, Says: `refused the PIN|PIN`},
		{Name: "final-try-2", Failure: "the token is at its last try of the PIN; second home", Homes: 2, Loss: None, Fewer: true,
			Before: before(faults{TokenFlags: flagFinalTry}), Fault: standing(100), Also: logins(0), Says: `final|last`},
		{Name: "pin-in-log", Failure: "the module crashes in C_Login, with the PIN in memory", Homes: 1, Loss: None,
			Fault: killed(rule{Function: "C_Login", Do: faultmodule.Crash, Count: 1})},
	}
}

// signatureRows are tokens that sign in odd ways.
func signatureRows() []Row {
	return []Row{
		{Name: "no-pss", Failure: "the token has no RSA-PSS, but raw RSA", Homes: 1, Scheme: tls.PSSWithSHA256, Loss: None,
			Before: before(faults{Refuse: []uint{mechanismPSS}}), Fault: standing(60)},
		{Name: "no-rsa", Failure: "the token has neither; RSA-PSS is not offered", Homes: 1, Loss: None,
			Before: before(faults{Refuse: []uint{mechanismPSS, mechanismX509}}), Fault: withoutPSS, Says: "PSS"},
		{Name: "short", Failure: "ECDSA signatures with a short r or s", Homes: 1, Loss: None, Before: before(faults{ECDSA: faultmodule.ECDSAShort}),
			Fault: func(t *Trial) error {
				return t.Until("300 short signatures", func() bool { return t.Counters().Short >= 300 })
			}},
		{Name: "der-2", Failure: "the module gives ECDSA signatures in DER; second home", Homes: 2, Loss: None, Before: before(faults{ECDSA: faultmodule.ECDSADER}), Fault: standing(100)},
	}
}
