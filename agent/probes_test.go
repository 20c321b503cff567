package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egret-project/egret/announce"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// TestOnlyTheFirstClaimOfAnAllocationWaitsForAProbe plays the agent's loop: a round whenever it is woken or something
// is due.
func TestOnlyTheFirstClaimOfAnAllocationWaitsForAProbe(t *testing.T) {
	ip := netip.MustParseAddr("10.10.0.11")
	foreign := announce.Conflict{Link: "eth0", MAC: "02:00:00:00:00:09"}
	for name, tt := range map[string]struct {
		owned, held bool          // an owner is seen before; the history knows one
		taken       time.Duration // until when another host has the IP
		broken      time.Duration // until when nothing can be asked
		noLink      bool          // it is made by the round after the question
		want        time.Duration // when it may be claimed
		asked       []time.Duration
	}{
		"never held":                            {want: 450 * time.Millisecond, asked: []time.Duration{0}},
		"the owner was seen":                    {owned: true},
		"only the history knows an owner":       {held: true},
		"the link is made for the question":     {noLink: true, want: 500 * time.Millisecond, asked: []time.Duration{50 * time.Millisecond}},
		"another host has it for a while":       {taken: 5 * time.Second, want: 7350 * time.Millisecond, asked: []time.Duration{0, 2450 * time.Millisecond, 6900 * time.Millisecond}},
		"the link cannot be asked for a moment": {broken: time.Second, want: 1900 * time.Millisecond, asked: []time.Duration{0, 1450 * time.Millisecond}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				var asked []time.Duration
				dirty := make(chan struct{}, 1)
				var made atomic.Bool
				made.Store(!tt.noLink)
				p := newProbes(&probes{
					log:    slog.New(slog.DiscardHandler),
					there:  func(string) bool { return made.Load() },
					unused: func(context.Context, netip.Addr) (bool, error) { return !tt.held, nil },
					probe: func(_ context.Context, want map[netip.Addr]string) (map[netip.Addr]announce.Conflict, error) {
						asked = append(asked, time.Since(start))
						out := map[netip.Addr]announce.Conflict{}
						if want[ip] == "eth0" && time.Since(start) < tt.taken {
							out[ip] = foreign
						}
						time.Sleep(450 * time.Millisecond)
						if time.Since(start) < tt.broken {
							return nil, errors.New("network is down")
						}
						return out, nil
					},
					wake: func() {
						select {
						case dirty <- struct{}{}:
						default:
						}
					},
				})
				ctx, stop := context.WithCancel(t.Context())
				done := make(chan error)
				go func() { done <- p.run(ctx) }()
				s := &egress.Snapshot{
					Egresses: map[string]egress.Policy{"e": {Addresses: []egress.Address{{IP: ip, ID: 7, Pool: "p"}}}},
					Owners:   map[netip.Addr]egress.Owner{},
				}
				if tt.owned {
					p.follow(&egress.Snapshot{Egresses: s.Egresses, Owners: map[netip.Addr]egress.Owner{ip: {IP: ip, Node: "node-2"}}}, time.Now())
				}
				c := plan.Claim{IP: ip, Link: "eth0"}
				reported := false
				for {
					reported = reported || p.conflicts()[ip] == foreign
					taken, next := p.follow(s, time.Now())
					if slices.Contains(p.asking(time.Now()), ip) {
						made.Store(true)
					}
					if !taken[ip] && p.clear(c, time.Now()) {
						break
					}
					var due <-chan time.Time
					if !next.IsZero() {
						due = time.After(time.Until(next))
					}
					select {
					case <-dirty:
					case <-due:
					case <-time.After(time.Minute):
						t.Fatal("the loop sleeps for ever")
					}
				}
				if reported != (tt.taken > 0) {
					t.Errorf("a conflict was reported: %t", reported)
				}
				if got := time.Since(start); got != tt.want || !slices.Equal(asked, tt.asked) {
					t.Errorf("may be claimed after %v, asked at %v, want %v, %v", got, asked, tt.want, tt.asked)
				}
				if c := p.conflicts(); len(c) > 0 {
					t.Errorf("at the end: conflicts %v", c)
				}
				// Another allocation of the address begins anew.
				anew := map[string]egress.Policy{"e": {Addresses: []egress.Address{{IP: ip, ID: 8, Pool: "p"}}}}
				p.follow(&egress.Snapshot{Egresses: anew, Owners: s.Owners}, time.Now())
				if p.clear(c, time.Now()) {
					t.Error("another allocation: claimed at once")
				}
				stop()
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
		})
	}
}
