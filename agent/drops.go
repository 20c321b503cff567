package agent

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/egret-project/egret/check"
	"github.com/egret-project/egret/egress"
)

const (
	// dropsEvery is how often it is looked what the guard dropped. The kernel remembers that by itself, and tells
	// nobody: a look takes a tenth of a millisecond, and no flood of packets makes it more.
	dropsEvery = 5 * time.Second
	// dropsAge is for how long the guard has to drop packets of an IP before that is reported: a moment of it belongs to
	// every take-over.
	dropsAge = 2 * dropsEvery
)

// drops knows of which egress IPs the guard drops packets for longer than a change of owner takes.
type drops struct {
	log *slog.Logger
	// by id, how long ago the last packet was dropped; without what is long past
	look func() (map[egress.ID]time.Duration, error)
	// causes returns, for one look, what returns the IP of an id and why its packets are dropped; ok is false where that
	// is as it should be.
	causes func() func(egress.ID) (ip netip.Addr, why string, ok bool)
	wake   func()

	since map[egress.ID]time.Time // since when; belongs to run

	mu       sync.Mutex // guards reported
	reported map[netip.Addr]string
}

// why returns the IPs whose packets are dropped, with the reason.
func (d *drops) why() map[netip.Addr]string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.reported)
}

// run looks again and again, until ctx ends.
func (d *drops) run(ctx context.Context) error {
	for sleep(ctx, dropsEvery) {
		last, err := d.look()
		if err != nil {
			continue // while tables are damaged or missing: a round says so
		}
		if d.note(time.Now(), last) {
			d.wake()
		}
	}
	return nil
}

// note takes in what the guard dropped, and reports whether there is something to report, or no more.
func (d *drops) note(now time.Time, last map[egress.ID]time.Duration) bool {
	since, reported, cause := map[egress.ID]time.Time{}, map[netip.Addr]string{}, d.causes()
	for id, ago := range last {
		if since[id] = d.since[id]; since[id].IsZero() {
			since[id] = now.Add(-ago)
		}
		if now.Add(-ago).Sub(since[id]) < dropsAge {
			continue
		}
		if ip, why, ok := cause(id); ok {
			reported[ip] = why
		}
	}
	d.since = since
	d.mu.Lock()
	defer d.mu.Unlock()
	if maps.Equal(reported, d.reported) {
		return false
	}
	for ip, why := range reported {
		if d.reported[ip] == "" {
			d.log.Warn("packets of an egress IP are dropped", "egress_ip", ip, "why", why)
		}
	}
	for ip := range d.reported {
		if reported[ip] == "" {
			d.log.Info("packets of an egress IP are not dropped any more", "egress_ip", ip)
		}
	}
	d.reported = reported
	return true
}

// causes returns what returns the IP of an id, and what makes the guard drop its packets on this node: they have another
// source when they are about to leave, be it for a gateway elsewhere, or they leave by another way than the overlay
// where the IP is not in service here. The kernel is asked once for all ids.
func (a *agent) causes() func(egress.ID) (ip netip.Addr, why string, ok bool) {
	s := a.view.Snapshot()
	ips := sync.OnceValue(func() map[egress.ID]netip.Addr {
		out := map[egress.ID]netip.Addr{}
		for _, e := range s.Egresses {
			for _, addr := range e.Addresses {
				out[addr.ID] = addr.IP
			}
		}
		return out
	})
	translating := sync.OnceValue(func() string {
		return blame(check.NATAhead, "%s translates them first: give it a priority above %d", egress.TranslatePriority, "")
	})
	routing := sync.OnceValue(func() string {
		return blame(check.RulesAhead, "%s has them routed before Egret's: give it a priority above %d", egress.MaxPriority,
			"egret check, run there, lists ip rules that come before Egret's")
	})
	return func(id egress.ID) (ip netip.Addr, why string, ok bool) {
		if s == nil {
			return ip, "", false
		}
		ip = ips()[id]
		owner := s.Owners[ip].Node
		if !ip.IsValid() || owner == "" || owner == a.Node && !a.machine.lasts(ip) {
			return ip, "", false // said elsewhere, or as it should be
		}
		if owner == a.Node || translating() != "" {
			return ip, "its packets have another source when they are about to leave, and are dropped: " +
				cmp.Or(translating(), "egret check, run there, lists chains that come before Egret's"), true
		}
		return ip, "its packets are about to leave here and not by the overlay, and are dropped: " + routing(), true
	}
}

// blame names whom look finds, and otherwise says what to do.
func blame(look func() ([]string, error), format string, priority int, otherwise string) string {
	if found, err := look(); err == nil && len(found) > 0 {
		return fmt.Sprintf(format, strings.Join(found, ", "), priority)
	}
	return otherwise
}
