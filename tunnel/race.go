package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"
)

// A dialer makes a carrier and registers over it. register is called for one carrier at a time, and never again once it has
// succeeded.
type dialer struct {
	DialConfig
	tls      *tls.Config
	register func(ctx context.Context, car carrier) error
}

// connectFunc makes a carrier that is not registered. shut frees what is below it, after its close.
type connectFunc func(ctx context.Context) (car carrier, shut func(), err error)

// dial returns how to free what is below the carrier that was registered.
func (d *dialer) dial(ctx context.Context) (shut func(), err error) {
	turn := make(chan struct{}, 1)
	switch d.Carrier {
	case CarrierQUIC:
		return d.attempt(ctx, CarrierQUIC, d.dialQUIC, turn)
	case CarrierTCP:
		return d.attempt(ctx, CarrierTCP, d.dialTCP, turn)
	case "":
		return d.race(ctx, turn)
	}
	return nil, fmt.Errorf("carrier %q is not known: use %q, %q, or none for both", d.Carrier, CarrierQUIC, CarrierTCP)
}

// race tries QUIC, and TCP when QUIC has failed or has not registered after RaceDelay.
func (d *dialer) race(ctx context.Context, turn chan struct{}) (func(), error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		shut func()
		err  error
	}
	results := make(chan result, 2)
	start := func(kind Carrier, connect connectFunc) {
		go func() {
			shut, err := d.attempt(ctx, kind, connect, turn)
			results <- result{shut, err}
		}()
	}
	start(CarrierQUIC, d.dialQUIC)
	timer := time.NewTimer(d.RaceDelay)
	defer timer.Stop()
	var won result
	var errs []error
	running, tcp := 1, false
	for running > 0 {
		select {
		case r := <-results:
			running--
			if r.err == nil {
				won = r
			} else if won.shut == nil {
				errs = append(errs, r.err)
			}
			if r.err == nil || decisive(r.err) {
				cancel() // the other's end is waited for
				tcp = true
			}
		case <-timer.C:
		}
		if !tcp && ctx.Err() == nil {
			tcp = true
			running++
			start(CarrierTCP, d.dialTCP)
		}
	}
	if won.shut != nil {
		return won.shut, nil
	}
	return nil, joinCarrierErrors(errs)
}

// decisive reports whether the edge has answered, so that another carrier would get the same answer, or may have taken a
// token.
func decisive(err error) bool {
	_, refused := errors.AsType[*RefusedError](err)
	_, joined := errors.AsType[*joinError](err)
	return refused || joined
}

// joinCarrierErrors leaves out what a decisive answer made end.
func joinCarrierErrors(errs []error) error {
	for _, err := range errs {
		if decisive(err) {
			return err
		}
	}
	return errors.Join(errs...)
}

// attempt makes one carrier and registers over it when it has its turn.
func (d *dialer) attempt(ctx context.Context, kind Carrier, connect connectFunc, turn chan struct{}) (func(), error) {
	car, shut, err := connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", kind, err)
	}
	select {
	case turn <- struct{}{}:
		if err = context.Cause(ctx); err == nil {
			err = d.register(ctx, car)
		}
		if err == nil {
			return shut, nil
		}
		if !decisive(err) { // else there is no turn after this one
			<-turn
		}
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	car.close(CloseRefused)
	shut()
	return nil, fmt.Errorf("%s: %w", kind, err)
}
