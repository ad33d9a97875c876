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

// What the server logs and counts.
const (
	lost       = `"worker is lost".*"reason":"`
	ends       = `keyhaven_keyserver_worker_ends_total reason=`
	replaced   = `device failed; worker is replaced`
	fails      = `the home fails; it is left alone for a while`
	opened     = `keyhaven_signer_lane_breaker_opened_total`
	failovers  = `keyhaven_signer_lane_failovers_total`
	pinRefused = `token refused the PIN; it is not tried again`
)

// processRows are modules that crash and hang.
func processRows() []Row {
	crash := func(function string, count int) rule {
		return rule{Function: function, Do: faultmodule.Crash, Count: count}
	}
	hang := rule{Function: "C_Sign", Do: faultmodule.Hang}
	return []Row{
		{Name: "kill", Failure: "a worker is killed with SIGKILL", Homes: 1, Loss: None, Fault: killed(), Says: lost + "crash", Metric: ends + `"crash"`},
		{Name: "kill-only", Failure: "the only worker is killed with SIGKILL", Homes: 1, Workers: 1, Loss: Outage, Fault: killed(), Says: lost + "crash"},
		{Name: "kill-only-2", Failure: "the same, second home", Homes: 2, Workers: 1, Loss: None, Fault: killed(), Says: lost + "crash"},
		{Name: "crash", Failure: "the module crashes in C_Sign (SIGSEGV)", Homes: 1, Loss: None, Fault: once(1, crash("C_Sign", 1)), Says: lost},
		{Name: "crash-always", Failure: "every C_Sign crashes for a while", Homes: 1, Loss: Outage, Fault: lasting(faults{Rules: []rule{crash("C_Sign", 0)}}), Says: fails, Metric: opened},
		{Name: "crash-always-2", Failure: "the same, second home", Homes: 2, Loss: None, Fault: lasting(faults{Rules: []rule{crash("C_Sign", 0)}}), Metric: failovers},
		{Name: "crash-start", Failure: "a killed worker's replacements crash in C_Initialize, twice", Homes: 1, Loss: None, Fault: killed(crash("C_Initialize", 2)), Says: "worker did not start"},
		{Name: "hang", Failure: "one C_Sign hangs", Homes: 1, Loss: InFlight, Fault: hung, Says: lost + "deadline", Metric: ends + `"deadline"`},
		{Name: "hang-2", Failure: "the same, second home", Homes: 2, Loss: None, Fault: hung, Says: lost + "deadline"},
		{Name: "hang-always", Failure: "every C_Sign hangs for a while", Homes: 1, Loss: Outage, Fault: lasting(faults{Rules: []rule{hang}}), Says: lost + "deadline"},
		{Name: "hang-always-2", Failure: "the same, second home", Homes: 2, Loss: None, Fault: lasting(faults{Rules: []rule{hang}}), Says: lost + "deadline"},
		{Name: "ha-wait-2", Failure: "an HA group does not answer, for longer than clients wait; second home", Homes: 2, Token: "deadline: 60s", Loss: None,
			Fault: learned(faults{Rules: []rule{hang}}), Metric: `keyhaven_signer_lane_hedges_won_total`},
		{Name: "slow", Failure: "each operation takes 200 ms, four at a time", Homes: 1, Loss: None, Fault: lasting(faults{Delay: 200 * time.Millisecond, Serve: 4})},
		{Name: "fork", Failure: "workers are started while others have the module loaded", Homes: 1, Workers: 4, Loss: None, Fault: killed()},
	}
}

// deviceRows are tokens that go away and come back.
func deviceRows() []Row {
	const (
		throttles = `the home throttles; fewer operations are sent at once`
		alone     = "deadline: 500ms\npriority: 1"
		noHedge   = "homes: {hedge_percentile: 0}\n"
	)
	return []Row{
		{Name: "restart", Failure: "the HSM or its daemon restarts; all handles are stale", Homes: 1, Loss: Outage, Fault: lasting(faults{Down: true}),
			Says: replaced, Metric: ends + `"device"`},
		{Name: "restart-2", Failure: "the same, second home", Homes: 2, Loss: None, Fault: lasting(faults{Down: true}), Says: replaced},
		{Name: "device-error", Failure: "CKR_DEVICE_ERROR until the module is loaded by a new process", Homes: 1, Loss: Outage, Fault: event(func(h *Home) { h.Break() }), Says: replaced},
		{Name: "device-error-2", Failure: "the same, second home", Homes: 2, Loss: None, Fault: event(func(h *Home) { h.Break() }), Says: replaced},
		{Name: "finalize", Failure: "only C_Finalize and C_Initialize bring the module back", Homes: 1, Loss: Outage, Fault: event(func(h *Home) { h.Stale() }), Says: replaced},
		{Name: "one-stale", Failure: "the same for one worker of two", Homes: 1, Loss: None, Fault: event(func(h *Home) { h.Stale(h.Counters().PIDs[0]) }), Says: replaced},
		{Name: "removed", Failure: "the token is taken out and put back", Homes: 1, Loss: Outage, Fault: lasting(faults{Hidden: true}), Says: replaced},
		{Name: "removed-2", Failure: "the same, second home", Homes: 2, Loss: None, Fault: lasting(faults{Hidden: true}), Says: replaced},
		{Name: "files-away", Failure: "the token's files are away and come back", Homes: 1, Loss: Outage, Fault: filesAway},
		{Name: "general-error", Failure: "one C_Sign fails with CKR_GENERAL_ERROR", Homes: 1, Loss: InFlight, Also: noRestart, Says: "CKR_GENERAL_ERROR",
			Fault: codes("C_Sign", generalError)},
		{Name: "general-always-2", Failure: "every C_Sign fails with CKR_GENERAL_ERROR for a while; second home", Homes: 2, Loss: None, Also: noRestart,
			Fault: lasting(faults{Rules: []rule{{Function: "C_Sign", Do: faultmodule.Return, Code: generalError}}})},
		{Name: "throttled", Failure: "the token throttles: CKR_FUNCTION_FAILED; second home of lower priority", Homes: 2, Second: alone, Config: noHedge, Loss: None,
			Fault: aloneDuring(lasting(faults{Delay: 5 * time.Millisecond, Throttle: 2})), Says: throttles, Metric: `keyhaven_signer_lane_throttled_total`},
		{Name: "throttled-active", Failure: "the same as CKR_OPERATION_ACTIVE now and then", Homes: 2, Second: alone, Config: noHedge, Loss: None,
			Fault: aloneDuring(codes("C_SignInit", operationActive, operationActive, operationActive))},
	}
}

// sessionRows are sessions and logins that are lost.
func sessionRows() []Row {
	rows := []Row{
		{Name: "idle", Failure: "the login ends when the token is idle; no keep-alive", Homes: 1, Token: "keep_alive: -1s", Loss: None,
			Before: before(faults{LoginIdle: spell / 2}), Fault: idle, Also: notKept},
		{Name: "idle-kept", Failure: "the same, with keep-alive", Homes: 1, Token: "keep_alive: 100ms", Loss: None,
			Before: before(faults{LoginIdle: spell / 2}), Fault: idle, Also: kept},
		{Name: "login-lost", Failure: "the token forgets the login", Homes: 1, Loss: None, Fault: event(func(h *Home) { h.ForgetLogin() }), Says: "logged in to token"},
		{Name: "sessions-lost", Failure: "the token drops all sessions", Homes: 1, Loss: None, Fault: event(func(h *Home) { h.DropSessions() }), Also: noRestart},
		{Name: "session-codes", Failure: "session handles and the login are refused now and then", Homes: 1, Loss: None, Also: noRestart,
			Fault: codes("C_SignInit", sessionHandleInvalid, sessionClosed, userNotLoggedIn)},
		{Name: "handle-codes", Failure: "key handles are refused now and then", Homes: 1, Loss: None, Also: noRestart, Fault: codes("C_SignInit", keyHandleInvalid, objectHandleInvalid)},
		{Name: "left-active", Failure: "a failed C_Sign leaves its operation active", Homes: 1, Loss: None, Also: noRestart,
			Fault: once(3, rule{Function: "C_Sign", Do: faultmodule.Return, Code: functionFailed, Count: 3, Leave: true})},
		{Name: "start-together", Failure: "four workers start on one token", Homes: 1, Workers: 4, Loss: None, Fault: standing(50), Also: logins(4)},
	}
	for _, n := range []struct{ workers, most int }{{1, 1}, {1, 2}, {2, 2}, {2, 5}} {
		rows = append(rows, Row{
			Name: fmt.Sprintf("sessions-%d-%d", n.workers, n.most), Failure: fmt.Sprintf("the token has no more sessions than %d; workers: %d", n.most, n.workers),
			Homes: 1, Workers: n.workers, Loss: None, Before: before(faults{MaxSessions: n.most}), Fault: standing(100), Also: atMost(n.most),
		})
	}
	return rows
}

// pinRows are PINs that the token does not take.
func pinRows() []Row {
	return []Row{
		{Name: "wrong-pin-2", Failure: "the PIN is wrong from the start; second home", Homes: 2, Loss: None, Absent: AtFirst, Before: noPIN, Fault: rightPIN, Says: pinRefused},
		{Name: "pin-refused", Failure: "the token refuses the PIN when a worker is replaced", Homes: 1, Loss: None, Fault: refusedLater, Says: pinRefused},
		{Name: "final-try-2", Failure: "the token is at its last try of the PIN; second home", Homes: 2, Loss: None, Absent: AllTheWay,
			Before: before(faults{TokenFlags: flagFinalTry}), Fault: standing(100), Also: logins(0), Says: "last try of the PIN"},
		{Name: "pin-in-log", Failure: "the module crashes in C_Login, with the PIN in memory", Homes: 1, Loss: None,
			Fault: killed(rule{Function: "C_Login", Do: faultmodule.Crash, Count: 1}), Says: "worker did not start"},
	}
}

// signatureRows are tokens that sign in odd ways.
func signatureRows() []Row {
	return []Row{
		{Name: "no-pss", Failure: "the token has no RSA-PSS, but raw RSA", Homes: 1, Scheme: tls.PSSWithSHA256, Loss: None,
			Before: before(faults{Refuse: []uint{mechanismPSS}}), Fault: standing(60)},
		{Name: "no-rsa", Failure: "the token has neither; RSA-PSS is not offered", Homes: 1, Loss: None,
			Before: before(faults{Refuse: []uint{mechanismPSS, mechanismX509}}), Fault: withoutPSS, Says: "algorithm does not fit the key"},
		{Name: "short", Failure: "ECDSA signatures with a short r or s", Homes: 1, Loss: None, Before: before(faults{ECDSA: faultmodule.ECDSAShort}),
			Fault: func(t *Trial) error {
				return t.Until("300 short signatures", func() bool { return t.Counters().Short >= 300 })
			}},
		{Name: "der-2", Failure: "the module gives ECDSA signatures in DER; second home", Homes: 2, Loss: None, Before: before(faults{ECDSA: faultmodule.ECDSADER}), Fault: standing(100), Says: "key is not used"},
	}
}
