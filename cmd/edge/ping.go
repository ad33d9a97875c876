package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/internal/cli"
)

// errNoReply makes ping and traceroute end with exit code 1 when the host has not answered; all has been said by then.
var errNoReply = errors.New("no reply from the host")

// echoFlags are those that ping and traceroute share.
type echoFlags struct {
	vnet, connector string
	size            int
	wait            time.Duration
}

func (f *echoFlags) add(cmd *cobra.Command, size int) {
	cmd.Flags().StringVar(&f.vnet, "vnet", "", "virtual network (default: the default network)")
	cmd.Flags().StringVar(&f.connector, "connector", "", "connector to go through (default: any of the route's tunnel)")
	cmd.Flags().IntVarP(&f.size, "size", "s", size, "bytes of payload, at most 65480")
	cmd.Flags().DurationVarP(&f.wait, "timeout", "W", 2*time.Second, "how long to wait for each answer, at most 10s")
	cmd.Args = cobra.ExactArgs(1)
}

func (f *echoFlags) request(host string, seq, ttl int) admin.EchoRequest {
	return admin.EchoRequest{VNet: f.vnet, Host: host, Connector: f.connector, Seq: uint16(seq), TTL: uint8(ttl), Size: f.size,
		TimeoutMS: int(f.wait / time.Millisecond)}
}

func newPing() *cobra.Command {
	var f echoFlags
	var count, ttl int
	var interval time.Duration
	cmd := &cobra.Command{
		Use:   "ping HOST",
		Short: "Ping a host behind a tunnel, through its connector",
		RunE: func(cmd *cobra.Command, args []string) error {
			if ttl < 0 || ttl > 255 {
				return cli.UsageError("--ttl is 0 to 255")
			}
			return asked(cmd, func(c *admin.Client) error {
				p := pinger{w: cmd.OutOrStdout(), host: args[0]}
				fmt.Fprintf(p.w, "PING %s: %d data bytes\n", p.host, f.size)
				err := p.run(cmd.Context(), count, interval, func(ctx context.Context, seq int) (admin.Echo, error) {
					return c.Echo(ctx, f.request(p.host, seq, ttl))
				})
				if p.sent > 0 {
					p.summary()
				}
				if err == nil && p.received == 0 {
					err = cli.Quiet(errNoReply)
				}
				return err
			})
		},
	}
	f.add(cmd, 56)
	cmd.Flags().IntVarP(&count, "count", "c", 0, "stop after so many requests; 0: go on until interrupted")
	cmd.Flags().DurationVarP(&interval, "interval", "i", time.Second, "time between two requests")
	cmd.Flags().IntVarP(&ttl, "ttl", "t", 0, "hop limit; 0: the connector's default")
	return cmd
}

// A pinger counts what comes of requests.
type pinger struct {
	w              io.Writer
	host           string
	sent, received int
	began          time.Time

	least, most, sum, squares float64 // of the round trips, in milliseconds
}

// run sends requests until ctx ends, and count of them at most if that is not zero.
func (p *pinger) run(ctx context.Context, count int, interval time.Duration, ping func(context.Context, int) (admin.Echo, error)) error {
	p.began = time.Now()
	tick := time.NewTicker(max(interval, 10*time.Millisecond))
	defer tick.Stop()
	for seq := 0; count == 0 || seq < count; seq++ {
		if seq > 0 {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return nil
			}
		}
		e, err := ping(ctx, seq)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil { // the edge has not sent it
			return err
		}
		p.sent++
		p.note(e)
	}
	return nil
}

func (p *pinger) note(e admin.Echo) {
	switch e.Type {
	case admin.EchoReply:
		ms := float64(e.RTTUS) / 1000
		p.received++
		p.sum += ms
		p.squares += ms * ms
		p.most = max(p.most, ms)
		if p.received == 1 || ms < p.least {
			p.least = ms
		}
		fmt.Fprintf(p.w, "%d bytes from %s: icmp_seq=%d ttl=%d time=%.3f ms (%.3f ms from the connector)\n",
			e.Size+8, e.From, e.Seq, e.TTL, ms, float64(e.HostRTTUS)/1000)
	case admin.EchoTimedOut:
		fmt.Fprintf(p.w, "no answer for icmp_seq=%d\n", e.Seq)
	case admin.EchoTimeExceeded:
		fmt.Fprintf(p.w, "from %s: icmp_seq=%d time to live exceeded\n", e.From, e.Seq)
	case admin.EchoUnreachable:
		fmt.Fprintf(p.w, "from %s: icmp_seq=%d %s\n", e.From, e.Seq, strings.TrimPrefix(e.Text, "tunnel: "))
	default:
		fmt.Fprintf(p.w, "icmp_seq=%d failed: %s\n", e.Seq, e.Text)
	}
}

func (p *pinger) summary() {
	lost := 0.0
	if p.sent > 0 {
		lost = 100 * float64(p.sent-p.received) / float64(p.sent)
	}
	fmt.Fprintf(p.w, "\n--- %s ping statistics ---\n%d packets transmitted, %d received, %.4g%% packet loss, time %dms\n",
		p.host, p.sent, p.received, lost, time.Since(p.began).Milliseconds())
	if p.received > 0 {
		mean := p.sum / float64(p.received)
		deviation := math.Sqrt(max(p.squares/float64(p.received)-mean*mean, 0))
		fmt.Fprintf(p.w, "rtt min/avg/max/mdev = %.3f/%.3f/%.3f/%.3f ms\n", p.least, mean, p.most, deviation)
	}
}
